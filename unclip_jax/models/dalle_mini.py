"""The network of dalle-mini and dalle-mega (Dayma et al. 2021): an encoder reads a caption, and a decoder
predicts the codes of an image from it, one after another in raster order.

It is BART's transformer (Lewis et al. 2020, section 2) with three changes. No linear layer has a bias. The
normalisations stand where NormFormer puts them (Shleifer et al. 2021, section 2): before and after each
attention, before the MLP and inside it. The MLP is gated (Shazeer 2020, equation 6):

    x <- x + LN(attention(LN(x)))
    x <- x + LN(attention(LN(x), states))                 in the decoder, to the encoder's states
    x <- x + W_2 LN(gelu(W_g h) * (W_1 h)),  h = LN(x)

A normalisation in front of a linear layer has a bias and no scale: the layer would absorb it.

Positions are learned. The decoder's first input is a start token, whose id follows the codes. Further rows of
its tables have no use; they round the tables up for a mesh.

Shape letters: B batch, L text tokens, N = G x G codes, W width, K heads, D width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import ACTIVATIONS, Dtype, Gather, attend, with_hooks
from unclip_jax.models.transformer import KeysValues, causal_mask

EPSILON = 1e-5
STD = 0.02  # of all tables and kernels at initialisation


class LayerCache(NamedTuple):
    """What a layer of the decoder keeps: keys and values of the codes (B, N, K, D), and of the text
    (B, L, K, D)."""

    codes: KeysValues
    text: KeysValues


class Caches(NamedTuple):
    """What the decoder keeps between two codes: its layers' caches, and the text's mask (B, 1, 1, L)."""

    layers: list[LayerCache]
    mask: jax.Array


def _norm(dtype: Dtype, name: str, scaled: bool) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=EPSILON, dtype=dtype, use_scale=scaled, use_fast_variance=False, name=name
    )  # fmt: skip


class Attention(nn.Module):
    """Attention without biases, to the sequence itself or to the encoder's states.

    Attributes:
      heads: K.
      head_scale: whether each head's output has a learned factor (NormFormer).
    """

    heads: int
    head_scale: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        states: jax.Array | None = None,
        cache: KeysValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """(B, P, W) -> (B, P, W), and the keys and values that it attended to.

        Args:
          x: (B, P, W) the sequence.
          mask: bool, broadcastable to (B, K, P, keys).
          states: (B, L, W) what is attended to; None for the sequence itself.
          cache: with `index`, keys and values of earlier positions, to which those of x are added. Without,
            the keys and values of the states, which are then not given.
          index: the slot of the cache from which the sequence's own are written.
        """
        width = x.shape[-1]
        project = lambda name, x: nn.DenseGeneral(
            (self.heads, width // self.heads), use_bias=False, dtype=self.dtype,
            kernel_init=nn.initializers.normal(STD), name=name,
        )(x)  # fmt: skip
        if cache is not None and index is None:
            kept = cache
        else:
            seen = x if states is None else states
            kept = KeysValues(project("key", seen), project("value", seen))
            if cache is not None:
                kept = KeysValues(
                    *(
                        jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
                        for old, new in zip(cache, kept, strict=True)
                    )
                )
        h = attend(project("query", x), *kept, mask)
        if self.head_scale:
            h = h * self.param("head_scale", nn.initializers.ones, (self.heads,))[:, None].astype(self.dtype)
        out = nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=False, dtype=self.dtype,
            kernel_init=nn.initializers.normal(STD), name="out",
        )  # fmt: skip
        return out(h), kept


class Block(nn.Module):
    """A layer of the encoder or, where it reads text, of the decoder.

    Attributes:
      heads, head_scale: of the attention.
      hidden: width of the MLP.
      reads_text: whether it attends to the encoder's states.
      gated, norm_scales: as in `DalleMini`.
    """

    heads: int
    hidden: int
    reads_text: bool
    gated: bool = True
    norm_scales: bool = False
    head_scale: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        cache: LayerCache | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | LayerCache]:
        """x (B, P, W) -> (B, P, W), and the layer's keys and values (of the text, too, where it reads one).

        `cache` and `index` are those of `Attention`; with a cache the states may be left out.
        """
        attention = lambda name: Attention(self.heads, self.head_scale, self.dtype, name=name)
        norm = lambda name, scaled: _norm(self.dtype, name, scaled or self.norm_scales)
        own = None if cache is None else cache.codes
        h, kept = attention("attn")(norm("ln1", False)(x), mask, cache=own, index=index)
        x = x + norm("ln1_out", True)(h)
        if self.reads_text:
            text = cache.text if states is None else None
            h, of_text = attention("attn_text")(norm("ln_text", False)(x), text_mask, states, text)
            x, kept = x + norm("ln_text_out", True)(h), LayerCache(kept, of_text)
        dense = lambda name, features: nn.Dense(
            features, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(STD), name=name
        )
        h = norm("ln2", False)(x)
        if self.gated:
            h = ACTIVATIONS["gelu"](dense("gate", self.hidden)(h)) * dense("fc1", self.hidden)(h)
        else:
            h = ACTIVATIONS["gelu"](dense("fc1", self.hidden)(h))
        return x + dense("fc2", x.shape[-1])(norm("ln_hidden", False)(h)), kept


class Stack(nn.Module):
    """Tokens -> states: embeddings, blocks, and a normalisation at each end.

    Attributes:
      rows: of the table of tokens.
      length: positions.
      width, layers: W, and the number of blocks.
      block: the blocks' attributes.
      remat, gather: hooks on each block (`layers.with_hooks`).
    """

    rows: int
    length: int
    width: int
    layers: int
    block: dict
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        places: jax.Array,
        mask: jax.Array,
        states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        caches: list[LayerCache] | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, list]:
        """Ids (B, P) int32 at the places (P,) -> (B, P, W), and what each layer keeps (`Block`)."""
        embed = lambda count, name: nn.Embed(
            count, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(STD), name=name
        )
        x = embed(self.rows, "embedding")(ids) + embed(self.length, "position")(places)
        x = _norm(self.dtype, "ln_in", True)(x)
        block, kept = with_hooks(self, Block, self.gather, self.remat), []
        for i in range(self.layers):
            cache = None if caches is None else caches[i]
            layer = block(**self.block, dtype=self.dtype, name=f"block_{i}")
            x, of_layer = layer(x, mask, states, text_mask, cache, index)
            kept.append(of_layer)
        return _norm(self.dtype, "ln_out", self.block["norm_scales"])(x), kept


class DalleMini(nn.Module):
    """The network.

    Attributes:
      width, heads, hidden: W, K, and the width of the MLP, of both halves.
      layers, decoder_layers: of the encoder and of the decoder.
      length: L, text tokens (64).
      vocab_size: rows of the table of text tokens (50,264); the tokenizer may have fewer.
      codes: of the image (16,384). The start token follows them.
      rows: of the tables of codes, more than `codes`; those behind the start token have no use.
      side: G of the image (16).
      gated: whether the MLP has a gate.
      norm_scales: whether a normalisation in front of a linear layer has a scale, too.
      head_scale: whether each head of attention has a learned factor.
      remat, gather: hooks on each block (`layers.with_hooks`).
    """

    width: int
    layers: int
    decoder_layers: int
    heads: int
    hidden: int
    length: int = 64
    vocab_size: int = 50264
    codes: int = 16384
    rows: int = 16385
    side: int = 16
    gated: bool = True
    norm_scales: bool = False
    head_scale: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def setup(self):
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rows <= self.codes:
            raise InputError(
                f"rows={self.rows} must be more than the {self.codes} codes, for the start token"
            )
        block = {
            "heads": self.heads, "hidden": self.hidden, "gated": self.gated,
            "norm_scales": self.norm_scales, "head_scale": self.head_scale,
        }  # fmt: skip
        hooks = {"remat": self.remat, "dtype": self.dtype, "gather": self.gather}
        self.encoder = Stack(
            self.vocab_size, self.length, self.width, self.layers, block | {"reads_text": False}, **hooks
        )
        self.decoder = Stack(
            self.rows, self.side**2, self.width, self.decoder_layers, block | {"reads_text": True}, **hooks
        )
        self.codes_out = nn.Dense(
            self.rows, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(STD)
        )

    def encode(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Captions as tokens (B, L) int32 and their mask (B, L), where each row has a token -> states
        (B, L, W)."""
        if tokens.shape[1] != self.length:
            raise InputError(f"this network reads {self.length} text tokens, got {tokens.shape[1]}")
        return self.encoder(tokens, jnp.arange(self.length), mask.astype(bool)[:, None, None])[0]

    def _logits(self, x: jax.Array) -> jax.Array:
        # Of the codes alone: the other rows stand for nothing that can be drawn.
        return self.codes_out(x)[..., : self.codes].astype(jnp.float32)

    def __call__(self, tokens: jax.Array, mask: jax.Array, codes: jax.Array) -> jax.Array:
        """Tokens (B, L) int32, their mask (B, L), codes (B, N) int32 -> the logits (B, N, codes) float32 of
        each code, from the text and the codes before it."""
        start = jnp.full((len(codes), 1), self.codes, jnp.int32)
        given = jnp.concatenate([start, codes[:, :-1]], axis=1)
        states, places = self.encode(tokens, mask), jnp.arange(self.side**2)
        text_mask = mask.astype(bool)[:, None, None]
        x, _ = self.decoder(given, places, causal_mask(self.side**2), states, text_mask)
        return self._logits(x)

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, codes: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        """The logits (B, codes) of the first code, or of the one behind the known codes (B, R), and caches
        with room for all codes."""
        known = jnp.zeros((len(tokens), 0), jnp.int32) if codes is None else codes
        states, text_mask = self.encode(tokens, mask), mask.astype(bool)[:, None, None]
        room = jnp.zeros((len(tokens), self.side**2, self.heads, self.width // self.heads), self.dtype)
        empty = [LayerCache(KeysValues(room, room), None)] * self.decoder_layers
        start = jnp.full((len(tokens), 1), self.codes, jnp.int32)
        ids = jnp.concatenate([start, known], axis=1)
        return self._next(ids, jnp.zeros((), jnp.int32), Caches(empty, text_mask), states)

    def extend(self, code: jax.Array, n: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Adds the n-th code (B,) (n from 0) to the caches.

        Returns:
          The next code's logits (B, codes), and the caches.
        """
        return self._next(code[:, None], n + 1, caches)

    def _next(self, ids, first, caches, states=None):
        # Ids (B, P), whose first stands at the place `first`.
        places = first + jnp.arange(ids.shape[1])
        seen = (jnp.arange(self.side**2) <= places[:, None])[None, None]
        x, layers = self.decoder(ids, places, seen, states, caches.mask, caches.layers, first)
        return self._logits(x[:, -1]), Caches(layers, caches.mask)
