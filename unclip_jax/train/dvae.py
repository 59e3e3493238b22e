"""DALL-E's discrete VAE (Ramesh et al. 2021, section 2.1 and appendix A.2).

    loss    mean over pixels and channels of -log logit-Laplace, plus beta KL(q || uniform). The KL, a sum
            over the image's codes, is divided by the image's number of values, as the likelihood is: at
            256 px beta 6.6 weighs the mean KL of a code by 6.6 / 192.

The codes are relaxed draws (Gumbel-softmax). Temperature and beta move along half a cosine. Figures take the
most probable codes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.examples import picture_example
from unclip_jax.errors import InputError
from unclip_jax.models.dvae import DVAE, kl_to_uniform, logit_laplace, map_pixels
from unclip_jax.models.quantiser import annealed, gumbel_softmax, usage
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import check_pictures, hashes
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import (
    held_out_rows,
    image_figures,
    reconstruction_rows,
    sample_grid,
    with_image_figures,
)

FROZEN: dict[str, str] = {}
SCHEDULE = {
    "start": settings.number("[0, inf)"),
    "end": settings.number("[0, inf)"),
    "steps": settings.whole("[1, inf)"),
}
TEMPERATURE = SCHEDULE | {"start": settings.number("(0, inf)"), "end": settings.number("(0, inf)")}
SETTINGS = settings.TRAINED | {
    "image_size": settings.whole("[1, inf)"),
    "model": {
        "channels": settings.whole("[4, inf)"),
        "levels": settings.whole("[1, 8]"),
        "level_blocks": settings.whole("[1, inf)"),
        "codes": settings.whole("[2, inf)"),
        "embed_dim": settings.whole("[1, inf)"),
    },
    "temperature": TEMPERATURE,
    "kl_weight": SCHEDULE,
    "eval": settings.DRAWN,
}
FIGURES = ("eval_psnr", "eval_l1", "eval_codes_used", "eval_perplexity")


# ------------------------------------------------------------------------------------ loss
def objective(params, extra, rng, batch, step, *, frozen, model, config):
    """The loss () of a global batch, its metrics, and `extra` as it was."""
    del frozen
    image, variables = batch["image"], {"params": params}
    temperature, beta = annealed(step, **config.temperature), annealed(step, **config.kl_weight)
    logits = model.apply(variables, image, method="encode")
    mean, log_scale = model.apply(variables, gumbel_softmax(logits, rng, temperature), method="decode")
    nll = jnp.mean(logit_laplace(map_pixels(image), mean, log_scale))
    kl = jnp.mean(jnp.sum(kl_to_uniform(logits), axis=(1, 2)))
    loss = nll + beta * kl / np.prod(image.shape[1:])
    used = usage(jnp.argmax(logits, axis=-1), model.codes)
    metrics = {"nll": nll, "kl": kl, "temperature": temperature, "kl_weight": beta}
    return loss, (metrics | {"perplexity": used.perplexity, "codes_used": used.used}, extra)


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    factor = DVAE(**config_json(config.model)).factor
    if config.image_size % factor:
        raise InputError(f"image_size={config.image_size} must be a multiple of {factor}, a code's pixels")
    if config.model.channels % 4:
        raise InputError(f"model.channels={config.model.channels} must be a multiple of 4")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    size, model_config = config.image_size, config_json(config.model)
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = DVAE(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    part = {"kind": "dvae", "model": model_config, "frozen": hashes(frozen)}

    def init(key):
        return model.init(key, jnp.zeros((1, size, size, 3)))["params"], {}

    example = functools.partial(picture_example, size=size, crop_scale=config.data.crop_scale)
    loss = functools.partial(objective, model=model, config=config)
    return Stage("dvae", model, part, init, example, loss)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/dalle/dvae.py`.
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
    reconstructed = jax.jit(lambda params, image: model.apply({"params": params}, image))

    @jax.jit
    def measured(params, batch):
        image, variables = batch["image"], {"params": params}
        (codes,) = model.apply(variables, image, method="encode_codes")
        made = model.apply(variables, codes, method="decode_codes")
        return reconstruction_rows(image, made) | {"codes": codes}

    def evaluate(run, step) -> dict[str, float]:
        params = run.state.ema_params
        again = lambda batch, rng: reconstructed(params, batch["image"])
        sample_grid(run, step, again)
        joined = held_out_rows(run, functools.partial(measured, params))
        used = usage(jnp.asarray(joined.pop("codes")), model.codes)
        figures = {"eval_codes_used": float(used.used), "eval_perplexity": float(used.perplexity)}
        figures |= {f"eval_{name}": float(np.mean(values)) for name, values in joined.items()}
        return figures | images_against_held_out(again, step)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, {}, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
