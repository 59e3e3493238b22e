"""From a record to one row of a batch: the choice of a caption, and the rows of every stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.data import ops
from unclip_jax.data.degrade import bsr_light, low_resolution
from unclip_jax.data.record import Record, label_of
from unclip_jax.data.text_states import padded
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.data.tokenizers import AnyTokenizer
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
    image = _cropped(ops.decode_image(record.image), rng, size, crop_scale, training)
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
    texts = _embedded_captions(record, chosen, tokenizer, text_tokenizer)
    return {"image_embed": record.embeds["image_embed"], **texts}


def _embedded_captions(
    record: Record, chosen: int, tokenizer: ClipTokenizer, text_tokenizer: ClipTokenizer | None
) -> dict[str, np.ndarray]:
    row = _caption_row(record.captions[chosen], tokenizer, text_tokenizer)
    embeds = record.embeds
    added, removed = (), ()
    if text_tokenizer is not None:
        added, removed = ("text_embed",), ("clip_tokens", "clip_token_mask")
    elif "text_states" in embeds:
        added, removed = ("text_embed", "text_states"), ("clip_tokens",)
    texts = {name: np.float32(values[chosen]) for name, values in embeds.items() if name in added}
    return texts | {name: array for name, array in row.items() if name not in removed}


def _caption_number(record: Record, rng: np.random.Generator | None, training: bool) -> int:
    if training:
        return choose_caption(record, rng)
    if not record.captions:
        raise InputError("the record has no caption")
    return 0


def _caption_row(
    caption: str, tokenizer: ClipTokenizer | None, text_tokenizer: AnyTokenizer | None
) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in caption_arrays([caption], tokenizer, text_tokenizer).items()}


def decoder_example(
    record: Record,
    rng: np.random.Generator,
    *,
    tokenizer: ClipTokenizer,
    size: int,
    clip_size: int,
    crop_scale: float = 1.0,
    training: bool = True,
    text_tokenizer: ClipTokenizer | None = None,
    inpaint: bool = False,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image for the decoder, the same image for CLIP, and a caption.

    A record with embeddings gives those in place of CLIP's image. They are of the centred square, so that
    square is the decoder's image too.

    Args:
      record, rng, tokenizer, crop_scale, training, text_tokenizer: as in `clip_example`.
      size: the side of the decoder's image in pixels.
      clip_size: the side of CLIP's image in pixels.
      inpaint: whether the row says which part of the image is known.

    Returns:
      `image` (size, size, 3) and `clip_image` (clip_size, clip_size, 3) of the same crop, in [-1, 1];
      `clip_tokens` and `clip_token_mask` (L,); with `text_tokenizer` `tokens` and `token_mask` (L',); with
      `inpaint` `known` (size, size, 1) bool.

    For a record with embeddings, the same with `image_embed` in place of `clip_image`, and the captions as
    `clip_example` gives them.

    Raises `ValueError` if the record has no caption, its image cannot be decoded, or it has embeddings and
    `crop_scale` is below 1.
    """
    image, embedded = ops.decode_image(record.image), record.embeds is not None
    if embedded and crop_scale < 1:
        raise InputError(
            f"data.crop_scale={crop_scale} crops at random, and embeddings are of the centred square: "
            "set it to 1, or train without embeddings"
        )
    if training and not embedded:
        image = ops.random_crop(image, int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0))), rng)
    else:
        image = ops.center_crop_square(image)
    chosen = _caption_number(record, rng, training)
    if embedded:
        row = {"image_embed": record.embeds["image_embed"]}
        row |= _embedded_captions(record, chosen, tokenizer, text_tokenizer)
    else:
        row = {"clip_image": ops.to_float(ops.resize(image, clip_size))}
        row |= _caption_row(record.captions[chosen], tokenizer, text_tokenizer)
    known = {"known": ops.random_mask(size, rng)} if inpaint else {}
    return {"image": ops.to_float(ops.resize(image, size)), **row, **known}


