"""The diffusion prior: a causal transformer that denoises CLIP image embeddings (unCLIP section 2.2).

The sequence is [text (L), z_t, time step, noised z_i, query]; the prediction of the clean z_i is read at the query. As the mask is
causal and the text comes first, the first L + 1 tokens never depend on t or on the noised embedding. The text is either the states of the
frozen CLIP (Karlo), or embedded tokens, so that this one transformer encodes the caption too (our reading of the paper).

Same topology as the public Karlo prior: pre-norm blocks, exact GELU, one learned position per token, separate input projections
for the text states, z_t and the noised embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Dtype, Gather, LayerNorm, TimeMLP
from unclip_jax.models.transformer import Transformer, causal_mask

EXTRA_TOKENS = 4  # z_t, time step, noised z_i, query


class DiffusionPrior(nn.Module):
    """f(z^(t), t, y) -> z_i.

    Attributes:
      embed_dim: D, the size of CLIP's embeddings.
      length: L, the number of text states or tokens.
      width, layers, heads: of the transformer.
      text: {"num_embeddings": number of token ids} when it takes tokens, None when it takes CLIP's text states.
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
    remat: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
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
          text_mask, token_mask: (B, L) bool, of the one given: True on the caption's own tokens; every row keeps its start token.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, D) float32, the predicted clean embedding in the normalised space.

        Raises:
          ValueError: when the text has another length than the model.
        """
        given, mask = (text_states, text_mask) if self.text is None else (tokens, token_mask)
        b, length = given.shape[:2]
        if length != self.length:
            raise ValueError(f"the prior was built for {self.length} text states, got {length}")
        dense = lambda name: nn.Dense(self.width, dtype=self.dtype, name=name)  # noqa: E731
        if self.text is None:
            states = dense("text_states_in")(given.astype(self.dtype))
        else:
            embedding = nn.Embed(**self.text, features=self.width, embedding_init=nn.initializers.normal(0.02), name="token_embedding")
            states = embedding(given).astype(self.dtype)
        query = self.param("query", nn.initializers.normal(0.02), (self.width,))
        tokens = jnp.concatenate(
            [
                states,
                dense("text_embed_in")(text_embed.astype(self.dtype))[:, None],
                TimeMLP(self.width, self.width, self.dtype, name="time")(t)[:, None],
                dense("z_in")(z.astype(self.dtype))[:, None],
                jnp.broadcast_to(query.astype(self.dtype), (b, 1, self.width)),
            ],
            axis=1,
        )
        n = length + EXTRA_TOKENS
        positions = self.param("position_embedding", nn.initializers.normal(0.01), (n, self.width))
        allowed = jnp.pad(mask.astype(bool), ((0, 0), (0, EXTRA_TOKENS)), constant_values=True)
        x = Transformer(
            self.layers,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            gather=self.gather,
            name="transformer",
        )(tokens + positions.astype(self.dtype), causal_mask(n) & allowed[:, None, None, :], deterministic)
        x = LayerNorm(dtype=self.dtype, name="ln_out")(x[:, -1])
        return nn.Dense(self.embed_dim, dtype=self.dtype, name="z_out")(x).astype(jnp.float32)
