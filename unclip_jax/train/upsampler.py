"""The upsampler: large images from small ones (unCLIP section 2.1).

An unconditional U-Net without attention predicts the noise of the large image, given the small one. It learns
on random crops, from degraded small images (64 -> 256 px: Gaussian blur with kernel 3 and sigma 0.6;
256 -> 1024 px: BSR). Sampling applies it to whole images.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import upsampler_example
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {}
SETTINGS = settings.TRAINED | {
    "data": settings.DATA
    | {
        "eval": settings.absent(settings.SOURCE),
        "crop_size": settings.whole("[1, inf)"),
        "degradation": settings.text("blur", "bsr_light"),
        "blur_prob": settings.number("[0, 1]"),
    },
    "factor": settings.whole("[2, inf)"),
    "model": {"unet": settings.UNET, "resize": settings.text("cubic", "linear")},
    "diffusion": settings.IMAGE_DIFFUSION,
    "sampling": settings.SAMPLING["upsampler"],
    "eval": settings.DRAWN,
}
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, tables, diffusion):
    """Loss () and metrics of a global batch. Nothing stands frozen under this stage."""
    del frozen
    rng_noise, rng_dropout = jax.random.split(rng)
    x0 = batch["image"]
    conditioning = {"low_res": batch["low_res"]}

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, **conditioning,
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or sizes that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    size, crop_size = config.model.unet.image_size, config.data.crop_size
    if size % config.factor or crop_size % config.factor:
        raise InputError(f"image_size {size} and crop_size {crop_size} are no multiples of {config.factor}")
    halves = 2 ** (len(config.model.unet.channel_mult) - 1)
    if crop_size > size or crop_size % halves:
        raise InputError(
            f"data.crop_size={crop_size} must be a multiple of {halves}, at most model.unet.image_size={size}"
        )


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    factor, size = config.factor, config.model.unet.image_size
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    part = {"kind": "upsampler", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    part["factor"] = factor
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = Upsampler(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    tables = training_tables(schedule_of(diffusion))

    def init(key):
        x = jnp.zeros((1, size, size, 3))
        inputs = {"low_res": jnp.zeros((1, size // factor, size // factor, 3))}
        return model.init(key, x, jnp.zeros(1), **inputs)["params"], {}

    example = functools.partial(
        upsampler_example, size=size, crop_size=config.data.crop_size, factor=factor,
        degradation=config.data.degradation, blur_prob=config.data.blur_prob,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, tables=tables, diffusion=diffusion,
    )  # fmt: skip
    objective = without_extra(loss)
    return Stage(f"upsampler_{size}", model, part, init, example, objective)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/upsampler.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling)
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        return sample_upsampler(network, batch["low_res"], rng, options)

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
