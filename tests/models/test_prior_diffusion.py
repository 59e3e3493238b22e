"""The diffusion prior: what may influence the prediction and what must not; hooks; published size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fast_key, param_count, param_shapes, random_params, struct
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.transformer import Block

B, L, D, W = 2, 5, 8, 16
TINY = dict(embed_dim=D, length=L, width=W, layers=2, heads=2)
TEXT_WIDTH = 12


def inputs(rows=B):
    """z, t and the conditioning of a batch; the last two tokens of every caption are padding."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.tile(jnp.arange(L) < L - 2, (rows, 1))
    z, text = (
        normal(rows, D),
        dict(text_embed=normal(rows, D), text_states=normal(rows, L, TEXT_WIDTH), text_mask=mask),
    )
    return z, jnp.array([3, 700]), text


@pytest.fixture(scope="module")
def params():
    z, t, text = inputs()
    return random_params(DiffusionPrior(**TINY), z, t, **text)


@functools.cache
def apply(**options):
    model = DiffusionPrior(**TINY, **options)
    return jax.jit(lambda params, z, t, text: model.apply({"params": params}, z, t, **text))


def test_padding_does_not_matter_and_captions_do(params):
    """The state of a masked token changes nothing, to the bit.

    The state of any other token, z_t, z and t all change the output.
    """
    z, t, text = inputs()
    base = apply()(params, z, t, text)
    changed = lambda name, index: text | {name: text[name].at[index].multiply(-1.0)}
    np.testing.assert_array_equal(base, apply()(params, z, t, changed("text_states", (0, L - 2))))
    for other in (
        apply()(params, z, t, changed("text_states", (0, 1))),
        apply()(params, z, t, changed("text_embed", 0)),
        apply()(params, z.at[0].multiply(-1.0), t, text),
        apply()(params, z, t.at[0].add(1), text),
        apply()(params, z, t, text | {"text_mask": text["text_mask"].at[0, 2].set(False)}),
    ):
        assert np.abs(base - other)[0].max() > 1e-3
        np.testing.assert_allclose(base[1], other[1], rtol=1e-6)  # the other row stays


def test_first_tokens_do_not_depend_on_the_noised_embedding(params):
    """After every block the text tokens and z_t are the same for all t and z.

    They can therefore be computed once. The other tokens change.
    """
    z, t, text = inputs()

    @jax.jit
    def states(z, t):
        _, seen = DiffusionPrior(**TINY).apply(
            {"params": params},
            z,
            t,
            **text,
            capture_intermediates=lambda module, _: isinstance(module, Block),
            mutable=["intermediates"],
        )
        return seen["intermediates"]["transformer"]

    before, after = states(z, t), states(-z, t + 100)
    assert sorted(before) == ["block_0", "block_1"]
    for name in before:
        a, b = before[name]["__call__"][0][0], after[name]["__call__"][0][0]
        np.testing.assert_array_equal(a[:, : L + 1], b[:, : L + 1])
        assert np.all(np.abs(a - b)[:, L + 1 :].max(-1) > 1e-4)


def test_hooks_change_nothing(params):
    """remat and an identity gather keep the parameter names and the output."""
    z, t, text = inputs()
    plain = apply()(params, z, t, text)
    gather = lambda tree: jax.tree.map(lambda leaf: leaf * 1.0, tree)
    for options in ({"remat": "full"}, {"gather": gather}):
        assert param_shapes(DiffusionPrior(**TINY, **options), z, t, **text) == jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
        )
        np.testing.assert_allclose(apply(**options)(params, z, t, text), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_text", [False, True])
def test_kept_keys_and_values_change_nothing(own_text):
    """One prefix serves any z and t, with padding masked.

    The prediction equals that of the full sequence.
    """
    z, t, text = inputs()
    options = TINY | ({"text": {"num_embeddings": 20}} if own_text else {})
    if own_text:
        tokens = jnp.asarray(np.random.default_rng(1).integers(0, 20, (B, L)))
        text = dict(text_embed=text["text_embed"], tokens=tokens, token_mask=text["text_mask"])
    model = DiffusionPrior(**options)
    p = random_params(model, z, t, **text)
    whole = jax.jit(lambda z, t: model.apply({"params": p}, z, t, **text))
    caches, allowed = jax.jit(lambda: model.apply({"params": p}, **text, method="prefill"))()
    step = jax.jit(lambda z, t: model.apply({"params": p}, z, t, caches, allowed, method="predict"))
    assert caches[0].keys.shape == (B, L + 4, 2, W // 2) and len(caches) == 2
    for scale, shift in ((1.0, 0), (-2.0, 200)):
        np.testing.assert_allclose(
            step(scale * z, t + shift), whole(scale * z, t + shift), rtol=1e-5, atol=1e-5
        )


def test_dropout_only_when_not_deterministic(params):
    """Deterministic calls ignore the rate; other calls differ between keys."""
    z, t, text = inputs()
    model = DiffusionPrior(**TINY, dropout=0.5)
    np.testing.assert_allclose(apply(dropout=0.5)(params, z, t, text), apply()(params, z, t, text), rtol=1e-6)
    noisy = jax.jit(
        lambda key: model.apply({"params": params}, z, t, **text, deterministic=False, rngs={"dropout": key})
    )
    assert not np.allclose(noisy(fast_key(0)), noisy(fast_key(1)))


def test_half_precision_answers_in_float32(params):
    """bfloat16 inside, float32 outside, near the float32 answer."""
    z, t, text = inputs()
    half, full = apply(dtype=jnp.bfloat16)(params, z, t, text), apply()(params, z, t, text)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_another_length_is_an_error():
    """The message gives both lengths."""
    z, t, text = inputs()
    with pytest.raises(ValueError, match="built for 4 text states, got 5"):
        param_shapes(DiffusionPrior(**TINY | {"length": 4}), z, t, **text)


def test_size_of_the_public_prior():
    """Karlo's prior has 1,022,030,080 parameters with its clip_mean and clip_std (768 each).

    Here those two belong to the embedding space. The query and position embeddings are parameters in both.
    """
    model = DiffusionPrior(embed_dim=768, length=77, width=2048, layers=20, heads=32)
    text = dict(
        text_embed=struct(1, 768), text_states=struct(1, 77, 768), text_mask=struct(1, 77, dtype=bool)
    )
    shapes = param_shapes(model, struct(1, 768), struct(1), **text)
    assert param_count(shapes) == 1_022_030_080 - 2 * 768
    assert shapes["query"].shape == (2048,) and shapes["position_embedding"].shape == (81, 2048)
