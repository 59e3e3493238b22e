"""The upsampler: large images from small ones (unCLIP section 2.1).

An unconditional U-Net without attention predicts the noise of the large image, given the small one. It learns on random crops, from
degraded small images (64 -> 256: Gaussian blur, kernel 3, sigma 0.6; 256 -> 1024: BSR), and is applied to whole images.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data import ops
from unclip_jax.data.degrade import bsr_light, low_resolution
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, training_tables
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.run.batches import open_data
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, sample_grid

FROZEN: dict[str, str] = {}


# ---------------------------------------------------------------------------------------------- example
def make_example(
    record, rng, *, size, crop_size, factor, degradation, blur_prob, training=True
) -> dict[str, np.ndarray]:
    """One row: `image` (crop_size, crop_size, 3) and `low_res` (crop_size / factor, ..., 3), in [-1, 1].

    In training a random crop of the image resized to `size`, its small version degraded: `blur`, with probability `blur_prob`, or
    `bsr_light`. Else the whole image and a clean reduction.
    """
    image = ops.to_float(
        ops.resize_then_crop(ops.decode_image(record.image), size, rng if training else None)
    )
    if training:
        image = ops.random_crop(image, crop_size, rng)
    small = image.shape[0] // factor
    if training and degradation == "bsr_light":
        return {"image": image, "low_res": bsr_light(image, small, rng)}
    return {
        "image": image,
        "low_res": low_resolution(image, small, rng, blur_prob=blur_prob if training else 0.0),
    }


# ---------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, frozen, model, tables, diffusion):
    """Loss () and metrics of a global batch; nothing stands frozen under this stage."""
    del frozen
    rng_noise, rng_dropout = jax.random.split(rng)
    x0 = batch["image"]

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, low_res=batch["low_res"],
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ---------------------------------------------------------------------------------------------- stage
def stage(config, mesh, frozen) -> Stage:
    """The stage as its configuration describes it.

    Raises:
      ValueError: on sizes that do not fit the factor, or an unknown degradation.
    """
    size, factor, crop_size = config.model.unet.image_size, config.factor, config.data.crop_size
    if size % factor or crop_size % factor:
        raise InputError(
            f"image_size {size} and crop_size {crop_size} must be multiples of the factor {factor}"
        )
    if config.data.degradation not in ("blur", "bsr_light"):
        raise InputError(f"unknown degradation {config.data.degradation!r}; choose blur or bsr_light")
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    part = {
        "kind": "upsampler",
        "model": model_config,
        "diffusion": diffusion,
        "frozen": {},
        "factor": factor,
    }
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = Upsampler(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        small = jnp.zeros((1, size // factor, size // factor, 3))
        return model.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros(1), low_res=small)["params"], {}

    return Stage(
        name=f"upsampler_{size}",
        model=model,
        part=part,
        init=init,
        example=functools.partial(
            make_example, size=size, crop_size=crop_size, factor=factor,
            degradation=config.data.degradation, blur_prob=config.data.blur_prob,
        ),
        objective=without_extra(functools.partial(
            loss_fn, model=model,
            tables=training_tables(make_schedule(diffusion["schedule"], diffusion["num_steps"])), diffusion=diffusion,
        )),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/upsampler.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------ mesh and data
    mesh, data = make_mesh(config.mesh), open_data(config)
    frozen: dict = {}
    upsampler = stage(config, mesh, frozen)

    # ------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling)

    @jax.jit
    def draw(params, batch, rng):
        return sample_upsampler(
            Network(upsampler.model, params, upsampler.part), batch["low_res"], rng, options
        )

    loss_of_held_out = held_out_loss(upsampler, config, mesh, data)

    def evaluate(run, step) -> dict[str, float]:
        sample_grid(run, step, lambda batch, rng: draw(run.state.ema_params, batch, rng))
        return {"eval_loss": loss_of_held_out(run.state, frozen)}

    # ------------------------------------------------------------------------------------------ loop
    with Run(config, workdir, upsampler, mesh, data, init_from) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
