"""Convolutions with fewer products equal the ordinary convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.models import winograd
from unclip_jax.models.winograd import conv3x3

NUMBERS = ("NHWC", "HWIO", "NHWC")


def inputs(b, h, w, channels, out):
    rng = np.random.default_rng(0)
    return jnp.float32(rng.normal(size=(b, h, w, channels))), jnp.float32(
        rng.normal(size=(3, 3, channels, out)) / np.sqrt(9 * channels)
    )


def exact(x, kernel):
    """The correlation in float64."""
    x, kernel = np.float64(x), np.float64(kernel)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


SHAPES = {  # B, H, W, C_in, C_out, and what it is made of
    "tiles": ((4, 16, 16, 192, 200), "16 products"),
    "oblong": ((1, 64, 16, 192, 192), "16 products"),
    "patches": ((2, 8, 8, 192, 192), "1 product"),
    "groups of images": ((6, 64, 64, 192, 192), "loop"),
    "bands of rows": ((1, 256, 128, 192, 192), "loop"),
    "odd sides": ((13, 7, 9, 192, 192), "convolution"),
    "odd patches": ((3, 7, 9, 192, 192), "1 product"),
    "few channels": ((2, 32, 32, 3, 192), "convolution"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_correlation(name):
    shape, way = SHAPES[name]
    x, kernel = inputs(*shape)
    program = str(jax.make_jaxpr(lambda x, k: conv3x3(x, k, dimension_numbers=NUMBERS))(x, kernel))
    products = {1: "1 product", 16: "16 products"}.get(program.count("dot_general"))
    made = "convolution" if "conv_general_dilated" in program else "loop" if "scan" in program else products
    assert made == way
    ours = jax.jit(lambda x, k: conv3x3(x, k, dimension_numbers=NUMBERS))(x, kernel)
    assert ours.shape == (*x.shape[:3], kernel.shape[3])
    np.testing.assert_allclose(ours, exact(x, kernel), atol=2e-5)


def test_small_blocks(monkeypatch):
    """Groups and bands together, of every size."""
    for tiles in (16, 64, 600):
        monkeypatch.setattr(winograd, "MAX_TILES", tiles)
        x, kernel = inputs(4, 16, 32, 192, 192)
        np.testing.assert_allclose(conv3x3(x, kernel), exact(x, kernel), atol=2e-5)


def test_gradients_are_those_of_the_convolution():
    x, kernel = inputs(4, 16, 16, 192, 192)
    weights = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    direct = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS
    )
    gradient = lambda conv: jax.grad(lambda x, k: jnp.sum(conv(x, k) * weights), (0, 1))(x, kernel)
    ours, theirs = gradient(conv3x3), gradient(direct)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
