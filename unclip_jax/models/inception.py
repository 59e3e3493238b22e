"""The Inception network of FID: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015, table 1; Heusel et al.
2017).

Every convolution is followed by batch normalisation without gain (epsilon 1e-3) and ReLU. The graph differs
from the paper in one place: the pooling branch of the last block, `mixed_10`, takes the maximum and not the
mean. The mean pools count no padding. Modules have the names of the graph. The 94 convolutions with their
statistics are 21,802,784 numbers; the classifier's matrix is 2,064,384 more.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, with_hooks

SIZE = 299  # pixels of the square that the network sees
EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # of `mixed_6/conv`, as ADM's evaluator takes them for sFID
Layer = tuple[int, tuple[int, int]]  # number of filters, height and width of the filter


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


class ConvNorm(nn.Module):
    """Convolution, batch normalisation with fixed statistics, ReLU.

    Attributes:
      features: number of filters.
      size: height and width of the filter.
      stride: in pixels. With 2, the picture is not padded.
      padding: of a convolution with stride 1.
    """

    features: int
    size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features)."""
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        beta = self.param("beta", nn.initializers.zeros, (self.features,))
        mean = self.param("mean", nn.initializers.zeros, (self.features,))
        var = self.param("var", nn.initializers.ones, (self.features,))
        # (conv(x) - mean) / sqrt(var + epsilon) + beta, with the division moved into the filters.
        scale = jax.lax.rsqrt(var + EPSILON)
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            (kernel * scale).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="VALID" if self.stride > 1 else self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.relu(x + (beta - mean * scale).astype(self.dtype))


class Tower(nn.Module):
    """Convolutions one after the other, named `conv`, `conv_1`, ...; `stride` is that of the last one."""

    layers: tuple[Layer, ...]
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', filters of the last layer)."""
        for i, (features, size) in enumerate(self.layers):
            stride = self.stride if i == len(self.layers) - 1 else 1
            x = ConvNorm(features, size, stride, dtype=self.dtype, name=_numbered("conv", i))(x)
        return x


class SplitTower(nn.Module):
    """A `Tower` whose end is two convolutions side by side, of 1x3 and 3x1 pixels: `mixed/conv`,
    `mixed/conv_1`."""

    layers: tuple[Layer, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, 768)."""
        for i, (features, size) in enumerate(self.layers):
            x = ConvNorm(features, size, dtype=self.dtype, name=_numbered("conv", i))(x)
        return Split(self.dtype, name="mixed")(x)


class Split(nn.Module):
    """Two convolutions of the same input, 1x3 and 3x1, joined."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, 768)."""
        wide = ConvNorm(384, (1, 3), dtype=self.dtype, name="conv")(x)
        tall = ConvNorm(384, (3, 1), dtype=self.dtype, name="conv_1")(x)
        return jnp.concatenate([wide, tall], axis=-1)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class PoolTower(nn.Module):
    """A pool of 3x3 pixels with stride 1, then a convolution of one pixel. `kind`: mean (of the pixels that
    are there) or max."""

    features: int
    kind: str = "mean"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features)."""
        if self.kind == "max":
            x = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            x = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        return ConvNorm(self.features, (1, 1), dtype=self.dtype, name="conv")(x)


class Block(nn.Module):
    """Branches of the same input, joined along the channels.

    Attributes:
      first: filters of the branch `conv` and its size; None where there is no such branch.
      towers: the layers of `tower`, `tower_1`, ...
      pool: filters of the pooling branch, which is the last tower; None for a plain max pool.
      pool_kind: mean or max.
      split: whether the towers end in two convolutions side by side.
      stride: of the block, in pixels.
    """

    first: Layer | None
    towers: tuple[tuple[Layer, ...], ...]
    pool: int | None
    pool_kind: str = "mean"
    split: bool = False
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(B, H, W, C) -> (B, H', W', C'), and the output of the branch `conv`, None without one."""
        first, branches = None, []
        if self.first is not None:
            first = ConvNorm(*self.first, self.stride, dtype=self.dtype, name="conv")(x)
            branches.append(first)
        for i, layers in enumerate(self.towers):
            name = _numbered("tower", i)
            if self.split:
                branches.append(SplitTower(layers, self.dtype, name=name)(x))
            else:
                branches.append(Tower(layers, self.stride, self.dtype, name=name)(x))
        if self.pool is None:
            branches.append(_max_pool(x))
        else:
            name = _numbered("tower", len(self.towers))
            branches.append(PoolTower(self.pool, self.pool_kind, self.dtype, name=name)(x))
        return jnp.concatenate(branches, axis=-1), first


