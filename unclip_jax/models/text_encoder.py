"""A stage's own text encoder, trained with the stage: GLIDE's (Nichol et al. 2021, section 3.2).

unCLIP uses it in the decoder and in the autoregressive prior. Token embeddings plus learned positions pass
through a transformer without a causal mask. Padding is not masked: a learned embedding per position replaces
it. All states feed the stage's attention, and the last one feeds its time embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm
from unclip_jax.models.transformer import Transformer


class TextEncoder(nn.Module):
    """Encodes captions as states.

    Attributes:
      vocab_size: number of token ids.
      length: L, tokens per caption.
      width, layers, heads: of the transformer.
    """

    vocab_size: int
    length: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes captions.

        Args:
          tokens: (B, L) int32 in [0, vocab_size).
          mask: (B, L) bool, True on the caption's own tokens.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          states (B, L, W), and the last of them (B, W).

        Raises:
          ValueError: when the length of the captions is not the encoder's.
        """
        if tokens.shape[1] != self.length:
            raise InputError(f"the text encoder was built for {self.length} tokens, got {tokens.shape[1]}")
        table = lambda name, std: self.param(name, nn.initializers.normal(std), (self.length, self.width))
        x = nn.Embed(
            self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="token_embedding"
        )(tokens)
        x = jnp.where(
            mask[..., None], x + table("position_embedding", 0.01), table("padding_embedding", 0.01)
        ).astype(self.dtype)
        x = Transformer(
            self.layers, self.heads, dropout=self.dropout, remat=self.remat, scan=self.scan,
            dtype=self.dtype, gather=self.gather, name="transformer",
        )(x, None, deterministic)  # fmt: skip
        x = LayerNorm(dtype=self.dtype, name="ln_out")(x)
        return x, x[:, -1]
