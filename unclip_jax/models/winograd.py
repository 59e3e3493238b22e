"""3x3 convolutions with fewer products, for float32 on CPU (Winograd's F(2x2, 3x3); Lavin and Gray 2015).

Two outputs of a correlation with three weights g, y_i = sum_k d_(i+k) g_k, need four products instead of six:

    y = A^T [(G g) * (B^T d)],    B^T = 1  0 -1  0     G =   1    0    0      A^T = 1  1  1  0
                                        0  1  1  0           1/2  1/2  1/2          0  1 -1 -1
                                        0 -1  1  0           1/2 -1/2  1/2
                                        0  1  0 -1           0    0    1

Likewise four outputs in the plane, y = A^T [(G g G^T) * (B^T d B)] A, need sixteen products instead of
thirty-six. Summed over the input channels, the sixteen become matrix products of (tiles, C_in) and (C_in,
C_out). These are 2.25 times fewer operations, in the form that suits CPUs best. The additions and
subtractions cost a few units in the last place. Gradients are correct, but not faster than those of the
direct convolution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Channels of input and output. With fewer, the additions cost what the products save, and compilation takes
# longer.
MIN_CHANNELS = 192
# Positions of all outputs. With fewer, transforming the kernel costs more than it saves.
MIN_POSITIONS = 512
MAX_TILES = 4096  # per pass, so that the transformed tiles fit into the cache


def conv3x3(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Any = (1, 1),
    padding: Any = ((1, 1), (1, 1)),
    **settings: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of stride 1 and padding 1, for `flax.linen.Conv`.

    It uses Winograd's algorithm where that is faster, one matrix product where there are few positions, and
    jax's convolution otherwise.

    Args:
      x: (B, H, W, C_in); kernel: (3, 3, C_in, C_out).
      window_strides, padding, settings: as flax passes them.

    Returns:
      (B, H, W, C_out).
    """
    b, h, w, channels = x.shape
    if min(kernel.shape[2:]) < MIN_CHANNELS or (b * h * w >= MIN_POSITIONS and (h % 2 or w % 2)):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **settings)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    if b * h * w < MIN_POSITIONS:  # XLA's convolution leaves most of a CPU idle here
        patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
        return jnp.dot(patches.reshape(b * h * w, -1), kernel.reshape(9 * channels, -1)).reshape(b, h, w, -1)
    # The barrier ties the kernel to the input. Without it, XLA would move the kernel transforms out of a
    # sampler's loop and keep the transformed kernels of all layers, 16/9 of the weights.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    kernels = _transform_kernel(kernel)
    images = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * h * w <= 4 * MAX_TILES))
    rows = max(
        n for n in range(1, h // 2 + 1) if (h // 2) % n == 0 and (n == 1 or images * n * w <= 2 * MAX_TILES)
    )
    bands = h // 2 // rows
    if (images, bands) == (b, 1):
        return _outputs(x, kernels)

    def part(i: jax.Array) -> jax.Array:
        first = i // bands * images, i % bands * 2 * rows, 0, 0
        return _outputs(jax.lax.dynamic_slice(x, first, (images, 2 * rows + 2, *x.shape[2:])), kernels)

    out = jax.lax.map(part, jnp.arange(b // images * bands))  # (groups x bands, images, rows, W, C)
    out = out.reshape(b // images, bands, images, 2 * rows, w, -1).swapaxes(1, 2)
    return out.reshape(b, h, w, -1)


def _transform_kernel(g: jax.Array) -> list[jax.Array]:
    # G g G^T: (3, 3, C_in, C_out) -> sixteen of (C_in, C_out), row by row.
    def along(a, b, c):
        return a, 0.5 * (a + b + c), 0.5 * (a - b + c), c

    return [column for row in along(*g) for column in along(*row)]


def _differences(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    # B^T along one axis.
    return a - c, b + c, c - b, b - d


def _sums(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    # A^T along one axis.
    return a + b + c, b - c - d


def _outputs(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    # (B, H + 2, W + 2, C_in), padded -> (B, H, W, C_out). A tile of 4 x 4 begins at every second row and
    # column.
    b, h, w, channels = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
    rows = _differences(*(x[:, i : i + h : 2] for i in range(4)))
    tiles = [tile for row in rows for tile in _differences(*(row[:, :, j : j + w : 2] for j in range(4)))]
    products = [
        jnp.dot(tile.reshape(-1, channels), kernel).reshape(b, h // 2, w // 2, -1)
        for tile, kernel in zip(tiles, kernels)
    ]
    columns = [_sums(*products[4 * i : 4 * i + 4]) for i in range(4)]  # along a row of each tile
    left, right = (_sums(*(column[j] for column in columns)) for j in range(2))
    # (B, H/2, 2, W/2, 2, C_out)
    stacked = jnp.stack([jnp.stack(pair, axis=3) for pair in zip(left, right)], axis=2)
    return stacked.reshape(b, h, w, -1)
