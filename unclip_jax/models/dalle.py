"""DALL-E's transformer over text and image tokens (Ramesh et al. 2021, section 2.2 and appendix B).

One sequence: a start token, L text tokens, N = G x G image codes in raster order. Every position predicts the
token behind it. A text position that the caption leaves empty has a padding token of its own. Image positions
have an embedding of their row and one of their column.

Text sees earlier text. Image codes see all of the text, and of the image what their layer's mask allows
(figure 11; o counts back in raster order, so that "row" and "conv" wrap around at the edges):

    row     the last G + 1 codes, o = 0 ... G: the last of them lies above
    column  the codes of the same column in this row and those above, o = 0, G, 2 G, ...
    conv    an 11 x 11 window's causal half: o = i G + j with i = 0 ... 5, |j| <= 5, o >= 0

Layer i of 1 ... n-1 is "column" where (i - 2) mod 4 = 0, and "row" elsewhere; the last is "conv".

`attend_image` computes this in blocks: a row of codes, or a transposed one, sees the text and the few rows
that its mask can reach. `dense_mask` is the definition, which drawing and the tests use.

Shape letters: B batch, S sequence 1 + L + N, W width, K heads, D width of a head, V size of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.models.layers import ACTIVATIONS, Dtype, Gather, LayerNorm, attend, with_hooks
from unclip_jax.models.transformer import KeysValues, causal_mask

KINDS = ("row", "column", "conv", "full")


def layer_kinds(layers: int) -> tuple[str, ...]:
    """The masks of the layers, the first layer's first."""
    kinds = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return (*kinds, "conv")


def sees(kind: str, side: int, window: int = 11) -> np.ndarray:
    """Which codes of a G x G image a code sees: (N, N) bool, [code, seen code].

    Args:
      kind: row, column, conv, or full for all codes up to the code itself.
      side: G.
      window: of conv, odd.

    Raises:
      ValueError: on another kind.
    """
    codes = np.arange(side**2)
    back = codes[:, None] - codes[None]  # how far back a seen code lies
    if kind == "full":
        return back >= 0
    if kind == "row":
        return (back >= 0) & (back <= side)
    if kind == "column":
        return (back >= 0) & (back % side == 0)
    if kind == "conv":
        half = window // 2
        offsets = np.arange(half + 1)[:, None] * side + np.arange(-half, half + 1)[None]
        return (back >= 0) & np.isin(back, offsets[offsets >= 0])
    raise InputError(f"unknown mask {kind!r}; choose one of {', '.join(KINDS)}")


def dense_mask(kind: str, text: int, side: int, window: int = 11) -> np.ndarray:
    """The mask of the whole sequence: (S, S) bool, [position, seen position].

    Args:
      kind, side, window: as in `sees`.
      text: number of positions before the image, the start token among them.
    """
    total = text + side**2
    mask = np.zeros((total, total), bool)
    mask[:text, :text] = np.tril(np.ones((text, text), bool))
    mask[text:, :text] = True
    mask[text:, text:] = sees(kind, side, window)
    return mask


