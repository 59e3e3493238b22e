"""Checks that all diffusion parts share: the schedule, the prediction, and the error in one step."""

from __future__ import annotations

import numpy as np

from unclip_jax.evaluate.doctor import denoising
from unclip_jax.evaluate.doctor.limits import (
    CLEAN_END,
    NOISY_END,
    TO_WIENER,
    TO_WIENER_OF_EMBEDDINGS,
    VARIANCE_INSIDE,
    WHAT_IF,
    WHAT_IF_OF_EMBEDDINGS,
    what_if,
)
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import CASCADES, Subject
from unclip_jax.generate.networks import part_schedule


def needs(subject: Subject, name: str) -> tuple[str, ...]:
    """The parts that make a part's conditioning."""
    kind = subject.config(name)["kind"]
    if kind in CASCADES:
        return tuple({subject.reader(name)} - {None, name})
    return () if kind == "upsampler" else ("clip",)


def _deviation(subject: Subject, name: str) -> float:
    # Of a part's data, in its own units.
    x0 = denoising.case_of(subject, name).x0
    return float(np.sqrt(np.mean(np.square(x0 - x0.mean(axis=0)))))


def noisy_end(subject: Subject, name: str) -> Finding:
    """Signal to noise at the last step, where sampling starts from noise alone."""
    abar = float(part_schedule(subject.config(name)).alphas_cumprod[-1])
    value = _deviation(subject, name) * np.sqrt(abar / (1 - abar))
    change = (
        "the last step still shows the data, and sampling starts without it: take the cosine or the linear "
        "schedule"
    )
    return finding(name, "signal to noise at the last step", value, NOISY_END, change, needs(subject, name))


def clean_end(subject: Subject, name: str) -> Finding:
    """Noise to signal at the first step, which no step of sampling removes."""
    abar = float(part_schedule(subject.config(name)).alphas_cumprod[0])
    value = np.sqrt((1 - abar) / abar) / max(_deviation(subject, name), 1e-12)
    change = "the first step is already noisy, and fine detail is lost: use more steps, or larger data"
    return finding(name, "noise to signal at the first step", value, CLEAN_END, change, needs(subject, name))


def to_wiener(subject: Subject, name: str) -> Finding:
    """The error in one step against the best linear filter."""
    embeds = subject.config(name)["kind"] == "prior_diffusion"
    change = (
        "a linear filter denoises as well: the weights are near their start. Train longer; where the "
        "training loss was good, the average (EMA) holds the start: lower ema_decay"
    )
    limits = TO_WIENER_OF_EMBEDDINGS if embeds else TO_WIENER
    value = denoising.ratio_to_wiener(subject, name)
    return finding(
        name, "error in one step, by a linear filter's", value, limits, change, needs(subject, name)
    )


def schedule(subject: Subject, name: str) -> Finding:
    """Would the part fit better with another noise schedule?"""
    losses = denoising.other_schedules(subject, name)
    change = "set diffusion.schedule to the one that the part was trained with"
    embeds = subject.config(name)["kind"] == "prior_diffusion"
    limits = WHAT_IF_OF_EMBEDDINGS if embeds else WHAT_IF
    figure = "error with another schedule, by the error as it is"
    return what_if(name, figure, losses, change, limits, needs(subject, name))


def prediction(subject: Subject, name: str) -> Finding:
    """Would the part fit better if it predicted something else?"""
    losses = denoising.other_predictions(subject, name)
    change = "set diffusion.prediction to what the part was trained to predict"
    figure = "error with another prediction, by the error as it is"
    return what_if(name, figure, losses, change, needs=needs(subject, name))


def channels(subject: Subject, name: str) -> Finding:
    """Would the part fit better with blue before red?"""
    losses = denoising.swapped_channels(subject, name)
    change = (
        "red and blue have changed places in the weights: swap them where the part was converted or trained"
    )
    figure = "error with blue before red, by the error as it is"
    return what_if(name, figure, losses, change, needs=needs(subject, name))


def variance(subject: Subject, name: str) -> Finding | None:
    """The share of the learned variance that lies between its bounds; None where none is learned."""
    made = denoising.own_step(subject, name)
    channels = made.x0.shape[-1]
    if made.output.shape[-1] != 2 * channels:
        return None
    fraction = (made.output[..., channels:] + 1) / 2
    inside = np.mean((fraction >= -0.05) & (fraction <= 1.05))
    change = (
        "the learned variance leaves its bounds: draw with variance 'small', and train with a larger "
        "vb_weight"
    )
    return finding(
        name, "share of the learned variance inside its bounds", inside, VARIANCE_INSIDE, change,
        needs(subject, name), {"smallest": fraction.min(), "largest": fraction.max()},
    )  # fmt: skip
