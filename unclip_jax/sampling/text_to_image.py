"""Draws images from captions with any system. `SYSTEMS` lists the systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling import unclip
from unclip_jax.sampling.edits import inpaint, inversion
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler


class Joint(NamedTuple):
    """Where one part takes what another part made, and was trained on real ones.

    maker: the part that makes it. taker: the kind of part that takes it. what: its name in a batch.
    """

    maker: str
    taker: str
    what: str


class System(NamedTuple):
    """A set of parts that together draw images.

    parts: the parts that every bundle of the system has.
    sample: the cascade, (sampler, captions, *, seed, prior, positions, options, progress) -> `unclip.Stages`.
    encode: inversion, images -> `edits.inversion.Latents`, which the edits change. None if the system cannot
      invert images.
    priors: the priors that a caller may choose from, each with the parts that it needs.
    sizes: bundle -> the sides in pixels of what `sample` draws, in the order of `Stages.images`.
    overrides: (bundle, prior, **options that people know) -> sampling options by part.
    joints: where parts meet that were trained apart; `evaluate.doctor` compares both sides.
    stream: `sample` as a generator of `programs.Partial`s and then the stages.
    decode: `edits.inversion.Latents` -> images: the way back of `encode`.
    inpaint: (sampler, images, masks, captions, ...) -> images, see `edits.inpaint.inpaint_rows`.
    """

    parts: tuple[str, ...]
    sample: Callable[..., Any]
    encode: Callable[..., Any] | None = None
    priors: Mapping[str, tuple[str, ...]] = {}
    sizes: Callable[[Bundle], list[int]] | None = None
    overrides: Callable[..., dict[str, dict[str, Any]]] | None = None
    joints: tuple[Joint, ...] = ()
    stream: Callable[..., Any] | None = None
    decode: Callable[..., Any] | None = None
    inpaint: Callable[..., Any] | None = None


UNCLIP_JOINTS = (
    Joint("prior_diffusion", "decoder", "image_embed"),
    Joint("prior_ar", "decoder", "image_embed"),
    Joint("decoder", "upsampler", "low_res"),
)
SYSTEMS = {
    "unclip": System(
        ("clip", "decoder"),
        unclip.sample_stages,
        inversion.encode,
        unclip.PRIORS,
        sizes=unclip.sizes,
        overrides=unclip.overrides,
        joints=UNCLIP_JOINTS,
        stream=unclip.stream_stages,
        decode=inversion.decode,
        inpaint=inpaint.inpaint_rows,
    ),
}


def system_of(bundle: Bundle) -> System:
    """The system that a bundle belongs to.

    Raises:
      ValueError: if the system is unknown.
      KeyError: if one of its parts is missing.
    """
    if bundle.system not in SYSTEMS:
        raise InputError(
            f"the bundle {bundle.path} is of the system {bundle.system!r}; known: {', '.join(SYSTEMS)}"
        )
    system = SYSTEMS[bundle.system]
    for name in system.parts:
        bundle.part(name)
    return system


def text_to_image(
    bundle: Sampler | Bundle,
    captions: Sequence[str] | str,
    *,
    seed: int = 0,
    prior: str = "prior_diffusion",
    positions: Sequence[int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws one image per caption.

    Args:
      bundle: from `load_bundle`; or a `Sampler` of it, which keeps the compiled programs between calls.
      captions: texts; a single string is one caption.
      seed, prior, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      uint8 (B, H, W, 3). H = W is the largest upsampler's size, or the decoder's if there is no upsampler.

    Raises:
      ValueError, KeyError, NumericalError: as in `unclip.sample_stages`.
    """
    sampler = as_sampler(bundle)
    captions = [captions] if isinstance(captions, str) else captions
    sample = system_of(sampler.bundle).sample
    stages = sample(
        sampler, captions, seed=seed, prior=prior, positions=positions, options=options, progress=progress
    )
    return ops.to_uint8(stages.images[-1])
