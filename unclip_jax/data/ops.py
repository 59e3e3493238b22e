"""Image operations in NumPy and PIL: decoding, antialiased resizing, cropping, and the [-1, 1] range.

Both backends of the input pipeline call these functions, so that a record yields the same bytes with and
without TensorFlow. Images are (H, W, 3) arrays, uint8 in [0, 255] until `to_float` makes them
float32 in [-1, 1].
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from unclip_jax.errors import InputError

# 2**27 pixels take 400 MB as RGB: more than any photograph in a caption dataset has.
MAX_PIXELS = 2**27

# The formats that PIL may open. Without this list it would start Ghostscript for an EPS file.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "MPO",
    "TGA",
    "ICO",
    "AVIF",
    "QOI",
    "PCX",
)

METHODS = {
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}


# ------------------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------------------
def image_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels, read from the header alone. Raises `ValueError` for an unknown format."""
    if isinstance(image, np.ndarray):
        return int(image.shape[1]), int(image.shape[0])
    return open_image(image).size


def decode_image(image: bytes | np.ndarray) -> np.ndarray:
    """The pixels of an encoded or decoded image: uint8 (H, W, 3), RGB in [0, 255].

    Transparency is composited on white, palettes and CMYK are converted, 16-bit greys are divided by 257, and
    the EXIF orientation is applied. Colours of 16 bits keep their higher 8 bits, which is at most one level
    less. An animation gives its first frame. Pixels of 32 bits are scaled by the smallest and largest sample
    value that a TIFF states.

    Args:
      image: encoded bytes in one of `FORMATS`, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
        uint8, uint16 or bool.

    Raises `ValueError` with one line if the image is empty, truncated, not an image, larger than
    `MAX_PIXELS`, or has pixels of 32 bits whose range it does not state.
    """
    if isinstance(image, np.ndarray):
        return _decode_array(image)
    opened = open_image(image)
    try:
        opened.load()
        deep = opened.mode.startswith(("I", "F"))
        samples = _sample_range(opened) if deep else None  # turning it loses the tags of a TIFF
        opened = upright(opened)
        return np.asarray(_to_rgb(_to_grey(opened, *samples) if deep else opened), np.uint8)
    except InputError as error:
        raise InputError(f"cannot decode image: {error}") from None
    # PIL's decoders raise OSError, SyntaxError, struct.error and others for a damaged file.
    except Exception as error:
        raise InputError(f"cannot decode image: {_reason(error)}") from error


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # some builds of PIL lack AVIF and others


