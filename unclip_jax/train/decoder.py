"""The decoder: images from CLIP image embeddings and captions (unCLIP section 2.1).

A GLIDE U-Net predicts the noise and its variance. The CLIP embedding is replaced by a learned null embedding, and the caption by the
empty one, independently, for classifier-free guidance. With `model.inpaint` it is trained to fill the unknown part of an image (GLIDE, on
inpainting): regions are erased at random, and what is left comes in through four more channels, whose weights start at zero when an
ordinary decoder is fine-tuned.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Part, load_part
from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import ops, pipeline, sources
from unclip_jax.data.tokenizer import caption_arrays
from unclip_jax.diffusion.losses import sample_noised, simple_loss, split_variance, target_of, training_tables, variational_bits
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.generate import options_from, sample_decoder, select_text, text_inputs
from unclip_jax.models.unet import Decoder
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.state import abstract_state, accumulated, create_state, make_update, step_rng


# ---------------------------------------------------------------------------------------------------------------------- example
def make_example(
    record, rng, *, tokenizer, size, clip_size, crop_scale=1.0, training=True, own=None, inpaint=False
) -> dict[str, np.ndarray]:
    """One row: `image` (size, size, 3) and `clip_image` (clip_size, clip_size, 3) of the same crop, in [-1, 1]; `clip_tokens` and
    `clip_token_mask` (L,) of one of its captions, and with a tokenizer `own` of the decoder's own text encoder `tokens` and `token_mask`
    (L',); to inpaint, `known` (size, size, 1) bool. Not in training: the centre, and the first caption."""
    image = ops.decode_image(record.image)
    if training:
        image = ops.random_crop(image, int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0))), rng)
        caption = record.captions[pipeline.choose_caption(record, rng)]
    else:
        image = ops.center_crop_square(image)
        caption = record.captions[0]
    return {
        "image": ops.to_float(ops.resize(image, size)),
        "clip_image": ops.to_float(ops.resize(image, clip_size)),
        **{k: v[0] for k, v in caption_arrays([caption], tokenizer, own).items()},
        **({"known": ops.random_mask(size, rng)} if inpaint else {}),
    }


def known_part(batch) -> dict[str, jax.Array]:
    """What a decoder that inpaints is told of a batch's images; nothing for another one."""
    return {"known_image": batch["image"], "known": batch["known"]} if "known" in batch else {}


def load_widened(path, name) -> tuple[Part, dict]:
    """`load_part`; where there is no decoder that inpaints the ordinary one, with weights of zero for the channels of what is known."""
    try:
        return load_part(path, name)
    except KeyError:
        part, meta = load_part(path, "decoder")
    conv = part.params["unet"]["conv_in"]
    kernel = np.pad(conv["kernel"], ((0, 0), (0, 0), (0, 4), (0, 0)))
    return Part(part.config, part.params | {"unet": part.params["unet"] | {"conv_in": conv | {"kernel": kernel}}}), meta


# ---------------------------------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, frozen, clip, model, tables, diffusion, freeze_text, drop_embedding, drop_text):
    """Loss () and metrics of a global batch; `frozen` holds the CLIP's parameters."""
    if freeze_text:
        params = params | {"text": jax.lax.stop_gradient(params["text"])}
    rng_embedding, rng_text, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0 = batch["image"]
    z_image = clip.image(frozen["clip"], batch)
    text = clip.text(frozen["clip"], batch)
    empty = clip.text(frozen["clip"], clip.empty)
    text = select_text(jax.random.uniform(rng_text, (len(x0),)) >= drop_text, text, empty)
    drop_image = jax.random.uniform(rng_embedding, (len(x0),)) < drop_embedding

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, image_embed=z_image, drop_image=drop_image,
        **text_inputs(model, text), **known_part(batch),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    if "known" in batch:  # as in sampling, what is known is put into the answer: nothing is learned for it
        out = jnp.where(batch["known"], target_of(x0, eps, t, tables, diffusion["prediction"]), out)
    simple = jnp.mean(simple_loss(out, x0, eps, t, tables, diffusion["prediction"]))
    if v_frac is None:
        return simple, {}
    bits = jnp.mean(variational_bits(out, v_frac, x0, x_t, t, tables, diffusion["prediction"]))
    return simple + diffusion["vb_weight"] * diffusion["num_steps"] * bits, {"simple": simple, "vb_bits": bits}


# ---------------------------------------------------------------------------------------------------------------------- network
def example_of(config, clip):
    """`make_example` as the configuration wants it."""
    return functools.partial(
        make_example, tokenizer=clip.tokenizer, own=clip.own, size=config.model.unet.image_size, clip_size=clip.image_size,
        crop_scale=config.data.crop_scale, inpaint=config.model.inpaint,
    )  # fmt: skip


