"""Masks for inpainting: which pixels of a picture are drawn anew.

Two conventions are common, and one rule reads both:

1. A mask with a transparent pixel (alpha below 255) is read by its alpha alone: alpha below 128 is drawn
   anew.
2. Any other mask is read by its luminance (Rec. 601, as in PIL's mode "L"): 128 and above is drawn anew, so
   white is.

A picture whose own transparent part is drawn anew needs no mask beside it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from unclip_jax.data import ops
from unclip_jax.errors import InputError, one_line

THRESHOLD = 128  # of 8 bits; half


def alpha(data: bytes) -> np.ndarray | None:
    """The alpha channel of an encoded picture.

    Args:
      data: a file's bytes, in any format and mode that `ops.decode_image` takes.

    Returns:
      uint8 (H, W), 0 where it is transparent, 255 where it is opaque; None when all of it is opaque.

    Raises:
      InputError: in one line, when the data cannot be decoded.
    """
    opened = ops.open_image(data)
    try:
        opened.load()
        opened = ops.upright(opened)
        if opened.mode.startswith("I"):  # 16-bit grey, of which at most one value is transparent
            key = opened.info.get("transparency")
            channel = np.where(np.asarray(opened) == (-1 if key is None else key), 0, 255).astype(np.uint8)
        elif opened.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in opened.info:
            channel = np.asarray(opened.convert("RGBA").getchannel("A"), np.uint8)
        else:
            return None
    # PIL's decoders raise OSError, SyntaxError, struct.error and others for a damaged file.
    except Exception as error:
        raise InputError(f"cannot decode image: {one_line(error)}") from error
    return channel if (channel < 255).any() else None


def redrawn_by_alpha(data: bytes) -> np.ndarray:
    """What of a picture its own alpha channel says is to be drawn anew.

    Args:
      data: as for `alpha`.

    Returns:
      bool (H, W), True where the picture is drawn anew: alpha below 128.

    Raises:
      InputError: when the picture is opaque, or no pixel of it is drawn anew, or it cannot be decoded.
    """
    channel = alpha(data)
    if channel is None:
        raise InputError("the picture is opaque: give a mask, or make transparent what is to be drawn anew")
    return _not_empty(channel < THRESHOLD, "no pixel has an alpha below 128")


def redrawn(data: bytes) -> np.ndarray:
    """What of a picture a mask says is to be drawn anew, by the rule in this module's docstring.

    Args:
      data: the mask's bytes, as for `alpha`.

    Returns:
      bool (H, W), True where the picture is drawn anew.

    Raises:
      InputError: when no pixel is drawn anew, or the mask cannot be decoded.
    """
    if alpha(data) is not None:
        return redrawn_by_alpha(data)
    luminance = np.asarray(Image.fromarray(ops.decode_image(data)).convert("L"), np.uint8)
    return _not_empty(luminance >= THRESHOLD, "the mask is opaque, and no pixel is white (128 or more)")


def _not_empty(mask: np.ndarray, otherwise: str) -> np.ndarray:
    if not mask.any():
        raise InputError(f"nothing is to be drawn anew: {otherwise}")
    return mask
