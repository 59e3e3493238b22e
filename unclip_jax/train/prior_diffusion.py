"""The diffusion prior: CLIP image embeddings from captions (unCLIP section 2.2).

A causal transformer sees the caption, its CLIP text embedding, the time step and the noised image embedding,
and predicts the clean one: L = E |f(z^(t), t, y) - z_i|^2. Training drops captions at random, for
classifier-free guidance.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.examples import clip_example
from unclip_jax.diffusion.embedding_space import KINDS, normalize
from unclip_jax.diffusion.losses import sample_noised, simple_loss, training_tables
from unclip_jax.diffusion.process import add_noise, to_x0_eps
from unclip_jax.diffusion.schedule import schedule_of, strided_steps
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import Texts, select_text, text_inputs
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import EMPTY, arrays, clip_reader, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.lora import adapted, whole, write_adapters
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import FITTED, Stage, without_extra
from unclip_jax.run.state import step_rng
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.embedding_fit import embedding_fit, placeholder, space_of
from unclip_jax.train.figures import PRIOR_FIGURES, prior_figures

FROZEN = {"clip": "clip"}
SETTINGS = (
    settings.TRAINED
    | settings.ADAPTERS
    | {
        "frozen": settings.frozen(FROZEN),
        "text_tokenizer": settings.maybe(settings.TOKENIZER),
        "model": settings.BLOCKS | {"text": settings.maybe({})},
        "diffusion": settings.DIFFUSION,
        "space": {"kind": settings.text(*KINDS), "scale": settings.maybe(settings.number("(0, inf)"))},
        "statistics_batches": settings.whole("[1, inf)"),
        "drop_text": settings.number("[0, 1)"),
        "sampling": settings.SAMPLING["prior_diffusion"],
        "eval": settings.RANKED,
    }
)
ERROR_TIMES = 50  # number of time steps at which the errors for analytic variance are measured
ERROR_BATCHES = 2  # number of batches at each of them


# ------------------------------------------------------------------------------------ fit
def error_table(errors: dict[int, float], variance: float, num_steps: int) -> list[float]:
    """Mean squared errors of x0 at some time steps -> one for each step 0 .. T - 1, interpolated.

    None is larger than the variance of the data. Analytic variance needs this table (Bao et al. 2022). It is
    written with x0, because 1 - E|eps|^2 cancels where there is little noise.
    """
    steps = sorted(errors)
    table = np.interp(np.arange(num_steps), steps, [errors[t] for t in steps])
    return [float(f"{v:.5g}") for v in np.minimum(table, variance)]


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, tables, prediction, clip, space, drop_text):
    """Loss () and metrics of a global batch, read by `clip` with the parameters in `frozen`.

    `space` makes an embedding space of the fitted statistics.
    """
    rng_drop, rng_noise, rng_dropout = jax.random.split(rng, 3)
    z = normalize(space(frozen[FITTED]), clip.images(frozen["clip"], batch))
    text = clip.captions(frozen["clip"], batch)
    text = select_text(jax.random.uniform(rng_drop, (len(z),)) >= drop_text, text, frozen[EMPTY])

    t, eps, z_t = sample_noised(rng_noise, z, tables)
    out = model.apply(
        {"params": params}, z_t, t, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    return jnp.mean(simple_loss(out, z, eps, t, tables, prediction)), {}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or an embedding space without its scale."""
    settings.check_settings(config, SETTINGS, PRIOR_FIGURES)
    if config.space.kind in ("unit", "scaled") and config.space.scale is None:
        raise InputError(f"space.kind={config.space.kind} needs space.scale")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Its fit is the embedding space. Raises ValueError as
    `check`.
    """
    check(config)
    clip = clip_reader(config, mesh, frozen)
    dim, length = clip.embed_dim, (clip.own_tokenizer or clip.tokenizer).length
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    model_config |= {"embed_dim": dim, "length": length}
    part = {
        "kind": "prior_diffusion",
        "model": model_config,
        "diffusion": diffusion,
        "frozen": hashes(frozen),
    }
    part["embedding_space"] = placeholder(config.space, dim)
    if clip.own_tokenizer is not None:
        model_config["text"] |= {"num_embeddings": clip.own_tokenizer.vocab_size}
        part["tokenizer"] = clip.own_tokenizer.config()
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = DiffusionPrior(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    tables = training_tables(schedule_of(diffusion))

    def init(key):
        inputs = text_inputs(model, clip.zeros)
        return model.init(key, jnp.zeros((1, dim)), jnp.zeros(1), **inputs)["params"], {}

    example = functools.partial(
        clip_example, tokenizer=clip.tokenizer, text_tokenizer=clip.own_tokenizer, size=clip.image_size,
        crop_scale=config.data.crop_scale,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, tables=tables, prediction=diffusion["prediction"],
        clip=clip, space=functools.partial(space_of, part), drop_text=config.drop_text,
    )  # fmt: skip
    fit = embedding_fit(clip, frozen["clip"], part["embedding_space"], config.statistics_batches)
    return Stage("prior_diffusion", model, part, init, example, without_extra(loss), fit=fit)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/prior_diffusion.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    prior = stage(config, mesh, networks)
    prior, frozen, init_from = adapted(prior, config, mesh, arrays(networks), init_from)
    run = Run(config, workdir, prior, mesh, data, init_from)
    frozen |= {FITTED: run.fit()}

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "prior_diffusion")
    clip, diffusion = clip_reader(config, mesh, networks), prior.part["diffusion"]

    @jax.jit
    def predict(params, frozen, batch, rng, errors):
        texts = Texts(clip.captions(frozen["clip"], batch), frozen[EMPTY])
        network = Network(prior.model, whole(params, frozen), run.part | {"x0_error": errors})
        z_hat = sample_prior(network, texts, rng, options)
        return z_hat, clip.images(frozen["clip"], batch), texts.captions.embed

    def evaluate(state, step) -> dict[str, float]:
        errors = None
        if options.variance == "analytic":
            # The table is measured on the weights that draw. That of the last ones is there already.
            if step != config.steps:
                run.part["x0_error"] = measure_errors(state)
            errors = np.asarray(run.part["x0_error"], np.float32)
        mean = np.asarray(run.part["embedding_space"]["mean"])
        return prior_figures(
            run, lambda batch, rng: predict(state.ema_params, frozen, batch, rng, errors), mean
        )

    @jax.jit
    def x0_error(params, frozen, batch, rng):
        z = normalize(space_of(prior.part, frozen[FITTED]), clip.images(frozen["clip"], batch))
        text, network = clip.captions(frozen["clip"], batch), whole(params, frozen)
        schedule = schedule_of(diffusion)
        times = strided_steps(diffusion["num_steps"], min(ERROR_TIMES, diffusion["num_steps"]))
        abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

        def at(t):
            z_t = add_noise(z, jax.random.normal(jax.random.fold_in(rng, t), z.shape), abar[t])
            out = prior.model.apply(
                {"params": network}, z_t, jnp.full(len(z), t), **text_inputs(prior.model, text)
            )
            return jnp.mean(jnp.square(to_x0_eps(out, z_t, abar[t], diffusion["prediction"])[0] - z))

        return times, jax.lax.map(at, jnp.asarray(times)), jnp.mean(jnp.var(z, axis=0))

    def measure_errors(state) -> list[float]:
        """The errors over some training rows, with their captions."""
        rows = [
            jax.device_get(x0_error(state.ema_params, frozen, batch, step_rng(config.seed, i)))
            for i, batch in enumerate(run.measuring_batches(ERROR_BATCHES))
        ]
        times, errors, variance = (np.mean(column, axis=0) for column in zip(*rows))
        pairs = dict(zip(times.astype(int).tolist(), errors.tolist()))
        return error_table(pairs, float(variance), diffusion["num_steps"])

    # -------------------------------------------------------------------------------- loop
    with run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step, **({"x0_error": measure_errors(run.state)} if step == config.steps else {}))
            if run.evaluates(step):
                run.record(step, evaluate(run.state, step))
    write_adapters(run, workdir)
    return run.figures
