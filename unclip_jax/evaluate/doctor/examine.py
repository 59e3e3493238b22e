"""Examines a bundle or a run, stage by stage, in the order of the cascade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from unclip_jax.checkpoint.bundle import last_step_of, upsamplers
from unclip_jax.data import ops
from unclip_jax.errors import InputError, NumericalError, one_line
from unclip_jax.evaluate.doctor import (
    captioned,
    clip,
    codes,
    diffusion,
    joints,
    pictures,
    priors,
    weights,
)
from unclip_jax.evaluate.doctor.report import FAULT, Finding, Report, explained
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.sampling.text_to_image import SYSTEMS

# What a check needs.
IMAGE, TEXT, DECODER, PICTURES = "CLIP's image tower", "CLIP's text tower", "the decoder", "drawn pictures"
BOTH, READER = (IMAGE, TEXT), "the network of small pictures and what reads its captions"
CASCADE = (*BOTH, DECODER, PICTURES)
SHOWN = 6  # captions of the grid


class Check(NamedTuple):
    """A check of one part: what it computes, and what it needs besides the part.

    run: (subject, the part's name) -> its finding; None where it does not apply.
    """

    run: Callable[[Subject, str], Finding | None]
    needs: tuple[str, ...] = ()


def _checks(needs: tuple[str, ...], *runs: Callable[[Subject, str], Finding | None]) -> tuple[Check, ...]:
    return tuple(Check(run, needs) for run in runs)


WEIGHTS = _checks((), weights.not_finite, weights.dead)
STEP = (
    diffusion.noisy_end, diffusion.clean_end, diffusion.to_wiener, diffusion.schedule, diffusion.prediction,
    weights.average,
)  # fmt: skip
PICTURE_STEP = (*STEP, diffusion.channels, diffusion.variance)
# The checks of each kind of part, in the order of the report.
CODER = _checks((), codes.decoded, codes.used)
ENLARGES = (pictures.to_enlarged, pictures.faithful)
CHECKS: dict[str, tuple[Check, ...]] = {
    "t5": (),
    "clip": _checks(BOTH, clip.alignment, clip.token_shift, clip.image_reading, weights.average),
    "codec": _checks((IMAGE,), priors.restored),
    "prior_diffusion": _checks(BOTH, *STEP, priors.space_scale, priors.other_spaces)
    + _checks(BOTH, priors.over_mean, priors.over_text)
    + _checks(CASCADE, pictures.prior_share),
    "prior_ar": _checks(BOTH, priors.over_mean, priors.over_text) + _checks(CASCADE, pictures.prior_share),
    "decoder": _checks(BOTH, *PICTURE_STEP, pictures.conditioning, pictures.embedding_scale),
    "upsampler": _checks((), *PICTURE_STEP)
    + _checks((PICTURES,), pictures.to_enlarged)
    + _checks(CASCADE, pictures.faithful),
    "glide": _checks((), *PICTURE_STEP, captioned.own_caption) + _checks((PICTURES,), *ENLARGES),
    "imagen": _checks((READER,), *PICTURE_STEP, captioned.own_caption, captioned.states_scale),
    "imagen_upsampler": _checks((READER,), *PICTURE_STEP, captioned.states_scale)
    + _checks((READER, PICTURES), *ENLARGES),
    "kl_autoencoder": _checks((), codes.decoded),
    "vq_autoencoder": CODER,
    "dvae": CODER,
    "dvae_strided": CODER,
    "vqvae": CODER,
    "dalle": _checks((PICTURES,), codes.drawn_use),
    "dalle_mini": _checks((PICTURES,), codes.drawn_use),
    "pixelsnail": _checks((PICTURES,), codes.drawn_use),
}
DRAWN = _checks(CASCADE, pictures.oracle, pictures.guidance)  # of the part `decoder` alone


def examine(subject: Subject, name: str, data: str, read: tuple[Finding, ...] = ()) -> Report:
    """Runs all checks that the subject's parts allow.

    Args:
      subject: the parts that can be read, and the data.
      name: what is examined, for the report.
      data: the data in words, for the report.
      read: what reading the parts has found. Parts that it finds at fault are not in the subject.

    Returns:
      The report. A fault that comes from a part before is a warning there, and names that part.
    """
    parts, findings = subject.sampler.bundle.parts, list(read)
    untested = [f"{found.stage}: its weights cannot be read" for found in read]
    place = lambda stage: _place(parts[stage].config["kind"]) if stage in parts else -1
    stages = sorted(parts, key=place)
    for stage in stages:
        for check in WEIGHTS:
            findings += _run(subject, stage, check)
        if any(found.stage == stage and found.verdict == FAULT for found in findings):
            subject.broken.add(stage)
            untested.append(f"{stage}: its weights are damaged")
    for stage in stages:
        for check in () if stage in subject.broken else _checks_of(subject, stage):
            absent = [needed for needed in check.needs if not _has(subject, needed)]
            if absent:
                untested.append(f"{stage}, where it needs {' and '.join(absent)}")
            else:
                findings += _run(subject, stage, check)
    findings.sort(key=lambda found: place(found.stage))
    return Report(name, data, explained(findings), tuple(dict.fromkeys(untested)))


def _place(kind: str) -> int:
    # The place of a kind in the report. Of a kind that is not in CHECKS, only the weights are tested.
    return list(CHECKS).index(kind) if kind in CHECKS else len(CHECKS)


def _has(subject: Subject, needed: str) -> bool:
    if needed == PICTURES:
        return subject.drawn > 0
    if needed == DECODER:
        return "decoder" in subject.sampler.bundle.parts and "decoder" not in subject.broken
    if needed == READER:
        networks = subject.names("imagen", "imagen_upsampler")
        return subject.reader(networks[0]) is not None and not {subject.reader(networks[0])} & subject.broken
    return subject.tower("image" if needed == IMAGE else "text") and "clip" not in subject.broken


def _checks_of(subject: Subject, stage: str) -> Iterator[Check]:
    parts, kind = subject.sampler.bundle.parts, subject.config(stage)["kind"]
    if last_step_of(parts[stage]):  # it sees the last step alone
        return
    if kind == "clip" and stage != "clip":  # the checks read the part `clip`, and not a second CLIP
        return
    yield from CHECKS.get(kind, ())
    if stage == "decoder":
        yield from DRAWN
    takers = {part.config["kind"] for part in parts.values()}
    for joint in SYSTEMS[subject.sampler.bundle.system].joints:
        if joint.maker == stage and joint.taker in takers:
            needs = CASCADE if kind == "decoder" else BOTH
            for run in (joints.norm, joints.spread):
                yield Check(lambda subject, _, run=run, joint=joint: run(subject, joint), needs)


def _run(subject: Subject, stage: str, check: Check) -> list[Finding]:
    # What a check finds, at most one finding. Values that are not finite are a fault.
    try:
        found = check.run(subject, stage)
    except NumericalError as error:
        figure, needs = "values that are finite", tuple({"clip"} - {stage})
        return [Finding(stage, figure, None, "all", FAULT, one_line(error), needs)]
    return [] if found is None else [found]


# ------------------------------------------------------------------------------------------ pictures
def swap_grid(subject: Subject) -> tuple[np.ndarray, list[str], int]:
    """Pictures of the same captions, with one stage swapped at a time.

    Returns:
      uint8 images (R C, S, S, 3), row by row; their labels; and the number of columns C. The first row is
      real.

    Raises:
      ValueError: when the bundle has neither a decoder that can be tested nor an upsampler.
    """
    parts, count = subject.sampler.bundle.parts, min(SHOWN, subject.drawn)
    if not count:
        raise InputError("a grid needs drawn pictures: ask for 2 or more")
    enlarging = [name for name in upsamplers(parts) if name not in subject.broken]
    rows: dict[str, np.ndarray] = {}
    if all(_has(subject, needed) for needed in (*BOTH, DECODER)):
        rows["true z_i"] = subject.drawn_oracle
        for prior in subject.names("prior_diffusion", "prior_ar"):
            if prior not in subject.broken and not (prior == "prior_ar" and "codec" in subject.broken):
                rows[f"z_i of {prior}"] = subject.drawn_from(prior)
        rows["z_t for z_i"] = subject.drawn_from("none")
    drawn = {words: images[:count] for words, images in rows.items()}
    for name in enlarging:
        drawn = {words: subject.enlarge(name, images) for words, images in drawn.items()}
    for name in enlarging:
        drawn[f"{name}, true low_res"] = subject.enlarged(
            name, "real", subject.low_res(name)[: subject.drawn]
        )
    if not drawn:
        raise InputError(
            "--grid needs a decoder with its CLIP, or an upsampler, and there is none to draw with"
        )
    size = max(images.shape[1] for images in drawn.values())
    drawn = {"real": subject.images(size), **drawn}
    images = [
        ops.resize(image, size) for row in drawn.values() for image in ops.to_uint8(row[:count])
    ]  # a stage in between is smaller
    labels = [f"{words}: {caption}" for words in drawn for caption in subject.captions[:count]]
    return np.stack(images), labels, count
