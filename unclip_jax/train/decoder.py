"""The decoder: images from CLIP image embeddings and captions (unCLIP section 2.1).

A GLIDE U-Net predicts the noise and its variance. For classifier-free guidance a learned null embedding
replaces the CLIP embedding, and the empty caption replaces the caption, independently. With `model.inpaint`
the decoder learns to fill the unknown part of an image (GLIDE, on inpainting): regions are erased at random,
and four more input channels hold what is left. Their weights start at zero when an ordinary decoder is
fine-tuned.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unclip_jax.checkpoint.load import load_part
from unclip_jax.data.examples import decoder_example
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, target_of, training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import Known, sample_decoder
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import Texts, select_text, text_inputs
from unclip_jax.models.decoder import Decoder
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import EMPTY, arrays, clip_reader, hashes, load_frozen, text_tokenizer
from unclip_jax.run.loop import Run
from unclip_jax.run.lora import adapted, whole, write_adapters
from unclip_jax.run.resume import config_json, load_widened
from unclip_jax.run.stage import Stage, without_extra, without_gradient
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, image_figures, sample_grid, with_image_figures

FROZEN: dict[str, str] = {"clip": "clip"}
SETTINGS = (
    settings.TRAINED
    | settings.ADAPTERS
    | {
        "frozen": settings.frozen(FROZEN),
        "text_tokenizer": settings.maybe(settings.TOKENIZER),
        "data": settings.CROPPED | {"eval": settings.absent(settings.SOURCE)},
        "model": {
            "inpaint": settings.FLAG,
            "text": settings.OWN_TEXT,
            "unet": settings.UNET,
            "conditioning": {
                "context_dim": settings.whole("[1, inf)"),
                "clip_tokens": settings.whole("[1, inf)"),
                "use_text_embed": settings.FLAG,
                "use_text_states": settings.FLAG,
            },
        },
        "diffusion": settings.IMAGE_DIFFUSION,
        "freeze_text": settings.FLAG,
        "drop_embedding": settings.number("[0, 1]"),
        "drop_text": settings.number("[0, 1]"),
        "sampling": settings.SAMPLING["decoder"],
        "eval": settings.DRAWN,
    }
)
FIGURES = ("eval_loss",)


# ------------------------------------------------------------------------------------ loss
def loss_fn(params, rng, batch, *, frozen, model, tables, diffusion, clip, drop_embedding, drop_text):
    """Loss () and metrics of a global batch, read by `clip` with the parameters in `frozen`."""
    rng_embedding, rng_text, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0 = batch["image"]
    text = clip.captions(frozen["clip"], batch)
    text = select_text(jax.random.uniform(rng_text, (len(x0),)) >= drop_text, text, frozen[EMPTY])
    drop_image = jax.random.uniform(rng_embedding, (len(x0),)) < drop_embedding
    conditioning = {"image_embed": clip.images(frozen["clip"], batch), "drop_image": drop_image}
    if model.inpaint:
        conditioning |= {"known_image": x0, "known": batch["known"]}

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, **conditioning, **text_inputs(model, text),
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    if model.inpaint:  # sampling puts the known part into the answer, so nothing is learned there
        out = jnp.where(batch["known"], target_of(x0, eps, t, tables, diffusion["prediction"]), out)
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together.

    `freeze_text` keeps a text encoder that must be there, and that weight decay must not shrink.
    """
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    if config.freeze_text and (text_tokenizer(config) is None or config.optimizer.weight_decay):
        raise InputError("freeze_text keeps the decoder's text encoder: it needs one, and no weight decay")
    text, conditioning = config.model.text, config.model.conditioning
    if text is not None and text.width != conditioning.context_dim:
        raise InputError(
            f"model.text.width={text.width} must be model.conditioning.context_dim={conditioning.context_dim}"
        )
    if text is not None and conditioning.use_text_states:
        raise InputError("model.conditioning.use_text_states is CLIP's, and model.text replaces CLIP's")


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    clip, size = clip_reader(config, mesh, frozen), config.model.unet.image_size
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    part = {"kind": "decoder", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    if clip.own_tokenizer is not None:
        own = clip.own_tokenizer
        model_config["text"] |= {"vocab_size": own.vocab_size, "length": own.length}
        part["tokenizer"] = own.config()
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = Decoder(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)
    tables = training_tables(schedule_of(diffusion))

    def init(key):
        x = jnp.zeros((1, size, size, 3))
        inputs = {"image_embed": clip.zeros.embed, "drop_image": jnp.zeros(1, bool)}
        if model.inpaint:
            inputs |= {"known_image": x, "known": x[..., :1] == 0}
        return model.init(key, x, jnp.zeros(1), **inputs, **text_inputs(model, clip.zeros))["params"], {}

    example = functools.partial(
        decoder_example, tokenizer=clip.tokenizer, text_tokenizer=clip.own_tokenizer, size=size,
        clip_size=clip.image_size, crop_scale=config.data.crop_scale, inpaint=model.inpaint,
    )  # fmt: skip
    loss = functools.partial(
        loss_fn, model=model, tables=tables, diffusion=diffusion,
        clip=clip, drop_embedding=config.drop_embedding, drop_text=config.drop_text,
    )  # fmt: skip
    objective = without_extra(without_gradient(loss, "text") if config.freeze_text else loss)
    return Stage("decoder_inpaint" if model.inpaint else "decoder", model, part, init, example, objective)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/decoder.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)
    clip = clip_reader(config, mesh, networks)

    load = load_widened if trained.model.inpaint else load_part
    trained, frozen, init_from = adapted(trained, config, mesh, frozen, init_from, load)

    # -------------------------------------------------------------------------------- evaluators
    options = options_from(config.sampling)
    loss_of_held_out = held_out_loss(trained, config, mesh, data)
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def draw(params, frozen, batch, rng):
        network = Network(trained.model, whole(params, frozen), trained.part)
        texts = Texts(clip.captions(frozen["clip"], batch), frozen[EMPTY])
        z_image = clip.images(frozen["clip"], batch)
        known = Known(batch["image"], batch["known"]) if trained.model.inpaint else None
        return sample_decoder(network, z_image, texts, rng, options, known=known)

    def evaluate(run, step) -> dict[str, float]:
        sample = functools.partial(draw, run.state.ema_params, frozen)
        sample_grid(run, step, sample)
        return {"eval_loss": loss_of_held_out(run.state, frozen)} | images_against_held_out(sample, step)

    # -------------------------------------------------------------------------------- loop
    with Run(config, workdir, trained, mesh, data, init_from, load) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    write_adapters(run, workdir)
    return run.figures
