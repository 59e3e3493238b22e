"""Decoding of images of every kind, whole and damaged; the properties of resizing, cropping and the range."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from unclip_jax.data import ops


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photo():
    """uint8 (48, 64, 3) with structure at every scale."""
    y, x = np.mgrid[:48, :64]
    image = np.stack([x * 4, y * 5, 128 + 100 * np.sin(x / 3) * np.cos(y / 4)], axis=2)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_decode_exactly(photo, kind):
    data = encode(Image.fromarray(photo), kind, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = ops.decode_image(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, photo)
    assert ops.image_size(data) == (64, 48)


def test_jpeg_cmyk_and_grey(photo):
    image = Image.fromarray(photo)
    assert np.abs(ops.decode_image(encode(image, "JPEG", quality=95)).astype(int) - photo).mean() < 4
    assert (
        np.abs(ops.decode_image(encode(image.convert("CMYK"), "JPEG", quality=95)).astype(int) - photo).mean()
        < 6
    )
    grey = ops.decode_image(encode(image.convert("L"), "PNG"))
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(image.convert("L"))[:, :, None], 3, axis=2))


def test_transparency_is_composited_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 1] = [255, 0, 0, 255]
    pixels[1, 0] = [0, 0, 0, 128]
    expected = np.array([[[255, 255, 255], [255, 0, 0]], [[127, 127, 127], [255, 255, 255]]])
    image = Image.fromarray(pixels)
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True), pixels):
        assert np.abs(ops.decode_image(data).astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert ops.decode_image(encode(palette, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert ops.decode_image(encode(palette, "PNG", transparency=0)).tolist() == [
        [[255, 255, 255], [40, 50, 60]]
    ]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert ops.decode_image(encode(grey, "PNG")).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled():
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]], np.uint8)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(ops.decode_image(encode(Image.fromarray(deep), "PNG")), expected)
    np.testing.assert_array_equal(ops.decode_image(deep), expected)
    np.testing.assert_array_equal(ops.decode_image(np.array([[True, False]])), [[[255] * 3, [0] * 3]])


def tiff(array, **tags):
    """A TIFF with some tags of its header: SMinSampleValue is 340, SMaxSampleValue 341."""
    directory = ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[{"lowest": 340, "highest": 341, "photometric": 262, "orientation": 274}[name]] = value
    return encode(Image.fromarray(array), "TIFF", tiffinfo=directory)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_need_a_stated_range(dtype):
    deep = np.array([[0, 200, 1000]], dtype)
    with pytest.raises(ValueError, match="does not state their range; convert it to 8 or 16 bits"):
        ops.decode_image(tiff(deep))
    decoded = ops.decode_image(tiff(deep, lowest=0, highest=1000))
    assert decoded[0, :, 0].tolist() == [0, 51, 255]
    with pytest.raises(ValueError, match="does not state their range"):
        ops.decode_image(tiff(deep, lowest=7, highest=7))
    if dtype == np.float32:
        with pytest.raises(ValueError, match="pixels that are not finite"):
            ops.decode_image(tiff(np.array([[np.nan, 1]], dtype), lowest=0, highest=1))


def test_twelve_bits_of_a_tiff():
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = bytes([0x00, 0x0F, 0xFF, 0])  # two values, 0 and 4095
    data = b"II*\0" + struct.pack("<I", 12) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4)
    assert ops.decode_image(data)[0, :, 0].tolist() == [0, 255]


def test_a_transparent_value_of_sixteen_bits_is_white():
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert ops.decode_image(encode(deep, "PNG", transparency=257))[0, :, 0].tolist() == [0, 255, 255]


def png(depth: int, colour: int, row: bytes, transparent: tuple[int, ...], width: int) -> bytes:
    """A PNG of one row of any depth, with one transparent value."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = {b"IHDR": header, b"tRNS": struct.pack(f">{len(transparent)}H", *transparent)}
    parts |= {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, parts, parts.values()))


def test_a_transparent_value_has_the_depth_of_the_file():
    two, four = png(2, 0, bytes([0b00011011]), (1,), 4), png(4, 0, bytes([0x3E]), (3,), 2)
    colours = png(16, 2, struct.pack(">6H", 1000, 2000, 3000, 9, 9, 9), (1000, 2000, 3000), 2)
    assert ops.decode_image(two)[0, :, 0].tolist() == [0, 255, 170, 255]
    assert ops.decode_image(four)[0, :, 0].tolist() == [255, 238]
    assert ops.decode_image(colours)[0].tolist() == [[255] * 3, [0] * 3]


def test_sixteen_bits_of_a_tiff():
    """White may be 0, and the picture may lie on its side."""
    deep = np.array([[0, 257, 65535]], np.uint16)
    assert ops.decode_image(tiff(deep))[0, :, 0].tolist() == [0, 1, 255]
    assert ops.decode_image(tiff(deep, photometric=0))[0, :, 0].tolist() == [255, 254, 0]
    assert ops.decode_image(tiff(deep, orientation=6))[:, 0, 0].tolist() == [0, 1, 255]


