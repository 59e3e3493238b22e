"""The autoregressive prior: codes of CLIP image embeddings from captions (unCLIP section 2.2).

The codec projects an embedding onto principal components and quantises it. A causal transformer sees the
caption, its CLIP text embedding, the quantised dot product z_i.z_t and the codes so far, and predicts the
next code. Training drops captions at random, for classifier-free guidance.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.examples import clip_example
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import Texts, select_text, text_inputs
from unclip_jax.models.codec import cosine, project, quantize
from unclip_jax.models.prior_ar import ARPrior, dot_token
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import EMPTY, arrays, clip_reader, hashes, load_frozen
from unclip_jax.run.hosts import on_every_host
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import FITTED, Fit, Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import PRIOR_FIGURES, prior_figures

FROZEN = {"clip": "clip", "codec": "codec"}
SETTINGS = settings.TRAINED | {
    "frozen": settings.frozen(FROZEN),
    "text_tokenizer": settings.maybe(settings.TOKENIZER),
    "model": settings.BLOCKS
    | {
        "text": settings.OWN_TEXT,
        "codes": settings.whole("[1, inf)"),
        "buckets": settings.whole("[2, inf)"),
        "dot_bins": settings.whole("[2, inf)"),
    },
    "statistics_batches": settings.whole("[1, inf)"),
    "drop_text": settings.number("[0, 1)"),
    "sampling": settings.SAMPLING["prior_ar"],
    "eval": settings.RANKED,
}


# ------------------------------------------------------------------------------------ fit
def dot_edges(clip, params, batches, bins: int) -> np.ndarray:
    """Edges (bins - 1,) that cut z_i.z_t of training batches into equally frequent bins.

    `clip` is a reader, `params` are its CLIP's.
    """

    @jax.jit
    def dots(params, batch):
        return cosine(clip.images(params, batch), clip.captions(params, batch).embed)

    rows = [on_every_host(dots(params, batch)) for batch in batches]
    return np.quantile(np.concatenate(rows), np.arange(1, bins) / bins)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, clip, drop_text):
    """Loss () in nats per code and metrics of a global batch, read by `clip` with the parameters in `frozen`.

    `frozen` also holds the codec, and the edges of the dot-product token's bins.
    """
    rng_drop, rng_dropout = jax.random.split(rng)
    z = clip.images(frozen["clip"], batch)
    text = clip.captions(frozen["clip"], batch)
    dot = dot_token(frozen[FITTED], z, text.embed)
    codes = quantize(frozen["codec"], project(frozen["codec"], z, model.codes), model.buckets)
    text = select_text(jax.random.uniform(rng_drop, (len(z),)) >= drop_text, text, frozen[EMPTY])

    logits = model.apply(
        {"params": params}, codes, dot, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
    return -jnp.mean(log_prob), {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes)}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range."""
    settings.check_settings(config, SETTINGS, PRIOR_FIGURES)


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Its fit is the edges of the dot-product token's bins.

    Raises:
      ValueError: as `check`, or when the embeddings have fewer dimensions than there are codes.
    """
    check(config)
    clip, bins = clip_reader(config, mesh, frozen), config.model.dot_bins
    if config.model.codes > clip.embed_dim:
        raise InputError(
            f"{config.model.codes} codes need as many dimensions; CLIP's embeddings have {clip.embed_dim}"
        )
    model_config = config_json(config.model) | {"length": (clip.own_tokenizer or clip.tokenizer).length}
    part = {"kind": "prior_ar", "model": model_config, "frozen": hashes(frozen)}
    part["dot_edges"] = np.linspace(-1, 1, bins + 1)[1:-1].tolist()
    if clip.own_tokenizer is not None:
        own = clip.own_tokenizer
        model_config["text"] |= {"vocab_size": own.vocab_size, "length": own.length}
        part["tokenizer"] = own.config()
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = ARPrior(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        codes, dot = jnp.zeros((1, model.codes), jnp.int32), jnp.zeros(1, jnp.int32)
        return model.init(key, codes, dot, **text_inputs(model, clip.zeros))["params"], {}

    def measure(run) -> dict:
        batches = run.measuring_batches(config.statistics_batches)
        return {"dot_edges": dot_edges(clip, frozen["clip"].params, batches, bins).tolist()}

    def fitted(part):
        return np.asarray(part["dot_edges"], np.float32)

    example = functools.partial(
        clip_example, tokenizer=clip.tokenizer, text_tokenizer=clip.own_tokenizer, size=clip.image_size,
        crop_scale=config.data.crop_scale,
    )  # fmt: skip
    loss = functools.partial(loss_fn, model=model, clip=clip, drop_text=config.drop_text)
    fit = Fit(measure, fitted, ("dot_edges",))
    return Stage("prior_ar", model, part, init, example, without_extra(loss), fit=fit)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/prior_ar.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.

    Raises:
      ValueError: when the codec belongs to another CLIP, or has fewer dimensions than there are codes.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    prior = stage(config, mesh, networks)
    run = Run(config, workdir, prior, mesh, data, init_from)
    frozen = arrays(networks) | {FITTED: run.fit()}

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling, "prior_ar")
    clip = clip_reader(config, mesh, networks)

    @jax.jit
    def predict(params, frozen, batch, rng):
        texts = Texts(clip.captions(frozen["clip"], batch), frozen[EMPTY])
        z_hat = sample_prior(Network(prior.model, params, run.part), texts, rng, options, frozen["codec"])
        return z_hat, clip.images(frozen["clip"], batch), texts.captions.embed

    def evaluate(state) -> dict[str, float]:
        mean = np.asarray(networks["codec"].params.mean)
        return prior_figures(run, lambda batch, rng: predict(state.ema_params, frozen, batch, rng), mean)

    # -------------------------------------------------------------------------------- loop
    with run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run.state))
    return run.figures
