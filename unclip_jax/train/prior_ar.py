"""The autoregressive prior: codes of CLIP image embeddings from captions (unCLIP section 2.2).

Embeddings are projected on their principal components and quantised; a causal transformer sees the caption, its CLIP text embedding, the
quantised dot product z_i.z_t and the codes so far, and predicts the next code. Captions are dropped for classifier-free guidance.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import load_part
from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import sources
from unclip_jax.evaluate.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.generate import options_from, sample_prior, select_text, text_inputs
from unclip_jax.models.prior_ar import ARPrior, Codec, cosine, dot_token, project, quantize
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.clip import make_example  # the same row: an image and a caption as CLIP sees them
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.state import abstract_state, accumulated, create_state, make_update, step_rng


# ---------------------------------------------------------------------------------------------------------------------- statistics
def dot_edges(clip: common.FrozenClip, config, source, example, mesh) -> np.ndarray:
    """Edges (bins - 1,) that cut z_i.z_t of the first training batches into equally frequent bins."""

    dots = jax.jit(lambda params, batch: cosine(clip.image(params, batch), clip.text(params, batch).embed))
    rows = []
    batches = common.batches(config, source, example, mesh, 0, config.statistics_batches)
    with common.closing(batches):
        for _ in range(config.statistics_batches):
            rows.append(common.crossed(dots(clip.params, shard_batch(next(batches), mesh))))
    bins = config.model.dot_bins
    return np.quantile(np.concatenate(rows), np.arange(1, bins) / bins)


# ---------------------------------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, frozen, clip, model, edges, drop_text):
    """Loss () in nats per code and metrics of a global batch; `frozen` holds the CLIP's parameters and the codec."""
    rng_drop, rng_dropout = jax.random.split(rng)
    z = clip.image(frozen["clip"], batch)
    text = clip.text(frozen["clip"], batch)
    empty = clip.text(frozen["clip"], clip.empty)
    dot = dot_token(edges, z, text.embed)
    codes = quantize(frozen["codec"], project(frozen["codec"], z, model.codes), model.buckets)
    text = select_text(jax.random.uniform(rng_drop, (len(z),)) >= drop_text, text, empty)

    logits = model.apply(
        {"params": params}, codes, dot, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
    return -jnp.mean(log_prob), {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes)}


# ---------------------------------------------------------------------------------------------------------------------- network
def example_of(config, clip):
    """`make_example` as the configuration wants it."""
    crop_scale = config.data.crop_scale
    return functools.partial(make_example, tokenizer=clip.tokenizer, own=clip.own, size=clip.image_size, crop_scale=crop_scale)


