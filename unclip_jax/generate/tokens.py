"""Drawing codes one after another: the choice of one, and grids of codes from a `PixelSNAIL` or a `DALLE`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.guidance import guide
from unclip_jax.diffusion.process import expand, fold_in
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import TokenSamplingOptions, is_guided
from unclip_jax.generate.text import Texts, twice
from unclip_jax.models.pixelsnail import next_row


def choose(logits: jax.Array, keys: jax.Array, options: TokenSamplingOptions) -> tuple[jax.Array, jax.Array]:
    """Draws one code for each row.

    Args:
      logits: (B, K); with guidance (2 B, K), the guided half first.
      keys: (B,) random keys.
      options: temperature, top_k, top_p, guidance.

    Returns:
      Codes (B,) int32, and (B,) bool, whether a row's logits were finite: the codes would not show it.
    """
    if is_guided(options):
        rows = len(keys)
        logits = guide(logits[:rows], logits[rows:], expand(options.guidance_scale, logits))
    finite = jnp.isfinite(logits).all(axis=-1)
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), finite
    if options.top_k is not None:
        logits = jnp.where(logits < jax.lax.top_k(logits, options.top_k)[0][:, -1:], -jnp.inf, logits)
    logits = logits / options.temperature
    if options.top_p is not None:
        logits = nucleus(logits, options.top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return drawn.astype(jnp.int32), finite


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits (B, K), where the codes behind the most probable ones that together have the probability `top_p`
    are -inf (Holtzman et al. 2020, section 3.1). The most probable code always stays."""
    ordered = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    lowest = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)


def sample_grid(
    prior: Network,
    rng: jax.Array,
    options: TokenSamplingOptions,
    *,
    coarse: jax.Array | None = None,
    texts: Texts | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws a grid of codes, row by row, in one loop that computes one position of each layer per code.

    Args:
      prior: of kind `pixelsnail`.
      rng: (B,) keys.
      options: temperature, top_k, guidance.
      coarse: (B, H / 2, W / 2) codes of the level above, where the prior is conditioned on them.
      texts: the captions and the empty caption, where it is conditioned on them.

    Returns:
      Codes (B, H, W) int32, and (B,) bool, whether all logits of a row were finite.
    """
    model, guided = prior.module, is_guided(options)
    given = {} if coarse is None else {"coarse": twice(coarse, guided)}
    if texts is not None:
        given["text_embed"] = (texts.both() if guided else texts.captions).embed
    condition = prior.apply(**given, method="condition")
    begun = jnp.zeros(len(rng), jnp.int32)
    params = {"params": prior.params}

    def first(collections):
        n = jnp.zeros((), jnp.int32)
        return model.apply(
            params, twice(begun, guided), n, condition, method="step", mutable=collections
        )[1]  # fmt: skip

    shapes = jax.eval_shape(lambda: first(["cache", "fixed"])["cache"])
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    fixed = first(["cache", "fixed"])["fixed"]

    def draw(carry, n):
        before, finite, cache = carry
        logits, moved = model.apply(
            params | {"cache": cache, "fixed": fixed}, twice(before, guided), n, condition,
            method="step", mutable=["cache"],
        )  # fmt: skip
        code, also = choose(logits, fold_in(rng, n), options)
        return (code, finite & also, moved["cache"]), code

    def draw_row(carry, row):
        before, finite, cache = carry
        numbers = row * model.side + jnp.arange(model.side)
        return jax.lax.scan(draw, (before, finite, next_row(cache)), numbers)

    begin = (begun, jnp.ones(len(rng), bool), cache)
    (_, finite, _), codes = jax.lax.scan(draw_row, begin, jnp.arange(model.side))
    return jnp.moveaxis(codes, 2, 0), finite


def sample_tokens(
    network: Network,
    captions: Mapping[str, jax.Array],
    empty: Mapping[str, jax.Array],
    rng: jax.Array,
    options: TokenSamplingOptions,
    known: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws the codes of images from captions, with cached keys and values, in one loop.

    Args:
      network: of kind `dalle` or `dalle_mini`.
      captions: `tokens` and `token_mask`, (B, L).
      empty: those of the empty caption, (B, L) or (1, L), for guidance.
      rng: (B,) keys.
      options: temperature, top_k, guidance.
      known: (B, R, G) int32, the codes of the upper R < G rows, which stay as they are; None draws all rows.

    Returns:
      Codes (B, G, G) int32, and (B,) bool, whether all logits of a row were finite.
    """
    model, guided = network.module, is_guided(options)
    tokens, mask = captions["tokens"], captions["token_mask"]
    if guided:
        both = lambda a, b: jnp.concatenate([a, jnp.broadcast_to(b, a.shape)])
        tokens, mask = both(tokens, empty["tokens"]), both(mask, empty["token_mask"])
    given = jnp.zeros((len(rng), 0), jnp.int32) if known is None else known.reshape(len(rng), -1)
    start = given.shape[1]
    before = twice(given, guided) if start else None
    logits, caches = network.apply(tokens, mask, before, method="prefill")
    first, finite = choose(logits, fold_in(rng, start), options)

    def draw(carry, n):
        code, finite, caches = carry
        logits, caches = network.apply(twice(code, guided), n, caches, method="extend")
        code, also = choose(logits, fold_in(rng, n + 1), options)
        return (code, finite & also, caches), code

    (_, finite, _), rest = jax.lax.scan(draw, (first, finite, caches), jnp.arange(start, model.side**2 - 1))
    codes = jnp.concatenate([given.T, first[None], rest]).T
    return codes.reshape(len(rng), model.side, model.side), finite
