"""The upsampler: large images from small ones (unCLIP section 2.1).

An unconditional U-Net without attention predicts the noise of the large image, given the small one. It learns on random crops, from
degraded small images (64 -> 256: Gaussian blur, kernel 3, sigma 0.6; 256 -> 1024: BSR), and is applied to whole images.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import ops, sources
from unclip_jax.data.degrade import bsr_light, low_resolution
from unclip_jax.diffusion.losses import sample_noised, simple_loss, split_variance, training_tables, variational_bits
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.generate import options_from, sample_upsampler
from unclip_jax.models.unet import Upsampler
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.state import abstract_state, accumulated, create_state, make_update, step_rng


# ---------------------------------------------------------------------------------------------------------------------- example
def make_example(record, rng, *, size, crop_size, factor, degradation, blur_prob, training=True) -> dict[str, np.ndarray]:
    """One row: `image` (crop_size, crop_size, 3) and `low_res` (crop_size / factor, ..., 3), in [-1, 1].

    In training a random crop of the image resized to `size`, its small version degraded: `blur`, with probability `blur_prob`, or
    `bsr_light`. Else the whole image and a clean reduction.
    """
    image = ops.to_float(ops.resize_then_crop(ops.decode_image(record.image), size, rng if training else None))
    if training:
        image = ops.random_crop(image, crop_size, rng)
    small = image.shape[0] // factor
    if training and degradation == "bsr_light":
        return {"image": image, "low_res": bsr_light(image, small, rng)}
    return {"image": image, "low_res": low_resolution(image, small, rng, blur_prob=blur_prob if training else 0.0)}


# ---------------------------------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, model, tables, diffusion, frozen=None):
    """Loss () and metrics of a global batch."""
    rng_noise, rng_dropout = jax.random.split(rng)
    x0 = batch["image"]

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, low_res=batch["low_res"], deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    simple = jnp.mean(simple_loss(out, x0, eps, t, tables, diffusion["prediction"]))
    if v_frac is None:
        return simple, {}
    bits = jnp.mean(variational_bits(out, v_frac, x0, x_t, t, tables, diffusion["prediction"]))
    return simple + diffusion["vb_weight"] * diffusion["num_steps"] * bits, {"simple": simple, "vb_bits": bits}


# ---------------------------------------------------------------------------------------------------------------------- network
def example_of(config, clip=None):
    """`make_example` as the configuration wants it; there is no CLIP in this stage.

    Raises:
      ValueError: on sizes that do not fit the factor, or an unknown degradation.
    """
    size, factor = config.model.unet.image_size, config.factor
    if size % factor or config.data.crop_size % factor:
        raise ValueError(f"image_size {size} and crop_size {config.data.crop_size} must be multiples of the factor {factor}")
    if config.data.degradation not in ("blur", "bsr_light"):
        raise ValueError(f"unknown degradation {config.data.degradation!r}; choose blur or bsr_light")
    return functools.partial(
        make_example, size=size, crop_size=config.data.crop_size, factor=factor, degradation=config.data.degradation,
        blur_prob=config.data.blur_prob,
    )  # fmt: skip


def build(config, mesh, clip=None):
    """The upsampler, its keyword arguments, and its initialisation (key -> parameters)."""
    model_config, size = common.config_json(config.model), config.model.unet.image_size
    model = Upsampler(**model_config, dtype=compute_dtype(config.dtype, mesh), remat=config.remat, gather=make_gather(mesh))

    def init(key):
        small = jnp.zeros((1, size // config.factor, size // config.factor, 3))
        return model.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros(1), low_res=small)["params"]

    return model, model_config, init


def objective(config, model, clip=None):
    """`loss_fn` as the configuration wants it: (params, rng, batch, frozen=) -> loss and metrics."""
    diffusion = common.config_json(config.diffusion)
    tables = training_tables(make_schedule(diffusion["schedule"], diffusion["num_steps"]))
    return functools.partial(loss_fn, model=model, tables=tables, diffusion=diffusion)


def gradient_of(config, mesh, model, clip=None):
    """The gradient of the objective, over the parts of the batch that the configuration asks for."""
    return accumulated(objective(config, model, clip), config.grad_accumulation, mesh)


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/upsampler.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    source = sources.make_source(config.data.train)
    held_out = sources.make_source(config.data.eval)
    size, factor = config.model.unet.image_size, config.factor
    example = example_of(config)

    # ------------------------------------------------------------------------------------------------------------------ model and optimizer
    model, model_config, init = build(config, mesh)
    diffusion = common.config_json(config.diffusion)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    _, shardings = abstract_state(init, optimizer[0], mesh)
    state = create_state(init, optimizer[0], config.seed, shardings)

    # ------------------------------------------------------------------------------------------------------------------ restore
    store = CheckpointStore(workdir, config.keep)
    meta = {
        "name": f"upsampler_{size}",
        "part": {"kind": "upsampler", "model": model_config, "diffusion": diffusion, "factor": factor},
        "sampling": common.config_json(config.sampling),
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, start, _ = common.restore_or_init(store, state, shardings, meta, init_from)

    # ------------------------------------------------------------------------------------------------------------------ update step
    loss_of = objective(config, model)
    gradient = gradient_of(config, mesh, model)
    update = make_update(gradient, optimizer, shardings, seed=config.seed, ema_decay=config.ema_decay)

    # ------------------------------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling)
    captions = [held_out.read(i).captions[0] for i in range(min(config.eval.samples, len(held_out)))]

    draw = jax.jit(lambda params, batch, rng: sample_upsampler(model, params, meta["part"], batch["low_res"], rng, options))
    held_out_loss = jax.jit(lambda params, batch, rng: loss_of(params, rng, batch)[0])

    def evaluate(state, step) -> dict[str, float]:
        example_eval = functools.partial(example, training=False)
        losses = []
        for i, (batch, _) in enumerate(common.eval_batches(held_out, example_eval, mesh, config.eval.batch_size, config.eval.rows)):
            losses.append(held_out_loss(state.ema_params, batch, step_rng(config.seed, i)))
        batch, valid = next(common.eval_batches(held_out, example_eval, mesh, config.eval.samples, config.eval.samples))
        images = draw(state.ema_params, batch, step_rng(config.seed, step))
        logger.samples(step, images, captions, valid)
        return {"eval_loss": float(np.mean(jax.device_get(losses)))}

    # ------------------------------------------------------------------------------------------------------------------ loop
    batches = common.batches(config, source, example, mesh, start)
    logger = common.make_logger(config, workdir, meta["name"], start, batches)
    figures: dict[str, float] = {}
    with common.closing(store, batches, logger), common.stop_signals() as stop:
        for step in range(start + 1, config.steps + 1):
            arguments = state, {}, shard_batch(next(batches), mesh)
            if step == start + 1:
                update = common.compiled_together(update, *arguments)
                logger.operations = common.model_operations(build, gradient_of, config, mesh, None, arguments)
            state, metrics = update(*arguments)
            logger.step(step, metrics)
            stopping = stop.after(step)
            if common.due(step, config.checkpoint_every, config.steps) or stopping:
                with logger.paused("checkpoint"):
                    store.save(step, state, common.with_time(meta, logger))
            if stopping:
                break
            if common.due(step, config.eval_every, config.steps):
                with logger.paused("evaluation"):
                    figures = evaluate(state, step)
                    logger.record(step, figures)
                    common.keep_best(config, workdir, step, state, common.with_time(meta, logger), figures)
                    common.say(f"{meta['name']} step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    common.leave_if_stopped(stop)
    return figures
