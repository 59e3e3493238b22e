"""Kandinsky's decoder: latents of a frozen autoencoder from CLIP image embeddings (Razzhigaev et al. 2023).

The ADM U-Net predicts the noise of the latents, with a plain squared error. For classifier-free guidance the
embedding of an image without content replaces z_i, as in sampling (`generate.kandinsky`). No caption reaches
the network. The half of its output that stands for the variance is not trained: no published sampler uses it.

With `model.inpaint` the decoder learns to fill the unknown part of an image: regions are erased at random,
and Z + 1 more input channels hold the known latents and where they are known. Their weights start at zero
when an ordinary decoder is fine-tuned. Its part is called `latent`, or `latent_inpaint`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.load import load_part
from unclip_jax.data.examples import decoder_example
from unclip_jax.diffusion.losses import sample_noised, simple_loss, split_variance, target_of, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.kandinsky import blank_image, known_latents, sample_decoder_latents
from unclip_jax.generate.latents import decode_latents, encode_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.models.kandinsky import KandinskyDecoder
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, clip_reader, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json, load_widened_latent
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {"clip": "clip", "autoencoder": "autoencoder"}
SETTINGS = settings.TRAINED | {
    "frozen": settings.frozen(FROZEN),
    "data": settings.CROPPED | {"eval": settings.absent(settings.SOURCE)},
    "model": {
        "unet": settings.UNET | {"out_channels": settings.whole("[1, inf)")},
        "latent_channels": settings.whole("[1, inf)"),
        "context_dim": settings.whole("[1, inf)"),
        "clip_tokens": settings.whole("[1, inf)"),
        "inpaint": settings.FLAG,
    },
    "diffusion": settings.DIFFUSION | {"beta_ends": settings.absent(settings.maybe(settings.ENDS))},
    "drop_embedding": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["kandinsky"],
    "eval": settings.DRAWN,
}
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(
    params, rng, batch, *, frozen, model, encode, known, blank, tables, prediction, clip, drop_embedding
):  # fmt: skip
    """Loss () and metrics of a global batch, encoded with the networks in `frozen`."""
    rng_drop, rng_latents, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0 = encode(frozen["autoencoder"], batch, rng_latents)
    drop = jax.random.uniform(rng_drop, (len(x0),)) < drop_embedding
    z_image = clip.images(frozen["clip"], batch)
    nothing = clip.images(frozen["clip"], {"clip_image": blank})
    z_image = jnp.where(drop[:, None], nothing, z_image)

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    seen = x_t
    if model.inpaint:
        kept = known(frozen["autoencoder"], batch)
        seen = jnp.concatenate([x_t, kept.beside], axis=-1)
    out = model.apply(
        {"params": params}, seen, t, image_embed=z_image, deterministic=False, rngs={"dropout": rng_dropout}
    )
    out, _ = split_variance(out, x0.shape[-1])
    if model.inpaint:  # sampling puts the known part into the answer, so nothing is learned there
        out = jnp.where(kept.mask, target_of(x0, eps, t, tables, prediction), out)
    return jnp.mean(simple_loss(out, x0, eps, t, tables, prediction)), {}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`, or where the autoencoder's
    latents are not those of the network."""
    check(config)
    clip, autoencoder = clip_reader(config, mesh, frozen), frozen["autoencoder"]
    diffusion = config_json(config.diffusion)
    model_config = config_json(config.model) | {"embed_dim": clip.embed_dim}
    part = {"kind": "kandinsky", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = KandinskyDecoder(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    if autoencoder.module.latent_channels != model.latent_channels:
        raise InputError(
            f"model.latent_channels={model.latent_channels}, but the autoencoder's latents have "
            f"{autoencoder.module.latent_channels} channels"
        )

    def init(key):
        x = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
        return model.init(key, x, jnp.zeros(1), image_embed=clip.zeros.embed)["params"], {}

    def encode(params, batch, rng):
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(encode_latents(network, batch, rng))

    def known(params, batch):
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(known_latents(network, batch["image"], batch["known"]))

    example = functools.partial(
        decoder_example, tokenizer=clip.tokenizer, size=model.image_size * autoencoder.module.factor,
        clip_size=clip.image_size, crop_scale=config.data.crop_scale, inpaint=model.inpaint,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, encode=encode, known=known, blank=blank_image(frozen["clip"].config),
        tables=training_tables(schedule_of(diffusion)), prediction=diffusion["prediction"], clip=clip,
        drop_embedding=config.drop_embedding,
    )  # fmt: skip
    name = "latent_inpaint" if model.inpaint else "latent"
    return Stage(name, model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/kandinsky/latent.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, public weights or a run whose decoder a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)
    clip = clip_reader(config, mesh, networks)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "kandinsky")
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)
    blank, size = blank_image(networks["clip"].config), (trained.model.image_size,) * 2

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        autoencoder = networks["autoencoder"].with_params(frozen["autoencoder"])
        z_image, nothing = (clip.images(frozen["clip"], seen) for seen in (batch, {"clip_image": blank}))
        kept = known_latents(autoencoder, batch["image"], batch["known"]) if trained.model.inpaint else None
        z = sample_decoder_latents(network, z_image, nothing, size, rng, options, known=kept)
        return decode_latents(autoencoder, z, method="decode_quantised")

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    load = load_widened_latent if trained.model.inpaint else load_part
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