def latent_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    tokenizer: ClipTokenizer | None,
    size: int,
    crop_scale: float = 1.0,
    training: bool = True,
    inpaint: bool = False,
    classes: Sequence[str] = (),
    label: str = "caption",
    stored: str = "latents",
    degradation: str | None = None,
    small: int = 0,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image for the autoencoder, or its latents, and what conditions the U-Net.

    Args:
      record: an image with captions, or its latents with CLIP's embeddings (`unclip embed --latents`).
      rng, crop_scale, training: as in `clip_example`.
      tokenizer: CLIP's tokenizer; None for a network without captions.
      size: the side of the image in pixels.
      inpaint: whether the row says which part of the image is known.
      classes: the names of all classes, for a network that is conditioned on them.
      label: where a record's class comes from (`record.label_of`).
      stored: what may stand for the image: `latents`, or the `codes` (N,) int32 of `unclip embed --codes`.
      degradation: `blur` or `bsr_light`, for a network that enlarges the image's small version; None for
        others. In evaluation the small version is a clean reduction.
      small: its side.

    Returns:
      `image` (size, size, 3) in [-1, 1], or `latents` (h, w, Z), not scaled; with a tokenizer the caption, as
      `clip_example` gives it; with `inpaint` `known` (size, size, 1) bool; with classes `label` () int32;
      with a degradation `low_res` (small, small, 3) in [-1, 1].

    Raises `ValueError` if the image cannot be decoded, a caption is missing, or the class is none of them.
    """
    if stored in (record.embeds or {}) and not inpaint and degradation is None:
        kind = np.int32 if stored == "codes" else np.float32
        row = {stored: np.asarray(record.embeds[stored], kind)}
    else:
        row = picture_example(record, rng, size=size, crop_scale=crop_scale, training=training)
    if tokenizer is not None:
        chosen = _caption_number(record, rng, training)
        embedded = record.embeds is not None
        row |= (
            _embedded_captions(record, chosen, tokenizer, None)
            if embedded
            else _caption_row(record.captions[chosen], tokenizer, None)
        )
    if inpaint:
        row["known"] = ops.random_mask(size, rng)
    if degradation is not None:
        row["low_res"] = _small(row["image"], small, rng, degradation, 0.5, training)
    if classes:
        name = label_of(record, label)
        if name not in classes:
            raise InputError(f"its class {name!r} ({label}) is none of the {len(classes)} of data.classes")
        row["label"] = np.int32(classes.index(name))
    return row


def captioned_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    tokenizer: AnyTokenizer | None = None,
    clip_tokenizer: ClipTokenizer | None = None,
    size: int,
    crop_scale: float = 1.0,
    training: bool = True,
    factor: int | None = None,
    crop_size: int | None = None,
    inpaint: bool = False,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image, its caption for one text encoder, and a small version.

    Args:
      record: an image with captions.
      rng, crop_scale, training: as in `clip_example`.
      tokenizer: of a text encoder that is not CLIP's. clip_tokenizer: CLIP's, in its place.
      size: the side of the image in pixels.
      factor: how many times larger the image's side is than the small one's; None for no small one.
      crop_size: in training, the side of a random crop of the image; None for the whole image.
      inpaint: whether the row says which part of the image is known.

    Returns:
      `image` (size, size, 3) in [-1, 1], `tokens` (L',) and `token_mask` (L',), or the caption as
      `clip_example` gives it with a `clip_tokenizer`; for a record with states
      `text_states` (L', W) in place of the tokens; with `factor` `low_res`
      (size / factor, size / factor, 3), a clean reduction; with `inpaint` `known` (size, size, 1) bool.

    Raises `ValueError` if the image cannot be decoded, or a caption is missing.
    """
    row = picture_example(record, rng, size=size, crop_scale=crop_scale, training=training)
    chosen = _caption_number(record, rng, training)
    if "text_states" in (record.embeds or {}):
        states, mask = padded(record.embeds["text_states"][chosen], tokenizer.length)
        row |= {"text_states": states, "token_mask": mask}
    else:
        row |= _caption_row(record.captions[chosen], clip_tokenizer, tokenizer)
    if training and crop_size is not None:
        row["image"] = ops.random_crop(row["image"], crop_size, rng)
    if factor is not None:
        row["low_res"] = np.clip(ops.resize(row["image"], len(row["image"]) // factor), -1, 1)
    if inpaint:
        row["known"] = ops.random_mask(size, rng)
    return row


def latent_embed_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    tokenizer: ClipTokenizer,
    size: int,
    clip_size: int,
    crop_scale: float = 1.0,
    training: bool = True,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image for the autoencoder and the same one for CLIP, and a caption.

    Args:
      record, rng, tokenizer, crop_scale, training: as in `clip_example`.
      size: the side of the autoencoder's image in pixels. clip_size: that of CLIP's.

    Returns:
      What `decoder_example` gives; for a record with latents, `latents` (h, w, Z), not scaled, and
      `image_embed` (D,), and the caption as `clip_example` gives it.

    Raises `ValueError` if the image cannot be decoded, or a caption is missing.
    """
    if "latents" not in (record.embeds or {}):
        return decoder_example(
            record, rng, tokenizer=tokenizer, size=size, clip_size=clip_size, crop_scale=crop_scale,
            training=training,
        )  # fmt: skip
    chosen = _caption_number(record, rng, training)
    row = {"latents": np.float32(record.embeds["latents"]), "image_embed": record.embeds["image_embed"]}
    return row | _embedded_captions(record, chosen, tokenizer, None)


def retrieval_example(
    record: Record, rng: np.random.Generator | None, *, size: int, count: int, training: bool = True
) -> dict[str, np.ndarray]:
    """One row of a batch: an image for the autoencoder, or its latents, and its nearest rows in an index.

    Args:
      record: its neighbours, and its image or its latents (`unclip embed --neighbours`).
      rng, training: as in `clip_example`. The image is always the centred square, whose neighbours they are.
      size: the side of the image in pixels.
      count: number of neighbours K.

    Returns:
      `image` (size, size, 3) in [-1, 1], or `latents` (h, w, Z), not scaled; `neighbours` float32 (K, D), the
      nearest first.

    Raises `ValueError` if the image cannot be decoded.
    """
    del training
    latents = record.embeds.get("latents")
    row = {} if latents is None else {"latents": np.float32(latents)}
    row = row or picture_example(record, rng, size=size, training=False)
    return row | {"neighbours": np.float32(record.embeds["neighbours"][:count])}


def picture_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    size: int,
    crop_scale: float = 1.0,
    training: bool = True,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image without a caption. The crops are those of `clip_example`.

    Returns:
      `image` float32 (size, size, 3) in [-1, 1].

    Raises `ValueError` if the image cannot be decoded.
    """
    image = ops.decode_image(record.image)
    return {"image": ops.to_float(_cropped(image, rng, size, crop_scale, training))}


def token_example(
    record: Record,
    rng: np.random.Generator | None,
    *,
    tokenizer: ClipTokenizer,
    size: int,
    crop_scale: float = 1.0,
    training: bool = True,
    bpe_dropout: float = 0.0,
) -> dict[str, np.ndarray]:
    """One row of a batch: an image, and a caption for a stage's own tokenizer.

    The crops and the choice of the caption are those of `clip_example`.

    Args:
      record, rng, crop_scale, training: as in `clip_example`.
      tokenizer: the stage's.
      size: the side of the image in pixels.
      bpe_dropout: the probability in [0, 1] with which training leaves out a merge of the tokenizer.

    Returns:
      `image` float32 (size, size, 3) in [-1, 1], or the `codes` (N,) int32 of `unclip embed --codes`;
      `tokens` int32 (L,) and `token_mask` bool (L,).

    Raises `ValueError` if the image cannot be decoded, or the record has no caption.
    """
    if "codes" in (record.embeds or {}):
        row = {"codes": np.asarray(record.embeds["codes"], np.int32)}
    else:
        row = picture_example(record, rng, size=size, crop_scale=crop_scale, training=training)
    caption = record.captions[_caption_number(record, rng, training)]
    tokens, mask = tokenizer([caption], bpe_dropout if training else 0.0, rng)
    return row | {"tokens": tokens[0], "token_mask": mask[0]}


def _cropped(
    image: np.ndarray, rng: np.random.Generator | None, size: int, crop_scale: float, training: bool
) -> np.ndarray:
    # A random square crop in training, and the central square otherwise, of the wanted size.
    if not training:
        return ops.resize_then_crop(image, size)
    side = int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0)))
    return ops.resize(ops.random_crop(image, side, rng), size)


