"""Checks of the decoder and the upsamplers: real conditioning against what the part before makes of it."""

from __future__ import annotations

import numpy as np

from unclip_jax.checkpoint.bundle import upsamplers
from unclip_jax.data import ops
from unclip_jax.evaluate.doctor import denoising
from unclip_jax.evaluate.doctor.limits import (
    CONDITIONING,
    FAITHFUL,
    GUIDANCE,
    ORACLE,
    PRIOR_SHARE,
    TO_ENLARGED,
    WHAT_IF,
    what_if,
)
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.generate.networks import image_size
from unclip_jax.metrics.retrieval import unit

SCALES = (1.0, 2.0, 4.0, 8.0)  # of guidance
NEEDS = ("clip",)
BASES = ("decoder", "glide", "imagen")  # the parts that draw small pictures


# ------------------------------------------------------------------------------------------ decoder
def conditioning(subject: Subject, name: str) -> Finding:
    """The error with a picture's own z_i, by the error with another picture's."""
    own = denoising.step(subject, name, denoising.case_of(subject, name), denoising.LATE)
    other = denoising.case_of(subject, name, image_embed=np.roll(subject.z_image, 1, axis=0))
    other = denoising.step(subject, name, other, denoising.LATE)
    value = denoising.error_of(subject, name, own) / denoising.error_of(subject, name, other)
    change = "the decoder does not listen to z_i: train it longer, and check that its CLIP is the one here"
    return finding(name, "error with own z_i, by that with another's", value, CONDITIONING, change, NEEDS)


def embedding_scale(subject: Subject, name: str) -> Finding:
    """Would the decoder fit better with z_i of another scale?"""
    run = lambda z: denoising.error_of(
        subject, name,
        denoising.step(subject, name, denoising.case_of(subject, name, image_embed=z), denoising.LATE),
    )  # fmt: skip
    z = subject.z_image
    as_is = run(z)
    others = {"half": z / 2, "twice": 2 * z, "unit": np.float32(unit(z))}
    losses = {f"z_i at {words} norm": run(other) / as_is for words, other in others.items()}
    change = (
        "the decoder was trained on embeddings of another normalisation: give it those, or scale its weights"
    )
    figure = "error with z_i of another norm, by the error as it is"
    return what_if(name, figure, losses, change, WHAT_IF, NEEDS)


def _share(subject: Subject, images: np.ndarray) -> float:
    """How far pictures lie from other pictures' embeddings (0) to their own (1)."""
    cosines = unit(subject.embed_images(images)) @ unit(subject.z_image[: len(images)]).T
    n = len(cosines)
    others = (cosines.sum() - np.trace(cosines)) / max(n * n - n, 1)
    return float((np.mean(np.diag(cosines)) - others) / max(1 - others, 1e-12))


def oracle(subject: Subject, name: str) -> Finding:
    """What CLIP sees in pictures drawn from true z_i, on the way from other pictures (0) to its own (1)."""
    change = "the decoder does not draw what z_i says, even if z_i is the true one: the decoder is to blame"
    value = _share(subject, subject.drawn_oracle)
    return finding(name, "likeness of pictures drawn from true z_i", value, ORACLE, change, NEEDS)


def prior_share(subject: Subject, name: str) -> Finding:
    """The likeness that is left where a prior's z_i replaces the true one. `name` is the prior's."""
    found = {"true z_i": _share(subject, subject.drawn_oracle)}
    found["prior's z_i"] = _share(subject, subject.drawn_from(name))
    found["z_t"] = _share(subject, subject.drawn_from("none"))
    value = found["prior's z_i"] / max(found["true z_i"], 1e-6)
    change = "most of what is lost is lost by the prior, and not by the decoder: train or tune the prior"
    figure = "likeness with its z_i, by that with true z_i"
    return finding(name, figure, value, PRIOR_SHARE, change, ("clip", "decoder"), found)


def guidance(subject: Subject, name: str) -> Finding:
    """The likeness at the guidance scale of the bundle, by the best of a sweep."""
    scale = subject.options()[name].guidance_scale
    likeness, full = {}, {}
    for other in sorted({*SCALES, float(scale)}):
        images = subject.drawn_oracle_at(other)
        likeness[other], full[other] = _share(subject, images), float(np.mean(np.abs(images) > 0.98))
    best = max(likeness, key=likeness.get)
    more = {f"likeness at {other:g}": value for other, value in likeness.items()}
    more |= {f"saturated at {other:g}": value for other, value in full.items()}
    more["saturated, real"] = np.mean(np.abs(subject.images(image_size(subject.config(name)))) > 0.98)
    value = likeness[float(scale)] / max(likeness[best], 1e-6)
    change = f"guidance {best:g} is nearer to z_i than {scale:g}, the bundle's: try --guidance {best:g}"
    figure = f"likeness at guidance {scale:g}, by the best"
    return finding(name, figure, value, GUIDANCE, change, NEEDS, more)


# ------------------------------------------------------------------------------------------ upsamplers
def _before(subject: Subject, name: str) -> str:
    # The part whose output an upsampler enlarges.
    names = upsamplers(subject.sampler.bundle.parts)
    if names.index(name):
        return names[names.index(name) - 1]
    return next((base for base in BASES if base in subject.sampler.bundle.parts), "decoder")


def _enlarges(subject: Subject, name: str) -> bool:
    return name in upsamplers(subject.sampler.bundle.parts)


def to_enlarged(subject: Subject, name: str) -> Finding | None:
    """The error of what is drawn from true low resolution, by the error of plain enlargement; None for a
    network that does not enlarge."""
    if not _enlarges(subject, name):
        return None
    real = subject.images(image_size(subject.config(name)))[: subject.drawn]
    low_res = subject.low_res(name)[: subject.drawn]
    plain = np.stack([ops.resize(image, real.shape[1]) for image in low_res])
    drawn = subject.enlarged(name, "real", low_res)
    value = np.mean(np.square(drawn - real)) / max(np.mean(np.square(plain - real)), 1e-12)
    change = "plain enlargement is nearer to the picture: train the upsampler longer, or check its low_res"
    return finding(name, "error from true low_res, by bicubic's", value, TO_ENLARGED, change)


def faithful(subject: Subject, name: str) -> Finding | None:
    """Shrunk again, how far are its pictures from what the network of small pictures gave it? None where it
    enlarges the pictures of another upsampler."""
    before = _before(subject, name) if _enlarges(subject, name) else None
    if before not in subject.sampler.bundle.parts or before not in BASES or before in subject.broken:
        return None
    given, made = subject.drawn_base(before), f"{before}'s low_res"
    lost = {made: _lost(subject.enlarged(name, before, given), given)}
    real = subject.low_res(name)[: subject.drawn]
    lost["true low_res"] = _lost(subject.enlarged(name, "real", real), real)
    change = (
        f"the upsampler changes what it is given: where true low_res is kept, the {before}'s pictures are "
        "unlike those in training; else train the upsampler longer"
    )
    figure = f"change of the {before}'s picture, by its variance"
    needs = ("clip", before) if before == "decoder" else (before,)
    return finding(name, figure, lost[made], FAITHFUL, change, needs, lost)


def _lost(images: np.ndarray, low_res: np.ndarray) -> float:
    small = np.stack([ops.resize(image, low_res.shape[1]) for image in images])
    return float(np.mean(np.square(small - low_res)) / max(np.var(low_res), 1e-12))
