"""The shapes of the parameters of networks that read captions without CLIP, from their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from unclip_jax.checkpoint.convert import array, shapes_of
from unclip_jax.models.glide import Glide
from unclip_jax.models.imagen import Imagen, ImagenUpsampler
from unclip_jax.models.t5 import T5Encoder


def _words(length: int, masked: str) -> dict:
    return {"tokens": array(1, length, dtype=jnp.int32), masked: array(1, length, dtype=bool)}


def t5_shapes(model: Mapping[str, Any]) -> Any:
    """The parameters' shapes of a `T5Encoder` with these keyword arguments."""
    return shapes_of(T5Encoder(**model).init, **_words(4, "mask"))


def glide_shapes(model: Mapping[str, Any]) -> Any:
    """The parameters' shapes of a `Glide` with these keyword arguments."""
    side = 2 ** (len(model["unet"]["channel_mult"]) - 1)
    image, given = array(1, side, side, 3), _words(model["text"]["length"], "token_mask")
    if model.get("upsamples"):
        given["low_res"] = array(1, 1, 1, 3)
    if model.get("inpaint"):
        given |= {"known_image": image, "known": array(1, side, side, 1, dtype=bool)}
    return shapes_of(Glide(**model).init, image, array(1), **given)


def imagen_shapes(model: Mapping[str, Any], width: int, upsamples: bool) -> Any:
    """The parameters' shapes of an `Imagen` or an `ImagenUpsampler` with these keyword arguments, for text
    states of `width`."""
    side = 2 ** len(model["unet"]["channel_mult"])
    image = array(1, side, side, 3)
    given = {"text_states": array(1, 1, width), "text_mask": array(1, 1, dtype=bool)}
    if upsamples:
        given |= {"enlarged": image, "augmentation": array(1)}
    module = (ImagenUpsampler if upsamples else Imagen)(**model)
    return shapes_of(module.init, image, array(1), **given)
