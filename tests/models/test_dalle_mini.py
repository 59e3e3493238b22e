"""The network of dalle-mini: exact sizes, what a code sees, and drawing with caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import param_count, param_shapes, random_params, struct
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import TokenSamplingOptions
from unclip_jax.generate.tokens import sample_tokens
from unclip_jax.models.autoencoder import VQAutoencoder
from unclip_jax.models.dalle_mini import DalleMini

SMALL = {"width": 16, "layers": 1, "decoder_layers": 2, "heads": 2, "hidden": 24, "length": 5}
SMALL |= {"vocab_size": 30, "codes": 9, "rows": 12, "side": 3}
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 30, (2, 5)), jnp.int32)
MASK = jnp.array([[True] * 3 + [False] * 2, [True] * 5])
CODES = jnp.asarray(RNG.integers(0, 9, (2, 9)), jnp.int32)
# The published sizes: width, layers, hidden, rows of both tables, parameters.
SIZES = {
    "mega": (2048, 24, 4096, 50272, 16416, 2_587_521_024),
    "mini": (1024, 12, 2730, 50264, 16385, 437_833_712),
}


@functools.cache
def made():
    """A small network with random weights, and its compiled logits."""
    model = DalleMini(**SMALL)
    params = random_params(model, TOKENS, MASK, CODES)
    return model, params, jax.jit(lambda *given: model.apply({"params": params}, *given))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """Every parameter, also by a sum of its own."""
    width, layers, hidden, words, rows, count = SIZES[name]
    model = DalleMini(
        width, layers, layers, heads=width // 64, hidden=hidden, vocab_size=words, rows=rows
    )  # fmt: skip
    ids = lambda length: struct(2, length, dtype=jnp.int32)
    found = param_count(param_shapes(model, ids(64), struct(2, 64, dtype=bool), ids(256)))
    mlp = 3 * width * hidden + width + hidden
    encoder = 4 * width**2 + 3 * width + mlp
    decoder = 8 * width**2 + 6 * width + mlp
    tables = (words + 64 + rows + 256 + rows) * width
    assert found == layers * (encoder + decoder) + tables + 2 * (2 * width + width) == count


def test_the_vqgan_has_the_published_size():
    """The configuration of taming-transformers: f = 16, 16,384 codes."""
    model = VQAutoencoder(256, 128, (1, 1, 2, 2, 4), 2, (4,), codes=16384, unit_range=True)
    assert model.factor == 16
    assert param_count(param_shapes(model, struct(1, 16, 16, 3))) == 76_073_859


def test_a_code_sees_the_text_and_what_is_before_it():
    _, _, logits = made()
    plain = logits(TOKENS, MASK, CODES)
    assert plain.shape == (2, 9, 9)
    changed = np.abs(logits(TOKENS, MASK, CODES.at[0, 4].add(1) % 9) - plain).max(-1)
    assert np.all(changed[0, :5] < 1e-6) and np.all(changed[0, 5:] > 1e-5) and np.all(changed[1] < 1e-6)
    changed = np.abs(logits(TOKENS.at[0, 1].add(1), MASK, CODES) - plain).max(-1)
    assert np.all(changed[0] > 1e-5) and np.all(changed[1] < 1e-6)
    changed = np.abs(logits(TOKENS.at[0, 4].add(1), MASK, CODES) - plain).max(-1)  # behind the mask
    assert np.all(changed < 1e-6)


@pytest.mark.parametrize("scale, kept", [(1.0, 0), (3.0, 1)])
def test_caches_give_the_logits_of_the_whole_network(scale, kept):
    """At temperature 0 each code is the most probable one under the codes before it, also behind rows that
    are kept; guidance moves the logits away from those of the other caption."""
    model, params, logits = made()
    other, others = TOKENS[::-1], MASK[::-1]
    captions = {"tokens": TOKENS, "token_mask": MASK}
    empty = {"tokens": other, "token_mask": others}
    options = TokenSamplingOptions(guidance_scale=scale, temperature=0)
    known = CODES[:, : 3 * kept].reshape(2, kept, 3) if kept else None
    draw = jax.jit(lambda p, key: sample_tokens(Network(model, p, {}), captions, empty, key, options, known))
    codes, finite = draw(params, jax.random.split(jax.random.key(0), 2))
    assert codes.shape == (2, 3, 3) and bool(finite.all())
    codes, start = codes.reshape(2, 9), 3 * kept
    np.testing.assert_array_equal(codes[:, :start], CODES[:, :start])
    free = logits(other, others, codes)
    whole = free + scale * (logits(TOKENS, MASK, codes) - free)
    chosen = np.take_along_axis(np.asarray(whole), np.asarray(codes)[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen[:, start:], whole.max(-1)[:, start:], atol=1e-4)
    assert len(np.unique(codes[:, start:])) > 1


def test_bad_sizes():
    with pytest.raises(InputError, match="not a multiple of heads 3"):
        param_shapes(DalleMini(**SMALL | {"heads": 3}), TOKENS, MASK, CODES)
    with pytest.raises(InputError, match="rows=9 must be more than the 9 codes"):
        param_shapes(DalleMini(**SMALL | {"rows": 9}), TOKENS, MASK, CODES)
    with pytest.raises(InputError, match="reads 5 text tokens, got 4"):
        param_shapes(DalleMini(**SMALL), TOKENS[:, :4], MASK[:, :4], CODES)
