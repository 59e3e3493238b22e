"""The diffusion prior: a causal transformer that denoises CLIP image embeddings (unCLIP section 2.2).

The sequence is [text (L), z_t, time step, noised z_i, query]. The output at the query is the prediction of
the clean z_i. The mask is causal and the text comes first, so the first L + 1 tokens do not depend on t or on
the noised embedding. Sampling therefore keeps their keys and values (`prefill`) and runs three tokens per
step (`predict`). The text is either the states of the frozen CLIP (Karlo) or embedded tokens. With tokens,
this one transformer encodes the caption too (our reading of the paper).

The topology is that of the public Karlo prior: pre-norm blocks, exact GELU, one learned position per token,
separate input projections for the text states, z_t and the noised embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm, TimeMLP
from unclip_jax.models.transformer import KeysValues, Transformer, causal_mask

EXTRA_TOKENS = 4  # z_t, time step, noised z_i, query


class DiffusionPrior(nn.Module):
    """f(z^(t), t, y) -> z_i.

    Attributes:
      embed_dim: D, the size of CLIP's embeddings.
      length: L, the number of text states or tokens.
      width, layers, heads: of the transformer.
      text: {"num_embeddings": number of token ids} for a prior on tokens, None for one on CLIP's text states.
    """

    embed_dim: int
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
        dense = lambda: nn.Dense(self.width, dtype=self.dtype)
        if self.text is None:
            self.text_states_in = dense()
        else:
            self.token_embedding = nn.Embed(
                **self.text, features=self.width, embedding_init=nn.initializers.normal(0.02)
            )
        self.text_embed_in, self.z_in = dense(), dense()
        self.time = TimeMLP(self.width, self.width, self.dtype)
        self.query = self.param("query", nn.initializers.normal(0.02), (self.width,))
        slots = self.length + EXTRA_TOKENS
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.01), (slots, self.width)
        )
        self.transformer = Transformer(
            self.layers, self.heads, mlp_ratio=self.mlp_ratio, activation=self.activation,
            dropout=self.dropout, remat=self.remat, scan=self.scan, dtype=self.dtype, gather=self.gather,
        )  # fmt: skip
        self.ln_out = LayerNorm(dtype=self.dtype)
        self.z_out = nn.Dense(self.embed_dim, dtype=self.dtype)

    def _caption(
        self,
        text_embed: jax.Array,
        text_states: jax.Array | None,
        text_mask: jax.Array | None,
        tokens: jax.Array | None,
        token_mask: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        # The tokens that depend on the caption alone (B, L + 1, W), and the slots that may be attended to (B,
        # L + 4).
        text, mask = (text_states, text_mask) if self.text is None else (tokens, token_mask)
        if text.shape[1] != self.length:
            raise InputError(f"the prior was built for {self.length} text states, got {text.shape[1]}")
        if self.text is None:
            states = self.text_states_in(text.astype(self.dtype))
        else:
            states = self.token_embedding(text).astype(self.dtype)
        x = jnp.concatenate([states, self.text_embed_in(text_embed.astype(self.dtype))[:, None]], axis=1)
        return x, jnp.pad(mask.astype(bool), ((0, 0), (0, EXTRA_TOKENS)), constant_values=True)

    def _noised(self, z: jax.Array, t: jax.Array) -> jax.Array:
        # The tokens that change from step to step: (B, 3, W).
        query = jnp.broadcast_to(self.query.astype(self.dtype), (z.shape[0], self.width))
        return jnp.stack([self.time(t), self.z_in(z.astype(self.dtype)), query], axis=1)

    def _read(self, x: jax.Array) -> jax.Array:
        return self.z_out(self.ln_out(x[:, -1])).astype(jnp.float32)

    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        *,
        text_embed: jax.Array,
        text_states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts the clean embedding.

        Args:
          z: (B, D) noised image embedding, in the prior's normalised space.
          t: (B,) time steps in [0, T).
          text_embed: (B, D) raw z_t.
          text_states: (B, L, Wt) text tower states, or tokens: (B, L) int32.
          text_mask, token_mask: (B, L) bool, the mask of the states or of the tokens: True on the caption's
            own tokens. Every row keeps its start token.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, D) float32, the predicted clean embedding in the normalised space.

        Raises:
          ValueError: when the length of the text is not the model's.
        """
        caption, allowed = self._caption(text_embed, text_states, text_mask, tokens, token_mask)
        x = jnp.concatenate([caption, self._noised(z, t)], axis=1) + self.position_embedding.astype(
            self.dtype
        )
        return self._read(
            self.transformer(x, causal_mask(x.shape[1]) & allowed[:, None, None, :], deterministic)
        )

    def prefill(
        self,
        *,
        text_embed: jax.Array,
        text_states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        token_mask: jax.Array | None = None,
    ) -> tuple[list[KeysValues], jax.Array]:
        """Caches for `predict`; the arguments are those of `__call__`.

        Returns:
          The keys and values of the captions, which are the same at every step, with room for the three
          tokens that follow; and the slots that may be attended to, (B, L + 4) bool.
        """
        caption, allowed = self._caption(text_embed, text_states, text_mask, tokens, token_mask)
        n = caption.shape[1]
        mask = causal_mask(n) & allowed[:, None, None, :n]
        _, layers = self.transformer.run(caption + self.position_embedding[:n].astype(self.dtype), mask)
        pad = lambda a: jnp.pad(a, ((0, 0), (0, EXTRA_TOKENS - 1), (0, 0), (0, 0)))
        return [KeysValues(*map(pad, layer)) for layer in layers], allowed

    def predict(self, z: jax.Array, t: jax.Array, caches: list[KeysValues], allowed: jax.Array) -> jax.Array:
        """As `__call__`, with the caches that `prefill` returns for the same rows.

        A step is one pass over three tokens instead of L + 4.
        """
        n = self.length + 1
        x = self._noised(z, t) + self.position_embedding[n:].astype(self.dtype)
        mask = causal_mask(n + EXTRA_TOKENS - 1)[:, :, n:] & allowed[:, None, None, :]
        return self._read(self.transformer.run(x, mask, True, None, caches, n)[0])
