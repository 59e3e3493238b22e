"""How well a diffusion part denoises real data in one step, against the best linear filter of that data.

Noise of known strength is added to real pictures or embeddings, and the part says in one step what was there.
Nothing is sampled, so the figures do not depend on sampling options. The error is divided by that of the
Wiener filter, the best linear estimate that the spectrum of the same rows allows:

    image x_t = a x0 + s eps, power P(f):     E|x0_hat - x0|^2 = mean_f  P s^2 / (a^2 P + s^2)
    embedding, variance v of each dimension:  the same with v in place of P

A trained network knows more than a spectrum, so its ratio is below 1. Errors also compare readings of one
network on the same noised rows: "what if it had been trained with the linear schedule, or with blue before
red?" The reading with which it was trained has the smallest error. All errors are geometric means over the
time steps of `TIMES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from unclip_jax.diffusion.embedding_space import EmbeddingSpace, normalize
from unclip_jax.diffusion.process import PREDICTIONS, to_x0_eps
from unclip_jax.diffusion.schedule import SCHEDULES, make_schedule
from unclip_jax.evaluate.doctor.subject import CASCADES, Subject
from unclip_jax.generate.networks import image_size, part_schedule, part_space

TIMES = (0.2, 0.5, 0.8)  # of T
LATE = (0.7, 0.9)  # where little but the conditioning tells what the data is
KINDS = ("prior_diffusion", "decoder", "upsampler", *CASCADES)  # of parts that have a `case_of`


@dataclass(frozen=True)
class Case:
    """Real data of a part, and its conditioning: x0 (N, ...) in the part's own units, inputs of N rows."""

    x0: np.ndarray
    inputs: Mapping[str, Any]


def case_of(subject: Subject, name: str, **changes: np.ndarray) -> Case:
    """The data of a part whose kind is in KINDS. `changes` replace inputs."""
    config = subject.config(name)
    if config["kind"] == "prior_diffusion":
        z = np.asarray(normalize(part_space(config), subject.z_image))
        return Case(z, subject.text_inputs(name) | changes)
    x0 = subject.images(image_size(config))[: subject.noised]
    if config["kind"] == "upsampler":
        low_res = subject.images(x0.shape[1] // config["factor"])[: len(x0)]
        return Case(x0, {"low_res": low_res} | changes)
    if config["kind"] in CASCADES:
        inputs = _enlarging(config, x0, subject) | subject.caption_inputs(name) | changes
        inputs |= _nothing_known(config, x0)
        return Case(x0, {key: value[: len(x0)] for key, value in inputs.items()})
    inputs = {"image_embed": subject.z_image, "drop_image": np.zeros(len(subject.z_image), bool)}
    inputs |= subject.text_inputs(name) | changes
    inputs |= _nothing_known(config, x0)
    return Case(x0, {key: value[: len(x0)] for key, value in inputs.items()})


def _nothing_known(config: Mapping[str, Any], x0: np.ndarray) -> dict[str, np.ndarray]:
    # What a network that inpaints sees of an image of which nothing is known.
    if not config["model"].get("inpaint"):
        return {}
    return {"known_image": np.zeros_like(x0), "known": np.zeros_like(x0[..., :1], bool)}


def _enlarging(config: Mapping[str, Any], x0: np.ndarray, subject: Subject) -> dict[str, np.ndarray]:
    # What an upsampler that reads captions sees of the true low resolution, without noise.
    if "factor" not in config:
        return {}
    low_res = subject.images(x0.shape[1] // config["factor"])[: len(x0)]
    if config["kind"] == "glide":
        return {"low_res": low_res}
    enlarged = np.asarray(jax.image.resize(low_res, x0.shape, "linear"))
    return {"enlarged": enlarged, "augmentation": np.zeros(len(x0), np.float32)}


@dataclass(frozen=True)
class Step:
    """One step of a part on noised data, K times of N rows each.

    x0: (N, ...). x_t: (K, N, ...). output: (K, N, ..., C or 2 C). abar: (K,).
    """

    x0: np.ndarray
    x_t: np.ndarray
    output: np.ndarray
    abar: np.ndarray


def step(
    subject: Subject,
    name: str,
    case: Case,
    times: tuple[float, ...] = TIMES,
    told: str | None = None,
    params: Any = None,
) -> Step:
    """Adds noise to a case and runs the part once.

    Args:
      told: a schedule of SCHEDULES. The part is told the time step at which that schedule has the noise that
        is there. None: the schedule of its configuration.
      params: replace the part's.

    Raises:
      NumericalError: naming the part, when its output is not finite.
    """
    schedule, x0 = part_schedule(subject.config(name)), case.x0
    steps = np.round(np.asarray(times) * (schedule.num_steps - 1)).astype(int)
    abar = schedule.abar(steps)
    if told is not None:
        other = make_schedule(told, schedule.num_steps).alphas_cumprod
        steps = np.argmin(np.abs(_logit(other)[None] - _logit(abar)[:, None]), axis=1)
    eps = np.random.default_rng(subject.seed).normal(size=(len(times), *x0.shape))
    wide = abar.reshape((-1,) + (1,) * x0.ndim)
    x_t = np.float32(np.sqrt(wide) * x0 + np.sqrt(1 - wide) * eps)
    output = subject.network_output(
        name,
        x_t.reshape(-1, *x0.shape[1:]),
        np.repeat(steps, len(x0)).astype(np.int32),
        {key: np.concatenate([value] * len(times)) for key, value in case.inputs.items()},
        params,
    )
    return Step(x0, x_t, output.reshape(len(times), len(x0), *output.shape[1:]), abar)


def _logit(abar: np.ndarray) -> np.ndarray:
    return np.log(abar) - np.log1p(-abar)


def own_step(subject: Subject, name: str) -> Step:
    """The step of a part on its own data, made once."""
    return subject.once(("step", name), lambda: step(subject, name, case_of(subject, name)))


def errors(made: Step, prediction: str, *, clip: bool, swapped: bool = False) -> np.ndarray:
    """The mean squared error of x0 at each time, (K,).

    Args:
      prediction: how to read the output: `eps`, `x0` or `v`.
      clip: whether x0 is clipped to [-1, 1], as for pictures.
      swapped: whether the output has its channels in reverse order.
    """
    channels = made.x0.shape[-1]
    output = made.output[..., :channels]
    output = output[..., ::-1] if swapped else output
    wide = np.asarray(made.abar, np.float32).reshape((-1,) + (1,) * made.x0.ndim)
    x0 = np.asarray(to_x0_eps(output, made.x_t, wide, prediction)[0], np.float64)
    x0 = np.clip(x0, -1, 1) if clip else x0
    return np.mean(np.square(x0 - made.x0).reshape(len(wide), -1), axis=1)


def typical(values: np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-20)))))


