"""The cascade of VQ-VAE-2: a bundle on disk, pictures by the command, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import random_params
from tests.runs import random_bundle
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.models.pixelsnail import PixelSNAIL
from unclip_jax.models.vqvae import VQVAE
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.sampling.vqvae2 import sample_stages

AUTOENCODER = {"channels": 8, "residual_channels": 4, "res_blocks": 1, "embed_dim": 4, "codes": 9}
PRIOR = {"codes": 9, "channels": 8, "kernel": 3, "blocks": 1, "res_blocks": 1, "res_channels": 6, "heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle of random weights: 4 x 4 and 2 x 2 codes, pictures of 16 pixels."""
    clip = random_bundle().parts["clip"]
    vqvae = Part(
        {"kind": "vqvae", "model": AUTOENCODER}, random_params(VQVAE(**AUTOENCODER), jnp.zeros((1, 8, 8, 3)))
    )
    parts = {"clip": clip, "vqvae": vqvae}
    frozen = {name: params_hash(part.params) for name, part in parts.items()}
    for level, side in enumerate((4, 2)):
        model = PRIOR | {
            "side": side,
            "text_dim": 16,
            "coarse_codes": None if level else 9,
            "attention": bool(level),
        }
        given = {} if level else {"coarse": jnp.zeros((1, 2, 2), jnp.int32)}
        codes, text = jnp.zeros((1, side, side), jnp.int32), jnp.zeros((1, 16))
        params = random_params(PixelSNAIL(**model), codes, text_embed=text, seed=level, **given)
        config = {"kind": "pixelsnail", "level": level, "model": model, "frozen": frozen}
        parts[f"pixelsnail_{level}"] = Part(config, params)
    sampling = {f"pixelsnail_{level}": {"guidance_scale": 2.0} for level in range(2)}
    bundle = Bundle(parts, "vqvae2", sampling, {"note": "random"})
    return save_bundle(bundle, tmp_path_factory.mktemp("vqvae2") / "bundle", np.float32)


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler(load_bundle(folder))


def test_pictures(sampler):
    """They depend on caption, seed and position, and not on the rest of the batch; the image is that of the
    codes."""
    captions = ["a red fox", "a blue heart", "x" * 10_000]
    stages = sample_stages(sampler, captions, seed=3)
    assert [codes.shape for codes in stages.codes] == [(3, 4, 4), (3, 2, 2)]
    assert stages.images[0].shape == (3, 16, 16, 3)
    again = sampler.network("vqvae").apply([jnp.asarray(c) for c in stages.codes], method="decode_codes")
    np.testing.assert_allclose(again, stages.images[0], atol=1e-4)
    alone = sample_stages(sampler, captions[1:2], seed=3, positions=[1])
    for ours, theirs in zip(alone.codes, stages.codes, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[1])
    assert not np.array_equal(stages.codes[0][0], sample_stages(sampler, captions[:1], seed=4).codes[0][0])
    images = text_to_image(sampler, captions, seed=3)
    assert images.dtype == np.uint8 and images.std() > 0


def test_damaged_weights_are_named(folder):
    bundle = load_bundle(folder)
    part = bundle.parts["pixelsnail_1"]
    part.params["logits"]["bias"] = part.params["logits"]["bias"] * np.nan
    with pytest.raises(NumericalError, match="the part 'pixelsnail_1'"):
        sample_stages(Sampler(bundle), ["a fox"])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pixelsnail_1": {"top_k": 10}}, "pixelsnail_1: top_k must be between 1 and 9, got 10"),
        ({"pixelsnail_0": {"steps": 3}}, "unknown sampling option steps"),
        ({"pixelsnail_0": {"candidates": 2}}, "candidates must be 1"),
        ({"vqvae": {"temperature": 1.0}}, "unknown part vqvae"),
    ],
)
def test_bad_options(sampler, options, words):
    with pytest.raises(InputError, match=words):
        sample_stages(sampler, ["a fox"], options=options)


def test_the_command_draws(folder, tmp_path, capsys):
    """`unclip sample` writes a grid; options of other systems are refused in one line."""
    out = tmp_path / "grid.png"
    command = ["sample", "a red fox", "--bundle", str(folder), "--out", str(out)]
    assert not main([*command, "--guidance", "3"])
    assert out.stat().st_size > 200
    capsys.readouterr()
    assert main([*command, "--steps", "3"]) == 1
    err = capsys.readouterr().err
    assert "pixelsnail_0: unknown sampling option steps" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "verb, words",
    [
        (["vary"], "has no image embedding"),
        (["interpolate", "SECOND"], "has no image embedding"),
        (["edit", "--from", "a cat", "--to", "a dog"], "cannot change a picture by its caption"),
        (["reconstruct"], "cannot draw a picture from its latents"),
        (["inpaint", "SECOND", "a fox"], "cannot draw a part of a picture anew"),
        (["img2img", "a fox"], "cannot draw from a picture"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_verbs_of_pictures_are_refused(folder, tmp_path, capsys, verb, words):
    """A system that draws codes of captions alone says so in one line, and writes nothing."""
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "picture.png")
    name, *more = [str(tmp_path / "picture.png") if word == "SECOND" else word for word in verb]
    out = tmp_path / "out.png"
    command = [name, str(tmp_path / "picture.png"), *more, "--bundle", str(folder), "--out", str(out)]
    assert main(command) == 1 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "the system vqvae2 " + words in line
