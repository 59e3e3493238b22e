"""Upscaling in latents: what the U-Net sees, and what is refused."""

import numpy as np
import pytest

from tests.checkpoint.peers import close
from tests.runs import ROOT
from tests.train.test_latent_classes import bundle_of
from unclip_jax.cli.train import load_config, override
from unclip_jax.data import ops
from unclip_jax.data.examples import latent_example
from unclip_jax.data.sources import make_source
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, sample_latents
from unclip_jax.sampling.edits.latent_inpaint import part_of
from unclip_jax.sampling.edits.latent_upscale import upscale_rows
from unclip_jax.sampling.latent import LATENT, sample_stages
from unclip_jax.sampling.programs import Sampler, row_keys
from unclip_jax.train import latent

OPTIONS = {"latent": {"steps": 2}}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(bundle_of("tiny-sr"))


def test_pictures(sampler):
    """Each is what the U-Net draws beside it, at its own position; sides may be odd."""
    images = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3), np.uint8)
    drawn = dict(upscale_rows(sampler, images, seed=3, positions=[5, 6], options=OPTIONS))
    assert drawn[0].shape == drawn[1].shape == (14, 18, 3)
    keys = fold_in(row_keys(np.full(2, 3, np.uint32), np.array([5, 6], np.uint32)), LATENT)
    options = sampler.options(OPTIONS)["latent"]
    z = sample_latents(
        sampler.networks["latent"], None, (7, 9), keys, options, beside=ops.to_float(images), rows=2
    )
    close(
        ops.to_float(np.stack([drawn[0], drawn[1]])), decode_latents(sampler.networks["autoencoder"], z), 0.02
    )
    ((_, other),) = upscale_rows(sampler, 255 - images[:1], seed=3, positions=[5], options=OPTIONS)
    assert np.abs(other.astype(int) - drawn[0]).max() > 5


def test_refused(sampler):
    image = [np.zeros((8, 8, 3), np.uint8)]
    for call, says in (
        (lambda: upscale_rows(Sampler(bundle_of("tiny")), image), "does not enlarge pictures"),
        (lambda: upscale_rows(sampler, image, parts=["autoencoder"]), "no upsampler of the bundle"),
        (lambda: upscale_rows(sampler, image, captions=["a"]), "draws without captions"),
        (
            lambda: upscale_rows(sampler, image, options={"latent": {"height": 8}}),
            "leave height and width out",
        ),
        (lambda: sample_stages(sampler, [""]), "enlarges: it takes 7 channels"),
        (lambda: part_of(sampler.bundle, None), "which the bundle lacks"),
    ):
        with pytest.raises(InputError, match=says):
            call()


def test_rows_and_settings():
    """A row holds the small image: degraded in training, clean in evaluation."""
    record = make_source({"name": "emoji", "split": "val"}).read(0)
    config = load_config(str(ROOT / "configs/latent/latent.py:tiny-sr"))
    assert latent.enlarges(config) and config.data.degradation == "bsr_light"
    make = lambda training: latent_example(
        record, np.random.default_rng(0), tokenizer=None, size=16, training=training,
        degradation="bsr_light", small=8,
    )  # fmt: skip
    clean, degraded = make(False), make(True)
    assert clean["low_res"].shape == degraded["low_res"].shape == (8, 8, 3)
    np.testing.assert_allclose(clean["low_res"], np.clip(ops.resize(clean["image"], 8), -1, 1), atol=1e-6)
    assert np.abs(degraded["low_res"] - ops.resize(degraded["image"], 8)).max() > 0.02
    override(config, "model.in_channels", 4)
    with pytest.raises(InputError, match="data.degradation belongs to a network that enlarges"):
        latent.check(config)
