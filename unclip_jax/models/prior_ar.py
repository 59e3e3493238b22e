"""The autoregressive prior: CLIP image embeddings as a sequence of codes (unCLIP section 2.2).

The codes are those of `models.codec`. The model is a causal transformer over [z_t, d, c_1, ..., c_N], where d
is the quantised dot product z_i.z_t. The token before c_n predicts c_n. Each layer prepends the caption's
keys and values to those of the sequence. (The paper does not say how the caption enters. Its transformer has
a context of 384, which 319 codes and 256 text tokens exceed.) The model never predicts d: training uses the
true one, and sampling draws it from the upper part of its distribution over the training data.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.codec import cosine
from unclip_jax.models.layers import Dtype, Gather, LayerNorm
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.transformer import KeysValues, Transformer, causal_mask

EXTRA_TOKENS = 2  # z_t and the dot product


def dot_token(edges: jax.Array, z_image: jax.Array, z_text: jax.Array) -> jax.Array:
    """The bin of z_i.z_t: edges (bins - 1,) ascending, raw embeddings (B, D) -> (B,) int32 in [0, bins)."""
    return jnp.searchsorted(edges, cosine(z_image, z_text)).astype(jnp.int32)


class ARPrior(nn.Module):
    """p(c_n | c_<n, d, z_t, y).

    Attributes:
      codes: N, the number of codes (principal components).
      buckets: values of a code.
      dot_bins: values of the dot-product token.
      length: L, the number of text states.
      width, layers, heads: of the transformer.
      text: keyword arguments of the prior's own `TextEncoder` (the paper); None for CLIP's text states.
    """

    codes: int
    buckets: int
    dot_bins: int
    length: int
    width: int
    layers: int
    heads: int
    text: dict | None = None
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def setup(self):
        embed = lambda count: nn.Embed(
            count, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        self.code_embedding, self.dot_embedding = embed(self.buckets), embed(self.dot_bins)
        if self.text is not None:
            self.text_encoder = TextEncoder(
                **self.text, remat=self.remat, scan=self.scan, dtype=self.dtype, gather=self.gather
            )
        self.text_embed_in = nn.Dense(self.width, dtype=self.dtype)
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.01), (self.codes + 1, self.width)
        )
        self.transformer = Transformer(
            self.layers, self.heads, mlp_ratio=self.mlp_ratio, activation=self.activation,
            dropout=self.dropout, remat=self.remat, scan=self.scan, dtype=self.dtype, gather=self.gather,
        )  # fmt: skip
        self.ln_out = LayerNorm(dtype=self.dtype)
        self.logits_out = nn.Dense(self.buckets, dtype=self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.logits_out(self.ln_out(x)).astype(jnp.float32)

    def _start(self, dot: jax.Array, text_embed: jax.Array) -> jax.Array:
        return jnp.stack([self.text_embed_in(text_embed.astype(self.dtype)), self.dot_embedding(dot)], axis=1)

    def encode_text(
        self,
        *,
        text_states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """The caption as the layers see it: states (B, L, Wt) and mask (B, L).

        CLIP's states pass through. The prior's own text encoder encodes tokens (B, L) int32.
        """
        if self.text is None:
            return text_states, text_mask
        return self.text_encoder(tokens, token_mask, deterministic)[0], jnp.ones(tokens.shape, bool)

    def __call__(
        self,
        codes: jax.Array,
        dot: jax.Array,
        *,
        text_embed: jax.Array,
        text_states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of every code, given the codes before it.

        Args:
          codes: (B, N) int32 in [0, buckets).
          dot: (B,) int32 in [0, dot_bins).
          text_embed: (B, D) raw z_t.
          text_states: (B, L, Wt) text tower states, or tokens: (B, L) int32.
          text_mask, token_mask: (B, L) bool, the mask of the states or of the tokens: True on the caption's
          own
            tokens.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, N, buckets) float32.

        Raises:
          ValueError: when the length of the codes or of the text is not the model's.
        """
        b, n = codes.shape
        text_states, text_mask = self.encode_text(
            text_states=text_states,
            text_mask=text_mask,
            tokens=tokens,
            token_mask=token_mask,
            deterministic=deterministic,
        )
        if n != self.codes or text_states.shape[1] != self.length:
            raise InputError(
                f"this prior has {self.codes} codes and {self.length} text states, "
                f"got {n} and {text_states.shape[1]}"
            )
        x = jnp.concatenate([self._start(dot, text_embed), self.code_embedding(codes[:, :-1])], axis=1)
        x = x + self.position_embedding.astype(self.dtype)
        text = jnp.broadcast_to(text_mask.astype(bool)[:, None, None], (b, 1, n + 1, self.length))
        mask = jnp.concatenate([text, jnp.broadcast_to(causal_mask(n + 1), (b, 1, n + 1, n + 1))], axis=-1)
        return self._logits(self.transformer(x, mask, deterministic, text_states)[:, 1:])

    def prefill(
        self, dot: jax.Array, *, text_embed: jax.Array, text_states: jax.Array, text_mask: jax.Array
    ) -> tuple[jax.Array, list[KeysValues]]:
        """The first code's logits (B, buckets), and caches with room for all codes.

        The caption is given as `encode_text` returns it.
        """
        b = dot.shape[0]
        x = self._start(dot, text_embed) + self.position_embedding[:EXTRA_TOKENS].astype(self.dtype)
        text = jnp.broadcast_to(text_mask.astype(bool)[:, None, None], (b, 1, EXTRA_TOKENS, self.length))
        mask = jnp.concatenate(
            [text, jnp.broadcast_to(causal_mask(EXTRA_TOKENS), (b, 1, EXTRA_TOKENS, EXTRA_TOKENS))], axis=-1
        )
        x, layers = self.transformer.run(x, mask, True, text_states)
        pad = lambda a: jnp.pad(a, ((0, 0), (0, self.codes + 1 - EXTRA_TOKENS), (0, 0), (0, 0)))
        return self._logits(x[:, -1]), [KeysValues(*map(pad, layer)) for layer in layers]

    def extend(
        self, code: jax.Array, n: jax.Array, caches: list[KeysValues], *, text_mask: jax.Array
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Adds the n-th code (B,) (n from 0) to the caches.

        Returns:
          The next code's logits (B, buckets), and the caches.
        """
        position = n + EXTRA_TOKENS
        x = self.code_embedding(code)[:, None] + jnp.take(self.position_embedding, position, axis=0).astype(
            self.dtype
        )
        slots = jnp.arange(self.codes + 1) <= position
        mask = jnp.concatenate(
            [text_mask.astype(bool), jnp.broadcast_to(slots, (code.shape[0], self.codes + 1))], axis=1
        )
        x, caches = self.transformer.run(x, mask[:, None, None], True, None, caches, self.length + position)
        return self._logits(x[:, 0]), caches