def open_image(data: bytes) -> Image.Image:
    """Opens an encoded picture without decoding its pixels.

    Raises `InputError` for empty data, an unknown format, or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise InputError("cannot decode image: it is empty (0 bytes)")
    try:
        opened = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise InputError(f"cannot decode image: more than {MAX_PIXELS} pixels") from error
    except Exception as error:
        reason = f"{len(data)} bytes, {_reason(error)}"
        raise InputError(
            f"cannot decode image: damaged, or not an image of a known format ({reason})"
        ) from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise InputError(f"cannot decode image: {width}x{height} is more than {MAX_PIXELS} pixels")
    _scale_transparency(opened)
    return opened


def _scale_transparency(opened: Image.Image) -> None:
    # PIL makes 8 bits of a PNG's pixels of 2, 4 or three times 16 bits. It leaves the value that stands for
    # transparent pixels as the file has it.
    key, mode = opened.info.get("transparency"), opened.tile[0][3] if opened.format == "PNG" else None
    if isinstance(key, int) and mode in ("L;2", "L;4"):
        opened.info["transparency"] = key * (85 if mode == "L;2" else 17)
    elif isinstance(key, tuple) and mode == "RGB;16B":
        opened.info["transparency"] = tuple(value >> 8 for value in key)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:  # the rest of the text is the address of a Python object
        return "cannot identify it"
    return text[:200] or type(error).__name__


def upright(opened: Image.Image) -> Image.Image:
    """Turns a picture as its EXIF orientation says."""
    try:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1  # if not, PIL would only copy it
        return ImageOps.exif_transpose(opened) if turned else opened
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return opened


def _to_grey(opened: Image.Image, black: float, white: float) -> Image.Image:
    # Scales one channel of more than 8 bits. PIL's own conversion clips at 255 and does not scale.
    grey = (np.asarray(opened).astype(np.float64) - black) / (white - black)
    if not np.isfinite(grey).all():
        raise InputError("it has pixels that are not finite")
    if isinstance(
        opened.info.get("transparency"), int
    ):  # one value of a PNG, composited on white as elsewhere
        grey[np.asarray(opened) == opened.info["transparency"]] = 1
    return Image.fromarray(np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8))


def _sample_range(opened: Image.Image) -> tuple[float, float]:
    # The values of black and white.
    tags = getattr(opened, "tag_v2", {})
    if opened.mode.startswith("I;"):
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        return (white, 0) if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else (0, white)
    if opened.mode == "I" and opened.format in ("PPM", "PNG"):
        return 0, 65535  # PIL scales the former to it
    for lowest, highest in ((340, 341), (280, 281)):  # SMinSampleValue, MinSampleValue and the like
        if lowest in tags and highest in tags:
            black, white = (float(np.ravel(tags[tag])[0]) for tag in (lowest, highest))
            if np.isfinite([black, white]).all() and black < white:
                return black, white
    kind = "floating-point pixels" if opened.mode == "F" else "pixels of 32 bits"
    raise InputError(f"it has {kind} and does not state their range; convert it to 8 or 16 bits")


def _to_rgb(opened: Image.Image) -> Image.Image:
    if opened.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in opened.info:
        layer = opened.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert(
            "RGB"
        )
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _decode_array(image: np.ndarray) -> np.ndarray:
    shape = image.shape
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        raise InputError(f"cannot decode image: array of shape {shape}, expected {expected}")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise InputError(f"cannot decode image: {shape[1]}x{shape[0]} is more than {MAX_PIXELS} pixels")
    if image.dtype == np.uint16:
        image = np.round(image / 257).astype(np.uint8)
    elif image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    elif image.dtype != np.uint8:
        raise InputError(f"cannot decode image: array of {image.dtype}, expected uint8, uint16 or bool")
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 4:
        return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(image))), np.uint8)
    return np.ascontiguousarray(image)


# ------------------------------------------------------------------------------------------------------------
# Resizing and cropping
# ------------------------------------------------------------------------------------------------------------
def resize(
    image: np.ndarray, size: int | tuple[int, int], method: str = "bicubic", box: tuple | None = None
) -> np.ndarray:
    """Antialiased resize of an image: (size, size, 3), or (h, w, 3) if `size` is (h, w); same dtype.

    When the image shrinks, the filter is widened by the scale. "box" at whole factors is then the exact area
    mean. Filters other than "box" and "bilinear" ring: float32 results may leave the range of the image, and
    uint8 results are clipped.

    Args:
      image: uint8 or float32 (H, W, 3).
      size: the side or the (height, width) of the result in pixels.
      method: one of `METHODS`.
      box: (left, top, right, bottom) in pixels, may be fractional: only this part of the image is resized.

    Raises `ValueError` for an unknown method or a size below 1.
    """
    if method not in METHODS:
        raise InputError(f"unknown resize method {method!r}: choose one of {', '.join(METHODS)}")
    height, width = (size, size) if isinstance(size, (int, np.integer)) else size
    if height < 1 or width < 1:
        raise InputError(f"cannot resize to {width}x{height}: a side has at least 1 pixel")
    if box is None and image.shape[:2] == (height, width):
        return image
    if image.dtype == np.uint8:
        resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), METHODS[method], box)
        return np.asarray(resized, np.uint8)
    channels = np.moveaxis(
        image.astype(np.float32, copy=False), 2, 0
    )  # PIL has no float images of 3 channels
    pictures = [Image.fromarray(np.ascontiguousarray(channel)) for channel in channels]
    resized = [picture.resize((width, height), METHODS[method], box) for picture in pictures]
    return np.stack([np.asarray(picture, np.float32) for picture in resized], axis=2)


def resize_tf1(image: np.ndarray, size: int) -> np.ndarray:
    """The bilinear resize of TensorFlow 1 (`align_corners=False`): float32 (size, size, 3) in [0, 255].

    FID is defined with it. The filter is not widened when the image shrinks. Pixel i of the result lies at
    i * H / size of the image: the pixels' corners are aligned, not their centres. The result is equal to
    TensorFlow's bit for bit.

    Args:
      image: uint8 or float32 (H, W, 3).
      size: the side of the result in pixels.
    """

    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # The pixels before and after each place along an axis, and how far it lies between them.
        place = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        before = place.astype(np.int64)
        return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)

    (top, bottom, down), (left, right, across) = places(image.shape[0]), places(image.shape[1])
    across, down = across[None, :, None], down[:, None, None]
    image = image.astype(np.float32)
    # The rows that are needed, each resized along the width.
    used = np.unique(np.concatenate([top, bottom]))
    rows = image[used]
    rows = rows[:, left] + (rows[:, right] - rows[:, left]) * across
    above, below = rows[np.searchsorted(used, top)], rows[np.searchsorted(used, bottom)]
    return above + (below - above) * down


def center_crop_square(image: np.ndarray) -> np.ndarray:
    """The largest central square of an image (H, W, 3): (S, S, 3), S = min(H, W)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest central part of an image (H, W, 3) with the proportions of `size`, a (height, width)."""
    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    h, w = (min(max(round(side * scale), 1), most) for side, most in zip(size, (height, width)))
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


def random_crop_square(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A largest square of an image (H, W, 3), uniformly placed: (S, S, 3), S = min(H, W)."""
    return random_crop(image, min(image.shape[:2]), rng)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A uniformly placed window (size, size, 3) of an image (H, W, 3).

    Raises `ValueError` if the image is smaller than `size`.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        advice = f"filter with min_side={size} or resize first"
        raise InputError(f"cannot crop {size}x{size} out of an image of {width}x{height}; {advice}")
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return image[top : top + size, left : left + size]