def error_of(subject: Subject, name: str, made: Step | None = None, **reading: Any) -> float:
    """The typical error of a part, read as its configuration says, but for `reading` (see `errors`)."""
    config = subject.config(name)
    reading = {"prediction": config["diffusion"]["prediction"]} | reading
    made = own_step(subject, name) if made is None else made
    return typical(errors(made, clip=config["kind"] != "prior_diffusion", **reading))


# ------------------------------------------------------------------------------------------ baselines
def spectrum(images: np.ndarray) -> np.ndarray:
    """The power of images (N, H, W, C) around their mean image, (H, W, C); its mean is their variance."""
    rest = images - images.mean(axis=0)
    power = np.mean(np.abs(np.fft.fft2(rest, axes=(1, 2))) ** 2, axis=0) / (rest.shape[1] * rest.shape[2])
    return power * len(images) / max(len(images) - 1, 1)


def wiener_error(x0: np.ndarray, abar: np.ndarray) -> np.ndarray:
    """The mean squared error of the best linear estimate of x0 (N, H, W, C) or (N, D) at each abar (K,)."""
    power = spectrum(x0) if x0.ndim == 4 else np.var(x0, axis=0, ddof=1)
    power, noise = np.maximum(power.reshape(1, -1), 1e-12), (1 - np.asarray(abar))[:, None]
    return np.mean(power * noise / ((1 - noise) * power + noise), axis=1)


def ratio_to_wiener(subject: Subject, name: str) -> float:
    """The error of a part divided by that of the Wiener filter of its own data."""
    made = own_step(subject, name)
    return error_of(subject, name) / typical(wiener_error(made.x0, made.abar))


# ------------------------------------------------------------------------------------------ what if
def other_schedules(subject: Subject, name: str) -> dict[str, float]:
    """The error when the part is told its time step by another schedule, divided by the error as it is."""
    own = subject.config(name)["diffusion"]["schedule"]
    case, as_is = case_of(subject, name), error_of(subject, name)
    return {
        other: error_of(subject, name, step(subject, name, case, told=other)) / as_is
        for other in SCHEDULES
        if other != own
    }


def other_predictions(subject: Subject, name: str) -> dict[str, float]:
    """The error when the output is read as another prediction, divided by the error as it is."""
    own, as_is = subject.config(name)["diffusion"]["prediction"], error_of(subject, name)
    return {other: error_of(subject, name, prediction=other) / as_is for other in PREDICTIONS if other != own}


def swapped_channels(subject: Subject, name: str) -> dict[str, float]:
    """The error when blue and red change places, divided by the error as it is: in the output alone, and in
    input and output."""
    case, as_is = case_of(subject, name), error_of(subject, name)
    flipped = {key: value[..., ::-1] for key, value in case.inputs.items() if key in ("low_res", "enlarged")}
    both = step(subject, name, Case(case.x0[..., ::-1], {**case.inputs, **flipped}))
    return {
        "output": error_of(subject, name, swapped=True) / as_is,
        "input and output": error_of(subject, name, both) / as_is,
    }


def other_spaces(subject: Subject, name: str) -> dict[str, float]:
    """The error of a prior in another embedding space, divided by the error as it is.

    Errors are compared in raw units, each divided by the variance that the space leaves, so that a space in
    which everything is small gains nothing.
    """
    config, z = subject.config(name), subject.z_image
    space, dim = part_space(config), z.shape[1]

    def loss(other: EmbeddingSpace) -> float:
        x0 = np.asarray(normalize(other, z))
        made = step(subject, name, Case(x0, subject.text_inputs(name)), LATE)
        return error_of(subject, name, made) / max(float(np.mean(np.var(x0, axis=0))), 1e-12)

    as_is = loss(space)
    others = {
        "half the scale": _scaled(space, 0.5),
        "twice the scale": _scaled(space, 2.0),
        "raw": EmbeddingSpace("raw"),
        "unit": EmbeddingSpace("unit"),
        "unit times sqrt(D)": EmbeddingSpace("scaled", float(np.sqrt(dim))),
        "whitened by this data": EmbeddingSpace("whitened", 1.0, z.mean(axis=0), z.std(axis=0) + 1e-6),
    }
    return {words: loss(other) / as_is for words, other in others.items()}


def _scaled(space: EmbeddingSpace, factor: float) -> EmbeddingSpace:
    # The same space with coordinates `factor` times as large.
    if space.kind == "whitened":
        return space._replace(std=space.std / factor)
    if space.kind == "raw":
        return EmbeddingSpace("whitened", 1.0, np.float32(0), np.float32(1 / factor))
    return EmbeddingSpace("scaled", space.scale * factor)
