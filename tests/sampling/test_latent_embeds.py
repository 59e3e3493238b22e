"""Edits in a latent system that sees z_i: an invariant for each, on a tiny bundle with random parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from tests.runs import random_bundle
from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.sampling.edits import latent_embeds
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.interpolation import interpolate
from unclip_jax.sampling.edits.inversion import Latents, square
from unclip_jax.sampling.edits.reconstruct import reconstruct
from unclip_jax.sampling.edits.text_diff import text_diff
from unclip_jax.sampling.edits.variations import fresh_variations, variations
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import prior_with_picture

VAE = dict(latent_channels=4, channels=8, channel_mult=(1, 2), res_blocks=1, groups=4)
UNET = dict(
    image_size=8, in_channels=4, out_channels=4, channels=8, channel_mult=(1,), res_blocks=1, heads=(2,),
    attention_levels=(0,), context_dim=32, vector_dim=32, groups=4,
)  # fmt: skip
STEPS = 40  # one number, so that all share the programs


@pytest.fixture(scope="module")
def sampler():
    """CLIP with both towers, whose text states are the U-Net's context, a prior and a codec."""
    parts = random_bundle().parts
    latents = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    given = {"context": jnp.zeros((1, 4, 32)), "vector": jnp.zeros((1, 32))}
    params = random_params(LatentUNet(**UNET), *latents, **given)
    params["conv_out"]["kernel"] *= 0.3  # a mild network, whose samples stay near the data
    params["vector_fc1"]["kernel"] *= 5.0  # that sees z_i well
    latent = {
        "kind": "latent",
        "model": UNET,
        "diffusion": {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"},
        "augmentation": {"schedule": "cosine", "num_steps": 1000},
        "embedding_space": {"kind": "whitened", "scale": None, "mean": [0.1] * 16, "std": [1.5] * 16},
    }
    vae = {"kind": "kl_autoencoder", "model": VAE, "scale_factor": 0.5}
    chosen = {name: parts[name] for name in ("clip", "prior_diffusion", "codec")}
    chosen["latent"] = Part(latent, params)
    chosen["autoencoder"] = Part(vae, random_params(KLAutoencoder(**VAE), jnp.zeros((1, 8, 8, 3))))
    sampling = {"latent": {"steps": 2, "sampler": "ddim", "clip": None}, "prior_diffusion": {"steps": 2}}
    return Sampler(Bundle(chosen, "stable_unclip", sampling))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(2)]


def test_a_pair_is_the_picture(sampler, images):
    """Decoding (z_i, x_T) gives the latents of the picture back, and another z_i gives another picture."""
    code = latent_embeds.encode(sampler, images, steps=STEPS)
    assert code.z_image.shape == (2, 16) and code.x_T.shape == (2, 8, 8, 4)
    drawn = latent_embeds.decode(sampler, code, steps=STEPS)[0]
    vae = sampler.network("autoencoder")
    mean = vae.apply(ops.to_float(square(images, 16)), method="encode").mean
    kept = np.clip(vae.apply(mean, method="decode"), -1, 1)
    error = lambda a, b: np.sqrt(np.mean((a - b) ** 2))
    other = latent_embeds.decode(sampler, Latents(3 * code.z_image[::-1], code.x_T), steps=STEPS)[0]
    assert error(drawn, kept) < 0.25 * error(other, kept), (error(drawn, kept), error(other, kept))


def test_the_verbs(sampler, images):
    """Each draws what it says; all share the programs of encoding and decoding."""
    first, second = images
    between = interpolate(sampler, first, second, count=2, steps=STEPS)
    ends = latent_embeds.decode(
        sampler, latent_embeds.encode(sampler, images, steps=STEPS), steps=STEPS, positions=[0, 0]
    )[0]
    assert np.abs(between.astype(int) - ops.to_uint8(ends)).max() <= 1
    turned = text_diff(sampler, first, "a cat", "a dog", count=2, steps=STEPS)
    assert np.abs(turned[0].astype(int) - between[0]).max() <= 1 and (turned[0] != turned[1]).any()
    varied = variations(sampler, [first], count=2, eta=0.0, steps=STEPS)
    assert np.abs(varied[0, 0].astype(int) - between[0]).max() <= 1
    drawn, dims = reconstruct(sampler, first, dims=[2, 16], steps=STEPS)
    assert dims == (2, 16) and (drawn[0] != drawn[1]).any()
    fresh = fresh_variations(sampler, images, count=2, options={"latent": {"noise_level": 500}})
    assert fresh.shape == (2, 2, 16, 16, 3) and (fresh[0, 0] != fresh[0, 1]).any()
    with pytest.raises(InputError, match="x_T must be of 2 latents of 8 x 8"):
        latent_embeds.decode(sampler, Latents(np.ones((2, 16)), np.zeros((2, 4, 4, 4))))
    assert coder_of(sampler).noise_shape(sampler) == (8, 8, 4)


def test_parts_of_pictures(sampler, images):
    """Inpainting keeps what is known. The prior draws z_i; without a prior it is the picture's own."""
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    shared = dict(resamples=1, options={"latent": {"guidance_scale": 1.0}})
    drawn = latent_embeds.inpaint_rows(sampler, images, [mask] * 2, ["a fox"] * 2, **shared)
    np.testing.assert_array_equal(drawn[:, :8], np.stack(images)[:, :8])
    assert (drawn[:, 8:] != np.stack(images)[:, 8:]).any()
    bundle = sampler.bundle
    assert prior_with_picture(bundle, None) == "prior_diffusion"
    parts = {name: part for name, part in bundle.parts.items() if name != "prior_diffusion"}
    assert prior_with_picture(Bundle(parts, bundle.system), None) is None
    with pytest.raises(KeyError, match="no part 'prior_diffusion'"):
        prior_with_picture(Bundle(parts, bundle.system), "prior_diffusion")