def resize_then_crop(
    image: np.ndarray, size: int, rng: np.random.Generator | None = None, method: str = "bicubic"
) -> np.ndarray:
    """A square of an image (H, W, 3), resized: (size, size, 3), the dtype does not change.

    The square is the central one, or with `rng` a random one. Only the square is resized, so that an image of
    100,000 x 10 pixels costs no more than its square.
    """
    square = center_crop_square(image) if rng is None else random_crop_square(image, rng)
    return resize(square, size, method)


def random_mask(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random mask to train inpainting on: bool (size, size, 1), True where the image is kept.

    | kept                          | probability |
    |-------------------------------|-------------|
    | no pixel                      | 0.1         |
    | all pixels outside of a box   | 0.3         |
    | the pixels of a box           | 0.2         |
    | all but one to three strokes  | 0.4         |

    The sides of a box are 1/4 to 1 of the image's side; the width of a stroke is 1/16 to 1/4 of it.
    """
    kind = rng.choice(4, p=(0.1, 0.3, 0.2, 0.4))
    mask = Image.new("1", (size, size), 1)
    draw = ImageDraw.Draw(mask)
    if kind == 0:
        draw.rectangle((0, 0, size, size), 0)
    elif kind in (1, 2):
        height, width = (int(round(size * rng.uniform(0.25, 1.0))) for _ in range(2))
        top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
        if kind == 2:
            draw.rectangle((0, 0, size, size), 0)
        draw.rectangle((left, top, left + width - 1, top + height - 1), int(kind == 2))
    else:
        for _ in range(rng.integers(1, 4)):
            points = [tuple(point) for point in rng.uniform(0, size, (rng.integers(2, 6), 2))]
            draw.line(points, 0, max(1, int(round(size * rng.uniform(1 / 16, 1 / 4)))), "curve")
    return np.asarray(mask, bool)[..., None]


# ------------------------------------------------------------------------------------------------------------
# Range
# ------------------------------------------------------------------------------------------------------------
def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 in [0, 255] of any shape -> float32 in [-1, 1], x / 127.5 - 1. Raises `ValueError` otherwise."""
    if image.dtype != np.uint8:
        raise InputError(f"to_float expects uint8 in [0, 255], got {image.dtype}")
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float in [-1, 1] of any shape -> uint8 in [0, 255], rounded and clipped: the inverse of `to_float`."""
    return np.clip(np.round((np.asarray(image, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
