"""From a record to one row of a batch: the choice of a caption, and the row for CLIP and the priors."""

from __future__ import annotations

import numpy as np

from unclip_jax.data import ops
from unclip_jax.data.record import Record
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.errors import InputError


def choose_caption(record: Record, rng: np.random.Generator) -> int:
    """The number of one of the record's captions that are not blank, each equally likely.

    Raises `ValueError` if the record has no such caption.
    """
    captions = [i for i, caption in enumerate(record.captions) if caption.strip()]
    if not captions:
        raise InputError("the record has no caption")
    return captions[int(rng.integers(len(captions)))]


def clip_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    tokenizer: ClipTokenizer,
    size: int,
    crop_scale: float = 1.0,
    training: bool = True,
    text_tokenizer: ClipTokenizer | None = None,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image and a caption for CLIP.

    In training the image is a random square crop and the caption is a random one. In evaluation the image is
    the central square and the caption is the first.

    Args:
      record: an image with captions, or its embeddings.
      rng: the randomness of this row; not used in evaluation, where it may be None.
      tokenizer: CLIP's tokenizer, for captions of L tokens.
      size: the side of the image in pixels.
      crop_scale: the smallest side of a random crop, as a fraction of the shorter side of the image.
      training: whether to crop and choose at random.
      text_tokenizer: the tokenizer of a stage that has its own text encoder, for captions of L' tokens.

    Returns:
      For an image:
        - `clip_image` float32 (size, size, 3) in [-1, 1];
        - `clip_tokens` int32 (L,) and `clip_token_mask` bool (L,);
        - with a `text_tokenizer` also `tokens` int32 (L',) and `token_mask` bool (L',).
      For a record of embeddings the same, but:
        - `image_embed` float32 (D,) in place of `clip_image`;
        - with a `text_tokenizer`: `text_embed` float32 (D,) in place of `clip_tokens` and `clip_token_mask`;
        - else, if the record has text states: `text_embed` float32 (D,) and `text_states` float32 (L, W) in
          place of `clip_tokens`.

    Raises `ValueError` if the image is damaged or the record has no caption.
    """
    if record.embeds is not None:
        return _embedded_example(record, rng, tokenizer, training, text_tokenizer)
    image = ops.decode_image(record.image)
    if training:
        side = int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0)))
        image = ops.resize(ops.random_crop(image, side, rng), size)
    else:
        image = ops.resize_then_crop(image, size)
    caption = record.captions[_caption_number(record, rng, training)]
    return {"clip_image": ops.to_float(image), **_caption_row(caption, tokenizer, text_tokenizer)}


def _embedded_example(
    record: Record,
    rng: np.random.Generator | None,
    tokenizer: ClipTokenizer,
    training: bool,
    text_tokenizer: ClipTokenizer | None,
) -> dict[str, np.ndarray]:
    chosen = _caption_number(record, rng, training)
    row = _caption_row(record.captions[chosen], tokenizer, text_tokenizer)
    embeds = record.embeds
    added, removed = (), ()
    if text_tokenizer is not None:
        added, removed = ("text_embed",), ("clip_tokens", "clip_token_mask")
    elif "text_states" in embeds:
        added, removed = ("text_embed", "text_states"), ("clip_tokens",)
    texts = {name: np.float32(values[chosen]) for name, values in embeds.items() if name in added}
    row = texts | {name: array for name, array in row.items() if name not in removed}
    return {"image_embed": embeds["image_embed"], **row}


def _caption_number(record: Record, rng: np.random.Generator | None, training: bool) -> int:
    if training:
        return choose_caption(record, rng)
    if not record.captions:
        raise InputError("the record has no caption")
    return 0


def _caption_row(
    caption: str, tokenizer: ClipTokenizer, text_tokenizer: ClipTokenizer | None
) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in caption_arrays([caption], tokenizer, text_tokenizer).items()}
