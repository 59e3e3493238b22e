"""StableUnCLIP's cascade: text, prior, noised z_i, latents, autoencoder, in one compiled program.

The prior draws z_i for a caption, as in unCLIP. The U-Net of latent diffusion sees z_i with noise of the
level `noise_level`, and the caption through the part `text`, or through `clip` where one CLIP serves both.
Where the bundle has no prior, z_i comes from a picture.

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.image_embeds import vector_inputs
from unclip_jax.generate.latents import decode_latents, sample_latents
from unclip_jax.generate.options import Options, is_guided
from unclip_jax.generate.text import Texts, encode_text
from unclip_jax.sampling.latent import check_draws, flagged, picture_size, tile_size
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

LATENT = 1  # what the stage folds into a row's random key; `unclip.PRIOR` is 0
PARTS = ("clip", "latent", "autoencoder")


class StableUnclipStages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    z_image: (B, D) raw image embeddings, without noise; zero with the prior `null`.
    latents: (B, h, w, Z) scaled latents.
    images: [float array (B, H, W, 3) in [-1, 1]].
    """

    z_image: np.ndarray
    latents: np.ndarray
    images: list[np.ndarray]


def check_parts(bundle: Bundle) -> None:
    """Raises a KeyError if a bundle lacks a part that drawing from z_i needs."""
    own = "text" in bundle.part("latent").config.get("frozen", {})
    for name in (*PARTS, *(("text",) if own else ())):
        bundle.part(name)


def owns(config: Mapping[str, Any]) -> bool:
    """Whether a part `latent` of this configuration sees a noised image embedding."""
    return config["kind"] == "latent" and "augmentation" in config


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle."""
    own = "latent" in parts and "text" in parts["latent"].config.get("frozen", {})
    return (*PARTS, "text") if own else PARTS


def context_tower(parts: Mapping[str, Any]) -> str:
    """The name of the part whose text states the U-Net sees."""
    return "text" if "text" in parts else "clip"


def check_reads(sampler: Sampler, prior: str) -> None:
    """Raises a ValueError or KeyError where the bundle cannot make z_i with a prior: it is unknown, or a part
    or the text tower of the CLIP of z_i is missing."""
    check_prior(sampler.bundle, prior)
    if prior != "null" and sampler.network("clip").config["model"]["text"] is None:
        raise InputError(
            f"the CLIP of {sampler.bundle.path or 'the bundle'} has no text encoder, so no caption gives a "
            "z_i: give a picture, or the prior null"
        )


def made_by(bundle: Bundle, prior: str | None) -> list[str]:
    """The parts that make z_image, the latents and the picture, in this order."""
    return [*(PRIORS[prior or "none"] or ("clip",))[:1], "latent", "autoencoder"]


def _cascade(
    sampler: Sampler,
    options: dict[str, Options],
    prior: str | None,
    size: tuple[int, int],
    tile: int | None,
    noised: bool,
) -> Callable:
    # With prior None, the caller gives z_image.
    def run(params, scales, captions, negative, asked, empty, z_image, x_T, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys, tower, latent = (
            row_keys(seeds, positions),
            networks[context_tower(networks)],
            networks["latent"],
        )
        texts = Texts(encode_text(tower, captions), encode_text(tower, negative))
        if prior not in (None, "null"):
            wanted = encode_captions(networks["clip"], asked, empty)
            z_image = draw_z_image(prior, networks, wanted, keys, chosen)
        noise = keys if noised else None
        inputs = vector_inputs(latent, z_image, texts.rows, noise, chosen["latent"])
        key = fold_in(keys, LATENT)
        z = sample_latents(latent, texts, size, key, chosen["latent"], x_T=x_T, inputs=inputs)
        shown = jnp.zeros((texts.rows, latent.module.vector_dim // 2)) if z_image is None else z_image
        return shown, z, decode_latents(networks["autoencoder"], z, tile)

    return run


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    prior: str = "prior_diffusion",
    z_image: np.ndarray | None = None,
    x_T: np.ndarray | None = None,
    noised: bool = True,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> StableUnclipStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts clip, latent and autoencoder, the chosen prior's parts, and text where the U-Net
        has a text tower of its own.
      captions: at least one text. The tokenizers truncate texts that are too long.
      prior: how to get z_i, one of `unclip.PRIORS`.
      z_image: (B, D) raw image embeddings, one per caption. If given, they replace the prior's.
      x_T: (B, h, w, Z) the latents' noise. None: the seed determines it.
      noised: whether z_i gets noise; False for edits, which find x_T for z_i alone.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions, the number of embeddings differs from that of captions, the prior
        is unknown or cannot read captions, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    count = len(captions)
    if not count:
        raise InputError("no captions: give at least one")
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    check_parts(sampler.bundle)
    check_draws(sampler.bundle)
    chosen_prior = prior if z_image is None else None
    if chosen_prior is not None:
        check_reads(sampler, chosen_prior)
    elif len(z_image) != count:
        raise InputError(f"expected one embedding per caption, got {len(z_image)} and {count}")
    used = ("latent", *(PRIORS[chosen_prior] if chosen_prior else ()))
    rows = [{n: o for n, o in row.items() if n in used} for row in sampler.row_options(options, count)]
    if any(row["latent"].negative and not is_guided(row["latent"]) for row in rows):
        raise InputError("a negative caption needs guidance: set a guidance_scale other than 1")
    negative, drawn_with = [row["latent"].negative for row in rows], rows[0]["latent"]
    static, scales = split_scales(
        [row | {"latent": dataclasses.replace(row["latent"], negative="", filter=True)} for row in rows]
    )
    size, tile = picture_size(sampler, drawn_with), tile_size(sampler, drawn_with)
    z = None if z_image is None else check_embeddings(sampler, z_image)
    noise = None if x_T is None else np.asarray(x_T, np.float32)
    if noise is not None and noise.shape != (count, *size, sampler.network("latent").module.out_channels):
        raise InputError(f"x_T must be of {count} latents of {size[0]} x {size[1]}, got {noise.shape}")
    run = sampler.program(
        ("stable_unclip", chosen_prior, size, tile, noised, *static.items()),
        lambda: _cascade(sampler, static, chosen_prior, size, tile, noised),
    )
    tower = context_tower(sampler.bundle.parts)
    reads = chosen_prior not in (None, "null")
    lengths = {sampler.tokenizer_of(name).length for name in ((tower, "clip") if reads else (tower,))}
    asked, empty = (
        sampler.captions(words, warns=len(lengths) > 1) if reads else None for words in (captions, [""])
    )
    given = (sampler.captions(captions, tower), sampler.captions(negative, tower), asked)

    def batch(index):
        scale, (texts, not_shown, asks), z_i, x, numbers, where = sampler.rows(
            (scales, given, z, noise, seeds, places), index
        )
        return run(sampler.params, scale, texts, not_shown, asks, empty, z_i, x, numbers, where)

    parts = made_by(sampler.bundle, chosen_prior)
    found, latents, image = sampler.in_batches(batch, count, parts, progress)
    if drawn_with.filter:
        image = np.where(flagged(sampler, ops.to_uint8(image))[:, None, None, None], -1.0, image)
    return StableUnclipStages(found, latents, [np.float32(image)])
