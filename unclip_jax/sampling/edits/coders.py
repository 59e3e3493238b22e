"""How each system turns pictures into (z_i, x_T) and back. The edits look their system up in `CODERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from unclip_jax.errors import InputError
from unclip_jax.generate.networks import image_size
from unclip_jax.sampling import kandinsky, latent, stable_unclip, unclip
from unclip_jax.sampling.edits import inversion, kandinsky_inversion, latent_embeds
from unclip_jax.sampling.programs import Sampler


class Coder(NamedTuple):
    """A system's way from a picture to its pair (z_i, x_T), and back.

    encode, decode: as `inversion.encode` and `inversion.decode`.
    check_edit: as `inversion.check_edit`; an edit calls it before any network runs.
    noise_shape: sampler -> (h, w, C) of x_T.
    sample: (sampler, captions, *, z_image, seed, options, progress) -> stages, whose `images` are drawn from
      z_i and fresh noise.
    """

    encode: Callable[..., inversion.Latents]
    decode: Callable[..., Any]
    check_edit: Callable[..., Any]
    noise_shape: Callable[[Sampler], tuple[int, int, int]]
    sample: Callable[..., Any]


def _pixels(sampler: Sampler) -> tuple[int, int, int]:
    size = image_size(sampler.network("decoder").config)
    return size, size, 3


CODERS = {
    "unclip": Coder(inversion.encode, inversion.decode, inversion.check_edit, _pixels, unclip.sample_stages),
    "kandinsky": Coder(
        kandinsky_inversion.encode,
        kandinsky_inversion.decode,
        kandinsky_inversion.check_edit,
        latent.noise_shape,
        kandinsky.sample_stages,
    ),
    "stable_unclip": Coder(
        latent_embeds.encode,
        latent_embeds.decode,
        latent_embeds.check_edit,
        latent.noise_shape,
        stable_unclip.sample_stages,
    ),
}


def coder_of(sampler: Sampler) -> Coder:
    """The coder of a bundle's system. Raises a ValueError where the system has no image embeddings."""
    if sampler.bundle.system not in CODERS:
        raise InputError(
            f"the system {sampler.bundle.system} has no image embedding to edit; "
            f"these have: {', '.join(CODERS)}"
        )
    return CODERS[sampler.bundle.system]
