"""Retrieval-augmented diffusion: a latent U-Net whose context is what CLIP says of similar pictures
(Blattmann et al. 2022, section 3).

The context of a picture is its K nearest rows of an index by cosine, the nearest first, without positions or
distances: the paper's encoder of neighbours is the identity. The index holds none of the training pictures.
`unclip embed --neighbours` finds the rows once, so that no step embeds or searches. The latents, the noise
and the loss are those of latent diffusion. For guidance, zeros replace the context; the authors train without
dropping it, and guide against zeros all the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.load import load_part
from unclip_jax.data.examples import retrieval_example
from unclip_jax.data.retrieval_index import SPACES
from unclip_jax.diffusion.losses import sample_noised, simple_loss, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, encode_latents, sample_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.run import settings
from unclip_jax.run.batches import Data, open_data
from unclip_jax.run.frozen import arrays, check_latents, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train import latent
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid

FROZEN: dict[str, str] = {"clip": "clip", "autoencoder": "autoencoder"}
SETTINGS = settings.TRAINED | {
    "frozen": settings.frozen(FROZEN),
    "data": settings.DATA | {"eval": settings.absent(settings.SOURCE)},
    "model": latent.SETTINGS["model"],
    "diffusion": latent.SETTINGS["diffusion"],
    "embedding_space": settings.text(*SPACES),
    "neighbours": settings.whole("[1, inf)"),
    "drop_neighbours": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["retrieval"],
    "eval": settings.DRAWN,
}


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, encode, tables, prediction, drop_neighbours):
    """Loss () and metrics of a global batch, encoded with the autoencoder in `frozen`."""
    rng_drop, rng_latents, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0 = encode(frozen["autoencoder"], batch, rng_latents)
    keep = jax.random.uniform(rng_drop, (len(x0),)) >= drop_neighbours
    context = jnp.where(keep[:, None, None], batch["neighbours"], 0.0)

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    rngs = {"dropout": rng_dropout}
    out = model.apply({"params": params}, x_t, t, context=context, deterministic=False, rngs=rngs)
    return jnp.mean(simple_loss(out, x0, eps, t, tables, prediction)), {}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    latent.check_settings(config, SETTINGS)
    if config.model.in_channels != config.model.out_channels:
        raise InputError("a network that sees neighbours does not inpaint: model.in_channels is out_channels")


def check_neighbours(clip: Network, data: Data, count: int, space: str) -> None:
    """Checks that every source holds neighbours of this CLIP.

    Args:
      count: of each picture. space: `raw` or `unit`.

    Raises:
      ValueError: naming the source, and what does not fit.
    """
    for source in (data.train, *data.held_out.values()):
        embedded = source.embedded
        kept = None if embedded is None else embedded.neighbours
        if kept is None:
            raise InputError(
                f"{source.name} holds no neighbours: embed with --neighbours INDEX, and give the folder with "
                "--embeddings"
            )
        if embedded.clip != clip.hash:
            raise InputError(
                f"{source.name} was made with CLIP {embedded.clip}, but the CLIP given is {clip.hash}: "
                "embed again, or give that CLIP"
            )
        if kept["count"] < count:
            raise InputError(
                f"{source.name} holds {kept['count']} neighbours of each picture, and neighbours={count}: "
                "embed with a larger --nearest"
            )
        if kept["embedding_space"] != space:
            raise InputError(
                f"{source.name} holds {kept['embedding_space']} neighbours, and embedding_space={space}: "
                f"make an index with --space {space}"
            )


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`, or where the frozen networks
    have other sizes."""
    check(config)
    autoencoder, model_config = frozen["autoencoder"], config_json(config.model)
    diffusion = config_json(config.diffusion)
    part = {"kind": "retrieval", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    part |= {"embedding_space": {"kind": config.embedding_space}, "neighbours": config.neighbours}
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = LatentUNet(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    if autoencoder.module.latent_channels != model.out_channels:
        raise InputError(
            f"model.out_channels={model.out_channels}, but the autoencoder's latents have "
            f"{autoencoder.module.latent_channels} channels"
        )
    dim = frozen["clip"].config["model"]["embed_dim"]
    if dim != model.context_dim:
        raise InputError(f"model.context_dim={model.context_dim}, but CLIP makes embeddings of {dim}")

    def init(key):
        x = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
        return model.init(key, x, jnp.zeros(1), context=jnp.zeros((1, 1, dim)))["params"], {}

    def encode(params, batch, rng):
        network = autoencoder.with_params(gather_rest(params, mesh))
        return jax.lax.stop_gradient(encode_latents(network, batch, rng))

    size = model.image_size * autoencoder.module.factor
    example = functools.partial(retrieval_example, size=size, count=config.neighbours)
    loss = functools.partial(
        loss_fn, model=model, encode=encode, tables=training_tables(schedule_of(diffusion)),
        prediction=diffusion["prediction"], drop_neighbours=config.drop_neighbours,
    )  # fmt: skip
    return Stage("retrieval", model, part, init, example, without_extra(loss))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/retrieval.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or a run whose U-Net a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, None)
    check_neighbours(networks["clip"], data, config.neighbours, config.embedding_space)
    check_latents(networks["autoencoder"], data, config.model.image_size, crop_scale=1.0)
    frozen = {"autoencoder": arrays(networks)["autoencoder"]}  # CLIP has said all that is needed
    trained = stage(config, mesh, networks)
    kept = data.train.embedded.neighbours
    popular = {key: list(kept[key]) if key != "index" else kept[key] for key in ("index", "rows", "uses")}
    trained = trained._replace(part=trained.part | {"popular": popular})

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "retrieval")
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        autoencoder = networks["autoencoder"].with_params(frozen["autoencoder"])
        near, size = batch["neighbours"], (trained.model.image_size,) * 2
        given = {"context": (near, jnp.zeros((1, 1, 1)))}
        z = sample_latents(network, None, size, rng, options, inputs=given, rows=len(near))
        return decode_latents(autoencoder, z)

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from, load_part) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