def attend_image(
    q: jax.Array, k: jax.Array, v: jax.Array, kind: str, text: int, side: int, window: int = 11
) -> jax.Array:
    """Attention of the whole sequence under a layer's mask, in blocks.

    Args:
      q, k, v: (B, S, K, D).
      kind, text, side, window: as in `dense_mask`.

    Returns:
      (B, S, K, D).
    """
    b, _, heads, width = q.shape
    of_text = attend(q[:, :text], k[:, :text], v[:, :text], causal_mask(text))
    # Rows of codes. For "column", rows of the transposed image, whose codes see their own row alone.
    transpose = kind == "column"

    def rows(x: jax.Array) -> jax.Array:
        x = x[:, text:].reshape(b, side, side, heads, width)
        return jnp.swapaxes(x, 1, 2) if transpose else x

    reach = {"row": 1, "column": 0, "conv": window // 2 + 1, "full": side - 1}[kind]
    reach = min(reach, side - 1)  # rows above that a row sees
    queries, keys, values = rows(q), rows(k), rows(v)
    order = np.arange(side**2).reshape(side, side)
    order = order.T if transpose else order
    allowed = sees(kind, side, window)

    def with_above(x: jax.Array) -> jax.Array:
        # (B, G, G, ...) -> (B, G, (reach + 1) G, ...): each row behind those above it.
        padded = jnp.pad(x, ((0, 0), (reach, 0), (0, 0), (0, 0), (0, 0)))
        joined = jnp.stack([padded[:, i : i + side] for i in range(reach + 1)], axis=2)
        return joined.reshape(b, side, (reach + 1) * side, heads, width)

    mask = np.zeros((side, side, (reach + 1) * side), bool)
    for row in range(side):
        for i in range(max(reach - row, 0), reach + 1):
            columns = slice(i * side, (i + 1) * side)
            mask[row, :, columns] = allowed[np.ix_(order[row], order[row - reach + i])]

    # One softmax over the text, which all rows share, and over the row's own window (M codes).
    queries = queries * width**-0.5
    logits = lambda spec, keys: jnp.einsum(spec, queries, keys, preferred_element_type=jnp.float32)
    to_text = logits("brckd,btkd->bkrct", k[:, :text])
    to_window = jnp.where(jnp.asarray(mask), logits("brckd,brmkd->bkrcm", with_above(keys)), -1e9)
    weights = jax.nn.softmax(jnp.concatenate([to_text, to_window], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrct,btkd->brckd", weights[..., :text], v[:, :text])
    out = out + jnp.einsum("bkrcm,brmkd->brckd", weights[..., text:], with_above(values))
    out = jnp.swapaxes(out, 1, 2) if transpose else out
    return jnp.concatenate([of_text, out.reshape(b, side**2, heads, width)], axis=1)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with a mask of its own.

    Attributes:
      heads: K.
      layers: of the whole transformer, for the initialisation.
      kind, text, side, window: as in `dense_mask`.
      dense: computes attention over the whole sequence under its mask, as the definition says.
    """

    heads: int
    layers: int
    kind: str
    text: int
    side: int
    window: int = 11
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dense: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deterministic: bool = True,
        cache: KeysValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x (B, S, W) -> (B, S, W), and the layer's keys and values.

        x may be the first positions of the sequence alone. With `cache` (keys and values of S slots),
        x (B, 1, W) is the position `index` ().
        """
        width = x.shape[-1]
        normal = lambda std: nn.initializers.normal(std)
        out_std = width**-0.5 * (2 * self.layers) ** -0.5
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        project = lambda name, x: nn.DenseGeneral(
            (self.heads, width // self.heads), dtype=self.dtype, kernel_init=normal(width**-0.5), name=name
        )(x)
        h = LayerNorm(dtype=self.dtype, name="ln1")(x)
        q, k, v = project("query", h), project("key", h), project("value", h)
        shape = (self.kind, self.text, self.side, self.window)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            seen = jnp.take(jnp.asarray(dense_mask(*shape)), index, axis=0)
            h = attend(q, k, v, seen[None, None, None])
        elif self.dense or x.shape[1] < self.text + self.side**2:
            mask = dense_mask(*shape)[: x.shape[1], : x.shape[1]]
            h = attend(q, k, v, jnp.asarray(mask)[None, None])
        else:
            h = attend_image(q, k, v, *shape)
        h = nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=normal(out_std), name="out"
        )(h)  # fmt: skip
        x = x + drop(h)
        h = LayerNorm(dtype=self.dtype, name="ln2")(x)
        hidden = round(width * self.mlp_ratio)
        h = nn.Dense(hidden, dtype=self.dtype, kernel_init=normal((2 * width) ** -0.5), name="fc1")(h)
        h = ACTIVATIONS["gelu"](h)
        h = nn.Dense(width, dtype=self.dtype, kernel_init=normal(out_std), name="fc2")(h)
        return x + drop(h), KeysValues(k, v)


class DALLE(nn.Module):
    """The transformer.

    Attributes:
      width, layers, heads: of the transformer; the paper has 62 heads of 64 in 64 layers.
      length: L, text tokens (256).
      vocab_size: V of the text (16,384).
      codes: V of the image (8,192).
      side: G of the image (32).
      window: of the convolutional mask (11).
      mlp_ratio, dropout: of the blocks.
      dense: attention without blocks, the reference.
      remat, gather: hooks on each block (`layers.with_hooks`).
    """

    width: int
    layers: int
    heads: int
    length: int = 256
    vocab_size: int = 16384
    codes: int = 8192
    side: int = 32
    window: int = 11
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dense: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def text(self) -> int:
        """Positions before the image: the start token and the text."""
        return 1 + self.length

    def setup(self):
        embed = lambda count: nn.Embed(
            count, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        # The padding tokens follow the vocabulary, one for each position, and then the start token.
        self.text_embedding = embed(self.vocab_size + self.length + 1)
        self.code_embedding = embed(self.codes)
        self.text_position, self.row_embedding, self.column_embedding = map(
            embed, (self.text, self.side, self.side)
        )
        block = with_hooks(self, Block, self.gather, self.remat, (2,))
        self.block = [
            block(
                self.heads, self.layers, kind, self.text, self.side, self.window, self.mlp_ratio,
                self.dropout, self.dense, self.dtype,
            )
            for kind in layer_kinds(self.layers)
        ]  # fmt: skip
        self.ln_out = LayerNorm(dtype=self.dtype)
        self.text_out = nn.Dense(self.vocab_size + self.length, dtype=self.dtype)
        self.codes_out = nn.Dense(self.codes, dtype=self.dtype)

    def text_ids(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens (B, L) int32 and their mask (B, L) -> ids (B, L), where empty positions have their own
        padding token."""
        return jnp.where(mask.astype(bool), tokens, self.vocab_size + jnp.arange(self.length))

    def _text(self, tokens, mask):
        if tokens.shape[1] != self.length:
            raise InputError(f"this transformer reads {self.length} text tokens, got {tokens.shape[1]}")
        start = jnp.full((len(tokens), 1), self.vocab_size + self.length, jnp.int32)
        ids = jnp.concatenate([start, self.text_ids(tokens, mask)], axis=1)
        return self.text_embedding(ids) + self.text_position(jnp.arange(self.text))

    def _code(self, codes, n):
        # Codes (B, P) at the places n (P,) of the image.
        where = self.row_embedding(n // self.side) + self.column_embedding(n % self.side)
        return self.code_embedding(codes) + where

    def _code_logits(self, x):
        return self.codes_out(self.ln_out(x)).astype(jnp.float32)

    def __call__(
        self, tokens: jax.Array, token_mask: jax.Array, codes: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of every token, given those before it.

        Args:
          tokens, token_mask: (B, L) int32 and bool, True on the caption's own tokens.
          codes: (B, N) int32 in raster order.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          Logits of the text (B, L, V + L), whose last L are the padding tokens, and of the image (B, N, V);
          float32.
        """
        n = jnp.arange(self.side**2)
        x = jnp.concatenate([self._text(tokens, token_mask), self._code(codes, n)], axis=1)
        for block in self.block:
            x, _ = block(x, deterministic)
        # Position 0, the start, predicts the first text token; the last text token predicts the first code.
        words = self.text_out(self.ln_out(x[:, : self.length])).astype(jnp.float32)
        return words, self._code_logits(x[:, self.length : -1])

    def prefill(
        self, tokens: jax.Array, token_mask: jax.Array, codes: jax.Array | None = None
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Reads what is given before the first code is drawn.

        Args:
          tokens, token_mask: as in `__call__`.
          codes: (B, P) int32, the first P of the N codes; None for none of them.

        Returns:
          The next code's logits (B, V), and caches with room for the whole sequence.
        """
        x, caches = self._text(tokens, token_mask), []
        if codes is not None:
            x = jnp.concatenate([x, self._code(codes, jnp.arange(codes.shape[1]))], axis=1)
        left = self.text + self.side**2 - x.shape[1]
        room = lambda a: jnp.pad(a, ((0, 0), (0, left), (0, 0), (0, 0)))
        for block in self.block:
            x, cache = block(x)
            caches.append(KeysValues(*map(room, cache)))
        return self._code_logits(x[:, -1]), caches

    def extend(
        self, code: jax.Array, n: jax.Array, caches: Sequence[KeysValues]
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Adds the n-th code (B,) (n from 0) to the caches.

        Returns:
          The next code's logits (B, V), and the caches.
        """
        x, moved = self._code(code[:, None], n[None]), []
        for block, cache in zip(self.block, caches, strict=True):
            x, cache = block(x, True, cache, self.text + n)
            moved.append(cache)
        return self._code_logits(x[:, 0]), moved
