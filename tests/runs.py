"""Tiny training runs and bundles for tests: the emoji recipes' `:tiny` variants, in this process."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import random_params
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.train import load_config, override
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.generate.networks import build_model
from unclip_jax.run import batches
from unclip_jax.train import (
    autoencoder,
    clip,
    codec,
    dalle,
    decoder,
    dvae,
    latent,
    pixelsnail,
    prior_ar,
    prior_diffusion,
    stable_unclip,
    upsampler,
    vqvae,
)

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "clip": (clip, "configs/emoji/clip.py:tiny"),
    "prior_diffusion": (prior_diffusion, "configs/emoji/prior_diffusion.py:tiny"),
    "prior_ar": (prior_ar, "configs/emoji/prior_ar.py:tiny"),
    "decoder": (decoder, "configs/emoji/decoder.py:tiny"),
    "upsampler_16": (upsampler, "configs/emoji/upsampler.py:tiny"),
    "autoencoder": (autoencoder, "configs/emoji/autoencoder.py:tiny-vq"),
    "latent": (latent, "configs/emoji/latent.py:tiny"),
    "vqvae": (vqvae, "configs/vqvae2/vqvae.py:tiny"),
    "dvae": (dvae, "configs/dalle/dvae.py:tiny"),
    "dalle": (dalle, "configs/dalle/dalle.py:tiny"),
    "pixelsnail_0": (pixelsnail, "configs/vqvae2/pixelsnail.py:tiny-bottom"),
}
CODEC = {"codec": (codec, "configs/emoji/codec.py:tiny")}  # fitted, not trained
# Stages that have tests of their own.
OTHERS = {"stable_unclip": (stable_unclip, "configs/emoji/stable_unclip.py:tiny")}
BESIDE = {
    "prior_diffusion": ("clip",),
    "decoder": ("clip",),
    "codec": ("clip",),
    "prior_ar": ("clip", "codec"),
    "latent": ("clip", "autoencoder"),
    "pixelsnail_0": ("clip", "vqvae"),
    "dalle": ("dvae",),
}  # runs that a stage starts from
STEPS = 12
SMALL = {
    "model__unet__channel_mult": (1,)
}  # changes: a U-Net of one level, where the run is watched and not what it learns


def tiny_config(name, **changes):
    """The stage's tiny configuration, long enough to see a loss fall; `changes` use __ for dots."""
    config = load_config(str(ROOT / (STAGES | CODEC | OTHERS)[name][1]))
    settings = (
        {"data.backend": "numpy"}
        if name in CODEC
        else {
            "steps": STEPS,
            "eval_every": STEPS,
            "checkpoint_every": STEPS,
            "data.backend": "numpy",
            "optimizer.eps": 1e-6,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup_steps": 2,
        }
    )
    for key, value in {**settings, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        override(config, key, value)
    return config


def train_tiny(name, workdir, init_from=None, **changes):
    """Trains the stage in `workdir`. By default it starts from the runs beside that folder."""
    module, _ = (STAGES | CODEC | OTHERS)[name]
    return module.train_and_evaluate(tiny_config(name, **changes), str(workdir), init_from)


def random_bundle():
    """A bundle of all parts of the tiny recipes, with random parameters and an orthogonal codec."""
    rng = np.random.default_rng(0)
    files = {name: name for name in ("clip", "prior_diffusion", "prior_ar", "decoder")} | {
        "upsampler_16": "upsampler"
    }
    configs = {name: load_config(str(ROOT / f"configs/emoji/{file}.py:tiny")) for name, file in files.items()}
    tokenizer = ClipTokenizer(**configs["clip"].tokenizer)
    dim, width, length = configs["clip"].model.embed_dim, configs["clip"].model.text.width, tokenizer.length
    plain = lambda value: json.loads(value.to_json_best_effort())
    draw = lambda x: np.float32(
        rng.normal(size=x.shape) * (np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 1.0)
    )

    def part(name, config, *args, **kwargs):
        config = {"model": plain(configs[name].model)} | config
        init = build_model(config).init
        shapes = jax.eval_shape(lambda key: init(key, *args, **kwargs), jax.random.key(0))["params"]
        return Part(config, jax.tree.map(draw, shapes))

    # ---------------------------------------------------------------------------------------- trained parts
    model = plain(configs["clip"].model)
    model["text"] |= {"vocab_size": tokenizer.vocab_size, "length": length}
    clip_config = {"kind": "clip", "model": model, "tokenizer": tokenizer.config()}
    parts = {"clip": part("clip", clip_config, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, length), int))}
    frozen = {"clip": params_hash(parts["clip"].params)}
    codes = configs["prior_ar"].model.codes
    text = {"text_embed": jnp.zeros((1, dim)), "text_states": jnp.zeros((1, length, width))}
    text["text_mask"] = jnp.ones((1, length), bool)
    prior = {
        "kind": "prior_diffusion",
        "model": plain(configs["prior_diffusion"].model) | {"length": length, "embed_dim": dim},
        "diffusion": plain(configs["prior_diffusion"].diffusion),
        "embedding_space": {"kind": "whitened", "mean": [0.1] * dim, "std": [1.5] * dim},
        "frozen": frozen,
    }
    parts["prior_diffusion"] = part("prior_diffusion", prior, jnp.zeros((1, dim)), jnp.zeros(1), **text)
    prior_ar = {
        "kind": "prior_ar",
        "model": plain(configs["prior_ar"].model) | {"length": length},
        "dot_edges": [-0.2, 0.0, 0.2],
        "frozen": frozen,
    }
    parts["prior_ar"] = part("prior_ar", prior_ar, jnp.zeros((1, codes), int), jnp.zeros(1, int), **text)
    decoder = {"kind": "decoder", "diffusion": plain(configs["decoder"].diffusion), "frozen": frozen}
    images = {"image_embed": text["text_embed"], "drop_image": jnp.zeros(1, bool)}
    parts["decoder"] = part("decoder", decoder, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), **images, **text)
    upsampler_config = configs["upsampler_16"]
    upsampler = {
        "kind": "upsampler",
        "diffusion": plain(upsampler_config.diffusion),
        "factor": upsampler_config.factor,
    }
    low_res = jnp.zeros((1, 8, 8, 3))
    parts["upsampler_16"] = part(
        "upsampler_16", upsampler, jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), low_res=low_res
    )

    # ---------------------------------------------------------------------------------------- inpainting
    # The same decoder with four more input channels.
    conv = parts["decoder"].params["unet"]["conv_in"]
    more = np.float32(rng.normal(size=(3, 3, 4, conv["kernel"].shape[3])) * 36**-0.5)
    unet = parts["decoder"].params["unet"] | {
        "conv_in": conv | {"kernel": np.concatenate([conv["kernel"], more], axis=2)}
    }
    config = parts["decoder"].config | {"model": parts["decoder"].config["model"] | {"inpaint": True}}
    parts["decoder_inpaint"] = Part(config, parts["decoder"].params | {"unet": unet})

    # ---------------------------------------------------------------------------------------- codec
    values = {
        "mean": rng.normal(size=dim),
        "components": np.linalg.qr(rng.normal(size=(dim, dim)))[0],
        "eigenvalues": np.sort(rng.uniform(0.1, 2.0, dim))[::-1],
        "low": rng.uniform(-3.0, -1.0, dim),
        "high": rng.uniform(1.0, 3.0, dim),
    }
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    parts["codec"] = Part({"kind": "codec", "embed_dim": dim, "dims": codes, "frozen": frozen}, values)
    parts["prior_ar"].config["frozen"] = frozen | {"codec": params_hash(values)}
    sampling = {name: plain(config.sampling) for name, config in configs.items() if name != "clip"}
    sampling["decoder_inpaint"] = sampling["decoder"]
    return Bundle(parts, sampling=sampling, provenance={"note": "random"})