def upsampler_example(
    record: Record,
    rng: np.random.Generator,
    *,
    size: int,
    crop_size: int,
    factor: int,
    degradation: str,
    blur_prob: float,
    training: bool = True,
) -> dict[str, np.ndarray]:
    """One row of a batch: a large image and its small version.

    In training the large image is a random crop, and the small one is degraded. In evaluation the large image
    is whole, and the small one is a clean reduction.

    Args:
      record: an image.
      rng: the randomness of this row.
      size: the side in pixels to which the image is resized before it is cropped.
      crop_size: the side of the crop.
      factor: how many times the large image's side is the small one's.
      degradation: `blur` (with probability `blur_prob`) or `bsr_light`.
      blur_prob: see `degradation`.
      training: see above.

    Returns:
      `image` (crop_size, crop_size, 3) and `low_res` (crop_size / factor, crop_size / factor, 3) in [-1, 1].

    Raises `ValueError` if the image cannot be decoded.
    """
    image = ops.resize_then_crop(ops.decode_image(record.image), size, rng if training else None)
    image = ops.to_float(image)
    if training:
        image = ops.random_crop(image, crop_size, rng)
    low_res = _small(image, image.shape[0] // factor, rng, degradation, blur_prob, training)
    return {"image": image, "low_res": low_res}


def _small(
    image: np.ndarray, side: int, rng: np.random.Generator, degradation: str, blur_prob: float, training: bool
) -> np.ndarray:
    # The small version of an image; degraded in training.
    if training and degradation == "bsr_light":
        return bsr_light(image, side, rng)
    return low_resolution(image, side, rng, blur_prob=blur_prob if training else 0.0)