def build(config, mesh, clip):
    """The prior, its keyword arguments, and its initialisation (key -> parameters)."""
    model_config = common.config_json(config.model) | {"length": (clip.own or clip.tokenizer).length}
    if clip.own is not None:
        model_config["text"] |= {"vocab_size": clip.own.vocab_size, "length": clip.own.length}
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = ARPrior(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        text = text_inputs(model, clip.zeros())
        codes, dot = jnp.zeros((1, model.codes), jnp.int32), jnp.zeros(1, jnp.int32)
        return model.init(key, codes, dot, **text)["params"]

    return model, model_config, init


def objective(config, model, clip, edges):
    """`loss_fn` as the configuration wants it: (params, rng, batch, frozen=) -> loss and metrics."""
    return functools.partial(loss_fn, clip=clip, model=model, edges=edges, drop_text=config.drop_text)


def gradient_of(config, mesh, model, clip, edges):
    """The gradient of the objective, over the parts of the batch that the configuration asks for."""
    return accumulated(objective(config, model, clip, edges), config.grad_accumulation, mesh)


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/prior_ar.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.

    Raises:
      ValueError: when the codec was fitted in another CLIP's space, or has fewer dimensions than there are codes.
    """
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    own = common.own_tokenizer(config)
    clip = common.frozen_clip(config.clip, workdir, mesh, config.dtype, own, config.scan_layers)
    pca, _ = load_part(common.resolve(config.pca, workdir), "pca")
    if pca.config["clip"] != clip.hash:
        raise ValueError(f"the codec was fitted in the embedding space of CLIP {pca.config['clip']}, but the CLIP given is {clip.hash}")
    if config.model.codes > clip.embed_dim:
        raise ValueError(f"{config.model.codes} codes need as many dimensions; CLIP's embeddings have {clip.embed_dim}")
    codec = jax.device_put(Codec(**pca.params))
    source = sources.make_source(config.data.train)
    evaluations = {name: sources.make_source(value) for name, value in config.data.eval.items()}
    clip = common.matched(clip, source, *evaluations.values())
    example = example_of(config, clip)

    # ------------------------------------------------------------------------------------------------------------------ model and optimizer
    model, model_config, init = build(config, mesh, clip)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    _, shardings = abstract_state(init, optimizer[0], mesh)
    state = create_state(init, optimizer[0], config.seed, shardings)

    # ------------------------------------------------------------------------------------------------------------------ restore
    store = CheckpointStore(workdir, config.keep)
    meta = {
        "name": "prior_ar",
        "part": {"kind": "prior_ar", "model": model_config, "clip": clip.hash, **common.tokenizer_of(own)},
        "tokenizer": clip.tokenizer.config(),
        "sampling": common.config_json(config.sampling),
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, start, old_part = common.restore_or_init(store, state, shardings, meta, init_from)
    if old_part.get("clip") == clip.hash:  # go on with the bins the weights were made for
        meta["part"]["dot_edges"] = old_part["dot_edges"]
    else:
        meta["part"]["dot_edges"] = dot_edges(clip, config, source, example, mesh).tolist()
    edges = np.asarray(meta["part"]["dot_edges"], np.float32)

    # ------------------------------------------------------------------------------------------------------------------ update step
    frozen = {"clip": clip.params, "codec": codec}
    gradient = gradient_of(config, mesh, model, clip, edges)
    update = make_update(gradient, optimizer, shardings, seed=config.seed, ema_decay=config.ema_decay)

    # ------------------------------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling, "prior_ar")

    @jax.jit
    def predict(params, frozen, batch, rng):
        text = clip.text(frozen["clip"], batch)
        empty = clip.text(frozen["clip"], clip.empty)
        z_hat = sample_prior(model, params, meta["part"], text, empty, rng, options, frozen["codec"])
        return z_hat, clip.image(frozen["clip"], batch), text.embed

    def evaluate(state) -> dict[str, float]:
        figures = {}
        for name, held_out in evaluations.items():
            rows = []
            example_eval = functools.partial(example, training=False)
            batches = common.eval_batches(held_out, example_eval, mesh, config.eval.batch_size, config.eval.rows)
            for i, (batch, valid) in enumerate(batches):
                outs = predict(state.ema_params, frozen, batch, step_rng(config.seed, i))
                rows.append([common.crossed(out)[:valid] for out in outs])
            z_hat, z_image, z_text = (np.concatenate(column) for column in zip(*rows))
            figures |= {
                f"{name}_cosine": mean_cosine(z_hat, z_image),
                f"{name}_cosine_of_mean_embedding": mean_cosine(z_image, np.asarray(codec.mean)),
                f"{name}_cosine_of_text_embedding": mean_cosine(z_text, z_image),
                f"{name}_retrieval_at_1": retrieval_at_1(z_hat, z_image, config.eval.candidates),
            }
        return figures

    # ------------------------------------------------------------------------------------------------------------------ loop
    batches = common.batches(config, source, example, mesh, start)
    logger = common.make_logger(config, workdir, "prior_ar", start, batches)
    figures: dict[str, float] = {}
    with common.closing(store, batches, logger), common.stop_signals() as stop:
        for step in range(start + 1, config.steps + 1):
            arguments = state, frozen, shard_batch(next(batches), mesh)
            if step == start + 1:
                update = common.compiled_together(update, *arguments)
                logger.operations = common.model_operations(build, gradient_of, config, mesh, clip, arguments, edges)
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
                    figures = evaluate(state)
                    logger.record(step, figures)
                    common.keep_best(config, workdir, step, state, common.with_time(meta, logger), figures)
                    common.say(f"prior_ar step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    common.leave_if_stopped(stop)
    return figures
