"""VQ-VAE-2: an autoencoder with a codebook on every level (Razavi et al. 2019, section 3.1).

    loss    mean (x - y)^2 + the sum over levels of the codebooks' losses. Those of averages, the paper's,
            are beta mean (z - sg(e))^2 (equation 2); those that learn by gradient have a term for the
            vectors, too (`models.quantiser`).

With `relax` the codes are relaxed draws (Jang et al. 2017), and the codebooks learn through them: the
temperature falls along half a cosine. Figures and use take the nearest vectors, as sampling does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from unclip_jax.data.examples import picture_example
from unclip_jax.errors import InputError
from unclip_jax.models.quantiser import annealed, usage
from unclip_jax.models.vqvae import VQVAE
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import check_pictures, hashes
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Player, Stage
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.codebooks import (
    QUANTISER,
    codebook_loss,
    codebook_of,
    continue_averages,
    start_averages,
)
from unclip_jax.train.figures import (
    held_out_rows,
    image_figures,
    reconstruction_rows,
    sample_grid,
    with_image_figures,
)

FROZEN: dict[str, str] = {}
MOST_LEVELS = 8
SETTINGS = settings.TRAINED | {
    "image_size": settings.whole("[1, inf)"),
    "model": {
        "channels": settings.whole("[2, inf)"),
        "residual_channels": settings.whole("[1, inf)"),
        "res_blocks": settings.whole("[1, inf)"),
        "embed_dim": settings.whole("[1, inf)"),
        "codes": settings.whole("[2, inf)"),
        "levels": settings.whole(f"[1, {MOST_LEVELS}]"),
        "halvings": settings.whole("[1, 8]"),
    },
    "quantiser": QUANTISER,
    "relax": settings.maybe(
        {
            "start": settings.number("(0, inf)"),
            "end": settings.number("(0, inf)"),
            "steps": settings.whole("[1, inf)"),
        }
    ),
    "eval": settings.DRAWN,
}
FIGURES = ("eval_psnr", "eval_l1")
LEVEL_FIGURES = ("eval_codes_used_{}", "eval_perplexity_{}")  # {} is the level; 0 is the bottom


# ------------------------------------------------------------------------------------ loss
def objective(params, extra, rng, batch, step, *, frozen, model, config):
    """The loss () of a global batch, its metrics, and `extra` with the averages moved."""
    del frozen
    rng_relax, rng_restart = jax.random.split(rng)
    variables, image, given = {"params": params}, batch["image"], {}
    if config.relax is not None:
        given = {"temperature": annealed(step, **config.relax), "key": rng_relax}
    levels = model.apply(variables, image, method="encode", **given)
    made = model.apply(variables, [level.quantised.latents for level in levels], method="decode")
    pixels = jnp.mean(jnp.square(image - made))
    loss, metrics, moved = pixels, {"mse": pixels}, {}
    for i, level in enumerate(levels):
        name = f"codebook_{i}"
        of_level, used, averages = codebook_loss(
            config.quantiser, level.z, level.quantised, model.codes,
            extra.get("averages", {}).get(name), jax.random.fold_in(rng_restart, i),
        )  # fmt: skip
        loss = loss + of_level
        if averages is not None:
            moved[name] = averages
        metrics |= {f"quantiser_{i}": of_level}
        metrics |= {f"perplexity_{i}": used.perplexity, f"codes_used_{i}": used.used}
    if given:
        metrics["temperature"] = given["temperature"]
    return loss, (metrics, extra | ({"averages": moved} if moved else {}))


# ------------------------------------------------------------------------------------ stage
def figure_names(config) -> tuple[str, ...]:
    """The names of a run's figures."""
    model = config.get("model")  # not checked yet: it may be anything
    levels = model.get("levels") if isinstance(model, (Mapping, ConfigDict)) else None
    count = levels if isinstance(levels, int) and 1 <= levels <= MOST_LEVELS else 0
    return FIGURES + tuple(name.format(level) for level in range(count) for name in LEVEL_FIGURES)


def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, figure_names(config)))
    factor = VQVAE(**config_json(config.model)).factor
    if config.image_size % factor:
        raise InputError(
            f"image_size={config.image_size} must be a multiple of {factor}, the pixels along a top code"
        )
    if config.relax is not None and config.quantiser.codebook != "gradient":
        raise InputError("relaxed codes move the codebook by gradient: set quantiser.codebook to gradient")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    size, model_config = config.image_size, config_json(config.model)
    model = VQVAE(
        **model_config, dtype=compute_dtype(config.dtype, mesh), remat=config.remat, gather=make_gather(mesh)
    )
    part = {"kind": "vqvae", "model": model_config, "frozen": hashes(frozen)}
    names = tuple(f"codebook_{level}" for level in range(model.levels))
    averages = names if config.quantiser.codebook == "averages" else ()

    def init(key):
        params = model.init(key, jnp.zeros((1, size, size, 3)))["params"]
        begun = {name: start_averages(config.quantiser, params[name]) for name in averages}
        return params, {"averages": begun} if begun else {}

    def follow(params, extra):
        return params | {name: codebook_of(config.quantiser, extra["averages"][name]) for name in averages}

    example = functools.partial(picture_example, size=size, crop_scale=config.data.crop_scale)
    loss = functools.partial(objective, model=model, config=config)
    return Stage("vqvae", model, part, init, example, loss, (Player(project=follow),))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/vqvae2/vqvae.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle, a run or public weights whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    check_pictures(data)
    trained = stage(config, mesh, {})
    model = trained.model

    # -------------------------------------------------------------------------------- evaluators
    images_against_held_out = image_figures(trained, config, mesh, data)
    reconstructed = jax.jit(lambda params, image: model.apply({"params": params}, image)[0])

    @jax.jit
    def measured(params, batch):
        image = batch["image"]
        made, levels = model.apply({"params": params}, image)
        made = jnp.clip(made, -1.0, 1.0)
        rows = reconstruction_rows(image, made)
        return rows | {f"codes_{i}": level.quantised.codes for i, level in enumerate(levels)}

    def evaluate(run, step) -> dict[str, float]:
        params = run.state.ema_params
        again = lambda batch, rng: reconstructed(params, batch["image"])
        sample_grid(run, step, again)
        joined = held_out_rows(run, functools.partial(measured, params))
        figures = {}
        for level in range(model.levels):
            used = usage(jnp.asarray(joined.pop(f"codes_{level}")), model.codes)
            names = [name.format(level) for name in LEVEL_FIGURES]
            figures |= dict(zip(names, (float(used.used), float(used.perplexity)), strict=True))
        figures |= {f"eval_{name}": float(np.mean(values)) for name, values in joined.items()}
        return figures | images_against_held_out(again, step)

    # -------------------------------------------------------------------------------- loop
    run = Run(config, workdir, trained, mesh, data, init_from)
    if init_from is not None and not run.start.step and "averages" in run.state.extra:
        sides = model.sides(config.image_size)
        outputs = {f"codebook_{i}": config.batch_size * side**2 for i, side in enumerate(sides)}
        continue_averages(run, outputs)
    with run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, {}, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
