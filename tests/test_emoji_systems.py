"""The emoji recipes of the other systems: sizes that compare with unCLIP's, and runs, bundles and samples."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import param_count, param_shapes, randomize, struct
from tests.runs import losses
from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.check import latent_shapes, part_tree
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.shapes import glide_shapes, imagen_shapes
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.compile.abstract import abstract_frozen
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.dvae import DVAE
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.models.vqvae import VQVAE
from unclip_jax.run.resume import config_json
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.sharding import make_mesh
from unclip_jax.train import STAGES, dalle, dvae, glide, imagen, pixelsnail, vqvae

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ONE_LEVEL = {"model.unet.channel_mult": (1,)}
RUNS = {
    "glide": {
        "glide": ("glide.py:tiny", ONE_LEVEL | {"model.unet.attention_resolutions": (8,)}),
        "glide_16": ("glide.py:tiny-upsampler", ONE_LEVEL),
    },
    "imagen": {
        "imagen": ("imagen.py:tiny", ONE_LEVEL | {"model.unet.attention_resolutions": (8,)}),
        "imagen_16": ("imagen.py:tiny-upsampler", {}),
    },
}


def recipe(name):
    return load_config(f"{CONFIGS}/{name}")


def unclip_sizes():
    """Parameters of unCLIP's decoder and upsampler."""
    dim, words = 128, struct(1, 24, 128)
    given = {"image_embed": struct(1, dim), "drop_image": struct(1, dtype=bool), "text_embed": struct(1, dim)}
    given |= {"text_states": words, "text_mask": struct(1, 24, dtype=bool)}
    image, model = struct(1, 8, 8, 3), config_json(recipe("emoji/decoder.py").model)
    decoder = param_shapes(Decoder(**model), image, struct(1), **given)
    model = config_json(recipe("emoji/upsampler.py").model)
    upsampler = param_shapes(Upsampler(**model), image, struct(1), low_res=struct(1, 4, 4, 3))
    return param_count(decoder), param_count(upsampler)


def size_of(name):
    """Parameters of GLIDE's or Imagen's network, from its recipe, which is checked and states them."""
    config, file = recipe(f"emoji/{name}"), CONFIGS / "emoji" / name.split(":")[0]
    STAGES[config.stage].check(config)
    model, upsamples = config_json(config.model), config.factor is not None
    if config.stage == "imagen":
        count = param_count(imagen_shapes(model, 128, upsamples))
    else:
        model["text"] |= {key: config.text_tokenizer[key] for key in ("vocab_size", "length")}
        count = param_count(glide_shapes(model | {"upsamples": upsamples}))
    assert f"{count:,}" in file.read_text()
    return count


def coded_sizes():
    """Parameters of DALL-E and VQ-VAE-2: the networks of codes, and those that predict them."""
    clip, mesh = recipe("emoji/clip.py"), make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def count(module, config, **given):
        frozen = abstract_frozen(config, clip, mesh) | given
        return param_count(jax.eval_shape(module.stage(config, mesh, frozen).init, jax.random.key(0))[0])

    config = recipe("dalle/dvae.py:emoji")
    coder = Network(DVAE(**config.model), {}, {"kind": "dvae"})
    yield "dalle", count(dvae, config) + count(dalle, recipe("dalle/dalle.py:emoji"), dvae=coder)
    config = recipe("vqvae2/vqvae.py:emoji")
    coder = Network(VQVAE(**config.model), {}, {"kind": "vqvae"})
    priors = (recipe(f"vqvae2/pixelsnail.py:emoji-{level}") for level in ("top", "bottom"))
    yield "vqvae2", count(vqvae, config) + sum(count(pixelsnail, prior, vqvae=coder) for prior in priors)


def latent_sizes():
    """Parameters of latent and retrieval-augmented diffusion: the U-Net and the autoencoder."""
    model = config_json(recipe("emoji/autoencoder.py").model)
    coder = part_tree({"kind": "kl_autoencoder", "model": model}, 1, 1)
    for name in ("latent", "retrieval"):
        config = recipe(f"emoji/{name}.py:small")
        STAGES[name].check(config)
        yield name, param_count(latent_shapes(config_json(config.model))) + param_count(coder)


def test_equal_sizes():
    """Every system has unCLIP's decoder's parameters within a fifth, and every upsampler its upsampler's."""
    decoder, upsampler = unclip_sizes()
    sizes = {name: size_of(f"{name}.py") for name in RUNS} | dict(coded_sizes()) | dict(latent_sizes())
    assert all(0.8 < size / decoder < 1.2 for size in sizes.values()), (decoder, sizes)
    guide = (CONFIGS.parent / "docs" / "family.md").read_text("utf-8")
    assert not [name for name, size in {"unclip": decoder, **sizes}.items() if f"| {size:,} |" not in guide]
    sizes = {name: size_of(f"{name}.py:upsampler") for name in RUNS}
    assert all(0.8 < size / upsampler < 1.2 for size in sizes.values()), (upsampler, sizes)


@pytest.mark.parametrize("name", ["glide.py:tiny", "glide.py:tiny-upsampler", "imagen.py:tiny-upsampler"])
def test_tiny_recipes_describe_networks(name):
    STAGES[name.split(".")[0]].check(recipe(f"emoji/{name}"))


@pytest.mark.parametrize("settings", [{"frozen.clip": None}, {"frozen.t5": "../t5"}])
def test_one_network_reads_the_captions(settings):
    config = recipe("emoji/imagen.py:tiny")
    imagen.check(config)
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match="set one of frozen.t5 and frozen.clip"):
        imagen.check(config)


@pytest.mark.slow
@pytest.mark.parametrize("system", RUNS)
def test_runs_make_a_bundle(system, tiny_run, tmp_path):
    """The losses fall; the runs make a bundle that draws; pictures depend on the caption in each row."""
    runs = tmp_path / "runs"
    runs.mkdir()
    if system == "imagen":
        (runs / "clip").symlink_to(tiny_run("clip"))
    for run, (name, changes) in RUNS[system].items():
        config = recipe(f"emoji/{name}")
        steps = 12 if run == system else 2
        rates = {"optimizer.learning_rate": 3e-3, "optimizer.eps": 1e-6, "data.backend": "numpy"}
        lengths = {"steps": steps, "eval_every": steps, "checkpoint_every": steps}
        for key, value in (rates | lengths | changes).items():
            override(config, key, value)
        {"glide": glide, "imagen": imagen}[system].train_and_evaluate(config, str(runs / run))
    curve = losses(runs / system)
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])
    out = tmp_path / "bundle"
    assert main(["bundle", str(runs), "--out", str(out), "--rows", "0"]) == 0
    drawn = ["sample", "a red fox", "a blue heart", "--bundle", str(out), "--guidance", "2"]
    assert main([*drawn, "--out", str(tmp_path / "fox.png")]) == 0
    bundle = load_bundle(out)
    assert bundle.system == system and ("clip" in bundle.parts) == (system == "imagen")
    parts = {
        name: Part(part.config, part.params if name == "clip" else randomize(part.params))
        for name, part in bundle.parts.items()
    }
    sampler = Sampler(Bundle(parts, system, bundle.sampling))
    first, second = (text_to_image(sampler, ["a red fox", text]) for text in ("a blue heart", "a red fox"))
    assert first.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()
