"""Checks of networks that draw pixels from captions alone: those of GLIDE and Imagen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.evaluate.doctor import denoising, diffusion
from unclip_jax.evaluate.doctor.limits import OWN_CAPTION, what_if
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject


def _late_error(subject: Subject, name: str, inputs: Mapping[str, Any]) -> float:
    # The error at late times, where the caption matters most, with some inputs replaced.
    case = denoising.case_of(subject, name, **inputs)
    return denoising.error_of(subject, name, denoising.step(subject, name, case, denoising.LATE))


def own_caption(subject: Subject, name: str) -> Finding | None:
    """The error with a picture's own caption, by that with another's; None for an upsampler, whose small
    picture says nearly everything."""
    if "factor" in subject.config(name):
        return None
    texts = subject.caption_inputs(name)
    others = {key: np.roll(value, 1, axis=0) for key, value in texts.items()}
    value = _late_error(subject, name, texts) / _late_error(subject, name, others)
    change = "the network does not listen to the caption: train it longer, and check its text encoder"
    figure = "error with the own caption, by that with another's"
    return finding(name, figure, value, OWN_CAPTION, change, diffusion.needs(subject, name))


def states_scale(subject: Subject, name: str) -> Finding:
    """Would the network fit better with the captions' states at another scale?"""
    states = subject.caption_inputs(name)["text_states"]
    as_is = _late_error(subject, name, {})
    scaled = {"half": states / 2, "twice": 2 * states}
    losses = {
        f"states at {words} norm": _late_error(subject, name, {"text_states": other}) / as_is
        for words, other in scaled.items()
    }
    change = "the network was trained with another T5 or CLIP, or in another precision: give it that one"
    figure = "error with text states of another norm, by the error as it is"
    return what_if(name, figure, losses, change, needs=diffusion.needs(subject, name))