def without_image_tower(bundle):
    """The CLIP and the diffusion prior of a bundle, without CLIP's image tower, as in Karlo."""
    clip, prior = (bundle.parts[name] for name in ("clip", "prior_diffusion"))
    config = clip.config | {"model": clip.config["model"] | {"image": None}}
    text = Part(config, {"text_tower": clip.params["text_tower"]})
    prior = Part(prior.config | {"frozen": {"clip": params_hash(text.params)}}, prior.params)
    sampling = {"prior_diffusion": bundle.sampling["prior_diffusion"]}
    return Bundle({"clip": text, "prior_diffusion": prior}, sampling=sampling)


def random_autoencoder(kind, folder, latents=3):
    """The folder of a bundle with a tiny autoencoder of random weights; latents are half as wide."""
    model = {"latent_channels": latents, "channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "groups": 4}
    model |= {"codes": 9} if kind == "vq_autoencoder" else {}
    config = {"kind": kind, "model": model, "scale_factor": 0.5}
    params = random_params(build_model(config), np.zeros((1, 8, 8, 3), np.float32))
    return save_bundle(Bundle({"autoencoder": Part(config, params)}), folder)


def losses(workdir):
    """The loss of every step, from metrics.jsonl."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


class Signalling:
    """Training batches that send this process SIGTERM when it takes the `at`-th batch."""

    def __init__(self, inner, at):
        self.inner, self.at, self.count, self.stats = inner, at, 0, inner.stats

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.inner)

    def close(self):
        self.inner.close()


class Repeating:
    """Repeats the first training batch."""

    def __init__(self, inner):
        self.inner, self.first, self.stats = inner, None, inner.stats

    def __next__(self):
        if self.first is None:
            self.first = next(self.inner)
        return self.first

    def close(self):
        self.inner.close()


def wrap_batches(monkeypatch, wrapper):
    """Makes every stage's training batches go through `wrapper`."""
    original = batches.train_batches

    def wrapped(config, source, example, mesh, start, stop):
        made = original(config, source, example, mesh, start, stop)
        return (
            wrapper(made) if stop == config.steps else made
        )  # what a stage measures on its data is left alone

    monkeypatch.setattr(batches, "train_batches", wrapped)
