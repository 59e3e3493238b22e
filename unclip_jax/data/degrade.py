"""What an upsampler is conditioned on while it trains: a low-resolution image, made slightly worse than a clean downsampling.

At sampling time an upsampler sees the smaller model's output, which is softer than a downsampled photograph. unCLIP (2204.06125,
section 2.2 and appendix C) therefore degrades the conditioning image in training: at 64 -> 256 by a Gaussian blur with kernel size 3
and standard deviation 0.6, as SR3-style cascades do. At sampling time nothing is degraded.
"""

from __future__ import annotations

import numpy as np

from unclip_jax.data import ops


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
    """Downsample float32 (H, W, 3) in [-1, 1] to (size, size, 3) and blur it with probability `blur_prob`; float32 in [-1, 1].

    `method` is one of `ops.METHODS` ("box" is the area mean). The blur works on the small image: `kernel` taps (odd), standard
    deviation `sigma` in its pixels, multiplied by a factor uniform in [1 - sigma_jitter, 1 + sigma_jitter]. `rng` is advanced by two
    numbers whatever happens, so that changing a probability does not change later draws.

    Raises `ValueError` if the image is not float32 or is smaller than `size`, or for a kernel that is even or below 1, a sigma that
    is not above 0, a probability outside [0, 1] or a jitter outside [0, 1).
    """
    if image.dtype != np.float32:
        raise ValueError(f"low_resolution expects float32 in [-1, 1], got {image.dtype}")
    if min(image.shape[:2]) < size:
        raise ValueError(f"low_resolution cannot make {size}x{size} out of {image.shape[1]}x{image.shape[0]}")
    if not 0 <= blur_prob <= 1 or not 0 <= sigma_jitter < 1:
        raise ValueError(f"low_resolution: blur_prob={blur_prob} is in [0, 1] and sigma_jitter={sigma_jitter} in [0, 1)")
    chance, factor = rng.random(), 1 + sigma_jitter * rng.uniform(-1, 1)
    small = ops.resize(image, size, method)
    if chance < blur_prob:
        small = gaussian_blur(small, kernel, sigma * factor)
    return np.clip(small, -1, 1)


def gaussian_blur(image: np.ndarray, kernel: int = 3, sigma: float = 0.6) -> np.ndarray:
    """Separable Gaussian blur of float32 (H, W, C) with `kernel` taps (odd) and `sigma` in pixels; borders are reflected.

    Taps are exp(-i^2 / (2 sigma^2)), i = -(kernel-1)/2 ... (kernel-1)/2, normalised to sum 1: a constant image is unchanged. Raises
    `ValueError` for a kernel that is even, below 1 or wider than the image allows, or a sigma not above 0.
    """
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise ValueError(f"gaussian_blur: kernel={kernel} must be odd and at least 1, sigma={sigma} above 0")
    half = kernel // 2
    if half >= min(image.shape[:2]):
        raise ValueError(f"gaussian_blur: kernel={kernel} is too wide for an image of {image.shape[1]}x{image.shape[0]}")
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).astype(np.float32)
    height, width = image.shape[:2]
    padded = np.pad(image.astype(np.float32, copy=False), ((half, half), (half, half), (0, 0)), mode="reflect")
    rows = sum(tap * padded[i : i + height] for i, tap in enumerate(taps))
    return sum(tap * rows[:, i : i + width] for i, tap in enumerate(taps))
