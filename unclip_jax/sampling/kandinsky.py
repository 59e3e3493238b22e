"""Kandinsky's cascade: text, prior, latents, autoencoder (Razzhigaev et al. 2023).

The prior draws z_i for a caption, as in unCLIP. The decoder draws latents for z_i alone, guided away from the
embedding of an image without content. A negative caption stands in for the empty one in the prior, which also
draws an embedding for it, and the decoder is guided away from that.

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.kandinsky import blank_embed, sample_decoder_latents
from unclip_jax.generate.latents import decode_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import LatentSamplingOptions, Options, is_guided
from unclip_jax.generate.text import Texts
from unclip_jax.sampling.latent import picture_size, tile_size
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)
from unclip_jax.sampling.unclip import PRIORS, check_embeddings, check_prior, draw_z_image, encode_captions

# What each stage folds into a row's random key; `unclip.PRIOR` is 0.
LATENT, NEGATIVE = 1, 2
PARTS = ("clip", "latent", "autoencoder")
DECODE = "decode_quantised"  # the autoencoder's latents are taken as they are drawn


class KandinskyStages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    z_text: (B, D) raw text embeddings.
    z_image: (B, D) raw image embeddings.
    latents: (B, h, w, Z).
    images: [float array (B, H, W, 3) in [-1, 1]].
    """

    z_text: np.ndarray
    z_image: np.ndarray
    latents: np.ndarray
    images: list[np.ndarray]


def made_by(bundle: Bundle, prior: str | None, latent: str = "latent") -> list[str]:
    """The parts that make z_text, z_image, the latents and the picture, in this order."""
    return ["clip", *(PRIORS[prior or "none"] or ("clip",))[:1], latent, "autoencoder"]


def owns(config: Mapping[str, Any]) -> bool:
    """Whether a part `latent` of this configuration sees the image embedding alone."""
    return config["kind"] == "kandinsky"


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle."""
    return ("clip", "prior_diffusion", "latent", "autoencoder")


def check_draws(bundle: Bundle) -> None:
    """Raises a ValueError if the bundle's decoder needs more than z_i."""
    if bundle.part("latent").config["model"].get("inpaint"):
        raise InputError(
            f"the part 'latent' of {bundle.path or 'the bundle'} inpaints: it also needs a picture and a mask"
        )


class Call(NamedTuple):
    """The checked arguments of a call, for B rows.

    seeds, positions: (B,) uint32.
    options, scales: of the parts that draw, from `split_scales`, without the negative captions.
    negative: B negative captions, or None where all are empty.
    drawn_with: the decoder's options of the first row, as they were given.
    """

    seeds: np.ndarray
    positions: np.ndarray
    options: dict[str, Options]
    scales: dict[str, np.ndarray]
    negative: list[str] | None
    drawn_with: LatentSamplingOptions

    @property
    def said(self) -> np.ndarray:
        """(B,) bool, True where a negative caption is not empty."""
        return np.array([bool(text) for text in self.negative or [""] * len(self.seeds)])


def check_call(
    sampler: Sampler,
    count: int,
    prior: str | None,
    seed: int | Sequence[int],
    positions: Sequence[int] | None,
    options: Overrides | Sequence[Overrides],
    latent: str = "latent",
) -> Call:
    """Checks the arguments that all calls share, before anything is compiled.

    Args:
      count: B. prior: one of `unclip.PRIORS`; None where the caller gives z_i.
      seed, positions, options: as in `sample_stages`.
      latent: the part that draws the latents.

    Raises:
      ValueError: if one of them is out of range, or a negative caption is given without guidance or prior.
      KeyError: if the bundle lacks a part.
    """
    for name in ("clip", latent, "autoencoder"):
        sampler.bundle.part(name)
    if prior is not None:
        check_prior(sampler.bundle, prior)
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    rows = sampler.row_options(options, count)
    negative = [row[latent].negative for row in rows]
    draws = {latent, *PRIORS[prior or "none"]}
    if any(negative):
        draws.add("prior_diffusion")
        check_prior(sampler.bundle, "prior_diffusion")
        if any(row[latent].negative and not is_guided(row[latent]) for row in rows):
            raise InputError("a negative caption needs guidance: set a guidance_scale other than 1")
    static, scales = split_scales([_plain(row, draws, latent) for row in rows])
    return Call(seeds, places, static, scales, negative if any(negative) else None, rows[0][latent])


def _plain(row: Mapping[str, Options], draws: set[str], latent: str) -> dict[str, Options]:
    # The options of the parts that draw. The negative caption is an argument of the program.
    used = {name: options for name, options in row.items() if name in draws}
    return used | {latent: dataclasses.replace(row[latent], negative="")}


class Words(NamedTuple):
    """The captions of a call as token arrays, and what stands for the empty ones.

    captions: of B captions.
    negative: of B negative captions, or None where all are empty.
    empty: of the empty caption (one row).
    blank: (1, D) the embedding of an image without content (`generate.kandinsky.blank_embed`).
    """

    captions: Mapping[str, Any]
    negative: Mapping[str, Any] | None
    empty: Mapping[str, Any]
    blank: Any


