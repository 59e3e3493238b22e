"""CLIP: a ViT image tower and a causal text tower (Radford et al. 2021; unCLIP appendix C for the paper's
ViT-H/16).

The towers are OpenAI's: class token, learned positions, ln_pre and ln_post, QuickGELU. The text tower is
causal and pooled at the end-of-text token. The logit scale starts at ln(1/0.07) and is clamped to ln 100.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm
from unclip_jax.models.transformer import Transformer, causal_mask

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100.0)


class TextFeatures(NamedTuple):
    """The text tower's output: `embed` (B, D) raw projection, `states` (B, L, W) after the final norm."""

    embed: jax.Array
    states: jax.Array


class ImageTower(nn.Module):
    """ViT: patches -> class token + positions -> ln_pre -> blocks -> ln_post(class token) -> projection.

    mean, std: of the training pixels in [0, 1], by channel; the tower normalises by them.
    noise_steps: T, for a tower that sees noised images (GLIDE): the class token is that of the time step.
    key_bias: see `transformer.Attention`.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    noise_steps: int | None = None
    key_bias: bool = True
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, image: jax.Array, project: bool = True, t: jax.Array | None = None) -> jax.Array:
        """(B, H, W, 3) in [-1, 1], H = W = image_size -> (B, D), not normalised; (B, width) without
        projection.

        t: (B,) the images' time steps in [0, T), whole numbers, for a tower that sees noised images.

        Raises:
          ValueError: when the image is not of the tower's size.
        """
        b, h, w, _ = image.shape
        if (h, w) != (self.image_size, self.image_size):
            raise InputError(
                f"CLIP's image tower takes {self.image_size}x{self.image_size} images, got {h}x{w}"
            )
        x = ((image + 1.0) / 2.0 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        p = self.patch_size
        x = nn.Conv(
            self.width,
            (p, p),
            strides=(p, p),
            use_bias=False,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed",
        )(x.astype(self.dtype))
        x = x.reshape(b, -1, self.width)
        scale = self.width**-0.5
        if self.noise_steps is None:
            cls = self.param("class_embedding", nn.initializers.normal(scale), (self.width,))
        else:
            steps = (self.noise_steps, self.width)
            table = self.param("step_embedding", nn.initializers.normal(scale), steps)
            cls = jnp.take(table, t, axis=0)[:, None]
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (b, 1, self.width)), x], axis=1)
        positions = self.param("position_embedding", nn.initializers.normal(scale), (x.shape[1], self.width))
        x = LayerNorm(dtype=self.dtype, name="ln_pre")(x + positions.astype(x.dtype))
        x = Transformer(
            self.layers, self.heads, self.mlp_ratio, self.activation, key_bias=self.key_bias,
            remat=self.remat, scan=self.scan, dtype=self.dtype, gather=self.gather, name="transformer",
        )(x)  # fmt: skip
        x = LayerNorm(dtype=self.dtype, name="ln_post")(x[:, 0])
        if not project:
            return x.astype(jnp.float32)
        x = nn.Dense(
            self.embed_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(scale),
            name="projection",
        )(x)
        return x.astype(jnp.float32)


class TextTower(nn.Module):
    """Causal transformer over byte-pair tokens, pooled at the end-of-text token: the highest token id.

    project: False for the towers of Stable Diffusion, whose states alone are used; the embedding is then the
      pooled state, and D = W.
    """

    embed_dim: int
    vocab_size: int
    length: int
    width: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0
    project: bool = True
    key_bias: bool = True
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> TextFeatures:
        """(B, L) int32 in [0, vocab_size), L = length -> embed (B, D) not normalised, states (B, L, W)."""
        b, length = tokens.shape
        if length != self.length:
            raise InputError(f"CLIP's text tower takes {self.length} tokens, got {length}")
        table = self.param("token_embedding", nn.initializers.normal(0.02), (self.vocab_size, self.width))
        positions = self.param("position_embedding", nn.initializers.normal(0.01), (self.length, self.width))
        x = jnp.take(table, tokens, axis=0).astype(self.dtype) + positions.astype(self.dtype)
        x = Transformer(
            self.layers, self.heads, self.mlp_ratio, self.activation, key_bias=self.key_bias,
            remat=self.remat, scan=self.scan, dtype=self.dtype, gather=self.gather, name="transformer",
        )(x, causal_mask(length))  # fmt: skip
        states = LayerNorm(dtype=self.dtype, name="ln_final")(x)
        pooled = states[jnp.arange(b), jnp.argmax(tokens, axis=-1)]
        if not self.project:
            return TextFeatures(pooled.astype(jnp.float32), states.astype(jnp.float32))
        embed = nn.Dense(
            self.embed_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.width**-0.5),
            name="projection",
        )(pooled)
        return TextFeatures(embed.astype(jnp.float32), states.astype(jnp.float32))


class CLIP(nn.Module):
    """Both towers and the temperature.

    Attributes:
      embed_dim: D, the joint embedding's size.
      image: keyword arguments of `ImageTower` (image_size, patch_size, width, layers, heads, mean, std); None
        for no image tower.
      text: keyword arguments of `TextTower` (vocab_size, length, width, layers, heads); None for no text
        tower.
      activation: `quick_gelu` (OpenAI) or `gelu`.

    An image tower with `noise_steps` reads noised images, and `encode_image` then takes their time steps.
    """

    embed_dim: int
    image: dict | None
    text: dict | None
    activation: str = "quick_gelu"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def setup(self):
        shared = dict(embed_dim=self.embed_dim, activation=self.activation, dtype=self.dtype)
        shared |= dict(remat=self.remat, scan=self.scan, gather=self.gather)
        if self.image is not None:
            self.image_tower = ImageTower(**self.image, **shared)
        if self.text is not None:
            self.text_tower = TextTower(**self.text, **shared)
        if self.image is not None and self.text is not None:
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def encode_image(self, image: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """(B, H, W, 3) float32 in [-1, 1] -> (B, D) float32 raw image embedding z_i."""
        return self.image_tower(image, t=t)

    def image_features(self, image: jax.Array) -> jax.Array:
        """As `encode_image`, before the projection: (B, W) float32, the features for a linear probe."""
        return self.image_tower(image, project=False)

    def encode_text(self, tokens: jax.Array) -> TextFeatures:
        """(B, L) int32 -> raw text embedding z_t (B, D) and the text states (B, L, W), both float32."""
        return self.text_tower(tokens)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, t: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit-norm image (B, D) and text (B, D) embeddings, and the scale exp(min(logit_scale, ln 100))."""
        scale = jnp.exp(jnp.minimum(self.logit_scale, MAX_LOGIT_SCALE))
        return unit(self.encode_image(image, t)), unit(self.encode_text(tokens).embed), scale


def unit(z: jax.Array) -> jax.Array:
    """Divides the last axis by its Euclidean norm (floored at 1e-8)."""
    return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-8)
