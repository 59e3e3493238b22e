"""PixelSNAIL over the codes of one level of a VQ-VAE-2 (Razavi et al. 2019, section 3.2).

The frozen VQ-VAE makes the codes of every level. The prior of a level predicts each code from those before
it, from the codes of the level above, and, with a CLIP, from the caption's embedding. Training drops captions
at random, for classifier-free guidance. A class is a caption of one word.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import latent_example
from unclip_jax.errors import InputError
from unclip_jax.generate.text import select_text
from unclip_jax.models.pixelsnail import PixelSNAIL
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import EMPTY, arrays, check_codes, clip_reader, codes_of, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss

FROZEN: dict[str, str] = {"clip": "clip", "vqvae": "vqvae"}
SETTINGS = settings.TRAINED | {
    "frozen": {"clip": settings.maybe(settings.text()), "vqvae": settings.text()},
    "data": settings.CROPPED | {"eval": settings.absent(settings.SOURCE)},
    "image_size": settings.whole("[1, inf)"),
    "level": settings.whole("[0, 8)"),
    "model": {
        "channels": settings.whole("[1, inf)"),
        "kernel": settings.whole("[1, inf)"),
        "blocks": settings.whole("[1, inf)"),
        "res_blocks": settings.whole("[1, inf)"),
        "res_channels": settings.whole("[1, inf)"),
        "heads": settings.whole("[1, inf)"),
        "attention": settings.FLAG,
        "dropout": settings.number("[0, 1)"),
        "condition_blocks": settings.whole("[0, inf)"),
        "out_blocks": settings.whole("[0, inf)"),
        "activated_skip": settings.FLAG,
    },
    "drop_text": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["pixelsnail"],
    "eval": {"batch_size": settings.whole("[1, inf)"), "rows": settings.whole("[1, inf)")},
}
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, encode, level, clip, drop_text):
    """Loss () in nats per code and metrics of a global batch, encoded with the networks in `frozen`."""
    rng_text, rng_dropout = jax.random.split(rng)
    codes, given = encode(frozen["vqvae"], batch), {}
    if model.coarse_codes is not None:
        given["coarse"] = codes[level + 1]
    if clip is not None:
        keep = jax.random.uniform(rng_text, (len(codes[level]),)) >= drop_text
        text = select_text(keep, clip.captions(frozen["clip"], batch), frozen[EMPTY])
        given["text_embed"] = text.embed
    logits = model.apply(
        {"params": params}, codes[level], **given, deterministic=False, rngs={"dropout": rng_dropout}
    )
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[level][..., None], axis=-1)
    return -jnp.mean(log_prob), {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes[level])}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, FIGURES)
    model = config.model
    if model.kernel % 2 == 0:
        raise InputError(f"model.kernel={model.kernel} must be odd")
    if model.attention and (model.channels // 2) % model.heads:
        half, heads = model.channels // 2, model.heads
        raise InputError(f"{half}, half of model.channels, must be a multiple of model.heads={heads}")
    if config.frozen.clip is None and config.sampling.get("guidance_scale", 1.0) != 1:
        raise InputError("guidance needs captions: set frozen.clip, or sampling.guidance_scale=1")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`, or where the VQ-VAE has no
    such level or takes no images of this size."""
    check(config)
    clip = clip_reader(config, mesh, frozen) if "clip" in frozen else None
    vqvae, level = frozen["vqvae"], config.level
    levels, size = vqvae.module.levels, config.image_size
    if level >= levels:
        raise InputError(f"level={level} must be below {levels}, the levels of the VQ-VAE")
    if size % vqvae.module.factor:
        raise InputError(f"image_size={size} must be a multiple of {vqvae.module.factor}, as the VQ-VAE's")
    codes = vqvae.module.codes
    model_config = config_json(config.model) | {
        "side": vqvae.module.sides(size)[level],
        "codes": codes,
        "coarse_codes": codes if level < levels - 1 else None,
        "text_dim": None if clip is None else clip.embed_dim,
    }
    part = {"kind": "pixelsnail", "level": level, "model": model_config, "frozen": hashes(frozen)}
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = PixelSNAIL(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        inputs, given = jnp.zeros((1, model.side, model.side), jnp.int32), {}
        if model.coarse_codes is not None:
            given["coarse"] = jnp.zeros((1, model.side // 2, model.side // 2), jnp.int32)
        if clip is not None:
            given["text_embed"] = clip.zeros.embed
        return model.init(key, inputs, **given)["params"], {}

    def encode(params, batch):
        return codes_of(vqvae.with_params(gather_rest(params, mesh)), batch, size)

    example = functools.partial(
        latent_example, tokenizer=None if clip is None else clip.tokenizer, size=size,
        crop_scale=config.data.crop_scale, stored="codes",
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, encode=encode, level=level, clip=clip, drop_text=config.drop_text
    )
    return Stage(f"pixelsnail_{level}", model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/vqvae2/pixelsnail.py`.
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
    check_codes(networks["vqvae"], data, config.image_size, config.data.crop_scale)

    # -------------------------------------------------------------------------------- evaluators
    loss_of_held_out = held_out_loss(trained, config, mesh, data)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, {"eval_loss": loss_of_held_out(run.state, frozen)})
    return run.figures
