"""DDIM inversion in latents: round trips, changes of the caption, and the commands that use it."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests.checkpoint import peers
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, mean_latents
from unclip_jax.sampling.edits import latent_inversion
from unclip_jax.sampling.edits.inversion import Latents
from unclip_jax.sampling.programs import Sampler

IMAGES = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
STEPS = 50
CAPTIONS = ["a red fox", "two cats"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny Stable Diffusion whose U-Net predicts a small v, and whose latents are not scaled, so that few
    steps invert it."""
    folder = tmp_path_factory.mktemp("sd") / "sd"
    peers.stable_diffusion(folder, version=2, prediction="v_prediction")
    found = load_bundle(folder)
    latent = found.parts["latent"]
    params = latent.params | {"conv_out": jax.tree.map(lambda a: 0.5 * a, latent.params["conv_out"])}
    autoencoder = found.parts["autoencoder"]
    changed = {
        "latent": dataclasses.replace(latent, params=params),
        "autoencoder": dataclasses.replace(autoencoder, config=autoencoder.config | {"scale_factor": 1.0}),
    }
    return dataclasses.replace(found, parts=found.parts | changed)


@pytest.fixture(scope="module")
def sampler(bundle):
    return Sampler(bundle)


def test_decoding_reconstructs(sampler):
    """Decoding x_T gives what the autoencoder keeps. Another caption or another x_T gives another picture."""
    shared = {"steps": STEPS, "captions": CAPTIONS}
    found = latent_inversion.encode(sampler, IMAGES, **shared)
    assert found.z_image is None and found.x_T.shape == (2, 8, 8, 4)
    (drawn,) = latent_inversion.decode(sampler, found, **shared)
    autoencoder = sampler.networks["autoencoder"]
    kept = jax.jit(lambda x: decode_latents(autoencoder, mean_latents(autoencoder, x)))(ops.to_float(IMAGES))
    error = np.sqrt(np.mean((drawn - kept) ** 2))
    other = latent_inversion.decode(sampler, found, steps=STEPS, captions=CAPTIONS[::-1])[0]
    noise = latent_inversion.decode(sampler, Latents(None, found.x_T[::-1]), **shared)[0]
    for changed in (other, noise):
        assert np.sqrt(np.mean((changed - kept) ** 2)) > 4 * error < 0.2
    half = latent_inversion.decode(sampler, found, targets=CAPTIONS[::-1], theta=[0.0, 1.0], **shared)[0]
    np.testing.assert_allclose(half[0], drawn[0], atol=1e-4)
    np.testing.assert_allclose(half[1], other[1], atol=1e-4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: latent_inversion.encode(s, []), "no images"),
        (lambda s: latent_inversion.encode(s, IMAGES, captions=["a"]), "one caption per image, got 1 and 2"),
        (
            lambda s: latent_inversion.encode(s, IMAGES, steps=0),
            "from 1 to 1000 steps|number of steps from 1",
        ),
        (
            lambda s: latent_inversion.encode(s, IMAGES, guidance_scale=[1.0]),
            "one guidance scale, or one per",
        ),
        (lambda s: latent_inversion.decode(s, Latents(None, np.zeros((1, 3, 8, 4)))), "x_T must be"),
        (lambda s: latent_inversion.text_diff(s, IMAGES[0], "a", "a"), "captions are the same"),
        (lambda s: latent_inversion.text_diff(s, IMAGES[0], "a", "b", count=1), "at least 2 images"),
        (lambda s: latent_inversion.text_diff(s, IMAGES[0], "a", "b", max_theta=0), "max_theta must be in"),
    ],
)
def test_refused(sampler, monkeypatch, call, words):
    """Before any network runs."""
    monkeypatch.setattr(Sampler, "in_batches", None)
    with pytest.raises(InputError, match=words):
        call(sampler)


def test_commands(bundle, tmp_path, monkeypatch, capsys):
    """`edit` and `reconstruct` of a bundle without image embeddings."""
    monkeypatch.chdir(tmp_path)
    save_bundle(bundle, tmp_path / "sd", np.float32)
    Image.fromarray(IMAGES[0]).save("a.png")
    steps = ["--bundle", "sd", "--steps", str(STEPS)]
    assert main(["edit", "a.png", "--from", "a", "--to", "two cats", "--count", "2", *steps]) == 0
    assert main(["reconstruct", "a.png", "--caption", "a", "--out", "r.png", *steps]) == 0
    assert (tmp_path / "grid.png").exists() and (tmp_path / "r.png").exists()
    capsys.readouterr()
    for argv, words in (
        (["reconstruct", "a.png", "--dims", "2"], "--dims is for bundles with image embeddings"),
        (["edit", "a.png", "--from", "a", "--to", "a"], "the two captions are the same"),
    ):
        assert main([*argv, *steps]) == 1
        assert words in capsys.readouterr().err
