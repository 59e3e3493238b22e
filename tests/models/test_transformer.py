"""The transformer stack: initialisation, causality, dropout, hooks and published size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fast_key, param_count, param_shapes, random_params, struct
from unclip_jax.models.transformer import Attention, Transformer, causal_mask
from unclip_jax.run.hardware import flops

L, W = 6, 16
TINY = dict(layers=2, heads=2, mlp_ratio=2.0)


@pytest.fixture(scope="module")
def setup():
    """Inputs (2, L, W) and parameters."""
    x = jax.random.normal(jax.random.key(0), (2, L, W))
    return x, random_params(Transformer(**TINY), x)


@functools.cache
def apply(**options):
    model = Transformer(**TINY, **options)
    return jax.jit(lambda params, x: model.apply({"params": params}, x, causal_mask(L)))


def test_causality(setup):
    """A change at position 3 leaves positions 0..2 unchanged, to the bit, and changes 3..5."""
    x, params = setup
    before, after = apply()(params, x), apply()(params, x.at[:, 3].multiply(-1.0))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.abs(before - after)[:, 3:].max(-1) > 1e-3)


def test_causal_mask():
    """Position i sees 0..i."""
    np.testing.assert_array_equal(causal_mask(4)[0, 0], np.tril(np.ones((4, 4), bool)))


def test_hooks_change_nothing(setup):
    """remat by any policy and an identity gather keep the parameter names and the output."""
    x, params = setup
    plain = apply()(params, x)
    gather = lambda tree: jax.tree.map(lambda leaf: leaf * 1.0, tree)
    policies = ({"remat": "dots_saveable"}, {"remat": "dots_with_no_batch_dims_saveable"})
    for options in ({"remat": "full"}, {"gather": gather, "remat": "full"}, *policies):
        assert jax.tree.structure(
            param_shapes(Transformer(**TINY, **options), struct(2, L, W))
        ) == jax.tree.structure(params)
        np.testing.assert_allclose(apply(**options)(params, x), plain, rtol=1e-5, atol=1e-6)


def test_dropout_only_when_not_deterministic(setup):
    """Deterministic calls need no key and ignore the rate; other calls differ between keys."""
    x, params = setup
    model = Transformer(**TINY, dropout=0.5)
    np.testing.assert_array_equal(apply(dropout=0.5)(params, x), apply()(params, x))
    noisy = jax.jit(lambda key: model.apply({"params": params}, x, None, False, rngs={"dropout": key}))
    assert not np.allclose(noisy(fast_key(0)), noisy(fast_key(1)))


def test_initialisation_is_clips():
    """The standard deviations are those of Radford et al. 2021.

    W^-1/2, for residual projections further times (2 layers)^-1/2, and (2 W)^-1/2 for the first MLP layer.
    """
    width, layers = 128, 2
    block = Transformer(layers=layers, heads=2).init(fast_key(), jnp.zeros((1, 2, width)))["params"][
        "block_1"
    ]
    std = lambda *path: np.std(functools.reduce(lambda tree, key: tree[key], path, block)["kernel"])
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(std("attn", name), width**-0.5, rtol=0.03)
    np.testing.assert_allclose(std("attn", "out"), (width * 2 * layers) ** -0.5, rtol=0.03)
    np.testing.assert_allclose(std("fc2"), (width * 2 * layers) ** -0.5, rtol=0.03)
    np.testing.assert_allclose(std("fc1"), (2 * width) ** -0.5, rtol=0.03)


def test_heads_must_divide_the_width():
    """The message names the width and the heads."""
    with pytest.raises(ValueError, match="16 is not a multiple of heads 3"):
        jax.eval_shape(lambda: Attention(3, 1.0).init(jax.random.key(0), jnp.zeros((1, 2, 16)), None))


def test_size_of_the_papers_blocks():
    """24 blocks of width 2048."""
    assert param_count(param_shapes(Transformer(layers=24, heads=32), struct(1, 4, 2048))) == 1_208_598_528


SAME = {"gather": lambda params: jax.tree.map(lambda p: p * 1.0, params)}


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, SAME], ids=["plain", "remat", "gather"])
def test_blocks_in_one_loop(setup, options):
    """A scanned stack gives the same output and gradient, also with masks and contexts.

    The parameters and their names are the same.
    """
    x, params = setup
    loss = lambda scan: jax.jit(
        jax.value_and_grad(
            lambda params: jnp.sum(
                Transformer(**TINY, scan=scan, **options).apply({"params": params}, x, causal_mask(L)) ** 2
            )
        )
    )
    (one, one_grad), (other, other_grad) = loss(False)(params), loss(True)(params)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one_grad, other_grad)
    fresh = param_shapes(Transformer(**TINY, scan=True, **options), x)
    assert jax.tree.structure(fresh) == jax.tree.structure(params)


def test_a_loop_does_not_grow_with_depth(setup):
    """A scanned stack has as many equations at any depth, apart from the stacking.

    Dropout differs between layers.
    """
    x, _ = setup

    def equations(layers, scan):
        model = Transformer(layers=layers, heads=2, scan=scan)
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, x))(param_shapes(model, x)).jaxpr
        return sum(e.primitive.name in ("dot_general", "tanh", "erf", "exp") for e in jaxpr.eqns), len(
            jaxpr.eqns
        )

    assert (
        equations(2, True)[0] == equations(8, True)[0] == 0
        and equations(8, False)[0] == 4 * equations(2, False)[0] > 0
    )
    model = Transformer(layers=2, heads=2, scan=True, dropout=0.5)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), param_shapes(model, x))
    draw = lambda seed: model.apply(
        {"params": params}, x, None, False, rngs={"dropout": jax.random.key(seed)}
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.abs(draw(0) - draw(1)).max() > 1e-3


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_computed_again(setup, scan):
    """By the policy's name, the backward pass recomputes everything, attention only, or nothing."""
    x, params = setup

    def operations(remat):
        model = Transformer(**TINY, scan=scan, remat=remat)
        return flops(
            jax.make_jaxpr(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)))(params)
        )

    none, full = operations("none"), operations("full")
    dots, parameters = operations("dots_saveable"), operations("dots_with_no_batch_dims_saveable")
    assert none == dots < parameters < full < 1.4 * none
    with pytest.raises(
        ValueError, match="unknown remat 'some'; choose none, full, dots_saveable or dots_with"
    ):
        operations("some")
