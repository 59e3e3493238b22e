"""Normalisations of CLIP embeddings: ranges, round trips and errors."""

import numpy as np
import pytest

from unclip_jax.diffusion.embedding_space import KINDS, EmbeddingSpace, denormalize, normalize

D = 16


@pytest.fixture(scope="module")
def z():
    """Raw embeddings (64, D): not centred, with a different scale in each dimension."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(64, D)) * np.linspace(0.5, 2, D) + np.linspace(-1, 1, D)).astype(np.float32)


def space_of(kind, z):
    """A space of every kind; scale 17.2 as in the paper."""
    if kind == "whitened":
        return EmbeddingSpace(kind, mean=z.mean(0), std=z.std(0))
    return EmbeddingSpace(kind, scale=17.2 if kind == "scaled" else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, z):
    """The round trip restores embeddings, up to the norm where the space loses it.

    Points of the space come back unchanged.
    """
    space = space_of(kind, z)
    inside = normalize(space, z)
    expected = z / np.linalg.norm(z, axis=-1, keepdims=True) if kind in ("unit", "scaled") else z
    np.testing.assert_allclose(denormalize(space, inside), expected, atol=1e-5)
    np.testing.assert_allclose(normalize(space, denormalize(space, inside)), inside, atol=2e-5)


def test_what_the_spaces_look_like(z):
    """`unit` has norm 1, `scaled` norm k, `whitened` mean 0 and deviation 1 in every dimension."""
    np.testing.assert_allclose(np.linalg.norm(normalize(space_of("unit", z), z), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(normalize(space_of("scaled", z), z), axis=-1), 17.2, rtol=1e-5)
    white = np.asarray(normalize(space_of("whitened", z), z))
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(white.std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(normalize(space_of("raw", z), z), z)


def test_zero_embedding_stays_finite():
    """A zero vector has no direction; it stays zero instead of becoming NaN."""
    np.testing.assert_array_equal(normalize(EmbeddingSpace("unit"), np.zeros((1, D), np.float32)), 0)


@pytest.mark.parametrize("function", [normalize, denormalize])
def test_unknown_space(function, z):
    """Both directions name the choices."""
    with pytest.raises(ValueError, match="'spherical'.*raw, unit, scaled, whitened"):
        function(EmbeddingSpace("spherical"), z)
