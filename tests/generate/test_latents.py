"""Decoding in tiles, and the latents of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from unclip_jax.generate.latents import (
    _starts,
    decode_latents,
    decode_tiled,
    encode_latents,
    inpainting_inputs,
)
from unclip_jax.generate.networks import Network
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.unet import upsample

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
VAE = dict(latent_channels=4, channels=8, channel_mult=(1, 2), res_blocks=1, groups=4)


@pytest.fixture(scope="module")
def autoencoder():
    model = KLAutoencoder(**VAE)
    params = random_params(model, jnp.zeros((1, 8, 8, 3)))
    return Network(model, params, {"kind": "kl_autoencoder", "model": VAE, "scale_factor": 0.5})


def local_decoder(factor):
    """A decoder that sees one latent to each side."""
    kernel = normal(3, 3, 4, 3)
    blur = lambda z: jax.lax.conv_general_dilated(
        z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    doublings = int(np.log2(factor))

    def decode(z):
        out = blur(z)
        for _ in range(doublings):
            out = upsample(out)
        return out

    return decode


@pytest.mark.parametrize("size, tile", [((16, 24), 8), ((8, 19), 8), ((9, 9), 8), ((21, 13), 12)])
def test_tiles_equal_the_whole_inside(size, tile):
    """Away from the edges of tiles the picture is the whole one to 1e-5; at the seams it lies between
    tiles."""
    factor, z = 2, normal(2, *size, 4)
    decode = local_decoder(factor)
    whole, tiled = decode(z), jax.jit(lambda z: decode_tiled(decode, z, tile, factor))(z)
    assert tiled.shape == whole.shape == (2, 2 * size[0], 2 * size[1], 3)
    inside = np.ones(size, bool)
    for axis, length in enumerate(size):
        for start in _starts(length, min(tile, length), max(tile // 4, 1)):
            for edge in (start, start + tile - 1):  # what lies at a tile's edge misses its neighbours
                if 0 < edge < length - 1:
                    np.moveaxis(inside, axis, 0)[edge] = False
    inside = np.kron(inside, np.ones((factor, factor))).astype(bool)
    assert 0.3 < inside.mean() < 1
    np.testing.assert_allclose(tiled[:, inside], whole[:, inside], atol=1e-5)
    seams = np.abs(tiled - whole)[:, ~inside]
    assert 0 < seams.max() < np.abs(whole).max()


def test_tiles_of_a_decoder_without_neighbours_are_exact():
    """Weights add up to one everywhere."""
    z = normal(1, 13, 22, 4)
    np.testing.assert_allclose(decode_tiled(upsample, z, 8, 2), upsample(z), atol=1e-6)


def test_a_small_picture_is_one_tile(autoencoder):
    z = normal(1, 6, 5, 4)
    whole, tiled = decode_latents(autoencoder, z), decode_latents(autoencoder, z, 8)
    np.testing.assert_array_equal(whole, tiled)
    assert np.abs(whole).max() <= 1


def test_latents_of_a_batch(autoencoder):
    """They are the Gaussian's, scaled; given ones are scaled alone. The mask is 1 where the image is
    unknown."""
    image = jnp.clip(normal(2, 8, 8, 3), -1, 1)
    moments = autoencoder.apply(image, method="encode")
    encode = jax.jit(lambda key: encode_latents(autoencoder, {"image": image}, key))
    drawn = jnp.stack([encode(jax.random.key(i)) for i in range(64)])
    spread = 0.5 * np.exp(0.5 * np.asarray(moments.logvar))
    np.testing.assert_array_less(np.abs(drawn.mean(0) - 0.5 * moments.mean), 5 * spread / np.sqrt(64) + 1e-4)
    given = encode_latents(autoencoder, {"latents": moments.mean}, jax.random.key(0))
    np.testing.assert_allclose(given, 0.5 * moments.mean, rtol=1e-6)
    known = jnp.ones((2, 8, 8, 1), bool).at[:, :4].set(False)
    beside = inpainting_inputs(autoencoder, image, known)
    assert beside.shape == (2, 4, 4, 5)
    np.testing.assert_array_equal(beside[:, :2, :, 0], 1)
    np.testing.assert_array_equal(beside[:, 2:, :, 0], 0)
    other = inpainting_inputs(autoencoder, image.at[:, :4].set(0.7), known)
    np.testing.assert_array_equal(beside, other)  # unknown pixels are not seen
