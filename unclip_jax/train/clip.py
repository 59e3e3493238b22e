"""CLIP: contrastive training of image and text towers (Radford et al. 2021; unCLIP appendix C).

The loss is the symmetric cross entropy over the global batch: every image against every caption, whatever the mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import ops, pipeline, sources
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.evaluate.retrieval import retrieval_at_1
from unclip_jax.models.clip import CLIP, MAX_LOGIT_SCALE
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.sam import sam_gradient
from unclip_jax.train.state import abstract_state, create_state, make_update


# ---------------------------------------------------------------------------------------------------------------------- example
def make_example(record, rng, *, tokenizer, size: int, crop_scale: float = 1.0, training: bool = True, own=None) -> dict[str, np.ndarray]:
    """One row: `clip_image` (size, size, 3) in [-1, 1], `clip_tokens` (L,), `clip_token_mask` (L,); with a tokenizer `own` of a stage's own
    text encoder also `tokens` (L',), `token_mask` (L',).

    In training a random square crop of at least `crop_scale` of the shorter side and a random caption; else the centre and the first.
    Of a record of embeddings: `image_embed` (D,) in place of the image and, where nothing else of CLIP's is needed, `text_embed` (D,) and
    `text_states` (L, W) in place of CLIP's tokens.
    """
    if record.embeds is not None:
        return _embedded_example(record, rng, tokenizer, training, own)
    image = ops.decode_image(record.image)
    if training:
        side = int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0)))
        image = ops.resize(ops.random_crop(image, side, rng), size)
        caption = record.captions[pipeline.choose_caption(record, rng)]
    else:
        image = ops.resize_then_crop(image, size)
        caption = record.captions[0]
    return {"clip_image": ops.to_float(image), **{k: v[0] for k, v in caption_arrays([caption], tokenizer, own).items()}}


def _embedded_example(record, rng, tokenizer, training: bool, own) -> dict[str, np.ndarray]:
    chosen = pipeline.choose_caption(record, rng) if training else 0
    row = {k: v[0] for k, v in caption_arrays([record.captions[chosen]], tokenizer, own).items()}
    texts = {k: np.float32(v[chosen]) for k, v in record.embeds.items() if k == "text_embed" or (k == "text_states" and own is None)}
    if own is not None or "text_states" in texts:
        row = texts | {k: v for k, v in row.items() if k != "clip_tokens" and (own is None or k != "clip_token_mask")}
    return {"image_embed": record.embeds["image_embed"], **row}


# ---------------------------------------------------------------------------------------------------------------------- loss
def contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric cross entropy of unit embeddings (B, D) at logit scale (); returns the loss and the image-to-text accuracy."""
    logits = scale * jnp.einsum("id,jd->ij", image, text, precision="highest")
    own = jnp.diagonal(logits)
    loss = 0.5 * jnp.mean(jax.nn.logsumexp(logits, axis=0) - own) + 0.5 * jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
    return loss, jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))


def embed_rows(params, batch, *, model: CLIP):
    """Unit image and text embeddings (B, D) of a batch."""
    return model.apply({"params": params}, batch["clip_image"], batch["clip_tokens"])[:2]


def loss_of_embeddings(params, embeddings):
    """Loss () and metrics of a global batch's unit embeddings; of the parameters only the temperature matters here."""
    scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE))
    loss, accuracy = contrastive_loss(*embeddings, scale)
    return loss, {"accuracy": accuracy, "logit_scale": scale}


def loss_fn(params, rng, batch, *, model: CLIP):
    """Loss () and metrics of a global batch. CLIP's training is free of randomness but for the data."""
    del rng
    return loss_of_embeddings(params, embed_rows(params, batch, model=model))


# ---------------------------------------------------------------------------------------------------------------------- network
def example_of(config, clip=None):
    """`make_example` as the configuration wants it."""
    tokenizer, size = ClipTokenizer(**config.tokenizer), config.model.image.image_size
    return functools.partial(make_example, tokenizer=tokenizer, size=size, crop_scale=config.data.crop_scale)


def build(config, mesh, clip=None):
    """The CLIP, its keyword arguments, and its initialisation (key -> parameters)."""
    tokenizer, model_config = ClipTokenizer(**config.tokenizer), common.config_json(config.model)
    model_config["text"] |= {"vocab_size": tokenizer.vocab_size, "length": tokenizer.length}
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = CLIP(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        size = config.model.image.image_size
        return model.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, tokenizer.length), jnp.int32))["params"]

    return model, model_config, init


def gradient_of(config, mesh, model, clip=None):
    """The gradient of the contrastive loss, or SAM's (appendix C). The loss compares all rows of a batch, so it has no parts."""
    if config.sam.rho:
        embed = lambda params, batch: embed_rows(gather_rest(params, mesh), batch, model=model)  # noqa: E731
        lanes = mesh.shape["data"] * mesh.shape["fsdp"]
        settings = {"rho": config.sam.rho, "group_size": config.sam.group_size, "lanes": lanes}
        return lambda params, rng, frozen, batch: sam_gradient(embed, loss_of_embeddings, params, batch, **settings)
    gradient = jax.value_and_grad(lambda params, rng, batch: loss_fn(gather_rest(params, mesh), rng, batch, model=model), has_aux=True)
    return lambda params, rng, frozen, batch: gradient(params, rng, batch)


def clamped(params):
    """The temperature's bound (section 2.5) is kept in the parameter itself, so that it can come back from it."""
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/clip.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    tokenizer = ClipTokenizer(**config.tokenizer)
    source = sources.make_source(config.data.train)
    evaluations = {name: sources.make_source(value) for name, value in config.data.eval.items()}
    example = example_of(config)

    # ------------------------------------------------------------------------------------------------------------------ model and optimizer
    model, model_config, init = build(config, mesh)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    _, shardings = abstract_state(init, optimizer[0], mesh)
    state = create_state(init, optimizer[0], config.seed, shardings)

    # ------------------------------------------------------------------------------------------------------------------ update step
    gradient = gradient_of(config, mesh, model)
    update = make_update(gradient, optimizer, shardings, seed=config.seed, ema_decay=config.ema_decay, project=clamped)

    # ------------------------------------------------------------------------------------------------------------------ restore
    store = CheckpointStore(workdir, config.keep)
    meta = {
        "name": "clip",
        "part": {"kind": "clip", "model": model_config},
        "tokenizer": tokenizer.config(),
        "sampling": {},
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, start, _ = common.restore_or_init(store, state, shardings, meta, init_from)

    # ------------------------------------------------------------------------------------------------------------------ evaluators
    encode = jax.jit(functools.partial(embed_rows, model=model))

    def evaluate(state) -> dict[str, float]:
        figures = {}
        for name, held_out in evaluations.items():
            rows = []
            example_eval = functools.partial(example, training=False)
            for batch, valid in common.eval_batches(held_out, example_eval, mesh, config.eval.batch_size, config.eval.rows):
                image, text = encode(state.ema_params, batch)
                rows.append((common.crossed(image)[:valid], common.crossed(text)[:valid]))
            image, text = (np.concatenate(column) for column in zip(*rows))
            figures[f"{name}_retrieval_at_1"] = retrieval_at_1(image, text, config.eval.candidates)
        return figures

    # ------------------------------------------------------------------------------------------------------------------ loop
    batches = common.batches(config, source, example, mesh, start)
    logger = common.make_logger(config, workdir, "clip", start, batches)
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
                    figures = evaluate(state)
                    logger.record(step, figures)
                    common.keep_best(config, workdir, step, state, common.with_time(meta, logger), figures)
                    common.say(f"clip step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    common.leave_if_stopped(stop)
    return figures
