"""Draws images from captions with any system. `SYSTEMS` lists the systems."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling import (
    dalle,
    dalle_mini,
    glide,
    imagen,
    kandinsky,
    latent,
    retrieval,
    stable_unclip,
    stream,
    unclip,
    vqvae2,
)
from unclip_jax.sampling.edits import (
    complete,
    img2img,
    inpaint,
    inversion,
    kandinsky_img2img,
    kandinsky_inpaint,
    latent_embeds,
    latent_img2img,
    latent_inpaint,
    latent_inversion,
    latent_upscale,
    reconstruct,
    text_diff,
    upscale,
)
from unclip_jax.sampling.edits.coders import CODERS, Coder
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler

# What people set of a diffusion network, and of a prior (with the prior's own name of it).
DIFFUSION_OPTIONS = ("steps", "guidance_scale", "eta")
PRIOR_OPTIONS = {"prior_guidance_scale": "guidance_scale", "candidates": "candidates"}


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
    sample: the cascade, (sampler, captions, *, seed, positions, options, progress) -> stages, whose `images`
      are arrays (B, H, W, 3) in [-1, 1], the largest last. A system with priors takes `prior` too.
    draws: the part that draws the image, whose steps and guidance the commands set.
    made_by: bundle, prior -> the names of the parts that draw with it.
    needs: parts -> the names of those that a set of training runs must give for a bundle of the system; None:
      `parts`.
    owns: configuration of the part that draws -> whether it is this system's, where the parts that draw in
      several systems have the same name.
    coder: the way from an image to its pair (z_i, x_T) and back, which the edits of z_i need. None if the
      system has no image embedding.
    reads: bundle -> what a picture is drawn for: `captions`, `classes` (their names or numbers are given as
      captions) or `nothing` (the captions are empty).
    priors: the priors that a caller may choose from, each with the parts that it needs.
    sizes: bundle -> the sides in pixels of what `sample` draws, in the order of `Stages.images`.
    options: what people set, as in `overrides_of`, of the parts that draw (`drawing_parts`). A system with
      priors has `PRIOR_OPTIONS` too.
    joints: where parts meet that were trained apart; `evaluate.doctor` compares both sides.
    stream: `sample` as a generator of `programs.Partial`s and then the stages.
    inpaint: (sampler, images, masks, captions, ...) -> images, see `edits.inpaint.inpaint_rows`.
    img2img: (sampler, images, captions, *, strength, ...) -> images, see `edits.img2img.img2img_rows`.
    complete: (sampler, images, captions, *, rows, ...) -> stages, see `edits.complete.complete`.
    text_diff: (sampler, image, source, target, ...) -> images, see `edits.text_diff.text_diff`.
    reconstruct: (sampler, image, ...) -> images, and what each was drawn from; `edits.reconstruct` says how
      with z_i, and `edits.latent_inversion` without.
    upscale: (sampler, images, *, captions, parts, ...) -> pairs of a number and a picture, see
      `edits.upscale.upscale_rows`.
    sees_pictures: whether `inpaint` and `img2img` take the picture's own z_i where the bundle has no prior.
    stream_decode, stream_inpaint: `coder.decode` and `inpaint` as generators of `Partial`s and then the
      images.
    """

    parts: tuple[str, ...]
    sample: Callable[..., Any]
    draws: str
    made_by: Callable[[Bundle, str | None], list[str]]
    needs: Callable[[Mapping[str, Part]], tuple[str, ...]] | None = None
    owns: Callable[[Mapping[str, Any]], bool] = lambda config: True
    coder: Coder | None = None
    reads: Callable[[Bundle], str] = lambda bundle: "captions"
    priors: Mapping[str, tuple[str, ...]] = {}
    sizes: Callable[[Bundle], list[int]] | None = None
    options: tuple[str, ...] = DIFFUSION_OPTIONS
    joints: tuple[Joint, ...] = ()
    stream: Callable[..., Any] | None = None
    inpaint: Callable[..., Any] | None = None
    img2img: Callable[..., Any] | None = None
    complete: Callable[..., Any] | None = None
    text_diff: Callable[..., Any] | None = None
    reconstruct: Callable[..., Any] | None = None
    upscale: Callable[..., Any] | None = None
    sees_pictures: bool = False
    stream_decode: Callable[..., Any] | None = None
    stream_inpaint: Callable[..., Any] | None = None


