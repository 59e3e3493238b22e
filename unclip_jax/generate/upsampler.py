"""Large images from small ones (unCLIP section 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.generate.denoise import NOISE, diffusion_sampler
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import SamplingOptions


def sample_upsampler(
    upsampler: Network,
    low_res: jax.Array,
    rng: jax.Array,
    options: SamplingOptions,
    last_step: Network | None = None,
) -> jax.Array:
    """Enlarges images by the upsampler's factor; there is no guidance.

    Args:
      upsampler: of kind `upsampler`.
      low_res: (B, h, w, 3) in [-1, 1].
      rng: one key, or (B,) keys.
      options: steps, sampler, clipping.
      last_step: the network that makes the last step, where a separate one does (Karlo).

    Returns:
      (B, H, W, 3) float32 in [-1, 1].
    """
    factor = upsampler.config["factor"]
    b, h, w, c = low_res.shape
    size = h * factor, w * factor
    sampler = diffusion_sampler(upsampler.config, options)
    enlarged = upsampler.module.enlarge(low_res, size)

    def network(x, t):
        return upsampler.apply(x, t, low_res=enlarged)

    def final_network(x, t):
        return last_step.apply(x, t, low_res=last_step.module.enlarge(low_res, size))

    def network_with_last_step(x, t):
        return jax.lax.cond(t[0] == sampler.steps[-1], final_network, network, x, t)

    x = standard_normal(fold_in(rng, NOISE), (b, *size, c))
    denoise = sampler.denoiser(network if last_step is None else network_with_last_step, False)
    return jnp.clip(sampler.run(denoise, x, rng), -1, 1)
