"""The autoregressive prior: codes of CLIP image embeddings from captions (unCLIP section 2.2).

Embeddings are projected on their principal components and quantised; a causal transformer sees the caption, its CLIP text embedding, the
quantised dot product z_i.z_t and the codes so far, and predicts the next code. Captions are dropped for classifier-free guidance.
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
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import (
    EMPTY,
    arrays,
    captions_of,
    clip_image_size,
    clip_tokenizer,
    hashes,
    images_of,
    load_frozen,
    text_tokenizer,
    zero_captions,
)  # fmt: skip
from unclip_jax.run.hosts import on_every_host
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import FITTED, Fit, Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import prior_figures

FROZEN = {"clip": "clip", "codec": "codec"}


# ---------------------------------------------------------------------------------------------- fit
def dot_edges(clip, mesh, keep_states, batches, bins: int) -> np.ndarray:
    """Edges (bins - 1,) that cut z_i.z_t of training batches into equally frequent bins."""

    @jax.jit
    def dots(params, batch):
        return cosine(
            images_of(clip, mesh, params, batch), captions_of(clip, mesh, keep_states, params, batch).embed
        )

    rows = [on_every_host(dots(clip.params, batch)) for batch in batches]
    return np.quantile(np.concatenate(rows), np.arange(1, bins) / bins)


# ---------------------------------------------------------------------------------------------- loss
def loss_fn(params, rng, batch, *, frozen, model, images_of, captions_of, drop_text):
    """Loss () in nats per code and metrics of a global batch; `images_of` and `captions_of` (params, batch) read it with the CLIP in
    `frozen`, which also holds the codec."""
    rng_drop, rng_dropout = jax.random.split(rng)
    z = images_of(frozen["clip"], batch)
    text = captions_of(frozen["clip"], batch)
    dot = dot_token(frozen[FITTED], z, text.embed)
    codes = quantize(frozen["codec"], project(frozen["codec"], z, model.codes), model.buckets)
    text = select_text(jax.random.uniform(rng_drop, (len(z),)) >= drop_text, text, frozen[EMPTY])

    logits = model.apply(
        {"params": params}, codes, dot, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
    return -jnp.mean(log_prob), {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes)}


# ---------------------------------------------------------------------------------------------- stage
def stage(config, mesh, frozen) -> Stage:
    """The stage as its configuration describes it, on the networks under it. Its fit is the edges of the dot-product token's bins.

    Raises:
      ValueError: when the embeddings have fewer dimensions than there are codes.
    """
    clip, own_tokenizer = frozen["clip"], text_tokenizer(config)
    dim, tokenizer = clip.config["model"]["embed_dim"], clip_tokenizer(clip)
    if config.model.codes > dim:
        raise InputError(f"{config.model.codes} codes need as many dimensions; CLIP's embeddings have {dim}")
    bins, keep_states = config.model.dot_bins, own_tokenizer is None
    model_config = config_json(config.model) | {"length": (own_tokenizer or tokenizer).length}
    part = {"kind": "prior_ar", "model": model_config, "frozen": hashes(frozen)}
    part["dot_edges"] = np.linspace(-1, 1, bins + 1)[1:-1].tolist()
    if own_tokenizer is not None:
        model_config["text"] |= {"vocab_size": own_tokenizer.vocab_size, "length": own_tokenizer.length}
        part["tokenizer"] = own_tokenizer.config()
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = ARPrior(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        codes, dot = jnp.zeros((1, model.codes), jnp.int32), jnp.zeros(1, jnp.int32)
        return model.init(key, codes, dot, **text_inputs(model, zero_captions(frozen)))["params"], {}

    def measure(run) -> dict:
        batches = run.measuring_batches(config.statistics_batches)
        return {"dot_edges": dot_edges(clip, mesh, keep_states, batches, bins).tolist()}

    return Stage(
        name="prior_ar",
        model=model,
        part=part,
        init=init,
        example=functools.partial(
            clip_example, tokenizer=tokenizer, text_tokenizer=own_tokenizer, size=clip_image_size(clip),
            crop_scale=config.data.crop_scale,
        ),
        objective=without_extra(functools.partial(
            loss_fn, model=model, images_of=functools.partial(images_of, clip, mesh),
            captions_of=functools.partial(captions_of, clip, mesh, keep_states), drop_text=config.drop_text,
        )),
        fit=Fit(measure, lambda part: np.asarray(part["dot_edges"], np.float32), ("dot_edges",)),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/prior_ar.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.

    Raises:
      ValueError: when the codec was fitted in another CLIP's space, or has fewer dimensions than there are codes.
    """
    # ------------------------------------------------------------------------------------------ mesh and data
    mesh, data = make_mesh(config.mesh), open_data(config)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    prior = stage(config, mesh, networks)
    run = Run(config, workdir, prior, mesh, data, init_from)
    frozen = arrays(networks) | {FITTED: run.fit()}

    # ------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling, "prior_ar")
    clip, keep_states = networks["clip"], prior.model.text is None

    @jax.jit
    def predict(params, frozen, batch, rng):
        texts = Texts(captions_of(clip, mesh, keep_states, frozen["clip"], batch), frozen[EMPTY])
        z_hat = sample_prior(Network(prior.model, params, run.part), texts, rng, options, frozen["codec"])
        return z_hat, images_of(clip, mesh, frozen["clip"], batch), texts.captions.embed

    def evaluate(state) -> dict[str, float]:
        mean = np.asarray(networks["codec"].params.mean)
        return prior_figures(run, lambda batch, rng: predict(state.ema_params, frozen, batch, rng), mean)

    # ------------------------------------------------------------------------------------------ loop
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
