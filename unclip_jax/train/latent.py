"""Latent diffusion: a U-Net on the latents of a frozen autoencoder (Rombach et al. 2022, sections 3.2 and
3.3).

The latents are drawn from the autoencoder's Gaussian and multiplied by its scale factor. Records that hold
`latents` save the encoder. The U-Net predicts the noise or v, with a plain squared error; there is no term of
the variational bound. The context is the text states of a frozen CLIP; for classifier-free guidance the empty
caption replaces the caption. Without `context_dim` the network has no condition, and there is no CLIP.

With `model.classes` the context is a row of a learned table, one for each class of `data.classes`. For
guidance a last row replaces it for `drop_text` of the rows (section 4.3). `data.label` says where a record's
class is.

A U-Net of 2 Z + 1 input channels learns to inpaint: beside the latents it sees the mask (1 where the image is
drawn anew) and the latents of the image without that part. The weights of the new channels start at zero when
an ordinary U-Net is fine-tuned.

A U-Net of Z + 3 input channels learns to enlarge (section 4.4): beside the latents it sees the image reduced
to the latents' size and degraded (`data.degradation`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.load import load_part
from unclip_jax.data.examples import latent_example
from unclip_jax.diffusion.losses import sample_noised, simple_loss, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, encode_latents, inpainting_inputs, sample_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import Texts, select_text
from unclip_jax.models.latent_unet import RESAMPLES, LatentUNet
from unclip_jax.paths import user_path
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import (
    EMPTY,
    ClipReader,
    arrays,
    check_latents,
    check_pictures,
    clip_reader,
    hashes,
    load_frozen,
)
from unclip_jax.run.loop import Run
from unclip_jax.run.lora import adapted, whole, write_adapters
from unclip_jax.run.resume import config_json, load_widened_latent
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {"clip": "clip", "autoencoder": "autoencoder"}
CLASSES = settings.Rule(
    (tuple, str),
    "the names of the classes, or a file with one a line",
    lambda value: bool(value) and all(isinstance(name, str) and name for name in value),
)
SETTINGS = (
    settings.TRAINED
    | settings.ADAPTERS
    | {
        "frozen": {"clip": settings.maybe(settings.text()), "autoencoder": settings.text()},
        "data": settings.CROPPED
        | {
            "eval": settings.absent(settings.SOURCE),
            "label": settings.absent(settings.text()),
            "classes": settings.absent(CLASSES),
            "degradation": settings.absent(settings.text("blur", "bsr_light")),
        },
        "model": {
            "image_size": settings.whole("[1, inf)"),
            "in_channels": settings.whole("[1, inf)"),
            "out_channels": settings.whole("[1, inf)"),
            "channels": settings.whole("[2, inf)"),
            "channel_mult": settings.several("[1, inf)"),
            "res_blocks": settings.whole("[1, inf)"),
            "heads": settings.several("[1, inf)"),
            "attention_levels": settings.absent(settings.several("[0, inf)", least=0)),
            "context_dim": settings.absent(settings.maybe(settings.whole("[1, inf)"))),
            "classes": settings.absent(settings.maybe(settings.whole("[1, inf)"))),
            "transformer_depth": settings.absent(settings.whole("[0, inf)")),
            "linear": settings.absent(settings.FLAG),
            "resample": settings.absent(settings.text(*RESAMPLES)),
            "groups": settings.absent(settings.whole("[1, inf)")),
            "dropout": settings.absent(settings.number("[0, 1)")),
            "scale_shift": settings.absent(settings.FLAG),
        },
        "diffusion": settings.DIFFUSION
        | {
            "beta_ends": settings.absent(settings.maybe(settings.ENDS)),
            "zero_snr": settings.absent(settings.FLAG),
        },
        "drop_text": settings.number("[0, 1]"),
        "sampling": settings.SAMPLING["latent"],
        "eval": settings.DRAWN,
    }
)
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, encode, beside, tables, prediction, clip, drop_text):
    """Loss () and metrics of a global batch, encoded with the networks in `frozen`."""
    rng_text, rng_latents, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0, given = encode(frozen["autoencoder"], batch, rng_latents), {}
    if clip is not None:
        text = clip.captions(frozen["clip"], batch)
        keep = jax.random.uniform(rng_text, (len(x0),)) >= drop_text
        given["context"] = select_text(keep, text, frozen[EMPTY]).states
    if model.classes is not None:
        keep = jax.random.uniform(rng_text, (len(x0),)) >= drop_text
        given["label"] = jnp.where(keep, batch["label"], model.classes)

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    if beside is not None:
        x_t = jnp.concatenate([x_t, beside(frozen["autoencoder"], batch)], axis=-1)
    out = model.apply({"params": params}, x_t, t, **given, deterministic=False, rngs={"dropout": rng_dropout})
    return jnp.mean(simple_loss(out, x0, eps, t, tables, prediction)), {}


# ------------------------------------------------------------------------------------ stage
def check_settings(config, table) -> None:
    """Raises ValueError on a setting of `table` that is out of range, or a U-Net whose settings do not fit
    together."""
    settings.check_settings(config, table, with_image_figures(config, FIGURES))
    model, groups = config.model, config.model.get("groups", 32)
    levels, latents = len(model.channel_mult), model.out_channels
    if model.in_channels not in (latents, 2 * latents + 1, latents + 3):
        raise InputError(
            f"model.in_channels={model.in_channels} must be model.out_channels={latents}, "
            f"or {2 * latents + 1} to inpaint, or {latents + 3} to enlarge"
        )
    if enlarges(config) != (config.data.get("degradation") is not None):
        raise InputError(
            f"data.degradation belongs to a network that enlarges (model.in_channels={latents + 3}), and "
            "only to that"
        )
    if len(model.heads) != levels or any(level >= levels for level in model.get("attention_levels", ())):
        raise InputError(f"model.heads and model.attention_levels must fit the {levels} levels of the U-Net")
    for level, mult in enumerate(model.channel_mult):
        width, heads = model.channels * mult, model.heads[level]
        if width % groups:
            raise InputError(f"{width} channels of model must be a multiple of model.groups={groups}")
        if width % heads and (level in model.get("attention_levels", ()) or level == levels - 1):
            raise InputError(f"{width} channels of model must be a multiple of its {heads} heads")
    if config.diffusion.get("zero_snr") and config.diffusion.prediction == "eps":
        raise InputError("diffusion.zero_snr needs diffusion.prediction=v: noise alone says nothing of x0")
    classes = model.get("classes") is not None
    if (model.get("context_dim") is None or classes) != (config.frozen.clip is None):
        raise InputError(
            "frozen.clip makes the context of model.context_dim: set both, or neither for a network without "
            "condition; with model.classes there is no clip"
        )
    if classes != (config.data.get("classes") is not None) or (classes and model.get("context_dim") is None):
        raise InputError("model.classes, model.context_dim and data.classes belong together: set all of them")
    if (model.get("context_dim") is None) != (model.get("transformer_depth", 1) == 0):
        raise InputError("a network without condition has model.transformer_depth=0, and only that")


def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    check_settings(config, SETTINGS)


def check_frozen_sizes(model: LatentUNet, autoencoder: Network, clip: ClipReader | None) -> None:
    """Raises ValueError where the autoencoder's latents or CLIP's text states are not those of the U-Net."""
    if autoencoder.module.latent_channels != model.out_channels:
        raise InputError(
            f"model.out_channels={model.out_channels}, but the autoencoder's latents have "
            f"{autoencoder.module.latent_channels} channels"
        )
    if clip is not None and clip.zeros.states.shape[-1] != model.context_dim:
        raise InputError(
            f"model.context_dim={model.context_dim}, but CLIP makes text states of "
            f"{clip.zeros.states.shape[-1]}"
        )


def enlarges(config) -> bool:
    """Whether the network sees a small version of the image, of the latents' size, beside the latents."""
    return config.model.in_channels == config.model.out_channels + 3


