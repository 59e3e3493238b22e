"""StableUnCLIP: a latent U-Net that also sees CLIP's image embedding z_i, with noise.

The loss is that of `latent` (Rombach et al. 2022, section 3.2). Beside the caption, the U-Net sees the vector
of z_i with noise of a level that is drawn uniformly (`generate.image_embeds`), as cascades noise the pictures
between their stages (Ho et al. 2021, section 4). For classifier-free guidance the empty caption replaces the
caption, and zeros replace the whole vector, each with its own probability. The mean and the deviation that
whiten z_i are measured before the first step.

Its part is called `latent`. The frozen `text` reads the captions, or `clip` where one CLIP serves both.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import latent_embed_example
from unclip_jax.diffusion.embedding_space import KINDS
from unclip_jax.diffusion.losses import sample_noised, simple_loss, training_tables
from unclip_jax.diffusion.schedule import SCHEDULES, schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.image_embeds import noised_vector, vector_inputs
from unclip_jax.generate.latents import decode_latents, encode_latents, sample_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import Texts, select_text
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import EMPTY, arrays, check_latents, clip_reader, hashes, load_frozen, text_role
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json, load_with_vector
from unclip_jax.run.stage import FITTED, Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train import latent
from unclip_jax.train.embedding_fit import embedding_fit, placeholder, space_of
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid

FROZEN = {"clip": "clip", "autoencoder": "autoencoder", "text": "text"}
SETTINGS = latent.SETTINGS | {
    "frozen": {
        "clip": settings.text(),
        "autoencoder": settings.text(),
        "text": settings.absent(settings.maybe(settings.text())),
    },
    "augmentation": {"schedule": settings.text(*SCHEDULES), "num_steps": settings.whole("[2, inf)")},
    "space": {"kind": settings.text(*KINDS), "scale": settings.maybe(settings.number("(0, inf)"))},
    "statistics_batches": settings.whole("[1, inf)"),
    "drop_image": settings.number("[0, 1]"),
}


# ------------------------------------------------------------------------------------ loss
def loss_fn(
    params, rng, batch, *, frozen, model, encode, tables, prediction, clip, text, tower, augmentation, space,
    drop_text, drop_image,
):  # fmt: skip
    """Loss () and metrics of a global batch, encoded with the networks in `frozen`.

    clip, text: the readers of z_i and of captions. tower: the role of the latter. space: makes an embedding
    space of the fitted statistics.
    """
    rng_drop, rng_latents, rng_image, rng_noise, rng_dropout = jax.random.split(rng, 5)
    x0 = encode(frozen["autoencoder"], batch, rng_latents)
    keep = jax.random.uniform(rng_drop, (2, len(x0))) >= jnp.array([[drop_text], [drop_image]])
    context = select_text(keep[0], text.captions(frozen[tower], batch), frozen[EMPTY]).states

    z_image, (rng_level, rng_eps) = clip.images(frozen["clip"], batch), jax.random.split(rng_image)
    level = jax.random.randint(rng_level, (len(x0),), 0, augmentation["num_steps"])
    eps_z = jax.random.normal(rng_eps, z_image.shape, jnp.float32)
    vector = noised_vector(augmentation, space(frozen[FITTED]), z_image, level, eps_z)
    vector = jnp.where(keep[1][:, None], vector, 0.0)

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, context=context, vector=vector,
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    return jnp.mean(simple_loss(out, x0, eps, t, tables, prediction)), {}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    latent.check_settings(config, SETTINGS)
    if config.model.in_channels != config.model.out_channels:
        raise InputError("a U-Net that sees z_i does not inpaint: set model.in_channels=model.out_channels")
    if config.space.kind in ("unit", "scaled") and config.space.scale is None:
        raise InputError(f"space.kind={config.space.kind} needs space.scale")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Its fit is the space of z_i. Raises ValueError as `check`,
    or where the frozen networks have other sizes."""
    check(config)
    tower, autoencoder = text_role(frozen), frozen["autoencoder"]
    clip, text = clip_reader(config, mesh, frozen), clip_reader(config, mesh, frozen, tower)
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    model_config |= {"vector_dim": 2 * clip.embed_dim}
    part = {"kind": "latent", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    part["augmentation"] = config_json(config.augmentation)
    part["embedding_space"] = placeholder(config.space, clip.embed_dim)
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = LatentUNet(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    latent.check_frozen_sizes(model, autoencoder, text)

    def init(key):
        x = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
        given = {"context": text.zeros.states, "vector": jnp.zeros((1, model.vector_dim))}
        return model.init(key, x, jnp.zeros(1), **given)["params"], {}

    def encode(params, batch, rng):
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(encode_latents(network, batch, rng))

    example = functools.partial(
        latent_embed_example, tokenizer=text.tokenizer, size=model.image_size * autoencoder.module.factor,
        clip_size=clip.image_size, crop_scale=config.data.crop_scale,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, encode=encode, tables=training_tables(schedule_of(diffusion)),
        prediction=diffusion["prediction"], clip=clip, text=text, tower=tower,
        augmentation=part["augmentation"], space=functools.partial(space_of, part),
        drop_text=config.drop_text, drop_image=config.drop_image,
    )  # fmt: skip
    fit = embedding_fit(clip, frozen["clip"], part["embedding_space"], config.statistics_batches)
    return Stage("latent", model, part, init, example, without_extra(loss), fit=fit)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/stable_unclip.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, public weights or a run whose U-Net a new run starts from. One that sees no z_i
        takes the vector of weight zero, and so starts as it is.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    trained = stage(config, mesh, networks)
    check_latents(networks["autoencoder"], data, trained.model.image_size, config.data.crop_scale)
    load = functools.partial(load_with_vector, vector_dim=trained.model.vector_dim)
    run = Run(config, workdir, trained, mesh, data, init_from, load)
    frozen = arrays(networks) | {FITTED: run.fit()}

    # -------------------------------------------------------------------------------- evaluators
    options, tower = options_from(config.sampling, "latent"), text_role(networks)
    clip, text = clip_reader(config, mesh, networks), clip_reader(config, mesh, networks, tower)
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        texts = Texts(text.captions(frozen[tower], batch), frozen[EMPTY])
        z_image, space = clip.images(frozen["clip"], batch), space_of(trained.part, frozen[FITTED])
        inputs = vector_inputs(network, z_image, texts.rows, rng, options, space)
        size = (trained.model.image_size,) * 2
        z = sample_latents(network, texts, size, rng, options, inputs=inputs)
        return decode_latents(networks["autoencoder"].with_params(frozen["autoencoder"]), z)

    def evaluate(step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    with run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(step))
    return run.figures
