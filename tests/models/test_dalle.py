"""DALL-E's transformer: masks by definition, blocks against the dense mask, caches, the loss, the size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import param_count, param_shapes, random_params, struct
from tests.runs import ROOT
from unclip_jax.cli.train import load_config, override
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import TokenSamplingOptions
from unclip_jax.generate.tokens import choose, sample_tokens
from unclip_jax.models.dalle import DALLE, KINDS, attend_image, dense_mask, layer_kinds
from unclip_jax.models.layers import attend
from unclip_jax.run.resume import config_json
from unclip_jax.train import dalle

SMALL = {
    "width": 16,
    "layers": 4,
    "heads": 2,
    "length": 5,
    "vocab_size": 30,
    "codes": 9,
    "side": 4,
    "window": 3,
}
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 30, (2, 5)), jnp.int32)
MASK = jnp.array([[True] * 3 + [False] * 2, [True] * 5])
CODES = jnp.asarray(RNG.integers(0, 9, (2, 16)), jnp.int32)


@functools.cache
def made():
    """A small transformer with random weights."""
    model = DALLE(**SMALL)
    return model, random_params(model, TOKENS, MASK, CODES)


# ------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text, side, window", [(6, 4, 3), (1, 5, 5), (3, 3, 11)])
def test_masks_are_their_definition(kind, text, side, window):
    """Position by position, by rows and columns of the image."""
    mask = dense_mask(kind, text, side, window)
    assert mask.shape == (text + side**2,) * 2
    half = window // 2
    for position in range(len(mask)):
        for seen in range(len(mask)):
            if position < text:
                expected = seen <= position
            elif seen < text:
                expected = True
            else:
                (row, column), (above, beside) = divmod(position - text, side), divmod(seen - text, side)
                back = position - seen
                if kind == "full":
                    expected = back >= 0
                elif kind == "row":  # from itself to the code above
                    expected = 0 <= back <= side
                elif kind == "column":
                    expected = column == beside and above <= row
                else:  # a window that wraps around at the edges
                    expected = back >= 0 and any(
                        back == i * side + j for i in range(half + 1) for j in range(-half, half + 1)
                    )
            assert mask[position, seen] == expected, (position, seen)


def test_the_order_of_the_layers():
    kinds = layer_kinds(64)
    assert len(kinds) == 64 and kinds[-1] == "conv"
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 64, 4))
    assert kinds.count("row") == 63 - 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text, side, window", [(6, 4, 3), (1, 5, 5), (3, 3, 11)])
def test_blocks_equal_the_dense_mask(kind, text, side, window):
    q, k, v = (jnp.asarray(RNG.normal(size=(2, text + side**2, 2, 3)), jnp.float32) for _ in range(3))
    expected = attend(q, k, v, jnp.asarray(dense_mask(kind, text, side, window))[None, None])
    found = attend_image(q, k, v, kind, text, side, window)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ------------------------------------------------------------------------------------ the transformer
def test_dense_and_blocked_transformers_are_one():
    model, params = made()
    apply = lambda model: jax.jit(model.apply)({"params": params}, TOKENS, MASK, CODES)
    for ours, dense in zip(apply(model), apply(model.clone(dense=True)), strict=True):
        np.testing.assert_allclose(ours, dense, atol=1e-4)
    words, image = apply(model)
    assert words.shape == (2, 5, 35) and image.shape == (2, 16, 9)


def test_a_token_sees_what_is_before_it():
    """A change of one token or code changes the logits of those behind it, and of none before it."""
    model, params = made()
    apply = jax.jit(lambda tokens, mask, codes: model.apply({"params": params}, tokens, mask, codes))
    words, image = apply(TOKENS, MASK, CODES)
    changed, behind = apply(TOKENS, MASK, CODES.at[0, 5].add(1) % 9)
    np.testing.assert_array_equal(changed, words)
    np.testing.assert_allclose(behind[0, :6], image[0, :6], atol=1e-6)
    assert np.all(np.abs(behind[0, 6:10] - image[0, 6:10]).max(-1) > 1e-5)
    changed, behind = apply(TOKENS.at[1, 2].set(29), MASK, CODES)
    np.testing.assert_allclose(changed[1, :3], words[1, :3], atol=1e-6)
    assert np.all(np.abs(behind[1] - image[1]).max(-1) > 1e-5)
    # Behind the mask, a token is its position's own padding.
    same, _ = apply(TOKENS.at[0, 3].set(7), MASK, CODES)
    np.testing.assert_array_equal(same, words)
    ids = model.apply({"params": params}, TOKENS, MASK, method="text_ids")
    np.testing.assert_array_equal(ids[0, 3:], [33, 34])


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_drawing_with_caches_equals_drawing_without(scale):
    model, params = made()
    network = Network(model, params, {})
    captions = {"tokens": TOKENS, "token_mask": MASK}
    empty = {"tokens": jnp.zeros((1, 5), jnp.int32), "token_mask": jnp.zeros((1, 5), bool)}
    options = TokenSamplingOptions(guidance_scale=scale)
    keys = jax.random.split(jax.random.key(0), 2)
    codes, finite = jax.jit(lambda keys: sample_tokens(network, captions, empty, keys, options))(keys)
    assert codes.shape == (2, 4, 4) and finite.all()
    flat = codes.reshape(2, -1)
    logits = jax.jit(network.apply)(TOKENS, MASK, flat)[1]
    if scale != 1:
        blank = [jnp.broadcast_to(empty[name], (2, 5)) for name in ("tokens", "token_mask")]
        logits = jnp.concatenate([logits, jax.jit(network.apply)(*blank, flat)[1]])
    for n in range(16):
        expected, _ = choose(logits[:, n], fold_in(keys, n), options)
        np.testing.assert_array_equal(flat[:, n], expected)
    assert len(np.unique(codes)) > 4


def test_known_rows_stay_and_the_rest_is_what_follows_them():
    """Codes behind given rows are drawn from the logits that the whole network has behind these rows."""
    model, params = made()
    network = Network(model, params, {})
    captions = {"tokens": TOKENS, "token_mask": MASK}
    empty = {"tokens": jnp.zeros((1, 5), jnp.int32), "token_mask": jnp.zeros((1, 5), bool)}
    options = TokenSamplingOptions(guidance_scale=1.5)
    keys = jax.random.split(jax.random.key(1), 2)
    draw = jax.jit(lambda known: sample_tokens(network, captions, empty, keys, options, known)[0])
    drawn = draw(None)
    np.testing.assert_array_equal(draw(drawn[:, :2]), drawn)  # its own upper rows draw a picture again
    known = (CODES.reshape(2, 4, 4)[:, :2] + 1) % 9
    codes = draw(known)
    np.testing.assert_array_equal(codes[:, :2], known)
    flat, apply = codes.reshape(2, -1), jax.jit(network.apply)
    blank = [jnp.broadcast_to(empty[name], (2, 5)) for name in ("tokens", "token_mask")]
    logits = jnp.concatenate([apply(TOKENS, MASK, flat)[1], apply(*blank, flat)[1]])
    for n in range(8, 16):
        np.testing.assert_array_equal(flat[:, n], choose(logits[:, n], fold_in(keys, n), options)[0])


def nats(logits, ids):
    """The mean cross-entropy of logits (..., V) for ids (...)."""
    log_prob = np.asarray(jax.nn.log_softmax(logits))
    return -np.mean(np.take_along_axis(log_prob, ids[..., None], -1))


def test_the_loss_is_an_eighth_of_text():
    """1/8 of the mean over text tokens, paddings among them, and 7/8 of the mean over codes."""
    model, params = made()
    encode = lambda frozen, batch: CODES
    batch = {"image": jnp.zeros((2, 8, 8, 3)), "tokens": TOKENS, "token_mask": MASK}
    empty = {"tokens": jnp.full((1, 5), 3), "token_mask": jnp.arange(5)[None] < 2}
    loss_of = functools.partial(dalle.loss_fn, frozen={"dvae": {}}, model=model, encode=encode, empty=empty)
    for drop, tokens, mask in ((0.0, TOKENS, MASK), (1.0, jnp.full((2, 5), 3), jnp.arange(5)[None] < 2)):
        loss, metrics = jax.jit(functools.partial(loss_of, drop_text=drop))(params, jax.random.key(0), batch)
        words, image = model.apply({"params": params}, tokens, jnp.broadcast_to(mask, (2, 5)), CODES)
        ids = np.where(mask, tokens, 30 + np.arange(5))
        text, codes = nats(words, ids), nats(image, np.asarray(CODES))
        np.testing.assert_allclose(loss, text / 8 + 7 * codes / 8, rtol=1e-5)
        np.testing.assert_allclose([metrics["text"], metrics["image"]], [text, codes], rtol=1e-5)


# ------------------------------------------------------------------------------------ recipes
def test_the_papers_size():
    """12.3 billion: 64 layers of 12 W^2 + 13 W, the embeddings and the two outputs."""
    config = load_config(str(ROOT / "configs/dalle/dalle.py"))
    dalle.check(config)
    model = config_json(config.model) | config_json(config.tokenizer) | {"codes": 8192, "side": 32}
    text, image = struct(1, 256, dtype=jnp.int32), struct(1, 1024, dtype=jnp.int32)
    count = param_count(param_shapes(DALLE(**model), text, struct(1, 256, dtype=bool), image))
    w, words = 3968, 16384 + 256
    embeddings = (words + 1 + 8192 + 257 + 32 + 32) * w
    assert count == 64 * (12 * w**2 + 13 * w) + embeddings + 2 * w + (w + 1) * (words + 8192)
    assert count == 12_293_857_024


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model.window": 4}, "model.window=4 must be odd"),
        ({"model.heads": 3}, "model.width=32 must be a multiple of model.heads=3"),
        ({"tokenizer.vocab_size": 100}, "tokenizer.vocab_size must be a whole number in"),
        ({"drop_text": 2.0}, "drop_text must be a number in"),
        ({"bpe_dropout": -0.1}, "bpe_dropout must be a number in"),
    ],
)
def test_refused_settings(settings, words):
    config = load_config(str(ROOT / "configs/dalle/dalle.py:tiny"))
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match=words):
        dalle.check(config)