def test_exif_orientation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    np.testing.assert_array_equal(
        ops.decode_image(encode(Image.fromarray(photo), "PNG", exif=exif)), np.rot90(photo, -1)
    )


def test_bad_images_are_one_line_errors(photo, monkeypatch):
    jpeg, png = encode(Image.fromarray(photo), "JPEG"), encode(Image.fromarray(photo), "PNG")
    cases = {
        "empty": b"",
        "truncated": jpeg[: len(jpeg) * 3 // 4],
        "decode": png[: len(png) // 2],
        "not an image": b"<html>404</html>" * 20,
        "floating-point": encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
        "float32": np.ones((2, 2, 3), np.float32),
        "shape": np.zeros((2, 2, 2), np.uint8),
        "known format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for words, data in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            ops.decode_image(data)
        assert "\n" not in str(error.value) and "0x" not in str(error.value)
    monkeypatch.setattr(ops, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="64x48 is more than 1000 pixels"):
        ops.decode_image(png)
    with pytest.raises(ValueError, match="more than 1000 pixels"):
        ops.decode_image(photo)


def test_every_truncation_is_an_error_or_an_image(photo):
    """No cut of a file may raise anything but ValueError, which is what the pipeline counts."""
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encode(Image.fromarray(photo), kind)
        for cut in range(0, len(data), max(1, len(data) // 25)):
            try:
                assert ops.decode_image(data[:cut]).shape[2] == 3
            except ValueError as error:
                assert str(error).startswith("cannot decode image")


def test_resize_is_antialiased(photo):
    area = photo.reshape(12, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(ops.resize(photo, (12, 16), "box") - area).max() <= 1  # 8-bit resizes round after each axis
    np.testing.assert_allclose(ops.resize(photo.astype(np.float32), (12, 16), "box"), area, atol=1e-3)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # the finest pattern: a resize without antialiasing returns 0 or 255
    for method in ops.METHODS:
        assert np.abs(ops.resize(stripes, 16, method)[:, 2:-2].astype(int) - 127).max() <= 2
        constant = np.full((30, 40, 3), 0.25, np.float32)
        np.testing.assert_allclose(ops.resize(constant, (7, 9), method), 0.25, atol=1e-6)
    assert ops.resize(photo, (48, 64)) is photo
    with pytest.raises(ValueError, match="bicubic, box, lanczos, bilinear"):
        ops.resize(photo, 8, "nearest")
    with pytest.raises(ValueError, match="at least 1"):
        ops.resize(photo, 0)


def test_crops(photo):
    square = ops.center_crop_square(photo)
    np.testing.assert_array_equal(square, photo[:, 8:56])
    rng = np.random.default_rng(0)
    tall = np.arange(100)[:, None, None] * np.ones((1, 10, 3), np.int64)
    tops = {int(ops.random_crop_square(tall, rng)[0, 0, 0]) for _ in range(2000)}
    assert tops == set(range(91))  # both ends are reached
    corners = {
        tuple(ops.random_crop(np.indices((5, 4)).transpose(1, 2, 0), 3, rng)[0, 0]) for _ in range(300)
    }
    assert corners == {(top, left) for top in range(3) for left in range(2)}
    with pytest.raises(ValueError, match="out of an image of 64x48"):
        ops.random_crop(photo, 49, rng)
    assert ops.resize_then_crop(photo, 24).shape == ops.resize_then_crop(photo, 24, rng).shape == (24, 24, 3)
    np.testing.assert_array_equal(
        ops.resize_then_crop(photo, 24, method="box"), ops.resize(square, 24, "box")
    )
    assert ops.resize_then_crop(np.zeros((2, 50_000, 3), np.uint8), 64).shape == (64, 64, 3)


def test_random_masks():
    """Masks depend on the generator alone, and each kind comes as often as its probability says."""
    masks = np.stack([ops.random_mask(32, np.random.default_rng(seed)) for seed in range(600)])
    assert masks.shape == (600, 32, 32, 1) and masks.dtype == np.bool_
    np.testing.assert_array_equal(masks[5], ops.random_mask(32, np.random.default_rng(5)))
    share = masks.mean((1, 2, 3))
    assert 0.07 < np.mean(share == 0) < 0.14 and 0.4 < share.mean() < 0.7

    def is_box(shown):
        rows, columns = shown.any(1), shown.any(0)
        return shown.any() and np.array_equal(shown, rows[:, None] & columns)

    shown, hidden = (np.mean([is_box(m[..., 0]) for m in both]) for both in (masks, ~masks))
    assert 0.15 < shown < 0.26 and 0.33 < hidden < 0.48


def test_float_round_trip():
    values = np.arange(256, dtype=np.uint8)
    floats = ops.to_float(values)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(ops.to_uint8(floats), values)
    np.testing.assert_array_equal(ops.to_uint8(np.array([-3.0, 3.0])), [0, 255])
    with pytest.raises(ValueError, match="float32"):
        ops.to_float(floats)
