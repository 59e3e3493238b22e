"""CLIP guidance: the caption steers a sampler through the gradient of CLIP's similarity (Nichol et al. 2021,
section 2.4).

The score is scale * 100 * d/dx_t cos(z_i, z_t). A CLIP that was trained on noised images (GLIDE's) embeds x_t
itself, with its time step. Another CLIP embeds the denoiser's clean image, so that the gradient runs through
the U-Net too. 100 is the temperature that CLIPs end at.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.guidance import Denoise, with_score
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, part_schedule
from unclip_jax.generate.options import SamplingOptions
from unclip_jax.models.clip import unit

TEMPERATURE = 100.0


def clip_score(
    clip: Network, z_text: jax.Array, scale: float, denoise: Denoise
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function (x_t, t) -> score, (B, H, W, 3).

    Args:
      clip: of kind `clip`; a bundle's `noised_clip` has an image tower with `noise_steps`.
      z_text: (B, D) the captions' embeddings.
      scale: of the guidance.
      denoise: the denoiser, for a CLIP of clean images.
    """
    tower = clip.config["model"]["image"]
    side, noised, z_text = tower["image_size"], tower.get("noise_steps") is not None, unit(z_text)

    def similarity(x_t: jax.Array, t: jax.Array) -> jax.Array:
        image = x_t if noised else jnp.clip(denoise(x_t, t).x0, -1, 1)
        if image.shape[1:3] != (side, side):
            image = jax.image.resize(image, (len(image), side, side, image.shape[-1]), "cubic")
        steps = {"t": jnp.full(len(image), t)} if noised else {}
        return jnp.sum(unit(clip.apply(image, **steps, method="encode_image")) * z_text)

    gradient = jax.grad(similarity)
    return lambda x_t, t: scale * TEMPERATURE * gradient(x_t, t)


def guided_by_clip(
    denoise: Denoise, clip: Network | None, z_text: jax.Array | None, config: dict, options: SamplingOptions
) -> Denoise:
    """The denoiser with the CLIP guidance that the options ask for; without it, the denoiser itself.

    Args:
      denoise, clip, z_text: as in `clip_score`; clip and z_text may be None where there is no such guidance.
      config: the configuration of the part that draws.
    """
    if not options.clip_guidance:
        return denoise
    if clip is None or clip.config["model"]["image"] is None:
        raise InputError("clip_guidance needs a CLIP with an image tower, which is not there: leave it out")
    score = clip_score(clip, z_text, options.clip_guidance, denoise)
    return with_score(denoise, score, part_schedule(config), options.sampler == "ddpm")
