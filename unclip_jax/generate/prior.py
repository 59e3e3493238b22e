"""Image embeddings from captions, with either prior (unCLIP section 2.2).

Guidance runs the conditional and the unconditional half as one batch of 2B rows. The unconditional half has
the empty caption with its start and end tokens.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.embedding_space import denormalize
from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.errors import InputError
from unclip_jax.generate.codes import sample_codes
from unclip_jax.generate.denoise import NOISE, diffusion_sampler
from unclip_jax.generate.networks import Network, part_space
from unclip_jax.generate.options import Options, SamplingOptions, is_guided
from unclip_jax.generate.text import TextConditioning, Texts, text_inputs, twice
from unclip_jax.models.codec import Codec, cosine


def sample_prior(
    prior: Network, texts: Texts, rng: jax.Array, options: Options, codec: Codec | None = None
) -> jax.Array:
    """Draws image embeddings for captions.

    Args:
      prior: of kind `prior_diffusion`, `prior_laion` or `prior_ar`.
      texts: the captions and the empty caption, or one negative caption per row.
      rng: one key, or (B,) keys, one per row.
      options: of the prior's kind; `clip` is in units of the diffusion prior's normalised space.
      codec: the autoregressive prior's.

    Returns:
      (B, D) float32 raw image embeddings; those of `prior_laion` have about unit length.

    Raises:
      ValueError: when the autoregressive prior gets no codec.
    """
    autoregressive = prior.config["kind"] == "prior_ar"
    if autoregressive and codec is None:
        raise InputError("the autoregressive prior needs the codec of the codec part")
    rows, count = texts.rows, options.candidates
    repeated = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), texts.captions)
    if np.ndim(options.guidance_scale):  # one scale per caption
        options = replace(options, guidance_scale=jnp.repeat(options.guidance_scale, count))
    if count > 1:
        rng = rng if rng.ndim == 0 else jax.vmap(lambda key: jax.random.split(key, count))(rng).reshape(-1)
    if autoregressive:
        z = sample_codes(prior, codec, Texts(repeated, texts.empty), rng, options)
    elif prior.config["kind"] == "prior_laion":
        z = _sample_laion(prior, repeated, rng, options)
    else:
        z = _sample_embedding(prior, texts, rng, options)
    best = jnp.argmax(cosine(z, repeated.embed).reshape(rows, count), axis=1)
    return z.reshape(rows, count, -1)[jnp.arange(rows), best]


def _sample_embedding(prior: Network, texts: Texts, rng: jax.Array, options: SamplingOptions) -> jax.Array:
    # All candidates of a caption share one prefix, and so do the empty captions of all rows. The keys and
    # values of each are computed once.
    guided, rows = is_guided(options), texts.rows * options.candidates

    def prefix(text, repeats):
        cached = prior.apply(**text_inputs(prior.module, text), method="prefill")
        return jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=0), cached)

    caches, allowed = prefix(texts.captions, options.candidates)
    if guided:
        halves = (caches, allowed), prefix(texts.empty, rows // texts.empty.embed.shape[0])
        caches, allowed = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves)

    def network(z, t):
        return prior.apply(z, t, caches, allowed, method="predict")

    x = standard_normal(fold_in(rng, NOISE), (rows, texts.captions.embed.shape[1]))
    sampler = diffusion_sampler(prior.config, options)
    return denormalize(part_space(prior.config), sampler.run(sampler.denoiser(network, guided), x, rng))


def _sample_laion(
    prior: Network, captions: TextConditioning, rng: jax.Array, options: SamplingOptions
) -> jax.Array:
    # Its unconditional half has learned embeddings in place of the empty caption and of z_i.
    guided, rows = is_guided(options), captions.embed.shape[0]
    text = {"text_embed": captions.embed, "text_states": captions.states, "text_mask": captions.mask}
    text = twice(text, guided)
    drop = jnp.arange(2 * rows) >= rows if guided else None
    x = standard_normal(fold_in(rng, NOISE), captions.embed.shape)
    sampler = diffusion_sampler(prior.config, options)
    denoise = sampler.denoiser(lambda z, t: prior.apply(z, t, **text, drop=drop), guided)
    return denormalize(part_space(prior.config), sampler.run(denoise, x, rng))