def _block_a(pool: int) -> dict:
    towers = ((48, (1, 1)), (64, (5, 5))), ((64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
    return dict(first=(64, (1, 1)), towers=towers, pool=pool)


def _block_c(width: int) -> dict:
    short = (width, (1, 1)), (width, (1, 7)), (192, (7, 1))
    long = (width, (1, 1)), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))
    return dict(first=(192, (1, 1)), towers=(short, long), pool=192)


def _block_e(pool_kind: str) -> dict:
    towers = ((384, (1, 1)),), ((448, (1, 1)), (384, (3, 3)))
    return dict(first=(320, (1, 1)), towers=towers, pool=192, pool_kind=pool_kind, split=True)


_BLOCK_B = dict(
    first=(384, (3, 3)), towers=(((64, (1, 1)), (96, (3, 3)), (96, (3, 3))),), pool=None, stride=2
)
_BLOCK_D = dict(
    first=None,
    towers=(
        ((192, (1, 1)), (320, (3, 3))),
        ((192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
    ),
    pool=None,
    stride=2,
)
# The blocks `mixed`, `mixed_1`, ..., `mixed_10`.
BLOCKS = (
    _block_a(32), _block_a(64), _block_a(64), _BLOCK_B,
    _block_c(128), _block_c(160), _block_c(160), _block_c(192), _BLOCK_D,
    _block_e("mean"), _block_e("max"),
)  # fmt: skip


class Inception(nn.Module):
    """The whole network.

    Attributes:
      logits: number of classes, 1008; None for weights without the classifier.
    """

    logits: int | None = None
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          image: (B, 299, 299, 3), (x - 128) / 128 of pixels x in [0, 255] (`data.ops.resize_tf1`).

        Returns:
          All float32:
          pool: (B, 2048), the mean of the last block over the picture (`pool_3`), for FID, KID, precision and
            recall.
          spatial: (B, 2023), the first 7 channels of `mixed_6/conv` (17x17) in the order height, width,
            channel, for sFID as in ADM's evaluator.
          logits: (B, logits), the classifier's products without its bias. The Inception scores of Salimans et
            al. 2016, ADM and torch-fidelity (`logits_unbiased`) all leave the bias out.

        Raises:
          ValueError: when the images are not of 299x299 pixels.
        """
        b, h, w, _ = image.shape
        if (h, w) != (SIZE, SIZE):
            raise InputError(f"Inception takes {SIZE}x{SIZE} images, got {h}x{w}")
        conv = lambda i, features, size, stride=1, padding="VALID": ConvNorm(
            features, (size, size), stride, padding, self.dtype, name=_numbered("conv", i)
        )
        x = conv(0, 32, 3, stride=2)(image)
        x = conv(2, 64, 3, padding="SAME")(conv(1, 32, 3)(x))
        x = conv(4, 192, 3)(conv(3, 80, 1)(_max_pool(x)))
        x = _max_pool(x)
        spatial, hooked = None, with_hooks(self, Block, self.gather, "none")
        for i, block in enumerate(BLOCKS):
            x, first = hooked(**block, dtype=self.dtype, name=_numbered("mixed", i))(x)
            if i == 6:
                spatial = first[..., :SPATIAL_CHANNELS].reshape(b, -1)
        pool = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        made = {"pool": pool, "spatial": spatial.astype(jnp.float32)}
        if self.logits is not None:
            made["logits"] = nn.Dense(self.logits, use_bias=False, name="logits")(pool)
        return made