def class_names(config) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers; () for a network without classes.

    Raises:
      ValueError: when they are not `model.classes` distinct names.
    """
    names, count = config.data.get("classes"), config.model.get("classes")
    if names is None:
        return ()
    if isinstance(names, str):
        names = tuple(line.strip() for line in user_path(names).read_text("utf-8").splitlines())
    if len(set(names)) != len(names) or len(names) != count or not all(names):
        raise InputError(f"data.classes must be model.classes={count} distinct names, got {len(names)}")
    return tuple(names)


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`, or where the frozen networks
    have other sizes."""
    check(config)
    clip = clip_reader(config, mesh, frozen) if "clip" in frozen else None
    autoencoder, model_config = frozen["autoencoder"], config_json(config.model)
    diffusion = config_json(config.diffusion)
    part = {"kind": "latent", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    names = class_names(config)
    if names:
        part["class_names"] = list(names)
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = LatentUNet(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    check_frozen_sizes(model, autoencoder, clip)
    size = model.image_size * autoencoder.module.factor
    inpaints, sees_small = model.in_channels == 2 * model.out_channels + 1, enlarges(config)

    def init(key):
        given = {} if clip is None else {"context": clip.zeros.states}
        if names:
            given["label"] = jnp.zeros(1, jnp.int32)
        x = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
        return model.init(key, x, jnp.zeros(1), **given)["params"], {}

    def encode(params, batch, rng):
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(encode_latents(network, batch, rng))

    def beside(params, batch):
        if sees_small:
            return batch["low_res"]
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(inpainting_inputs(network, batch["image"], batch["known"]))

    example = functools.partial(
        latent_example, tokenizer=None if clip is None else clip.tokenizer, size=size,
        crop_scale=config.data.crop_scale, inpaint=inpaints, classes=names,
        label=config.data.get("label", "caption"), degradation=config.data.get("degradation"),
        small=model.image_size,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, encode=encode, beside=beside if inpaints or sees_small else None,
        tables=training_tables(schedule_of(diffusion)), prediction=diffusion["prediction"], clip=clip,
        drop_text=config.drop_text,
    )  # fmt: skip
    return Stage("latent_inpaint" if inpaints else "latent", model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/latent.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, public weights or a run whose U-Net a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)
    inpaints = trained.name == "latent_inpaint"
    if inpaints or enlarges(config):  # masks and small versions are of pixels
        check_pictures(data)
    check_latents(networks["autoencoder"], data, trained.model.image_size, config.data.crop_scale)
    clip = clip_reader(config, mesh, networks) if "clip" in networks else None

    load = load_widened_latent if inpaints else load_part
    trained, frozen, init_from = adapted(trained, config, mesh, frozen, init_from, load)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "latent")
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, whole(params, frozen), trained.part)
        autoencoder = networks["autoencoder"].with_params(frozen["autoencoder"])
        texts = None if clip is None else Texts(clip.captions(frozen["clip"], batch), frozen[EMPTY])
        beside = (
            inpainting_inputs(autoencoder, batch["image"], batch["known"])
            if inpaints
            else batch.get("low_res")
        )
        size, inputs = (trained.model.image_size,) * 2, None
        if "label" in batch:
            inputs = {"label": (batch["label"], jnp.full(1, trained.model.classes, jnp.int32))}
        rows = len(jax.tree.leaves(batch)[0])
        z = sample_latents(network, texts, size, rng, options, beside=beside, inputs=inputs, rows=rows)
        return decode_latents(autoencoder, z)

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from, load) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    write_adapters(run, workdir)
    return run.figures