def build(config, mesh, clip):
    """The decoder, its keyword arguments, and its initialisation (key -> parameters)."""
    model_config, size = common.config_json(config.model), config.model.unet.image_size
    if clip.own is not None:
        model_config["text"] |= {"vocab_size": clip.own.vocab_size, "length": clip.own.length}
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = Decoder(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        text = clip.zeros()
        x, drop = jnp.zeros((1, size, size, 3)), jnp.zeros(1, bool)
        known = known_part({"image": x, "known": x[..., :1] == 0} if config.model.inpaint else {})
        return model.init(key, x, jnp.zeros(1), image_embed=text.embed, drop_image=drop, **text_inputs(model, text), **known)["params"]

    return model, model_config, init


def objective(config, model, clip):
    """`loss_fn` as the configuration wants it: (params, rng, batch, frozen=) -> loss and metrics."""
    diffusion = common.config_json(config.diffusion)
    tables = training_tables(make_schedule(diffusion["schedule"], diffusion["num_steps"]))
    return functools.partial(
        loss_fn, clip=clip, model=model, tables=tables, diffusion=diffusion,
        freeze_text=config.freeze_text, drop_embedding=config.drop_embedding, drop_text=config.drop_text,
    )  # fmt: skip


def gradient_of(config, mesh, model, clip):
    """The gradient of the objective, over the parts of the batch that the configuration asks for."""
    return accumulated(objective(config, model, clip), config.grad_accumulation, mesh)


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/decoder.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    own = common.own_tokenizer(config)
    if config.freeze_text and (own is None or config.optimizer.weight_decay):
        raise ValueError("freeze_text keeps the decoder's own text encoder: it needs one, and no weight decay, which would shrink it")
    clip = common.frozen_clip(config.clip, workdir, mesh, config.dtype, own, config.scan_layers)
    source = sources.make_source(config.data.train)
    held_out = sources.make_source(config.data.eval)
    clip = common.matched(clip, source, held_out, pictures=True)
    inpaint = config.model.inpaint
    example = example_of(config, clip)

    # ------------------------------------------------------------------------------------------------------------------ model and optimizer
    model, model_config, init = build(config, mesh, clip)
    diffusion = common.config_json(config.diffusion)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    _, shardings = abstract_state(init, optimizer[0], mesh)
    state = create_state(init, optimizer[0], config.seed, shardings)

    # ------------------------------------------------------------------------------------------------------------------ restore
    store = CheckpointStore(workdir, config.keep)
    meta = {
        "name": "decoder_inpaint" if inpaint else "decoder",
        "part": {"kind": "decoder", "model": model_config, "diffusion": diffusion, "clip": clip.hash, **common.tokenizer_of(own)},
        "tokenizer": clip.tokenizer.config(),
        "sampling": common.config_json(config.sampling),
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, start, _ = common.restore_or_init(store, state, shardings, meta, init_from, load_widened if inpaint else load_part)

    # ------------------------------------------------------------------------------------------------------------------ update step
    frozen = {"clip": clip.params}
    loss_of = objective(config, model, clip)
    gradient = gradient_of(config, mesh, model, clip)
    update = make_update(gradient, optimizer, shardings, seed=config.seed, ema_decay=config.ema_decay)

    # ------------------------------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling)
    captions = [held_out.read(i).captions[0] for i in range(min(config.eval.samples, len(held_out)))]

    @jax.jit
    def draw(params, frozen, batch, rng):
        text = clip.text(frozen["clip"], batch)
        empty = clip.text(frozen["clip"], clip.empty)
        z_image = clip.image(frozen["clip"], batch)
        return sample_decoder(model, params, meta["part"], z_image, text, empty, rng, options, **known_part(batch))

    @jax.jit
    def held_out_loss(params, frozen, batch, rng):
        return loss_of(params, rng, batch, frozen=frozen)[0]

    def evaluate(state, step) -> dict[str, float]:
        example_eval = functools.partial(example, training=False)
        losses = []
        for i, (batch, _) in enumerate(common.eval_batches(held_out, example_eval, mesh, config.eval.batch_size, config.eval.rows)):
            losses.append(held_out_loss(state.ema_params, frozen, batch, step_rng(config.seed, i)))
        batch, valid = next(common.eval_batches(held_out, example_eval, mesh, config.eval.samples, config.eval.samples))
        images = draw(state.ema_params, frozen, batch, step_rng(config.seed, step))
        logger.samples(step, images, captions, valid)
        return {"eval_loss": float(np.mean(jax.device_get(losses)))}

    # ------------------------------------------------------------------------------------------------------------------ loop
    batches = common.batches(config, source, example, mesh, start)
    logger = common.make_logger(config, workdir, meta["name"], start, batches)
    figures: dict[str, float] = {}
    with common.closing(store, batches, logger), common.stop_signals() as stop:
        for step in range(start + 1, config.steps + 1):
            arguments = state, frozen, shard_batch(next(batches), mesh)
            if step == start + 1:
                update = common.compiled_together(update, *arguments)
                logger.operations = common.model_operations(build, gradient_of, config, mesh, clip, arguments)
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
