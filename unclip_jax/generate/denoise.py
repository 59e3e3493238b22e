"""One diffusion stage as a denoiser and a sampler, with its schedule, time steps and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoise, make_denoiser
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import add_noise, fold_in
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


class Start(NamedTuple):
    """A clean sample from which sampling starts in place of noise (SDEdit, Meng et al. 2022, section 3).

    x0: (B, ...) in the stage's own units.
    strength: in (0, 1]; the share of the steps that are made. The sample is noised to the first of them.
    """

    x0: jax.Array
    strength: float


@dataclass(frozen=True)
class DiffusionSampler:
    """How a part is sampled with given options.

    config: the part's configuration. schedule: its noise schedule. moves: the time steps, descending, and
    where each leads. options: guidance, clipping, the sampler. left_out: how many moves before these a start
    from a clean sample leaves out; None where sampling starts from noise.
    """

    config: dict
    schedule: Schedule
    moves: Moves
    options: SamplingOptions
    left_out: int | None = None

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
            threshold_most=self.options.threshold_most,
            smallest_abar=SMALLEST_ABAR if self.floored else 0.0,
        )

    def begin(self, noise: jax.Array, start: Start | None = None) -> tuple[DiffusionSampler, jax.Array]:
        """The sampler's moves and the sample before the first of them.

        With a start, they are the last int(strength * N) of the N moves, and the clean sample is noised to
        the first. The number is rounded down as in CompVis' and diffusers' image-to-image.

        Args:
          noise: (B, ...) a standard normal draw.
          start: the clean sample, of the same shape; None starts from the noise.

        Raises:
          ValueError: when the strength is out of range, or leaves no move.
        """
        if start is None:
            return self, noise
        count = len(self.moves.t)
        if not 0 < start.strength <= 1:
            raise InputError(f"strength must be in (0, 1], got {start.strength}")
        kept = int(count * start.strength)
        if kept < 1:
            raise InputError(
                f"a strength of {start.strength:g} makes none of {count} steps: raise the strength or the "
                "steps until their product is at least 1"
            )
        moves = Moves(self.moves.t[count - kept :], self.moves.r[count - kept :])
        abar = np.maximum(self.schedule.abar(moves.t[0]), SMALLEST_ABAR if self.floored else 0.0)
        noised = add_noise(start.x0, noise, jnp.asarray(abar, noise.dtype))
        return replace(self, moves=moves, left_out=count - kept), noised

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
            bound = 1.0 if options.spacing == "even" else None
            settings |= {"bound": bound, "left_out": self.left_out or 0}
        elif self.left_out is None and options.spacing in ("linspace", "trailing"):  # Euler's methods
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
    moves = options.moves(schedule.num_steps, schedule.continuous is not None)
    return DiffusionSampler(config, schedule, moves, options)
