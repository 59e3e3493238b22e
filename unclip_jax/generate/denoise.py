"""One diffusion stage as a denoiser and a sampler, with its schedule, time steps and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from unclip_jax.diffusion.guidance import Denoise, make_denoiser
from unclip_jax.diffusion.process import fold_in
from unclip_jax.diffusion.samplers import SAMPLERS
from unclip_jax.diffusion.schedule import Schedule, time_steps
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import part_schedule
from unclip_jax.generate.options import SamplingOptions

# Folds of a stage's random key.
NOISE = 0  # the noise that sampling starts from
STEPS = 1  # the noise that the sampler adds at its steps


@dataclass(frozen=True)
class DiffusionSampler:
    """How a part is sampled with given options.

    config: the part's configuration. schedule: its noise schedule. steps: the time steps, descending.
    options: guidance, clipping, the sampler.
    """

    config: dict
    schedule: Schedule
    steps: tuple[int, ...]
    options: SamplingOptions

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
        )

    def run(self, denoise: Denoise, x: jax.Array, rng: jax.Array) -> jax.Array:
        """Noise x (B, ...) -> samples (B, ...). `rng` is the stage's key, or (B,) keys."""
        settings = {}
        if self.options.sampler == "ddpm":
            settings = {"variance": self.options.variance, "x0_error": self.config.get("x0_error")}
        elif self.options.sampler == "ddim":
            settings = {"eta": self.options.eta}
        return SAMPLERS[self.options.sampler](
            denoise, x, self.schedule, self.steps, fold_in(rng, STEPS), **settings
        )


def diffusion_sampler(config: dict, options: SamplingOptions) -> DiffusionSampler:
    """The sampler of a part.

    Raises:
      ValueError: on an unknown sampler, or steps that do not fit the schedule.
    """
    if options.sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {options.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    schedule = part_schedule(config)
    return DiffusionSampler(config, schedule, time_steps(schedule.num_steps, options.steps), options)
