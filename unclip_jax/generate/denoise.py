"""One diffusion stage as a denoiser and a sampler, with its schedule, time steps and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from unclip_jax.diffusion.guidance import Denoise, make_denoiser
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import fold_in
from unclip_jax.diffusion.samplers import SAMPLERS
from unclip_jax.diffusion.schedule import SMALLEST_ABAR, Schedule
from unclip_jax.diffusion.spacing import Moves
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import part_schedule
from unclip_jax.generate.options import SamplingOptions

# Folds of a stage's random key.
NOISE = 0  # the noise that sampling starts from
STEPS = 1  # the noise that the sampler adds at its steps

FLOORED = ("dpmpp_2m", "euler", "euler_ancestral")  # the samplers that divide by abar


@dataclass(frozen=True)
class DiffusionSampler:
    """How a part is sampled with given options.

    config: the part's configuration. schedule: its noise schedule. moves: the time steps, descending, and
    where each leads. options: guidance, clipping, the sampler.
    """

    config: dict
    schedule: Schedule
    moves: Moves
    options: SamplingOptions

    @property
    def steps(self) -> np.ndarray:
        """The time steps, descending."""
        return self.moves.t

    @property
    def floored(self) -> bool:
        """Whether the sampler divides by an abar that is zero at the last step, which is then
        SMALLEST_ABAR."""
        return self.options.sampler in FLOORED and self.schedule.alphas_cumprod[-1] == 0

    def denoiser(self, network: Callable[[jax.Array, jax.Array], jax.Array], guided: bool) -> Denoise:
        """Turns `network` (x_t, t) -> output into a denoiser.

        Where `guided`, the denoiser calls it with 2 B rows, the conditional half first.
        """
        return make_denoiser(
            network,
            self.schedule,
            prediction=self.config["diffusion"]["prediction"],
            guidance=self.options.guidance if guided else None,
            clip=self.options.clip,
            threshold=self.options.threshold,
            smallest_abar=SMALLEST_ABAR if self.floored else 0.0,
        )

    def run(
        self, denoise: Denoise, x: jax.Array, rng: jax.Array, segment: Segment | None = None
    ) -> jax.Array:
        """Noise x (B, ...) -> samples (B, ...). `rng` is the stage's key, or (B,) keys.

        With `segment`, it makes some of the steps only (`loops.Segment`).
        """
        options, settings = self.options, {}
        if segment is not None:
            denoise, settings = segment.watch(denoise), {"loop": segment}
        if options.sampler == "ddpm":
            settings |= {"variance": options.variance, "x0_error": self.config.get("x0_error")}
        elif options.sampler == "ddim":
            settings |= {"eta": options.eta}
        elif options.sampler == "plms":
            settings |= {"prediction": self.config["diffusion"]["prediction"]}
        elif options.sampler == "dpmpp_2m":
            settings |= {"bound": 1.0 if options.spacing == "even" else None}
        elif options.spacing in ("linspace", "trailing"):  # Euler's methods
            first = np.maximum(self.schedule.abar(self.steps[0]), SMALLEST_ABAR)
            settings |= {"noise_scale": float(np.sqrt(1 - first))}
        return SAMPLERS[options.sampler](
            denoise, x, self.schedule, self.moves, fold_in(rng, STEPS), **settings
        )


def diffusion_sampler(config: dict, options: SamplingOptions) -> DiffusionSampler:
    """The sampler of a part.

    Raises:
      ValueError: on an unknown sampler, or steps that do not fit the schedule.
    """
    if options.sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {options.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    schedule = part_schedule(config)
    return DiffusionSampler(config, schedule, options.moves(schedule.num_steps), options)
