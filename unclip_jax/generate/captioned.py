"""Images from captions with U-Nets that take no CLIP embedding: those of GLIDE and Imagen.

A base network draws from a caption, and an upsampler enlarges a small image with the same caption. Guidance
runs the conditional and the unconditional half as one batch of 2B rows; the unconditional half has the empty
caption.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.augmentation import augmented
from unclip_jax.diffusion.guidance import Denoise
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.errors import InputError
from unclip_jax.generate.clip_guidance import guided_by_clip
from unclip_jax.generate.decoder import Known, keep_known
from unclip_jax.generate.denoise import NOISE, Start, diffusion_sampler
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import PixelSamplingOptions, is_guided
from unclip_jax.generate.text import TextConditioning, Texts, twice

AUGMENTATION = 2  # fold of a stage's random key (`generate.denoise` has the others): noise of the small image


def caption_inputs(text: TextConditioning) -> dict[str, jax.Array]:
    """The arguments of a network that stand for the caption: what the conditioning has, by their names."""
    names = {"embed": "text_embed", "states": "text_states", "mask": "text_mask"}
    found = ((names.get(name, name), value) for name, value in text._asdict().items())
    return {name: value for name, value in found if value is not None}


def captioned_denoiser(
    network: Network,
    texts: Texts,
    size: tuple[int, int],
    options: PixelSamplingOptions,
    given: Mapping[str, jax.Array],
    known: Known | None = None,
) -> Denoise:
    """A network as a denoiser of (B, H, W, 3) that already contains caption and guidance.

    Args:
      network: of kind `glide`, `imagen` or `imagen_upsampler`.
      texts: B captions and the empty caption.
      size: (H, W).
      options: guidance and clipping.
      given: its other arguments by name, (B, ...) each.
      known: for a network that inpaints. The denoiser's x0 equals the known image where it is known.
    """
    guided = is_guided(options)
    inputs = caption_inputs(texts.both() if guided else texts.captions) | twice(dict(given), guided)
    if known is not None:
        image, mask = twice(known, guided)
        inputs |= {"known_image": image, "known": mask}
    rows = (2 if guided else 1) * texts.rows
    variables = {"params": network.params}
    # This call's only used result is the collection, so XLA removes its U-Net.
    noiseless = jnp.zeros((rows, *size, 3)), jnp.zeros(rows)
    _, fixed = network.module.apply(variables, *noiseless, **inputs, mutable=["fixed"])

    def run(x: jax.Array, t: jax.Array) -> jax.Array:
        return network.module.apply(variables | fixed, x, t, **inputs)

    denoise = diffusion_sampler(network.config, options).denoiser(run, guided)
    return denoise if known is None else keep_known(denoise, known, network.config)


def sample_captioned(
    network: Network,
    texts: Texts,
    rng: jax.Array,
    options: PixelSamplingOptions,
    *,
    low_res: jax.Array | None = None,
    x_T: jax.Array | None = None,
    known: Known | None = None,
    segment: Segment | None = None,
    start: Start | None = None,
    clip: Network | None = None,
    z_text: jax.Array | None = None,
) -> jax.Array:
    """Draws images for captions, or enlarges images with their captions.

    Args:
      network: of kind `glide`, `imagen` or `imagen_upsampler`.
      texts: B captions and the empty caption.
      rng: one key, or (B,) keys, one per row.
      options: steps, guidance, clipping, sampler, scale of the noise, level of the augmentation.
      low_res: (B, h, w, 3) in [-1, 1], for a network that upsamples.
      x_T: (B, H, W, 3) the noise to start from; drawn when None.
      known: the part to keep, for a network that inpaints.
      segment: makes some of the steps only (`loops.Segment`).
      start: images (B, H, W, 3) to start from in place of noise; x_T is then what they are noised with.
      clip, z_text: a CLIP, and its embeddings (B, D) of the captions, for CLIP guidance.

    Returns:
      (B, H, W, 3) float32 in [-1, 1], of `factor` times the small image's sides, or of the network's size.

    Raises:
      ValueError: when a network lacks `low_res` or `known`, or gets one that it cannot use.
    """
    module, factor = network.module, network.config.get("factor")
    inpaints = getattr(module, "inpaint", False)
    if (factor is not None) != (low_res is not None) or inpaints != (known is not None):
        raise InputError(
            "a network that upsamples needs a small image, and one that inpaints the known part of the "
            "image; others cannot use them"
        )
    side, given = network.config["model"]["unet"]["image_size"], {}
    size = (side, side)
    if low_res is not None:
        size, given = (low_res.shape[1] * factor, low_res.shape[2] * factor), {"low_res": low_res}
        if network.config["kind"] == "imagen_upsampler":
            level = jnp.full(texts.rows, options.augmentation)
            enlarged = module.enlarge(low_res, size)
            noise = standard_normal(fold_in(rng, AUGMENTATION), enlarged.shape)
            given = {"enlarged": augmented(enlarged, level, noise), "augmentation": level}
    denoise = captioned_denoiser(network, texts, size, options, given, known)
    denoise = guided_by_clip(denoise, clip, z_text, network.config, options)
    if x_T is None:
        x_T = options.noise_scale * standard_normal(fold_in(rng, NOISE), (texts.rows, *size, 3))
    sampler, x = diffusion_sampler(network.config, options).begin(x_T, start)
    return jnp.clip(sampler.run(denoise, x, rng, segment), -1, 1)


def eight_bits(image: jax.Array) -> jax.Array:
    """An image in [-1, 1] as it is read back from 256 levels."""
    return jnp.round((image + 1) * 127.5) / 127.5 - 1
