"""DALL-E's transformer over the tokens of captions and the codes of images (Ramesh et al. 2021, section 2.2).

The frozen discrete VAE makes the codes of an image: the most probable ones. The transformer predicts each
token from those before it.

    loss    1/8 of the mean cross-entropy of the text tokens, and 7/8 of that of the codes, in nats. Padding
            tokens are text tokens, too: each has a position of its own.

The tokenizer leaves out one merge in ten (`data.bpe_dropout`), so that a word is read in several ways.

Training may drop captions for classifier-free guidance, which the paper does not use.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.data.examples import token_example
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.tokens import sample_tokens
from unclip_jax.models.dalle import DALLE
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, check_codes, codes_of, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, gather_rest, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN = {"dvae": "dvae"}
TEXT_SHARE = 1 / 8  # of the loss
SETTINGS = settings.TRAINED | {
    "frozen": settings.frozen(FROZEN),
    "data": settings.CROPPED | {"eval": settings.absent(settings.SOURCE)},
    "image_size": settings.whole("[1, inf)"),
    "tokenizer": settings.TOKENIZER,
    "model": settings.TRANSFORMER
    | {
        "window": settings.whole("[1, inf)"),
        "mlp_ratio": settings.absent(settings.number("(0, inf)")),
        "dropout": settings.number("[0, 1)"),
    },
    "drop_text": settings.number("[0, 1]"),
    "bpe_dropout": settings.number("[0, 1]"),
    "sampling": settings.SAMPLING["dalle"],
    "eval": settings.DRAWN,
}
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, encode, empty, drop_text):
    """Loss () and metrics of a global batch, whose images the discrete VAE in `frozen` encodes.

    `empty` holds `tokens` and `token_mask` (1, L) of the empty caption.
    """
    rng_text, rng_dropout = jax.random.split(rng)
    codes = encode(frozen["dvae"], batch)
    keep = jax.random.uniform(rng_text, (len(codes), 1)) >= drop_text
    tokens, mask = (jnp.where(keep, batch[name], empty[name]) for name in ("tokens", "token_mask"))
    words, image = model.apply(
        {"params": params}, tokens, mask, codes, deterministic=False, rngs={"dropout": rng_dropout}
    )
    ids = model.apply({"params": params}, tokens, mask, method="text_ids")
    nats = lambda logits, ids: (
        -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1))
    )
    of_text, of_image = nats(words, ids), nats(image, codes)
    accuracy = jnp.mean(jnp.argmax(image, axis=-1) == codes)
    loss = TEXT_SHARE * of_text + (1.0 - TEXT_SHARE) * of_image
    return loss, {"text": of_text, "image": of_image, "accuracy": accuracy}


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    if config.model.window % 2 == 0:
        raise InputError(f"model.window={config.model.window} must be odd")
    if config.sampling.get("candidates", 1) != 1:
        raise InputError("a run has no CLIP that ranks candidates: set sampling.candidates=1")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`, or where the discrete VAE
    takes no images of this size."""
    check(config)
    dvae, size, tokenizer = frozen["dvae"], config.image_size, ClipTokenizer(**config.tokenizer)
    if size % dvae.module.factor:
        raise InputError(f"image_size={size} must be a multiple of {dvae.module.factor}, a code's pixels")
    model_config = config_json(config.model) | {
        "length": tokenizer.length,
        "vocab_size": tokenizer.vocab_size,
        "codes": dvae.module.codes,
        "side": size // dvae.module.factor,
    }
    part = {"kind": "dalle", "model": model_config, "tokenizer": tokenizer.config(), "frozen": hashes(frozen)}
    hooks = {"remat": config.remat, "gather": make_gather(mesh)}
    model = DALLE(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        zeros = jnp.zeros((1, model.length), jnp.int32)
        return model.init(key, zeros, zeros > 0, jnp.zeros((1, model.side**2), jnp.int32))["params"], {}

    def encode(params, batch):
        network = dvae.with_params(gather_rest(params, mesh))
        return codes_of(network, batch, size)[0].reshape(-1, model.side**2)

    example = functools.partial(
        token_example, tokenizer=tokenizer, size=size, crop_scale=config.data.crop_scale,
        bpe_dropout=config.bpe_dropout,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, encode=encode, empty=empty_caption(tokenizer), drop_text=config.drop_text
    )
    return Stage("dalle", model, part, init, example, without_extra(loss))


def empty_caption(tokenizer: ClipTokenizer) -> dict:
    """`tokens` and `token_mask` (1, L) of the empty caption."""
    return dict(zip(("tokens", "token_mask"), tokenizer([""]), strict=True))


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/dalle/dalle.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, None)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)
    check_codes(networks["dvae"], data, config.image_size, config.data.crop_scale)

    # -------------------------------------------------------------------------------- evaluators
    options, empty = options_from(config.sampling, "dalle"), empty_caption(ClipTokenizer(**config.tokenizer))
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, params, trained.part)
        keys = jax.random.split(rng, len(batch["tokens"]))
        codes, _ = sample_tokens(network, batch, empty, keys, options)
        return networks["dvae"].with_params(frozen["dvae"]).apply(codes, method="decode_codes")

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
