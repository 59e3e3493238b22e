"""The decoder: images from CLIP image embeddings and captions (unCLIP section 2.1).

A GLIDE U-Net predicts the noise and its variance. The CLIP embedding is replaced by a learned null embedding, and the caption by the
empty one, independently, for classifier-free guidance. With `model.inpaint` it is trained to fill the unknown part of an image (GLIDE, on
inpainting): regions are erased at random, and what is left comes in through four more channels, whose weights start at zero when an
ordinary decoder is fine-tuned.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.checkpoint.load import load_part
from unclip_jax.data import ops
from unclip_jax.data.examples import choose_caption
from unclip_jax.data.tokenizer import caption_arrays
from unclip_jax.diffusion.losses import hybrid_loss, sample_noised, split_variance, target_of, training_tables
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import Known, sample_decoder
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import options_from
from unclip_jax.generate.text import Texts, select_text, text_inputs
from unclip_jax.models.decoder import Decoder
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
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Stage, without_extra
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.figures import held_out_loss, sample_grid

FROZEN = {"clip": "clip"}


# ---------------------------------------------------------------------------------------------- example
def make_example(
    record,
    rng,
    *,
    tokenizer,
    size,
    clip_size,
    crop_scale=1.0,
    training=True,
    text_tokenizer=None,
    inpaint=False,
) -> dict[str, np.ndarray]:
    """One row: `image` (size, size, 3) and `clip_image` (clip_size, clip_size, 3) of the same crop, in [-1, 1]; `clip_tokens` and
    `clip_token_mask` (L,) of one of its captions; with a tokenizer of the decoder's own text encoder `tokens` and `token_mask` (L',);
    to inpaint, `known` (size, size, 1) bool. Not in training: the centre, and the first caption."""
    image = ops.decode_image(record.image)
    if training:
        image = ops.random_crop(image, int(round(min(image.shape[:2]) * rng.uniform(crop_scale, 1.0))), rng)
        caption = record.captions[choose_caption(record, rng)]
    else:
        image = ops.center_crop_square(image)
        caption = record.captions[0]
    return {
        "image": ops.to_float(ops.resize(image, size)),
        "clip_image": ops.to_float(ops.resize(image, clip_size)),
        **{k: v[0] for k, v in caption_arrays([caption], tokenizer, text_tokenizer).items()},
        **({"known": ops.random_mask(size, rng)} if inpaint else {}),
    }


def load_widened(path, name) -> tuple[Part, dict]:
    """`load_part`; where there is no decoder that inpaints, the ordinary one with weights of zero for the channels of what is known."""
    try:
        return load_part(path, name)
    except KeyError:
        part, meta = load_part(path, "decoder")
    conv = part.params["unet"]["conv_in"]
    kernel = np.pad(conv["kernel"], ((0, 0), (0, 0), (0, 4), (0, 0)))
    return Part(
        part.config, part.params | {"unet": part.params["unet"] | {"conv_in": conv | {"kernel": kernel}}}
    ), meta


# ---------------------------------------------------------------------------------------------- loss
def loss_fn(
    params,
    rng,
    batch,
    *,
    frozen,
    model,
    images_of,
    captions_of,
    tables,
    diffusion,
    drop_embedding,
    drop_text,
    freeze_text,
):
    """Loss () and metrics of a global batch; `images_of` and `captions_of` (params, batch) read it with the CLIP in `frozen`."""
    if freeze_text:
        params = params | {"text": jax.lax.stop_gradient(params["text"])}
    rng_embedding, rng_text, rng_noise, rng_dropout = jax.random.split(rng, 4)
    x0 = batch["image"]
    z_image = images_of(frozen["clip"], batch)
    text = captions_of(frozen["clip"], batch)
    text = select_text(jax.random.uniform(rng_text, (len(x0),)) >= drop_text, text, frozen[EMPTY])
    drop_image = jax.random.uniform(rng_embedding, (len(x0),)) < drop_embedding
    known = {"known_image": x0, "known": batch["known"]} if model.inpaint else {}

    t, eps, x_t = sample_noised(rng_noise, x0, tables)
    out = model.apply(
        {"params": params}, x_t, t, image_embed=z_image, drop_image=drop_image, **text_inputs(model, text), **known,
        deterministic=False, rngs={"dropout": rng_dropout},
    )  # fmt: skip
    out, v_frac = split_variance(out, x0.shape[-1])
    if model.inpaint:  # as in sampling, what is known is put into the answer: nothing is learned for it
        out = jnp.where(batch["known"], target_of(x0, eps, t, tables, diffusion["prediction"]), out)
    return hybrid_loss(out, v_frac, x0, eps, x_t, t, tables, diffusion)


# ---------------------------------------------------------------------------------------------- stage
def stage(config, mesh, frozen) -> Stage:
    """The stage as its configuration describes it, on the networks under it.

    Raises:
      ValueError: when `freeze_text` is set and there is no text encoder, or weight decay would shrink it.
    """
    clip, own_tokenizer, size = frozen["clip"], text_tokenizer(config), config.model.unet.image_size
    if config.freeze_text and (own_tokenizer is None or config.optimizer.weight_decay):
        raise InputError(
            "freeze_text keeps the decoder's own text encoder: it needs one, and no weight decay, which would shrink it"
        )
    model_config, diffusion = config_json(config.model), config_json(config.diffusion)
    part = {"kind": "decoder", "model": model_config, "diffusion": diffusion, "frozen": hashes(frozen)}
    if own_tokenizer is not None:
        model_config["text"] |= {"vocab_size": own_tokenizer.vocab_size, "length": own_tokenizer.length}
        part["tokenizer"] = own_tokenizer.config()
    hooks = {"remat": config.remat, "scan": config.scan_layers, "gather": make_gather(mesh)}
    model = Decoder(**model_config, dtype=compute_dtype(config.dtype, mesh), **hooks)

    def init(key):
        text, x = zero_captions(frozen), jnp.zeros((1, size, size, 3))
        known = {"known_image": x, "known": x[..., :1] == 0} if model.inpaint else {}
        drop = jnp.zeros(1, bool)
        inputs = {"image_embed": text.embed, "drop_image": drop, **text_inputs(model, text), **known}
        return model.init(key, x, jnp.zeros(1), **inputs)["params"], {}

    return Stage(
        name="decoder_inpaint" if model.inpaint else "decoder",
        model=model,
        part=part,
        init=init,
        example=functools.partial(
            make_example, tokenizer=clip_tokenizer(clip), text_tokenizer=own_tokenizer, size=size,
            clip_size=clip_image_size(clip), crop_scale=config.data.crop_scale, inpaint=model.inpaint,
        ),
        objective=without_extra(functools.partial(
            loss_fn, model=model, images_of=functools.partial(images_of, clip, mesh),
            captions_of=functools.partial(captions_of, clip, mesh, own_tokenizer is None),
            tables=training_tables(make_schedule(diffusion["schedule"], diffusion["num_steps"])), diffusion=diffusion,
            drop_embedding=config.drop_embedding, drop_text=config.drop_text, freeze_text=config.freeze_text,
        )),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains (or goes on training) in `workdir` and returns the last evaluation's figures.

    Args:
      config: see `configs/emoji/decoder.py`.
      workdir: the run's folder; a run found there is resumed.
      init_from: a bundle or run whose weights a new run starts from.
    """
    # ------------------------------------------------------------------------------------------ mesh and data
    mesh, data = make_mesh(config.mesh), open_data(config)
    networks = load_frozen(config, workdir, mesh, FROZEN, data)
    frozen = arrays(networks)
    decoder = stage(config, mesh, networks)

    # ------------------------------------------------------------------------------------------ evaluators
    options = options_from(config.sampling)
    clip, keep_states = networks["clip"], decoder.model.text is None

    @jax.jit
    def draw(params, frozen, batch, rng):
        texts = Texts(captions_of(clip, mesh, keep_states, frozen["clip"], batch), frozen[EMPTY])
        z_image = images_of(clip, mesh, frozen["clip"], batch)
        known = Known(batch["image"], batch["known"]) if decoder.model.inpaint else None
        return sample_decoder(
            Network(decoder.model, params, decoder.part), z_image, texts, rng, options, known=known
        )

    loss_of_held_out = held_out_loss(decoder, config, mesh, data)

    def evaluate(run, step) -> dict[str, float]:
        sample_grid(run, step, lambda batch, rng: draw(run.state.ema_params, frozen, batch, rng))
        return {"eval_loss": loss_of_held_out(run.state, frozen)}

    # ------------------------------------------------------------------------------------------ loop
    load = load_widened if decoder.model.inpaint else load_part
    with Run(config, workdir, decoder, mesh, data, init_from, load) as run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step)
            if run.evaluates(step):
                run.record(step, evaluate(run, step))
    return run.figures
