"""GLIDE: images from captions, and large images from small ones and captions (Nichol et al. 2021, sections 4
and 4.1 to 4.3).

A U-Net with a text encoder of its own predicts the noise and its variance. For classifier-free guidance the
empty caption replaces the caption for a share of the rows, `drop_text`: 0 in the first training, and 0.2 in
the fine-tuning that follows. With `factor`, the network enlarges a small image, a clean reduction of the
large one. With `model.inpaint` it learns to fill the unknown part of an image: regions are erased at random,
and four more input channels hold what is left. Their weights start at zero when an ordinary network is
fine-tuned.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.load import load_part
from unclip_jax.data.examples import captioned_example
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, target_of, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.captioned import caption_inputs, sample_captioned
from unclip_jax.generate.decoder import Known
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import TextConditioning, Texts, select_text
from unclip_jax.models.glide import Glide
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, check_pictures, hashes, load_frozen, text_tokenizer
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json, load_widened
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {}
SETTINGS = settings.TRAINED | {
    "text_tokenizer": settings.GLIDE_TOKENIZER,
    "data": settings.CROPPED | {"eval": settings.absent(settings.SOURCE)},
    "factor": settings.maybe(settings.whole("[2, inf)")),
    "model": {
        "inpaint": settings.FLAG,
        "text": settings.OWN_TEXT,
        "unet": settings.UNET,
    },
    "diffusion": settings.IMAGE_DIFFUSION,
    "drop_text": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["glide"],
    "eval": settings.DRAWN,
}
FIGURES = ("eval_loss",)


def words(tokens: jax.Array, token_mask: jax.Array) -> TextConditioning:
    """Tokens (B, L) and their mask as the conditioning of a network with its own text encoder."""
    return TextConditioning(None, None, None, tokens, token_mask)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, tables, diffusion, empty, drop_text):
    """Loss () and metrics of a global batch. `empty` is the empty caption. Nothing stands frozen under this
    stage."""
    del frozen
    rng_text, rng_noise, rng_dropout = jax.random.split(rng, 3)
    x0 = batch["image"]
    text = words(batch["tokens"], batch["token_mask"])
    text = select_text(jax.random.uniform(rng_text, (len(x0),)) >= drop_text, text, empty)
    conditioning = {"low_res": batch["low_res"]} if model.upsamples else {}
    if model.inpaint:
        conditioning |= {"known_image": x0, "known": batch["known"]}

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, **conditioning, **caption_inputs(text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    if model.inpaint:  # sampling puts the known part into the answer, so nothing is learned there
        out = jnp.where(batch["known"], target_of(x0, eps, t, tables, diffusion["prediction"]), out)
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or sizes that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    size, factor = config.model.unet.image_size, config.factor
    if factor is not None and size % factor:
        raise InputError(f"model.unet.image_size={size} must be a multiple of factor={factor}")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    factor, size, tokenizer = config.factor, config.model.unet.image_size, text_tokenizer(config)
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    model_config["text"] |= {"vocab_size": tokenizer.vocab_size, "length": tokenizer.length}
    model_config["upsamples"] = factor is not None
    part = {"kind": "glide", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    part["tokenizer"] = tokenizer.config()
    if factor is not None:
        part["factor"] = factor
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = Glide(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    tables = training_tables(schedule_of(diffusion))
    empty = words(*(jnp.asarray(a)[None] for a in tokenizer.empty()))

    def init(key):
        x = jnp.zeros((1, size, size, 3))
        inputs = {"low_res": x[:, :: factor or 1, :: factor or 1]} if model.upsamples else {}
        if model.inpaint:
            inputs |= {"known_image": x, "known": x[..., :1] == 0}
        return model.init(key, x, jnp.zeros(1), **inputs, **caption_inputs(empty))["params"], {}

    example = functools.partial(
        captioned_example, tokenizer=tokenizer, size=size, crop_scale=config.data.crop_scale,
        factor=factor, inpaint=model.inpaint,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, tables=tables, diffusion=diffusion,
        empty=empty, drop_text=config.drop_text,
    )  # fmt: skip
    name = "glide" if factor is None else f"glide_{size}"
    name = f"{name}_inpaint" if model.inpaint else name
    return Stage(name, model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/glide/glide.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, public weights or a run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    check_pictures(data)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "glide")
    empty = words(*(jnp.asarray(a)[None] for a in text_tokenizer(config).empty()))
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        texts = Texts(words(batch["tokens"], batch["token_mask"]), empty)
        known = Known(batch["image"], batch["known"]) if trained.model.inpaint else None
        return sample_captioned(network, texts, rng, options, low_res=batch.get("low_res"), known=known)

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    load = load_widened if trained.model.inpaint else load_part
    with Run(config, workdir, trained, mesh, data, init_from, load) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
