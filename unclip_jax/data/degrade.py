"""The low-resolution image on which an upsampler is conditioned in training: slightly degraded.

At sampling time an upsampler sees the output of a smaller model, which is softer than a downsampled
photograph. unCLIP (2204.06125, section 2.1 and appendix C) therefore degrades the conditioning image in
training:

- 64 -> 256: a Gaussian blur with kernel size 3 and standard deviation 0.6, as in cascades after SR3;
- 256 -> 1024: the light variant of BSR, the blind super-resolution degradation of BSRGAN (Zhang et al. 2021,
  arXiv 2103.14006).

At sampling time the image is not degraded.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from unclip_jax.data import ops
from unclip_jax.errors import InputError


def low_resolution(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    method: str = "bicubic",
    blur_prob: float = 0.5,
    kernel: int = 3,
    sigma: float = 0.6,
    sigma_jitter: float = 0.0,
) -> np.ndarray:
    """A downsampled image, blurred with probability `blur_prob`: float32 (size, size, 3) in [-1, 1].

    `rng` always advances by two numbers, so that changing a probability does not change later draws.

    Args:
      image: float32 (H, W, 3) in [-1, 1].
      size: the side of the result in pixels.
      rng: the randomness.
      method: one of `ops.METHODS` ("box" is the area mean).
      blur_prob: the probability of the blur, in [0, 1].
      kernel: how many taps the blur of the small image has, an odd number.
      sigma: its standard deviation, in pixels of the small image, above 0.
      sigma_jitter: sigma is multiplied by a factor uniform in 1 - sigma_jitter ... 1 + sigma_jitter.

    Raises `ValueError` if the image is not float32 or is smaller than `size`, or for an option out of range.
    """
    if image.dtype != np.float32:
        raise InputError(f"low_resolution expects float32 in [-1, 1], got {image.dtype}")
    if min(image.shape[:2]) < size:
        raise InputError(f"low_resolution cannot make {size}x{size} out of {image.shape[1]}x{image.shape[0]}")
    if not 0 <= blur_prob <= 1 or not 0 <= sigma_jitter < 1:
        given = f"blur_prob={blur_prob} must be in [0, 1] and sigma_jitter={sigma_jitter} in [0, 1)"
        raise InputError(f"low_resolution: {given}")
    chance, factor = rng.random(), 1 + sigma_jitter * rng.uniform(-1, 1)
    small = ops.resize(image, size, method)
    if chance < blur_prob:
        small = gaussian_blur(small, kernel, sigma * factor)
    return np.clip(small, -1, 1)


def gaussian_blur(image: np.ndarray, kernel: int = 3, sigma: float = 0.6) -> np.ndarray:
    """Separable Gaussian blur of float32 (H, W, C), with reflected borders.

    The taps are exp(-i^2 / (2 sigma^2)) for i = -(kernel-1)/2 ... (kernel-1)/2, normalised to sum 1. So a
    constant image does not change.

    Args:
      image: float32 (H, W, C).
      kernel: how many taps, an odd number.
      sigma: the standard deviation in pixels, above 0.

    Raises `ValueError` for a kernel that is even, below 1 or too wide for the image, or a sigma of 0 or less.
    """
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise InputError(f"gaussian_blur: kernel={kernel} must be odd and at least 1, sigma={sigma} above 0")
    half = kernel // 2
    if half >= min(image.shape[:2]):
        pixels = f"{image.shape[1]}x{image.shape[0]}"
        raise InputError(f"gaussian_blur: kernel={kernel} is too wide for an image of {pixels}")
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).astype(np.float32)
    height, width = image.shape[:2]
    padded = np.pad(
        image.astype(np.float32, copy=False), ((half, half), (half, half), (0, 0)), mode="reflect"
    )
    rows = sum(tap * padded[i : i + height] for i, tap in enumerate(taps))
    return sum(tap * rows[:, i : i + width] for i, tap in enumerate(taps))


def bsr_light(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """An image downsampled by the light variant of BSR: float32 (size, size, 3) in [-1, 1].

    The steps blur, resize, noise and JPEG (the last with probability 0.9) come in random order. Then the
    image is resized to its final size and compressed as JPEG once more. The steps are:

    - blur: an isotropic Gaussian of 5 to 7 taps, or an anisotropic one of 5 to 14 taps at a random angle;
    - resize: with probability 0.8 to a random size between the image's and half the result's, by bilinear,
      bicubic or box; else to the result's size, by box;
    - noise: Gaussian with a standard deviation of 1 to 2 of 255 levels: independent in the channels, the same
      in all channels, or with a random covariance of the channels;
    - JPEG: quality 80 to 95.

    Args:
      image: float32 (H, H, 3) in [-1, 1].
      size: the side of the result in pixels.
      rng: the randomness.

    Raises `ValueError` if the image is not float32, not square, or smaller than `size`.
    """
    if image.dtype != np.float32 or image.shape[0] != image.shape[1]:
        raise InputError(
            f"bsr_light expects square float32 images in [-1, 1], got {image.dtype} {image.shape}"
        )
    side = image.shape[0]
    if side < size:
        raise InputError(f"bsr_light cannot make {size}x{size} out of {side}x{side}")
    factor = side / size
    methods = ("bilinear", "bicubic", "box")
    x = image
    for step in rng.permutation(["blur", "resize", "noise", "jpeg"]):
        if step == "blur":
            x = _filter(x, _gaussian_kernel(rng, factor))
        elif step == "resize":
            random_size = rng.random() < 0.8
            smaller = max(1, round(side / rng.uniform(1, 2 * factor)))
            x = ops.resize(
                x, smaller if random_size else size, str(rng.choice(methods)) if random_size else "box"
            )
        elif step == "noise":
            x = x + _noise(x.shape, rng)
        elif rng.random() < 0.9:
            x = _jpeg(x, rng)
        x = np.clip(x, -1, 1)
    return _jpeg(ops.resize(x, size, str(rng.choice(methods))), rng)


def _gaussian_kernel(rng: np.random.Generator, factor: float) -> np.ndarray:
    # (taps, taps), sum 1. The widths depend on the scale factor f as in BSRGAN: a standard deviation up to
    # 2 + 0.2 f for an isotropic kernel, variances up to 4 + f for an anisotropic one.
    if rng.random() < 0.5:
        taps = int(rng.integers(2, 5)) + 3
        precision = np.eye(2) / max((2 + 0.2 * factor) * rng.random(), 0.1) ** 2
    else:
        taps = int(rng.integers(2, 12)) + 3
        angle, (first, second) = np.pi * rng.random(), np.maximum((4 + factor) * rng.random(2), 0.01)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        precision = turn @ np.diag([1 / first, 1 / second]) @ turn.T
    offset = np.arange(taps) - (taps - 1) / 2
    grid = np.stack(np.meshgrid(offset, offset, indexing="ij"), axis=-1)
    weights = np.exp(-0.5 * np.einsum("ija,ab,ijb->ij", grid, precision, grid))
    return (weights / weights.sum()).astype(np.float32)


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    # Correlation of (H, W, C) with (taps, taps). An even kernel shifts the image by half a pixel to the top
    # left; borders repeat the pixels of the edge.
    taps = len(kernel)
    height, width = image.shape[:2]
    before = (taps - 1) // 2
    padded = np.pad(image, ((before, taps - 1 - before), (before, taps - 1 - before), (0, 0)), mode="edge")
    out = np.zeros_like(image)
    for i in range(taps):
        for j in range(taps):
            out += kernel[i, j] * padded[i : i + height, j : j + width]
    return out


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    # One of 255 levels is 2 / 255 in the range [-1, 1].
    level, kind = 2 / 255 * rng.uniform(1, 2), rng.random()
    if kind < 0.4:
        return np.float32(level * rng.normal(size=shape))
    if kind < 0.8:
        return np.float32(level * rng.normal(size=(*shape[:2], 1)))
    # mix mix^T is a random covariance with eigenvalues in [0, 1].
    mix = np.linalg.qr(rng.normal(size=(3, 3)))[0] * np.sqrt(rng.random(3))
    return np.float32(level * rng.normal(size=shape) @ mix.T)


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(ops.to_uint8(image)).save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    return ops.to_float(np.asarray(Image.open(buffer)))
