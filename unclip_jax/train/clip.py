"""CLIP: contrastive training of image and text towers (Radford et al. 2021; unCLIP appendix C).

The loss is the symmetric cross entropy over the global batch: it compares every image with every caption, on
any mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import clip_example
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.metrics.retrieval import retrieval_at_1
from unclip_jax.models.clip import CLIP, MAX_LOGIT_SCALE
from unclip_jax.models.layers import ACTIVATIONS
from unclip_jax.run import settings
from unclip_jax.run.batches import eval_batches, joined_rows, open_data
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Player, Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train.sam import sam_gradient

FROZEN: dict[str, str] = {}
SETTINGS = settings.TRAINED | {
    "tokenizer": settings.TOKENIZER,
    "model": {
        "embed_dim": settings.whole("[1, inf)"),
        "image": settings.TOWER
        | {"image_size": settings.whole("[1, inf)"), "patch_size": settings.whole("[1, inf)")},
        "text": settings.TOWER,
        "activation": settings.text(*ACTIVATIONS),
    },
    "sam": {"rho": settings.number("[0, inf)"), "group_size": settings.whole("[1, inf)")},
    "eval": settings.RANKED,
}
FIGURES = ("{}_retrieval_at_1",)


# ------------------------------------------------------------------------------------ loss
def contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric cross entropy of a batch's embeddings (Radford et al. 2021, figure 3).

    Args:
      image: (B, D) unit embeddings of the images.
      text: (B, D) unit embeddings of their captions.
      scale: () logit scale, the inverse of the temperature.

    Returns:
      The loss () and the accuracy () with which an image finds its caption.
    """
    logits = scale * jnp.einsum("id,jd->ij", image, text, precision="highest")
    matching = jnp.diagonal(logits)
    to_image = jnp.mean(jax.nn.logsumexp(logits, axis=0) - matching)
    to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - matching)
    return 0.5 * to_image + 0.5 * to_text, jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))


def embed_rows(params, batch, *, model: CLIP):
    """Unit image and text embeddings (B, D) of a batch."""
    return model.apply({"params": params}, batch["clip_image"], batch["clip_tokens"])[:2]


def loss_of_embeddings(params, embeddings):
    """Loss () and metrics of a global batch's unit embeddings. The only parameter used is `logit_scale`."""
    scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE))
    loss, accuracy = contrastive_loss(*embeddings, scale)
    return loss, {"accuracy": accuracy, "logit_scale": scale}


def loss_fn(params, rng, batch, *, frozen, model: CLIP):
    """Loss () and metrics of a global batch. The loss itself is not random."""
    del rng, frozen
    return loss_of_embeddings(params, embed_rows(params, batch, model=model))


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings with which this loss cannot be computed.

    The loss compares all rows of a batch, so its gradient cannot be accumulated over parts of the batch.
    """
    settings.check_settings(config, SETTINGS, FIGURES)
    if config.grad_accumulation != 1:
        raise InputError(
            "the contrastive loss compares all rows of a batch: grad_accumulation must be 1 for CLIP"
        )
    if config.batch_size < 2:
        raise InputError("the contrastive loss compares the rows of a batch: batch_size must be at least 2")
    if config.sam.rho and config.batch_size % config.sam.group_size:
        raise InputError(
            f"batch_size={config.batch_size} must be a multiple of sam.group_size={config.sam.group_size}"
        )
    size, patch = config.model.image.image_size, config.model.image.patch_size
    if size % patch:
        raise InputError(
            f"model.image.image_size={size} must be a multiple of model.image.patch_size={patch}"
        )


def stage(config, mesh, frozen) -> Stage:
    """The stage as its configuration describes it. Raises ValueError as `check`.

    If `sam.rho` is not 0, the gradient is SAM's (appendix C).
    """
    check(config)
    tokenizer, model_config = ClipTokenizer(**config.tokenizer), config_json(config.model)
    model_config["text"] |= {"vocab_size": tokenizer.vocab_size, "length": tokenizer.length}
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model, size = (
        CLIP(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks),
        config.model.image.image_size,
    )

    def init(key):
        image, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, tokenizer.length), jnp.int32)
        return model.init(key, image, tokens)["params"], {}

    def clamped(params, extra):
        # The bound of the temperature (section 2.5) applies to the parameter itself. A bound in the loss
        # alone would have no gradient beyond it, and the parameter could not return.
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}

    def gradient_by_sam(params, extra, rng, batch, step, *, frozen):
        result, gradient = sam_gradient(
            lambda params, rows: embed_rows(gather_rest(params, mesh), rows, model=model),
            loss_of_embeddings, params, batch,
            rho=config.sam.rho, group_size=config.sam.group_size,
            lanes=mesh.shape["data"] * mesh.shape["fsdp"],
        )  # fmt: skip
        loss, metrics = result
        return (loss, (metrics, extra)), gradient

    return Stage(
        name="clip",
        model=model,
        part={"kind": "clip", "model": model_config, "frozen": {}, "tokenizer": tokenizer.config()},
        init=init,
        example=functools.partial(
            clip_example, tokenizer=tokenizer, size=size, crop_scale=config.data.crop_scale
        ),
        objective=without_extra(functools.partial(loss_fn, model=model)),
        players=(Player(gradient=gradient_by_sam if config.sam.rho else None, project=clamped),),
    )


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/clip.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    clip = stage(config, mesh, {})

    # -------------------------------------------------------------------------------- evaluators
    encode = jax.jit(functools.partial(embed_rows, model=clip.model))

    def evaluate(state) -> dict[str, float]:
        figures = {}
        for name, source in data.held_out.items():
            batches = eval_batches(source, clip.example, mesh, config.eval.batch_size, config.eval.rows)
            image, text = joined_rows((encode(state.ema_params, batch), valid) for batch, valid in batches)
            figures[f"{name}_retrieval_at_1"] = retrieval_at_1(image, text, config.eval.candidates)
        return figures

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, clip, mesh, data, init_from) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, {}, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run.state))
    return run.figures
