"""Masks for inpainting: both conventions, in every mode that PIL writes."""

import io

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import masks
from unclip_jax.errors import InputError

# Columns of two pictures of (2, 4) pixels: luminance and alpha on both sides of the thresholds.
GREY = np.array([[0, 127, 128, 255]] * 2, np.uint8)
WHITE = np.array([[False, False, True, True]] * 2)  # where GREY is drawn anew
ALPHA = np.array([[0, 127, 128, 255]] * 2, np.uint8)
TRANSPARENT = np.array([[True, True, False, False]] * 2)  # where ALPHA is drawn anew


def encoded(image, kind="PNG", **options):
    """A file's bytes of a PIL image, or of an array."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def with_alpha(mode, alpha=ALPHA):
    """A picture in a mode with alpha, the negative of GREY, and so white where ALPHA is low."""
    picture = Image.fromarray(np.stack([255 - GREY] * 3 + [alpha], axis=2), "RGBA")
    return encoded(picture if mode == "RGBA" else picture.convert(mode))


def palette(transparency):
    """A picture of a palette whose entry i has luminance GREY[0, i].

    `transparency` is the entry that is transparent, or the alphas of all entries.
    """
    image = Image.fromarray(np.array([[0, 1, 2, 3]] * 2, np.uint8), "P")
    image.putpalette(np.repeat(GREY[0], 3).tolist())
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    "data",
    [
        encoded(GREY),
        encoded(np.stack([GREY] * 3, axis=2)),
        encoded(np.stack([GREY] * 3, axis=2), "BMP"),
        encoded(np.where(WHITE, 40000, 0x7F00).astype(np.uint16)),
        encoded(Image.fromarray(WHITE)),
        encoded(Image.fromarray(GREY).convert("CMYK"), "TIFF"),
        palette(None),
        palette(bytes([255, 255, 255, 255])),
        with_alpha("RGBA", np.full_like(GREY, 255)),
        with_alpha("LA", np.full_like(GREY, 255)),
    ],
    ids=["L", "RGB", "BMP", "I;16", "1", "CMYK", "P", "P-opaque", "RGBA-opaque", "LA-opaque"],
)
def test_white_of_an_opaque_mask_is_drawn_anew(data):
    drawn = masks.redrawn(data)
    opened = Image.open(io.BytesIO(data))
    expected = ~WHITE if opened.mode in ("RGBA", "LA") else WHITE  # `with_alpha` is the negative
    assert drawn.dtype == np.bool_
    np.testing.assert_array_equal(drawn, expected)
    assert masks.alpha(data) is None
    with pytest.raises(InputError, match="the picture is opaque: give a mask"):
        masks.redrawn_by_alpha(data)


def test_luminance_is_that_of_rec_601():
    """Pure green is light (150), pure red (76) and blue (29) are dark."""
    colours = np.array([[[0, 255, 0], [255, 0, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_array_equal(masks.redrawn(encoded(colours)), [[True, False, False]])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (with_alpha("RGBA"), TRANSPARENT),
        (with_alpha("LA"), TRANSPARENT),
        (
            with_alpha("RGBA", np.array([[255, 255, 255, 127]] * 2, np.uint8)),
            np.array([[0, 0, 0, 1]] * 2, bool),
        ),
        (palette(bytes([255, 128, 127, 0])), np.array([[0, 0, 1, 1]] * 2, bool)),
        (palette(0), np.array([[1, 0, 0, 0]] * 2, bool)),
        (encoded(GREY, transparency=127), np.array([[0, 1, 0, 0]] * 2, bool)),
        (encoded(np.stack([GREY] * 3, axis=2), transparency=(255,) * 3), np.array([[0, 0, 0, 1]] * 2, bool)),
        (encoded(GREY.astype(np.uint16) * 257, transparency=128 * 257), np.array([[0, 0, 1, 0]] * 2, bool)),
        (
            encoded(Image.open(io.BytesIO(with_alpha("RGBA"))), "WEBP", lossless=True),
            TRANSPARENT,
        ),
    ],
    ids=["RGBA", "LA", "one-pixel", "P-alphas", "P-entry", "L-key", "RGB-key", "I;16-key", "WEBP"],
)
def test_a_mask_with_a_transparent_pixel_is_read_by_its_alpha_alone(data, expected):
    np.testing.assert_array_equal(masks.redrawn(data), expected)
    np.testing.assert_array_equal(masks.redrawn_by_alpha(data), expected)


def test_alpha_is_that_of_the_file():
    np.testing.assert_array_equal(masks.alpha(with_alpha("RGBA")), ALPHA)


def test_the_orientation_is_applied():
    """As the picture's own is: a mask that a camera turned fits the picture that it turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    for image, read in (
        (GREY, masks.redrawn),
        (np.stack([GREY] * 3 + [ALPHA], axis=2), masks.redrawn_by_alpha),
    ):
        drawn = read(encoded(image, exif=exif))
        np.testing.assert_array_equal(drawn, np.rot90(WHITE if image is GREY else TRANSPARENT, -1))


def test_an_alpha_that_hides_nothing_is_an_error():
    """Half transparent at the least: the alpha counts, and it keeps every pixel."""
    data = with_alpha("RGBA", np.full_like(GREY, 128))
    for read in (masks.redrawn, masks.redrawn_by_alpha):
        with pytest.raises(InputError, match="nothing is to be drawn anew: no pixel has an alpha below 128"):
            read(data)
    with pytest.raises(InputError, match="no pixel is white"):
        masks.redrawn(encoded(np.full_like(GREY, 127)))


@pytest.mark.parametrize("read", [masks.alpha, masks.redrawn, masks.redrawn_by_alpha])
def test_damaged_masks_are_one_line(read):
    whole = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8))
    for data in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="cannot decode image") as caught:
            read(data)
        assert "\n" not in str(caught.value)
