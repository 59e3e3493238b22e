"""The diffusion prior: CLIP image embeddings from captions (unCLIP section 2.2).

A causal transformer sees the caption, its CLIP text embedding, the time step and the noised image embedding, and predicts the clean
one: L = E |f(z^(t), t, y) - z_i|^2. Captions are dropped for classifier-free guidance.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import sources
from unclip_jax.diffusion.embedding_space import normalize
from unclip_jax.diffusion.losses import sample_noised, simple_loss, training_tables
from unclip_jax.diffusion.process import add_noise, to_x0_eps
from unclip_jax.diffusion.schedule import make_schedule, strided_steps
from unclip_jax.evaluate.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.generate import options_from, part_schedule, part_space, sample_prior, select_text, text_inputs
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.clip import make_example  # the same row: an image and a caption as CLIP sees them
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.state import abstract_state, accumulated, create_state, make_update, step_rng

ERROR_TIMES, ERROR_BATCHES = 50, 2  # time steps at which the errors for analytic variance are measured, and batches at each


# ---------------------------------------------------------------------------------------------------------------------- statistics
def embedding_statistics(clip: common.FrozenClip, config, source, example, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of the raw image embeddings of the first training batches, on the host in float64; of all of them
    where the source holds embeddings."""
    if source.embedded is not None:
        return source.embedded.mean, source.embedded.std
    encode, rows = jax.jit(clip.image), []
    batches = common.batches(config, source, example, mesh, 0, config.statistics_batches)
    with common.closing(batches):
        for _ in range(config.statistics_batches):
            rows.append(common.crossed(encode(clip.params, shard_batch(next(batches), mesh))))
    z = np.concatenate(rows).astype(np.float64)
    return z.mean(axis=0), np.maximum(z.std(axis=0), 1e-6)


def error_table(errors: dict[int, float], variance: float, num_steps: int) -> list[float]:
    """Mean squared errors of x0 at some time steps -> one per step 0 .. T - 1, interpolated and at most the data's variance: what analytic
    variance needs (Bao et al. 2022; written with x0, as 1 - E|eps|^2 cancels where there is little noise)."""
    steps = sorted(errors)
    table = np.interp(np.arange(num_steps), steps, [errors[t] for t in steps])
    return [float(f"{v:.5g}") for v in np.minimum(table, variance)]


