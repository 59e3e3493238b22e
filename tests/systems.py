"""A tiny bundle of random weights for every system of `SYSTEMS`, built without any training."""

import functools
import math
import tempfile
from pathlib import Path

import jax
import numpy as np

from tests.checkpoint import peer_dalle_mini
from tests.runs import ROOT
from tests.runs import random_bundle as make_random_bundle
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.check import part_tree
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.train import load_config
from unclip_jax.data.bart_tokenizer import BartTokenizer
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.run.resume import config_json

D, STATES = 16, 12  # sizes of CLIP's embeddings and of T5's states
STEPS = 2
VAE = {"latent_channels": 4, "channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "groups": 4}
VQVAE = {"channels": 8, "residual_channels": 4, "res_blocks": 1, "embed_dim": 4, "codes": 9}
PIXELSNAIL = {"codes": 9, "channels": 8, "kernel": 3, "blocks": 1, "res_blocks": 1, "res_channels": 6} | {
    "heads": 2, "text_dim": D
}  # fmt: skip
DVAE = {"channels": 8, "levels": 2, "level_blocks": 1, "codes": 9, "embed_dim": 4}
DALLE = {"width": 16, "layers": 2, "heads": 2, "length": 8, "vocab_size": 600, "codes": 9, "side": 4}
T5 = {"vocab_size": 16, "width": STATES, "layers": 1, "heads": 2, "head_dim": 8, "hidden": 16, "gated": True}
WHITENED = {"kind": "whitened", "mean": [0.1] * D, "std": [1.5] * D}


random_bundle = functools.cache(make_random_bundle)


def random_part(config, seed=0):
    """A part of this configuration with random weights, none of which is zero."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name == "kernel":
            noise *= math.prod(leaf.shape[:-1]) ** -0.5
        else:
            noise = (name == "scale") + 0.2 * noise
        return np.asarray(noise, np.float32)

    return Part(config, jax.tree_util.tree_map_with_path(fill, part_tree(config, D, STATES)))


def from_recipe(recipe, kind, seed=0, model=(), **more):
    """A random part of a tiny recipe, and its sampling options."""
    config = load_config(str(ROOT / "configs" / recipe))
    described = {"kind": kind, "model": config_json(config.model) | dict(model)}
    described["diffusion"] = config_json(config.diffusion)
    sampling = config_json(config.sampling) | {"steps": STEPS}
    return random_part(described | more, seed), sampling


def _hashed(parts, *names):
    return {name: params_hash(parts[name].params) for name in names}


# ------------------------------------------------------------------------------------------ the systems
def unclip():
    bundle = random_bundle()
    few = {name: o | ({"steps": STEPS} if "steps" in o else {}) for name, o in bundle.sampling.items()}
    return Bundle(bundle.parts, "unclip", few)


def _latents(kind="kl_autoencoder"):
    # CLIP and an autoencoder.
    more = {"codes": 9} if kind == "vq_autoencoder" else {}
    coder = random_part({"kind": kind, "model": VAE | more, "scale_factor": 0.5})
    return {"clip": random_bundle().parts["clip"], "autoencoder": coder}


def _with_prior(parts):
    # With unCLIP's prior and codec.
    made = random_bundle()
    options = made.sampling["prior_diffusion"] | {"steps": STEPS}
    return parts | {name: made.parts[name] for name in ("prior_diffusion", "codec")}, options


def latent(enlarges=False):
    parts = _latents()
    frozen = _hashed(parts, "clip", "autoencoder")
    model = {"in_channels": 7} if enlarges else {}
    parts["latent"], options = from_recipe("emoji/latent.py:tiny", "latent", model=model, frozen=frozen)
    return Bundle(parts, "latent", {"latent": options})


def stable_unclip():
    parts, prior = _with_prior(_latents())
    more = {"frozen": _hashed(parts, "clip", "autoencoder"), "embedding_space": WHITENED}
    more["augmentation"] = {"schedule": "cosine", "num_steps": 1000}
    model = {"vector_dim": 2 * D}
    parts["latent"], options = from_recipe("emoji/stable_unclip.py:tiny", "latent", model=model, **more)
    return Bundle(parts, "stable_unclip", {"latent": options, "prior_diffusion": prior})


def kandinsky():
    parts, prior = _with_prior(_latents("vq_autoencoder"))
    frozen = _hashed(parts, "clip", "autoencoder")
    recipe, model = "kandinsky/latent.py:tiny", {"embed_dim": D}
    parts["latent"], options = from_recipe(recipe, "kandinsky", model=model, frozen=frozen)
    return Bundle(parts, "kandinsky", {"latent": options, "prior_diffusion": prior})


def retrieval():
    parts = _latents()
    more = {"embedding_space": {"kind": "raw"}, "neighbours": 2}
    more["frozen"] = _hashed(parts, "clip", "autoencoder")
    parts["retrieval"], options = from_recipe("emoji/retrieval.py:tiny", "retrieval", **more)
    index = {"kind": "index", "embed_dim": D, "rows": 20, "embedding_space": {"kind": "raw"}}
    parts["index"] = random_part(index | {"checksum": "", "frozen": _hashed(parts, "clip")})
    return Bundle(parts, "retrieval", {"retrieval": options})


def glide():
    tokenizer, parts, sampling = ClipTokenizer(12, 8192), {}, {}
    for seed, (name, recipe, factor) in enumerate(
        [("glide", "glide.py:tiny", None), ("glide_16", "glide_256.py:tiny", 2)]
        + [("glide_inpaint", "glide.py:tiny-inpaint", None)]
    ):
        text = load_config(str(ROOT / "configs/glide" / recipe)).model.text.to_dict()
        text |= {"vocab_size": tokenizer.vocab_size, "length": tokenizer.length}
        model = {"text": text, "upsamples": factor is not None}
        more = {"tokenizer": tokenizer.config()} | ({} if factor is None else {"factor": factor})
        parts[name], sampling[name] = from_recipe(f"glide/{recipe}", "glide", seed, model, **more)
    return Bundle(parts, "glide", sampling)


def imagen():
    from tests.models.test_t5 import write_pieces

    with tempfile.TemporaryDirectory() as folder:
        write_pieces(Path(folder))
        tokenizer = T5Tokenizer.from_folder(Path(folder), 8)
    parts, sampling = {"t5": random_part({"kind": "t5", "model": T5, "tokenizer": tokenizer.config()})}, {}
    frozen = _hashed(parts, "t5")
    parts["imagen"], sampling["imagen"] = from_recipe("imagen/imagen.py:tiny", "imagen", 1, frozen=frozen)
    parts["imagen_16"], sampling["imagen_16"] = from_recipe(
        "imagen/upsampler.py:tiny", "imagen_upsampler", 2, frozen=frozen, factor=2
    )
    return Bundle(parts, "imagen", sampling)


def dalle():
    parts = {"dvae": random_part({"kind": "dvae", "model": DVAE})}
    config = {"kind": "dalle", "model": DALLE, "tokenizer": ClipTokenizer(8, 600).config()}
    parts["dalle"] = random_part(config | {"frozen": _hashed(parts, "dvae")})
    return Bundle(parts, "dalle", {"dalle": {"guidance_scale": 2.0}})


def dalle_mini():
    tokenizer = BartTokenizer(list(peer_dalle_mini.vocabulary()), peer_dalle_mini.MERGES, 8)
    model = {"width": 16, "layers": 1, "decoder_layers": 1, "heads": 2, "hidden": 24, "side": 4}
    model |= {"length": 8, "vocab_size": tokenizer.vocab_size, "codes": 9, "rows": 10}
    coder = {"kind": "vq_autoencoder", "model": VAE | {"codes": 9, "unit_range": True}, "scale_factor": 1.0}
    config = {"kind": "dalle_mini", "model": model, "tokenizer": tokenizer.config()}
    parts = {"dalle_mini": random_part(config), "autoencoder": random_part(coder)}
    return Bundle(parts, "dalle_mini", {"dalle_mini": {"guidance_scale": 2.0}})


def vqvae2():
    parts = {"clip": random_bundle().parts["clip"], "vqvae": random_part({"kind": "vqvae", "model": VQVAE})}
    frozen = _hashed(parts, "clip", "vqvae")
    for level, side in enumerate((4, 2)):
        model = PIXELSNAIL | {"side": side, "coarse_codes": None if level else 9, "attention": bool(level)}
        config = {"kind": "pixelsnail", "level": level, "model": model, "frozen": frozen}
        parts[f"pixelsnail_{level}"] = random_part(config, level)
    return Bundle(parts, "vqvae2", {f"pixelsnail_{level}": {"guidance_scale": 2.0} for level in range(2)})


def judge():
    clip = random_bundle().parts["clip"]
    return Bundle({"clip": Part(clip.config, jax.tree.map(np.negative, clip.params))})


BUNDLES = {
    each.__name__: each
    for each in (
        unclip,
        latent,
        retrieval,
        stable_unclip,
        imagen,
        glide,
        kandinsky,
        dalle,
        dalle_mini,
        vqvae2,
    )
}


def save_systems(folder):
    """Writes a bundle of each system into a folder of its name. The latent U-Net of `enlarging` enlarges, and
    `judge` has a CLIP of its own."""
    others = {"enlarging": lambda: latent(enlarges=True), "judge": judge}
    for name, make in (BUNDLES | others).items():
        save_bundle(make(), Path(folder) / name, np.float32)
