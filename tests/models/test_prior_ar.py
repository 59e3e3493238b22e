"""The autoregressive prior: its codec's bounds, causality, and cached sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from unclip_jax.models.codec import Codec, cosine, dequantize, project, quantize, unproject
from unclip_jax.models.prior_ar import ARPrior, dot_token
from unclip_jax.train.codec import explained, principal_components

B, N, L, D, BUCKETS, BINS = 3, 5, 4, 8, 7, 4
MODEL = ARPrior(codes=N, buckets=BUCKETS, dot_bins=BINS, length=L, width=16, layers=2, heads=2)
RNG = np.random.default_rng(0)
CODES, DOT = RNG.integers(0, BUCKETS, (B, N)).astype(np.int32), np.array([0, 3, 1], np.int32)
TEXT = {
    "text_embed": RNG.normal(size=(B, D)).astype(np.float32),
    "text_states": RNG.normal(size=(B, L, 6)).astype(np.float32),
    "text_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool),
}


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, CODES, DOT, **TEXT)


apply = jax.jit(lambda params, codes, dot, text: MODEL.apply({"params": params}, codes, dot, **text))


# ------------------------------------------------------------------------------------------------------ codec
@pytest.fixture(scope="module")
def fitted():
    """Correlated embeddings (400, D) and their codec."""
    z = RNG.normal(size=(400, D)) @ RNG.normal(size=(D, D)) * np.linspace(2, 0.1, D) + 3
    mean, values, components = principal_components(len(z), z.sum(0), z.T @ z)
    y = (z - mean) @ components.T
    return z.astype(np.float32), Codec(
        *(np.float32(a) for a in (mean, components, values, y.min(0), y.max(0)))
    )


def test_principal_components(fitted):
    """They agree with the SVD of the centred data."""
    z, codec = fitted
    _, singular, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(codec.eigenvalues, singular**2 / len(z), rtol=1e-3)
    y = np.asarray(project(codec, z, D))
    np.testing.assert_allclose(
        np.cov(y.T, bias=True), np.diag(codec.eigenvalues), atol=1e-3 * codec.eigenvalues[0]
    )
    assert explained(codec.eigenvalues, D) == 1.0 and 0 < explained(codec.eigenvalues, 1) < explained(
        codec.eigenvalues, 2
    )


def test_all_components_return_the_embedding(fitted):
    """The squared error of the first k components is the variance in the rest."""
    z, codec = fitted
    np.testing.assert_allclose(unproject(codec, project(codec, z, D)), z, rtol=1e-3, atol=1e-3)
    for k in (1, 4, 7):
        error = np.mean(np.sum((np.asarray(unproject(codec, project(codec, z, k))) - z) ** 2, axis=1))
        np.testing.assert_allclose(
            error / np.sum(codec.eigenvalues), 1 - explained(codec.eigenvalues, k), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("buckets", [2, 128, 1024])
def test_codec_round_trip_is_within_half_a_bucket(fitted, buckets):
    """The bound holds for everything inside the extremes, and so for all fitted rows.

    Values outside go to the nearest bucket.
    """
    z, codec = fitted
    y = np.asarray(project(codec, z, 6))
    codes = quantize(codec, y, buckets)
    assert codes.dtype == jnp.int32 and codes.min() >= 0 and codes.max() < buckets
    half = (codec.high - codec.low)[:6] / buckets / 2
    assert np.all(np.abs(dequantize(codec, codes, buckets) - y) <= half * 1.001 + 1e-4)
    np.testing.assert_array_equal(quantize(codec, dequantize(codec, codes, buckets), buckets), codes)
    far = quantize(codec, np.stack([y[0] - 1e3, y[0] + 1e3]), buckets)
    np.testing.assert_array_equal(far, [[0] * 6, [buckets - 1] * 6])


def test_dot_token():
    """The bin of the cosine, whatever the norms."""
    edges = np.array([-0.5, 0.0, 0.5], np.float32)
    a = np.array([[1.0, 0.0]] * 4)
    b = np.array([[-1.0, 0.1], [-1.0, 3.0], [1.0, 2.0], [5.0, 0.0]])
    np.testing.assert_array_equal(dot_token(edges, a, b), [0, 1, 2, 3])
    np.testing.assert_array_equal(dot_token(edges, 7 * a, b), [0, 1, 2, 3])
    np.testing.assert_allclose(cosine(a, 2 * a), 1.0)


# ------------------------------------------------------------------------------------------------------ model
def test_a_code_sees_only_what_stands_before_it(params):
    """Changing code n changes only the logits of later codes.

    z_t, the dot product and the caption affect all logits.
    """
    base = apply(params, CODES, DOT, TEXT)
    assert base.shape == (B, N, BUCKETS) and base.dtype == jnp.float32
    for n in range(N):
        codes = CODES.copy()
        codes[:, n] = (codes[:, n] + 1) % BUCKETS
        moved = np.abs(apply(params, codes, DOT, TEXT) - base).max(axis=(0, 2)) > 1e-5
        np.testing.assert_array_equal(moved, np.arange(N) > n)
    for text, dot in (
        ({**TEXT, "text_embed": -TEXT["text_embed"]}, DOT),
        ({**TEXT, "text_states": -TEXT["text_states"]}, DOT),
        (TEXT, 3 - DOT),
    ):
        assert np.all(np.abs(apply(params, CODES, dot, text) - base).max(axis=2) > 1e-4)


def test_masked_text_is_not_seen(params):
    """Masked states do not matter; other states do."""
    states = TEXT["text_states"] + 5.0 * ~TEXT["text_mask"][..., None]
    np.testing.assert_allclose(
        apply(params, CODES, DOT, {**TEXT, "text_states": np.float32(states)}),
        apply(params, CODES, DOT, TEXT),
        atol=1e-5,
    )


def test_cached_logits_are_the_models(params):
    """Code by code with cached keys and values, the logits equal those of one full pass."""
    conditioning = {k: v for k, v in TEXT.items()}
    logits, caches = MODEL.apply({"params": params}, DOT, **conditioning, method="prefill")
    steps = [logits]
    extend = jax.jit(
        lambda code, n, caches: MODEL.apply(
            {"params": params}, code, n, caches, text_mask=TEXT["text_mask"], method="extend"
        )
    )
    for n in range(N - 1):
        logits, caches = extend(CODES[:, n], n, caches)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, axis=1), apply(params, CODES, DOT, TEXT), rtol=1e-4, atol=1e-5)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="5 codes and 4 text states, got 3 and 4"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), CODES[:, :3], DOT, **TEXT))