UNCLIP_JOINTS = (
    Joint("prior_diffusion", "decoder", "image_embed"),
    Joint("prior_ar", "decoder", "image_embed"),
    Joint("decoder", "upsampler", "low_res"),
)
SYSTEMS = {
    "unclip": System(
        ("clip", "decoder"),
        unclip.sample_stages,
        "decoder",
        unclip.made_by,
        needs=unclip.needs,
        coder=CODERS["unclip"],
        priors=unclip.PRIORS,
        sizes=unclip.sizes,
        joints=UNCLIP_JOINTS,
        stream=stream.stream_stages,
        inpaint=inpaint.inpaint_rows,
        img2img=img2img.img2img_rows,
        text_diff=text_diff.text_diff,
        reconstruct=reconstruct.reconstruct,
        upscale=upscale.upscale_rows,
        stream_decode=inversion.stream_decode,
        stream_inpaint=inpaint.stream_rows,
    ),
    "latent": System(
        latent.PARTS,
        latent.sample_stages,
        "latent",
        latent.made_by,
        needs=latent.needs,
        owns=latent.owns,
        reads=latent.reads,
        sizes=latent.sizes,
        inpaint=latent_inpaint.inpaint_rows,
        img2img=latent_img2img.img2img_rows,
        text_diff=latent_inversion.text_diff,
        reconstruct=latent_inversion.reconstruct,
        upscale=latent_upscale.upscale_rows,
        options=(*DIFFUSION_OPTIONS, "negative"),
    ),
    "retrieval": System(
        retrieval.PARTS,
        retrieval.sample_stages,
        "retrieval",
        retrieval.made_by,
        sizes=retrieval.sizes,
    ),
    "stable_unclip": System(
        stable_unclip.PARTS,
        stable_unclip.sample_stages,
        "latent",
        stable_unclip.made_by,
        needs=stable_unclip.needs,
        owns=stable_unclip.owns,
        coder=CODERS["stable_unclip"],
        priors=unclip.PRIORS,
        sizes=latent.sizes,
        inpaint=latent_embeds.inpaint_rows,
        img2img=latent_embeds.img2img_rows,
        text_diff=text_diff.text_diff,
        reconstruct=reconstruct.reconstruct,
        sees_pictures=True,
        options=(*DIFFUSION_OPTIONS, "negative"),
    ),
    "imagen": System(
        imagen.CASCADE.parts,
        imagen.sample_stages,
        "imagen",
        imagen.made_by,
        needs=imagen.needs,
        sizes=imagen.sizes,
        img2img=imagen.img2img_rows,
        upscale=imagen.upscale_rows,
    ),
    "glide": System(
        glide.CASCADE.parts,
        glide.sample_stages,
        "glide",
        glide.made_by,
        sizes=glide.sizes,
        inpaint=glide.inpaint_rows,
        img2img=glide.img2img_rows,
        upscale=glide.upscale_rows,
    ),
    "kandinsky": System(
        kandinsky.PARTS,
        kandinsky.sample_stages,
        "latent",
        kandinsky.made_by,
        needs=kandinsky.needs,
        owns=kandinsky.owns,
        priors=unclip.PRIORS,
        sizes=latent.sizes,
        joints=(Joint("prior_diffusion", "kandinsky", "image_embed"),),
        coder=CODERS["kandinsky"],
        inpaint=kandinsky_inpaint.inpaint_rows,
        img2img=kandinsky_img2img.img2img_rows,
        text_diff=text_diff.text_diff,
        reconstruct=reconstruct.reconstruct,
        options=(*DIFFUSION_OPTIONS, "negative"),
    ),
    "dalle": System(
        dalle.CASCADE,
        dalle.sample_stages,
        "dalle",
        dalle.made_by,
        owns=lambda config: config["kind"] == "dalle",  # dalle_mini is no twin
        sizes=dalle.sizes,
        complete=complete.complete,
        options=("guidance_scale", "candidates"),
    ),
    "dalle_mini": System(
        dalle_mini.CASCADE,
        dalle_mini.sample_stages,
        "dalle_mini",
        dalle_mini.made_by,
        sizes=dalle_mini.sizes,
        complete=functools.partial(complete.complete, cascade=dalle_mini.CASCADE),
        options=("guidance_scale", "candidates"),
    ),
    "vqvae2": System(
        vqvae2.PARTS,
        vqvae2.sample_stages,
        "pixelsnail_0",
        vqvae2.made_by,
        needs=vqvae2.needs,
        sizes=vqvae2.sizes,
        options=("guidance_scale",),
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


def system_of_runs(parts: Mapping[str, Part]) -> tuple[str, tuple[str, ...]]:
    """Which system the parts of training runs make up.

    It is the one whose part that draws (`System.draws`), or a twin of that part, is among them. Where the
    decoder of unCLIP is among them, or no part draws, it is unCLIP.

    Returns:
      The system's name, and the names of the parts that the runs must have for a bundle of it.

    Raises:
      ValueError: if the parts draw in two systems, and neither is unCLIP.
    """

    def drawn(system: System) -> bool:
        names = [name for name in parts if name == system.draws or name.startswith(f"{system.draws}_")]
        return bool(names) and system.owns(parts[names[0]].config)

    found = [name for name, system in SYSTEMS.items() if drawn(system)]
    if len(found) > 1 and "unclip" not in found:
        raise InputError(f"the runs are of {len(found)} systems, {' and '.join(found)}")
    name = "unclip" if "unclip" in found or not found else found[0]
    system = SYSTEMS[name]
    return name, system.needs(parts) if system.needs else system.parts


def prior_of(bundle: Bundle, prior: str | None) -> str | None:
    """The prior that a bundle draws with: the one asked for, or the first of its system; None where the
    system has none.

    Raises:
      ValueError: if the prior is unknown, or the system has none.
      KeyError: if the bundle lacks a part that it needs.
    """
    system = system_of(bundle)
    if not system.priors:
        if prior is not None:
            raise InputError(f"the system {bundle.system} has no prior: leave {prior!r} out")
        return None
    prior = next(iter(system.priors)) if prior is None else prior
    if prior not in system.priors:
        raise InputError(f"unknown prior {prior!r}; choose one of {', '.join(system.priors)}")
    for name in system.priors[prior]:
        bundle.part(name)
    return prior


def prior_with_picture(bundle: Bundle, prior: str | None) -> str | None:
    """As `prior_of`, where a picture is given: None, for the picture's own z_i, where the system can take it
    (`System.sees_pictures`), and no prior is asked for or there."""
    system = system_of(bundle)
    if prior is None and system.sees_pictures:
        first = next(iter(system.priors))
        if not all(name in bundle.parts for name in system.priors[first]):
            return None
    return prior_of(bundle, prior)


def drawing_parts(bundle: Bundle) -> list[str]:
    """The part that draws (`System.draws`) and its twins, such as one that inpaints. Upsamplers of the same
    kind, which have a `factor`, are not among them."""
    kind = bundle.part(system_of(bundle).draws).config["kind"]
    alike = (name for name, part in bundle.parts.items() if part.config["kind"] == kind)
    return [name for name in alike if "factor" not in bundle.parts[name].config]


def overrides_of(bundle: Bundle, prior: str | None, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides of the bundle's sampling defaults from the options that people know.

    Args:
      bundle: the parts.
      prior: from `prior_of`.
      given: option -> value. Of the parts that draw: `steps`, `guidance_scale`, `eta` (noise of DDIM, which
        then draws in place of the part's own sampler), `negative` (what the picture should not show). Of the
        prior: `prior_guidance_scale`, `candidates`.

    Raises:
      ValueError: if the system does not have one of them, or the prior draws nothing and has options.
    """
    system = system_of(bundle)
    own = {name: value for name, value in given.items() if name in system.options}
    drawn = {name: given[name] for name in PRIOR_OPTIONS if name in given and name not in own}
    unknown = [name for name in given if name not in own and not (system.priors and name in drawn)]
    if drawn and not system.priors and "steps" in system.options:
        raise InputError(f"the system {bundle.system} has no prior: leave {' and '.join(PRIOR_OPTIONS)} out")
    if unknown:
        raise InputError(f"the system {bundle.system} has no {', '.join(unknown)}: leave that out")
    drawn = {PRIOR_OPTIONS[name]: value for name, value in drawn.items()}
    if drawn and not system.priors[prior]:
        raise InputError(f"the prior {prior!r} draws nothing, so leave its options out: {', '.join(drawn)}")
    if "eta" in own:
        own["sampler"] = "ddim"
    chosen = {name: dict(own) for name in drawing_parts(bundle)} if own else {}
    return chosen | ({prior: drawn} if drawn else {})


def text_to_image(
    bundle: Sampler | Bundle,
    captions: Sequence[str] | str,
    *,
    seed: int = 0,
    prior: str | None = None,
    positions: Sequence[int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws one image per caption.

    Args:
      bundle: from `load_bundle`; or a `Sampler` of it, which keeps the compiled programs between calls.
      captions: texts; a single string is one caption.
      prior: one of the system's; None for its first. A system without priors takes None only.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      uint8 (B, H, W, 3), of the largest size that the bundle draws.

    Raises:
      ValueError, KeyError, NumericalError: as in the system's `sample_stages`; ValueError for a prior of a
        system that has none.
    """
    sampler = as_sampler(bundle)
    captions = [captions] if isinstance(captions, str) else captions
    system, prior = system_of(sampler.bundle), prior_of(sampler.bundle, prior)
    chosen = {"prior": prior} if system.priors else {}
    stages = system.sample(
        sampler, captions, seed=seed, positions=positions, options=options, progress=progress, **chosen
    )
    return ops.to_uint8(stages.images[-1])
