"""Edits of a latent system that sees z_i (StableUnCLIP): a picture as the pair (z_i, x_T), and drawing from
pictures.

As in `inversion`, z_i is CLIP's embedding, here without noise, and x_T the noise of the latents from which
DDIM draws the picture again. Image-to-image and inpainting need a z_i for the whole picture: the prior draws
it for the caption where the bundle has one, and otherwise it is that of the given picture.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.generate.image_embeds import vector_inputs
from unclip_jax.generate.latents import Inputs, invert_latents, mean_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import LatentSamplingOptions, Options
from unclip_jax.generate.text import Texts
from unclip_jax.sampling.edits import latent_img2img, latent_inpaint
from unclip_jax.sampling.edits.img2img import STRENGTH
from unclip_jax.sampling.edits.inversion import (
    STEPS,
    Latents,
    embed_images,
    row_captions,
    row_scales,
    square,
)
from unclip_jax.sampling.latent import Call, Condition, encode_captions, exact_ddim, noise_shape
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_sampler,
    as_seed,
    row_keys,
    split_scales,
    with_scale,
    with_scales,
)
from unclip_jax.sampling.stable_unclip import check_parts, context_tower, sample_stages
from unclip_jax.sampling.unclip import PRIORS, draw_z_image
from unclip_jax.sampling.unclip import encode_captions as encode_for_prior


# ---------------------------------------------------------------------------------------- (z_i, x_T)
def check_edit(
    sampler: Sampler, steps: Any, guidance_scale: float, *, eta: float = 0.0, seed: int = 0
) -> LatentSamplingOptions:
    """The U-Net's options to invert and decode with; see `inversion.check_edit`."""
    sampler.network("clip"), sampler.network("autoencoder"), as_seed(seed)
    return sampler.options(exact_ddim(steps, guidance_scale, eta))["latent"]


def encode(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Latents:
    """Finds (z_i, x_T) of images; arguments and errors are those of `inversion.encode`."""
    sampler, count = as_sampler(bundle), len(images)
    check_parts(sampler.bundle)
    captions = row_captions(captions, count)
    given = [exact_ddim(steps, scale, 0.0) for scale in row_scales(guidance_scale, count)]
    rows = sampler.row_options(given, count)
    side, _, _ = noise_shape(sampler)
    pixels = ops.to_float(square(images, side * sampler.network("autoencoder").module.factor))
    static, scales = split_scales([{"latent": row["latent"]} for row in rows])
    z_image, tower = embed_images(sampler, images), context_tower(sampler.bundle.parts)

    def make():
        def run(params, scale, captions, empty, image, z):
            networks, options = sampler.with_params(params), with_scale(static["latent"], scale)
            texts, latent = encode_captions(networks[tower], captions, empty), networks["latent"]
            x0 = mean_latents(networks["autoencoder"], image)
            inputs = vector_inputs(latent, z, len(z), None, options)
            return invert_latents(latent, texts, x0, options, inputs)

        return run

    run = sampler.program(("latent_embeds_invert", static["latent"]), make)
    given = (scales["latent"], sampler.captions(captions, tower), sampler.captions([""] * count, tower))
    batch = lambda index: run(sampler.params, *sampler.rows((*given, pixels, z_image), index))
    return Latents(z_image, sampler.in_batches(batch, count, ["latent"], progress))


def decode(
    bundle: Sampler | Bundle,
    latents: Latents,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    eta: float = 0.0,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Draws images from (z_i, x_T) with DDIM; arguments and errors are those of `inversion.decode`."""
    count = len(latents.z_image)
    options = [exact_ddim(steps, scale, eta) for scale in row_scales(guidance_scale, count)]
    return sample_stages(
        bundle, row_captions(captions, count), z_image=latents.z_image, x_T=latents.x_T, noised=False,
        seed=seed, positions=positions, options=options, progress=progress,
    ).images  # fmt: skip


# ---------------------------------------------------------------------------------------- from pictures
def draw_embeddings(
    sampler: Sampler,
    captions: Sequence[str],
    call: Call,
    prior: str,
    options: Overrides | Sequence[Overrides],
) -> np.ndarray:
    """z_i (B, D) of captions by a prior of the bundle.

    call: with the rows' seeds and positions. options: as in `stable_unclip.sample_stages`.
    """
    count, used = len(captions), PRIORS[prior]
    rows = sampler.row_options(options, count)
    static, scales = split_scales([{name: row[name] for name in used if name in row} for row in rows])

    def make():
        def run(params, scales, captions, empty, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(static, scales)
            texts = encode_for_prior(networks["clip"], captions, empty)
            return draw_z_image(prior, networks, texts, row_keys(seeds, positions), chosen)

        return run

    run, empty = sampler.program(("embeddings", prior, *static.items()), make), sampler.captions([""])
    given = (scales, sampler.captions(captions), call.seeds, call.positions)

    def batch(index):
        scale, texts, seeds, positions = sampler.rows(given, index)
        return run(sampler.params, scale, texts, empty, seeds, positions)

    return sampler.in_batches(batch, count, [*used[:1], "clip"][:1])


def _arrays(
    prior: str | None,
    options: Overrides | Sequence[Overrides],
    sampler: Sampler,
    captions: Sequence[str],
    images: Sequence[np.ndarray],
    call: Call,
    name: str,
) -> dict[str, Any]:
    tower = context_tower(sampler.bundle.parts)
    if prior is None:
        z_image = embed_images(sampler, images)
    elif prior == "null":
        z_image = None
    else:
        z_image = draw_embeddings(sampler, captions, call, prior, options)
    texts = (sampler.captions(captions, tower), sampler.captions(call.negative, tower))
    return {"texts": texts, "z_image": z_image}


def _read(
    networks: Mapping[str, Network], name: str, arrays: Any, keys: jax.Array, options: Mapping[str, Options]
) -> tuple[Texts, Inputs]:
    texts = encode_captions(networks[context_tower(networks)], *arrays["texts"])
    return texts, vector_inputs(networks[name], arrays["z_image"], texts.rows, keys, options[name])


def _condition(bundle: Bundle, prior: str | None, options: Overrides | Sequence[Overrides]) -> Condition:
    check_parts(bundle)
    if prior is None and "prior_diffusion" in bundle.parts:
        prior = "prior_diffusion"
    for name in PRIORS[prior] if prior else ():
        bundle.part(name)
    return Condition(functools.partial(_arrays, prior, options), _read)


def img2img_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    strength: float = STRENGTH,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    prior: str | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws pictures again, each for its own caption; see `latent_img2img.img2img_rows`.

    prior: one of `unclip.PRIORS`; None for `prior_diffusion` where the bundle has it, and else for the
      pictures' own z_i.
    """
    sampler = as_sampler(bundle)
    return latent_img2img.img2img_rows(
        sampler, images, captions, strength=strength, seed=seed, positions=positions, options=options,
        progress=progress, condition=_condition(sampler.bundle, prior, options),
    )  # fmt: skip


def inpaint_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    method: str | None = None,
    resamples: int | None = None,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    prior: str | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws the unknown parts of images; see `latent_inpaint.inpaint_rows`. `prior` is that of
    `img2img_rows`."""
    sampler = as_sampler(bundle)
    return latent_inpaint.inpaint_rows(
        sampler, images, masks, captions, method=method, resamples=resamples, seed=seed, positions=positions,
        options=options, progress=progress, condition=_condition(sampler.bundle, prior, options),
    )  # fmt: skip
