"""The autoregressive prior: draws the codes of an image embedding one by one (unCLIP section 2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import CodeSamplingOptions, is_guided
from unclip_jax.generate.text import Texts, text_inputs, twice
from unclip_jax.generate.tokens import choose
from unclip_jax.models.codec import Codec, dequantize, unproject

# Folds of the stage's random key.
DOT = 0  # the dot-product token
CODES = 1  # the codes; folded again with each code's number


def sample_codes(
    prior: Network, codec: Codec, texts: Texts, rng: jax.Array, options: CodeSamplingOptions
) -> jax.Array:
    """Draws codes with cached keys and values, and returns the embeddings that they encode.

    Guidance runs both halves in one batch and combines their logits.

    Args:
      prior: of kind `prior_ar`.
      codec: turns codes into embeddings.
      texts: the captions and the empty caption.
      rng: one key, or (B,) keys.
      options: temperature, top_k, guidance.

    Returns:
      (B, D) float32 raw image embeddings. A row is NaN where one of the logits that it was drawn from is not
      finite: the codes themselves would not show it.
    """
    model, rows, guided = prior.module, texts.rows, is_guided(options)
    text = texts.both() if guided else texts.captions
    keys = rng if rng.ndim else jax.random.split(rng, rows)
    lowest = int(np.floor(options.dot_quantile * model.dot_bins))
    dot = jax.vmap(lambda key: jax.random.randint(key, (), lowest, model.dot_bins))(fold_in(keys, DOT))

    choose_code = lambda logits, n: choose(logits, fold_in(fold_in(keys, CODES), n), options)
    inputs = text_inputs(model, text)
    z_text = inputs.pop("text_embed")
    states, mask = prior.apply(**inputs, method="encode_text")
    dots = twice(dot, guided)
    logits, caches = prior.apply(
        dots, text_embed=z_text, text_states=states, text_mask=mask, method="prefill"
    )
    first, finite = choose_code(logits, 0)

    def body(carry, n):
        code, finite, caches = carry
        logits, caches = prior.apply(twice(code, guided), n, caches, text_mask=mask, method="extend")
        code, also = choose_code(logits, n + 1)
        return (code, finite & also, caches), code

    (_, finite, _), rest = jax.lax.scan(body, (first, finite, caches), jnp.arange(model.codes - 1))
    codes = jnp.concatenate([first[:, None], rest.T], axis=1)
    return jnp.where(finite[:, None], unproject(codec, dequantize(codec, codes, model.buckets)), jnp.nan)
