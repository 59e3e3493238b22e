"""Imagen: images from captions that a frozen T5 has read, and large images from small ones (Saharia et al.
2022, section 2 and appendix B).

The text tower of a frozen CLIP may read them in T5's place, as in the paper's comparison of text encoders
(section 2.1). A U-Net predicts the noise, or v. The empty caption replaces the caption for a share of the
rows, `drop_text`. With `factor`, the network enlarges a small image, a clean reduction of the large one, to
which noise of a random level is added: noise conditioning augmentation. The largest upsampler learns on
crops.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import captioned_example
from unclip_jax.diffusion.augmentation import augmented
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, training_times
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.captioned import caption_inputs, sample_captioned
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import Texts, select_text
from unclip_jax.models.imagen import Imagen, ImagenUpsampler
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, check_pictures, hashes, load_frozen, wanted_roles
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.run.t5 import check_text_states
from unclip_jax.run.text_reader import text_reader
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {"t5": "t5", "clip": "clip"}  # one of the two
SETTINGS = settings.TRAINED | {
    "frozen": {role: settings.absent(settings.maybe(settings.text())) for role in FROZEN},
    "data": settings.CROPPED
    | {"eval": settings.absent(settings.SOURCE), "crop_size": settings.maybe(settings.whole("[1, inf)"))},
    "factor": settings.maybe(settings.whole("[2, inf)")),
    "model": {"context_dim": settings.whole("[1, inf)"), "unet": settings.UNET | settings.EFFICIENT},
    "diffusion": settings.IMAGE_DIFFUSION | {"continuous": settings.absent(settings.FLAG)},
    "drop_text": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["imagen"],
    "eval": settings.DRAWN,
}
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, tables, diffusion, reader, upsamples, drop_text):
    """Loss () and metrics of a global batch, whose captions `reader` reads with what is in `frozen`."""
    rng_text, rng_noise, rng_dropout, rng_level, rng_augmentation = jax.random.split(rng, 5)
    x0 = batch["image"]
    text, empty = reader.captions(frozen, batch), reader.empty(frozen)
    text = select_text(jax.random.uniform(rng_text, (len(x0),)) >= drop_text, text, empty)
    conditioning = {}
    if upsamples:
        level = jax.random.uniform(rng_level, (len(x0),))
        enlarged = model.enlarge(batch["low_res"], x0.shape[1:3])
        noise = jax.random.normal(rng_augmentation, enlarged.shape)
        conditioning = {"enlarged": augmented(enlarged, level, noise), "augmentation": level}

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, **conditioning, **caption_inputs(text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or sizes that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    unet, factor, crop = config.model.unet, config.factor, config.data.crop_size
    if len(wanted_roles(config, FROZEN)) != 1:
        raise InputError("captions are read by a T5 or by a CLIP: set one of frozen.t5 and frozen.clip")
    if config.diffusion.get("continuous", False) and unet.out_channels != 3:
        raise InputError("in continuous time no variance is learned: set model.unet.out_channels=3")
    if factor is None and crop is not None:
        raise InputError("data.crop_size is for upsamplers: set it to None, or set factor")
    if (factor is not None) != ("attention" in unet):
        raise InputError("model.unet.attention is of upsamplers, which have a factor, and of them alone")
    if factor is not None:
        halves = 2 ** len(unet.channel_mult)
        for name, side in (("model.unet.image_size", unet.image_size), ("data.crop_size", crop)):
            if side is not None and (side % factor or side % halves or side > unet.image_size):
                raise InputError(
                    f"{name}={side} must be a multiple of factor={factor} and of {halves}, and at most "
                    "model.unet.image_size"
                )


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    factor, size, reader = config.factor, config.model.unet.image_size, text_reader(mesh, frozen)
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    kind = "imagen" if factor is None else "imagen_upsampler"
    part = {"kind": kind, "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    if factor is not None:
        part["factor"] = factor
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    module = Imagen if factor is None else ImagenUpsampler
    model = module(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    tables = training_times(schedule_of(diffusion))

    def init(key):
        x = jnp.zeros((1, size, size, 3))
        inputs = {} if factor is None else {"enlarged": x, "augmentation": jnp.zeros(1)}
        return model.init(key, x, jnp.zeros(1), **inputs, **caption_inputs(reader.zeros))["params"], {}

    example = functools.partial(
        captioned_example, **reader.tokenizers, size=size, crop_scale=config.data.crop_scale,
        factor=factor, crop_size=config.data.crop_size,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, tables=tables, diffusion=diffusion,
        reader=reader, upsamples=factor is not None, drop_text=config.drop_text,
    )  # fmt: skip
    name = "imagen" if factor is None else f"imagen_{size}"
    return Stage(name, model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/imagen/imagen.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, public weights or a run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    check_pictures(data)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    if "t5" in networks:
        check_text_states(networks["t5"], data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, trained.part["kind"])
    reader = text_reader(mesh, networks)
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        texts = Texts(reader.captions(frozen, batch), reader.empty(frozen))
        return sample_captioned(network, texts, rng, options, low_res=batch.get("low_res"))

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