def blank_of(sampler: Sampler) -> np.ndarray:
    """The embedding (1, D) of an image without content (`generate.kandinsky.blank_embed`)."""
    clip = sampler.network("clip")
    embed = sampler.program("blank_embed", lambda: lambda params: blank_embed(clip.with_params(params)))
    return np.asarray(embed(clip.params))


def words_of(sampler: Sampler, captions: Sequence[str], call: Call) -> Words:
    """Tokenizes the captions of a call, and embeds the image without content."""
    negative = None if call.negative is None else sampler.captions(call.negative)
    return Words(sampler.captions(captions), negative, sampler.captions([""]), blank_of(sampler))


def draw_embeds(
    networks: Mapping[str, Network],
    words: Words,
    z_image: jax.Array | None,
    prior: str | None,
    keys: jax.Array,
    options: Mapping[str, Options],
    said: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The embeddings that the decoder needs.

    Args:
      networks: the bundle's.
      words: of B captions.
      z_image: (B, D) from the caller; None draws it with the prior.
      prior: one of `unclip.PRIORS`, or None where z_image is given.
      keys: (B,), one per row.
      options: of the prior.
      said: (B,) bool, True where a negative caption is not empty.

    Returns:
      z_text, z_image and what guidance compares z_image with: (B, D) or (1, D) each.
    """
    texts, other = encode_captions(networks["clip"], words.captions, words.empty), words.blank
    against = texts.empty
    if words.negative is not None:
        negative = encode_captions(networks["clip"], words.negative, words.empty)
        # Beside a caption, its own guidance is against the negative one too. For the negative caption itself
        # that is no guidance.
        settings = dataclasses.replace(options["prior_diffusion"], candidates=1)
        if prior is not None:
            against, settings = negative.captions, dataclasses.replace(settings, guidance_scale=1.0)
        drawn = draw_z_image(
            "prior_diffusion", networks, negative, fold_in(keys, NEGATIVE), {"prior_diffusion": settings}
        )
        other = jnp.where(said[:, None], drawn, other)
    if prior == "null":
        z_image = jnp.broadcast_to(words.blank, texts.captions.embed.shape)
    elif prior is not None:
        z_image = draw_z_image(prior, networks, Texts(texts.captions, against), keys, options)
    return texts.captions.embed, z_image, other


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    prior: str = "prior_diffusion",
    z_image: np.ndarray | None = None,
    x_T: np.ndarray | None = None,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> KandinskyStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts clip, latent and autoencoder, and the chosen prior's parts.
      captions: at least one text. The tokenizer truncates texts that are too long.
      prior: how to get z_i, one of `unclip.PRIORS`; `null` uses the embedding of an image without content.
      z_image: (B, D) raw image embeddings, one per caption. If given, they replace the prior's, and the
        captions draw nothing.
      x_T: (B, h, w, Z) the latents' noise. None: the seed determines it.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions, the number of embeddings differs from that of captions, the prior
        is unknown, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    count = len(captions)
    if not count:
        raise InputError("no captions: give at least one")
    chosen_prior = prior if z_image is None else None
    call = check_call(sampler, count, chosen_prior, seed, positions, options)
    check_draws(sampler.bundle)
    if z_image is not None and len(z_image) != count:
        raise InputError(f"expected one embedding per caption, got {len(z_image)} and {count}")
    size, tile = picture_size(sampler, call.drawn_with), tile_size(sampler, call.drawn_with)
    z = None if z_image is None else check_embeddings(sampler, z_image)
    noise = None if x_T is None else np.asarray(x_T, np.float32)
    wanted = (count, *size, sampler.network("latent").module.out_channels)
    if noise is not None and noise.shape != wanted:
        raise InputError(f"x_T must be {wanted}, got {noise.shape}")

    def make() -> Callable:
        def run(params, scales, words, z, x_T, said, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            z_text, z, other = draw_embeds(networks, words, z, chosen_prior, keys, chosen, said)
            latents = sample_decoder_latents(
                networks["latent"], z, other, size, fold_in(keys, LATENT), chosen["latent"], x_T=x_T
            )
            return z_text, z, latents, decode_latents(networks["autoencoder"], latents, tile, DECODE)

        return run

    run = sampler.program(("kandinsky", chosen_prior, size, tile, *call.options.items()), make)
    words = words_of(sampler, captions, call)
    given = (call.scales, words.captions, words.negative, z, noise, call.said, call.seeds, call.positions)

    def batch(index):
        scales, texts, negative, *rest = sampler.rows(given, index)
        return run(sampler.params, scales, words._replace(captions=texts, negative=negative), *rest)

    parts = made_by(sampler.bundle, chosen_prior)
    *found, image = sampler.in_batches(batch, count, parts, progress)
    return KandinskyStages(*found, [np.float32(image)])