# ---------------------------------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, frozen, clip, model, space, tables, prediction, drop_text):
    """Loss () and metrics of a global batch; `frozen` holds the CLIP's parameters."""
    rng_drop, rng_noise, rng_dropout = jax.random.split(rng, 3)
    z = normalize(space, clip.image(frozen["clip"], batch))
    text = clip.text(frozen["clip"], batch)
    empty = clip.text(frozen["clip"], clip.empty)
    text = select_text(jax.random.uniform(rng_drop, (len(z),)) >= drop_text, text, empty)

    t, eps, z_t = sample_noised(rng_noise, z, tables)
    out = model.apply(
        {"params": params}, z_t, t, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    return jnp.mean(simple_loss(out, z, eps, t, tables, prediction)), {}


# ---------------------------------------------------------------------------------------------------------------------- network
def example_of(config, clip):
    """`make_example` as the configuration wants it."""
    crop_scale = config.data.crop_scale
    return functools.partial(make_example, tokenizer=clip.tokenizer, own=clip.own, size=clip.image_size, crop_scale=crop_scale)


def build(config, mesh, clip):
    """The prior, its keyword arguments, and its initialisation (key -> parameters)."""
    model_config = common.config_json(config.model) | {"embed_dim": clip.embed_dim, "length": (clip.own or clip.tokenizer).length}
    if clip.own is not None:
        model_config["text"] |= {"num_embeddings": clip.own.vocab_size}
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = DiffusionPrior(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        text = text_inputs(model, clip.zeros())
        return model.init(key, jnp.zeros((1, clip.embed_dim)), jnp.zeros(1), **text)["params"]

    return model, model_config, init


def objective(config, model, clip, space):
    """`loss_fn` as the configuration wants it: (params, rng, batch, frozen=) -> loss and metrics."""
    diffusion = common.config_json(config.diffusion)
    tables = training_tables(make_schedule(diffusion["schedule"], diffusion["num_steps"]))
    prediction = diffusion["prediction"]
    return functools.partial(
        loss_fn, clip=clip, model=model, space=space, tables=tables, prediction=prediction, drop_text=config.drop_text
    )


def gradient_of(config, mesh, model, clip, space):
    """The gradient of the objective, over the parts of the batch that the configuration asks for."""
    return accumulated(objective(config, model, clip, space), config.grad_accumulation, mesh)


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/prior_diffusion.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    own = common.own_tokenizer(config)
    clip = common.frozen_clip(config.clip, workdir, mesh, config.dtype, own, config.scan_layers)
    source = sources.make_source(config.data.train)
    evaluations = {name: sources.make_source(value) for name, value in config.data.eval.items()}
    clip = common.matched(clip, source, *evaluations.values())
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
        "name": "prior",
        "part": {"kind": "prior_diffusion", "model": model_config, "diffusion": diffusion, "clip": clip.hash, **common.tokenizer_of(own)},
        "tokenizer": clip.tokenizer.config(),
        "sampling": common.config_json(config.sampling),
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, start, old_part = common.restore_or_init(store, state, shardings, meta, init_from)
    if "embedding_space" in old_part and old_part["clip"] == clip.hash:  # go on in the space the weights were made in
        meta["part"]["embedding_space"] = old_part["embedding_space"]
    else:
        mean, std = embedding_statistics(clip, config, source, example, mesh)
        space = {"kind": config.space.kind, "scale": config.space.scale, "mean": mean.tolist(), "std": std.tolist()}
        meta["part"]["embedding_space"] = space
    space = part_space(meta["part"])

    # ------------------------------------------------------------------------------------------------------------------ update step
    frozen = {"clip": clip.params}
    gradient = gradient_of(config, mesh, model, clip, space)
    update = make_update(gradient, optimizer, shardings, seed=config.seed, ema_decay=config.ema_decay)

    # ------------------------------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling)

    @jax.jit
    def predict(params, frozen, batch, rng, errors):
        text = clip.text(frozen["clip"], batch)
        empty = clip.text(frozen["clip"], clip.empty)
        z_hat = sample_prior(model, params, meta["part"] | {"x0_error": errors}, text, empty, rng, options)
        return z_hat, clip.image(frozen["clip"], batch), text.embed

    def evaluate(state, step) -> dict[str, float]:
        figures, errors = {}, None
        if options.variance == "analytic":  # its table is measured on the weights that draw; of the last ones it is there already
            if step != config.steps:
                meta["part"]["x0_error"] = measure_errors(state)
            errors = np.asarray(meta["part"]["x0_error"], np.float32)
        for name, held_out in evaluations.items():
            rows = []
            example_eval = functools.partial(example, training=False)
            batches = common.eval_batches(held_out, example_eval, mesh, config.eval.batch_size, config.eval.rows)
            for i, (batch, valid) in enumerate(batches):
                outs = predict(state.ema_params, frozen, batch, step_rng(config.seed, i), errors)
                rows.append([common.crossed(out)[:valid] for out in outs])
            z_hat, z_image, z_text = (np.concatenate(column) for column in zip(*rows))
            figures |= {
                f"{name}_cosine": mean_cosine(z_hat, z_image),
                f"{name}_cosine_of_mean_embedding": mean_cosine(z_image, np.asarray(space.mean)),
                f"{name}_cosine_of_text_embedding": mean_cosine(z_text, z_image),
                f"{name}_retrieval_at_1": retrieval_at_1(z_hat, z_image, config.eval.candidates),
            }
        return figures

    @jax.jit
    def x0_error(params, frozen, batch, rng):
        z = normalize(space, clip.image(frozen["clip"], batch))
        text = clip.text(frozen["clip"], batch)
        times = strided_steps(diffusion["num_steps"], min(ERROR_TIMES, diffusion["num_steps"]))
        abar, kind = jnp.asarray(part_schedule(meta["part"]).alphas_cumprod, jnp.float32), diffusion["prediction"]

        def at(t):
            z_t = add_noise(z, jax.random.normal(jax.random.fold_in(rng, t), z.shape), abar[t])
            out = model.apply({"params": params}, z_t, jnp.full(len(z), t), **text_inputs(model, text))
            return jnp.mean(jnp.square(to_x0_eps(out, z_t, abar[t], kind)[0] - z))

        return times, jax.lax.map(at, jnp.asarray(times)), jnp.mean(jnp.var(z, axis=0))

    def measure_errors(state) -> list[float]:
        """The errors over some training rows, captions kept."""
        rows = []
        measured = common.batches(config, source, example, mesh, 0, ERROR_BATCHES)
        with common.closing(measured):
            for i in range(ERROR_BATCHES):
                rows.append(jax.device_get(x0_error(state.ema_params, frozen, shard_batch(next(measured), mesh), step_rng(config.seed, i))))
        times, errors, variance = (np.mean(column, axis=0) for column in zip(*rows))
        return error_table(dict(zip(times.astype(int).tolist(), errors.tolist())), float(variance), diffusion["num_steps"])

    # ------------------------------------------------------------------------------------------------------------------ loop
    batches = common.batches(config, source, example, mesh, start)
    logger = common.make_logger(config, workdir, "prior", start, batches)
    figures: dict[str, float] = {}
    with common.closing(store, batches, logger), common.stop_signals() as stop:
        for step in range(start + 1, config.steps + 1):
            arguments = state, frozen, shard_batch(next(batches), mesh)
            if step == start + 1:
                update = common.compiled_together(update, *arguments)
                logger.operations = common.model_operations(build, gradient_of, config, mesh, clip, arguments, space)
            state, metrics = update(*arguments)
            logger.step(step, metrics)
            stopping = stop.after(step)
            if common.due(step, config.checkpoint_every, config.steps) or stopping:
                with logger.paused("checkpoint"):
                    if step == config.steps:
                        meta["part"]["x0_error"] = measure_errors(state)
                    store.save(step, state, common.with_time(meta, logger))
            if stopping:
                break
            if common.due(step, config.eval_every, config.steps):
                with logger.paused("evaluation"):
                    figures = evaluate(state, step)
                    logger.record(step, figures)
                    common.keep_best(config, workdir, step, state, common.with_time(meta, logger), figures)
                    common.say(f"prior step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    common.leave_if_stopped(stop)
    return figures
