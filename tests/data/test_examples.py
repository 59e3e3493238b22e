"""Rows of a batch from records of images and of embeddings."""

import dataclasses
import functools

import numpy as np
import pytest

from unclip_jax.data import ops
from unclip_jax.data.examples import choose_caption, clip_example
from unclip_jax.data.record import Record
from unclip_jax.data.tokenizer import ClipTokenizer

CAPTIONS = ("a fox", " ", "a red fox")
TOKENIZER, TEXT_TOKENIZER = ClipTokenizer(16, 2048), ClipTokenizer(10, 1024)
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
PICTURE = Record("fox", IMAGE, CAPTIONS, {}, "memory")
EMBEDS = {
    "image_embed": np.arange(4, dtype=np.float32),
    "text_embed": np.arange(12, dtype=np.float32).reshape(3, 4),
    "text_states": np.arange(3 * 16 * 5, dtype=np.float16).reshape(3, 16, 5),
}
EMBEDDED = dataclasses.replace(PICTURE, image=b"", embeds=EMBEDS)

example = functools.partial(clip_example, tokenizer=TOKENIZER, size=8)
evaluated = functools.partial(example, rng=None, training=False)


def test_blank_captions_are_never_chosen():
    rng = np.random.default_rng(0)
    assert {choose_caption(PICTURE, rng) for _ in range(50)} == {0, 2}
    for captions in ((), ("", " \n")):
        with pytest.raises(ValueError, match="no caption"):
            choose_caption(dataclasses.replace(PICTURE, captions=captions), rng)


def test_an_evaluated_image_is_its_centre_with_the_first_caption():
    row = evaluated(PICTURE)
    np.testing.assert_array_equal(row["clip_image"], ops.to_float(ops.resize(IMAGE[:, 4:16], 8)))
    tokens, mask = TOKENIZER(["a fox"])
    np.testing.assert_array_equal(row["clip_tokens"], tokens[0])
    np.testing.assert_array_equal(row["clip_token_mask"], mask[0])
    assert set(row) == {"clip_image", "clip_tokens", "clip_token_mask"}
    both = evaluated(PICTURE, text_tokenizer=TEXT_TOKENIZER)
    assert both["tokens"].shape == both["token_mask"].shape == (10,) and set(both) > set(row)
    np.testing.assert_array_equal(both["tokens"], TEXT_TOKENIZER(["a fox"])[0][0])


def test_a_training_image_is_a_random_crop_of_at_least_the_scale():
    """A ramp shows the place and the size of each crop."""
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    record = dataclasses.replace(PICTURE, image=ramp)
    rows = [example(record, np.random.default_rng(seed), crop_scale=0.5) for seed in range(200)]
    columns = np.stack([ops.to_uint8(row["clip_image"])[0, :, 0].astype(float) for row in rows])
    sides = (columns[:, 6] - columns[:, 1]) / 5 * 8  # the width of 8 pixels of the result
    assert sides.min() > 45 and sides.max() < 105 and sides.min() < 60 and sides.max() > 90
    assert np.ptp(columns[:, 0]) > 25
    chosen = {row["clip_tokens"].tobytes() for row in rows}
    assert chosen == {TOKENIZER([CAPTIONS[i]])[0][0].tobytes() for i in (0, 2)}
    same = example(record, np.random.default_rng(3), crop_scale=0.5)
    assert all(same[name].tobytes() == rows[3][name].tobytes() for name in same)


@pytest.mark.parametrize(
    "text_tokenizer, stored, names",
    [
        (None, ("text_embed", "text_states"), {"text_embed", "text_states", "clip_token_mask"}),
        (None, ("text_embed",), {"clip_tokens", "clip_token_mask"}),
        (TEXT_TOKENIZER, ("text_embed", "text_states"), {"text_embed", "tokens", "token_mask"}),
        (TEXT_TOKENIZER, ("text_embed",), {"text_embed", "tokens", "token_mask"}),
    ],
)
def test_a_record_of_embeddings_holds_what_clip_would_compute(text_tokenizer, stored, names):
    embeds = {name: EMBEDS[name] for name in ("image_embed", *stored)}
    record = dataclasses.replace(EMBEDDED, embeds=embeds)
    first = evaluated(record, text_tokenizer=text_tokenizer)
    assert set(first) == {"image_embed"} | names
    np.testing.assert_array_equal(first["image_embed"], EMBEDS["image_embed"])
    rows = [example(record, np.random.default_rng(seed), text_tokenizer=text_tokenizer) for seed in range(30)]
    for name in names & set(EMBEDS):
        assert first[name].dtype == np.float32
        np.testing.assert_array_equal(first[name], EMBEDS[name][0])
        chosen = {row[name].tobytes() for row in rows}
        assert chosen == {np.float32(EMBEDS[name][i]).tobytes() for i in (0, 2)}  # never the blank caption


@pytest.mark.parametrize("record", [PICTURE, EMBEDDED])
@pytest.mark.parametrize("training", [True, False])
def test_a_record_without_captions_is_refused(record, training):
    bare = dataclasses.replace(record, captions=())
    with pytest.raises(ValueError, match="the record has no caption"):
        example(bare, np.random.default_rng(0), training=training)
