"""Attention, time embedding, normalisation and the block hooks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.models.layers import ACTIVATIONS, LayerNorm, TimeMLP, attend, timestep_embedding, with_hooks


def test_attention_against_loops():
    """Softmax(q k / sqrt D) v, one query and head at a time."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 2, 4)), rng.normal(size=(2, 5, 2, 4)), rng.normal(size=(2, 5, 2, 4))
    mask = rng.random((2, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    out = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(mask))
    for b in range(2):
        for i in range(3):
            for head in range(2):
                allowed = mask[b, 0, i]
                scores = np.exp(k[b, allowed, head] @ q[b, i, head] / math.sqrt(4))
                np.testing.assert_allclose(
                    out[b, i, head], scores @ v[b, allowed, head] / scores.sum(), rtol=1e-5
                )


def test_attention_in_half_precision_keeps_its_softmax():
    """bfloat16 inputs give a bfloat16 output near the float32 one, even over many keys."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 512, 1, 8)) for i in range(3))
    half = attend(*(a.astype(jnp.bfloat16) for a in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attend(q, k, v), atol=0.03)


def test_fused_attention_is_asked_for_on_gpus(monkeypatch):
    """Half precision calls it, with equivalent arguments.

    Our own attention runs where it rejects the shapes, and on other platforms.
    """
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, 2, 8), jnp.bfloat16) for i, n in enumerate((4, 6, 6))
    )
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 1, 1, 6)).at[..., 0].set(True)
    expected, asked, original = attend(q, k, v, mask), [], jax.nn.dot_product_attention
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def cudnn(*args, implementation, **settings):
        assert implementation == "cudnn"
        asked.append(settings)
        return original(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    ours = attend(q, k, v, mask)
    assert asked[0]["mask"].shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(ours, expected)  # this is no GPU
    fused = original(q, k, v, implementation="xla", mask=jnp.broadcast_to(mask, (2, 1, 4, 6)))
    np.testing.assert_allclose(fused.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)

    # Odd lengths get a query and a key more, which change nothing.
    def as_on_gpu(*args, cuda, default):
        return cuda(*args)

    with monkeypatch.context() as patched:
        patched.setattr(jax.lax, "platform_dependent", as_on_gpu)
        for odd, allowed in (((q[:, :3], k, v), mask), ((q, k[:, :5], v[:, :5]), None)):
            got = jax.vjp(lambda *args, allowed=allowed: attend(*args, allowed), *odd)
            assert asked[-1]["mask"] is None or all(n % 2 == 0 for n in asked[-1]["mask"].shape[2:])
            patched.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: default(*args))
            wanted = jax.vjp(lambda *args, allowed=allowed: attend(*args, allowed), *odd)
            patched.setattr(jax.lax, "platform_dependent", as_on_gpu)
            pairs = zip((got[0], *got[1](got[0])), (wanted[0], *wanted[1](got[0])))
            for a, b in pairs:
                assert a.shape == b.shape
                np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.06)

    def refuses(*args, **settings):
        raise NotImplementedError("the heads are too wide")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuses)
    np.testing.assert_array_equal(attend(q, k, v, mask), expected)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **settings: pytest.fail("asked in float32")
    )
    attend(*(a.astype(jnp.float32) for a in (q, k, v)), mask)


def test_timestep_embedding_by_hand():
    """Cosines first, periods from 2 pi to 10,000 x 2 pi exclusive."""
    out = np.asarray(timestep_embedding(jnp.array([0, 3]), 8))
    np.testing.assert_array_equal(out[0], [1, 1, 1, 1, 0, 0, 0, 0])
    angles = [3 * 10_000 ** (-i / 4) for i in range(4)]
    np.testing.assert_allclose(out[1], [*map(math.cos, angles), *map(math.sin, angles)], rtol=1e-5, atol=1e-7)


def test_timestep_embedding_tells_all_steps_apart():
    """The nearest neighbours among 1000 steps are the adjacent ones."""
    out = np.asarray(timestep_embedding(jnp.arange(1000), 64))
    distance = np.linalg.norm(out[:, None] - out[None], axis=-1) + 1e3 * np.eye(1000)
    assert np.all(np.abs(distance.argmin(1) - np.arange(1000)) == 1)
    assert distance.min() > 0.1


def test_activations():
    """The exact GELU and OpenAI's approximation differ, and neither is jax's tanh approximation."""
    x = jnp.linspace(-4, 4, 41)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x)])
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, atol=1e-6)
    np.testing.assert_allclose(
        ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * np.asarray(x))), atol=1e-6
    )
    assert 0.01 < np.abs(ACTIVATIONS["quick_gelu"](x) - exact).max() < 0.03


def test_layer_norm_of_a_large_offset():
    """float32 statistics withstand a mean that is a thousand times the deviation.

    bfloat16 input keeps its type.
    """
    x = 1000 + jax.random.normal(jax.random.key(0), (4, 256))
    out = LayerNorm().apply({"params": {"norm": {"scale": jnp.ones(256), "bias": jnp.zeros(256)}}}, x)
    np.testing.assert_allclose(np.mean(out, -1), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(out, -1), 1, atol=1e-2)


def test_time_mlp_follows_the_dtype():
    """(B,) -> (B, width) in the compute dtype; parameters stay float32."""
    model = TimeMLP(8, 12, jnp.bfloat16)
    out, variables = model.init_with_output(jax.random.key(0), jnp.array([1, 2, 3]))
    assert out.shape == (3, 12) and out.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


class Affine(nn.Module):
    @nn.compact
    def __call__(self, x, negate: bool):
        y = nn.Dense(3, name="dense")(x)
        return -y if negate else y


class Stack(nn.Module):
    gather: object = None
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        block = with_hooks(self, Affine, self.gather, self.remat, static_argnums=(2,))
        return block(name="b")(block(name="a")(x, True), False)


@pytest.mark.parametrize("remat", ["none", "full", "dots_saveable"])
def test_hooks_keep_names_and_gather_every_block(remat):
    """The gather hook sees each block's parameters once per call.

    The block uses the hook's result.
    """
    x = jnp.arange(6.0).reshape(2, 3)
    params = Stack().init(jax.random.key(0), x)["params"]
    seen = []

    def doubling(tree):
        seen.append(jax.tree.map(jnp.shape, tree))
        return jax.tree.map(lambda leaf: 2 * leaf, tree)

    hooked_stack = Stack(gather=doubling, remat=remat)
    assert jax.tree.structure(hooked_stack.init(jax.random.key(0), x)["params"]) == jax.tree.structure(params)
    seen.clear()
    out = hooked_stack.apply({"params": params}, x)
    assert len(seen) == 2 and all(
        jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, tuple)) for tree in seen
    )
    np.testing.assert_allclose(
        out, Stack().apply({"params": jax.tree.map(lambda leaf: 2 * leaf, params)}, x), rtol=1e-6
    )
    gradient = jax.grad(lambda p, model: model.apply({"params": p}, x).sum())
    plain = gradient(jax.tree.map(lambda leaf: 2 * leaf, params), Stack())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5), gradient(params, hooked_stack), plain
    )
