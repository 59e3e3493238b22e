"""What a Python caller gives wrong is one line that names the value, and the value that is wanted."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.checkpoint.check import check_config
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import karlo_export
from unclip_jax.checkpoint.store import CheckpointStore, load_run
from unclip_jax.data.sources import emoji_source
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.generate.decoder import invert_decoder
from unclip_jax.generate.options import SamplingOptions
from unclip_jax.grid import draw_grid
from unclip_jax.metrics.bootstrap import interval
from unclip_jax.models.unet import GroupNorm
from unclip_jax.run.optim import make_optimizer
from unclip_jax.sampling.edits import inpaint, inversion, text_diff, variations
from unclip_jax.sampling.text_to_image import system_of
from unclip_jax.sampling.unclip import sample_stages
from unclip_jax.sharding import compute_dtype, make_mesh
from unclip_jax.train.embed import embed

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: draw_grid(np.zeros((2, 8, 8, 3), np.uint8), ["a"]), "got 2 and 1"),
        (lambda b: interval([np.ones(3)], level=1.5), "level must lie in"),
        (lambda b: make_optimizer(learning_rate=1.0, steps=9, schedule="s"), "one of cosine, constant"),
        (lambda b: make_optimizer(learning_rate=1.0, steps=9, warmup_steps=9), "must be fewer than steps 9"),
        (lambda b: compute_dtype("float8", make_mesh()), "unknown dtype 'float8'; choose one of"),
        (lambda b: sample_stages(b, ["a"], z_image=np.zeros((2, 16))), "per caption, got 2 and 1"),
        (lambda b: inversion.embed_images(b, []), "no images: give at least one"),
        (lambda b: variations.fresh_variations(b, [PICTURE], count=0), "must be at least 1, got 0"),
        (lambda b: text_diff.text_diff(b, PICTURE, "a", "b", count=1), "at least 2 images, got 1"),
        (
            lambda b: inpaint.inpaint(b, PICTURE, PICTURE[..., 0] > 0, "a", count=0),
            "number of pictures must be at least 1, got 0",
        ),
        (
            lambda b: invert_decoder(None, None, None, None, SamplingOptions(2, clip=1.0)),
            "DDIM inversion needs clip None",
        ),
        (
            lambda b: GroupNorm(groups=4).init(jax.random.key(0), np.zeros((1, 2, 6))),
            "6 channels are not a multiple of 4 groups",
        ),
        (lambda b: system_of(dataclasses.replace(b, system="x")), "of the system 'x'; known: unclip"),
        (lambda b: CheckpointStore("w", keep=0), "at least one checkpoint must be kept, got keep=0"),
        (lambda b: load_run("nowhere"), "no checkpoint in nowhere; train that stage first"),
        (lambda b: embed("emoji", emoji_source("val"), "out", None, batch_size=0), "must be at least 1"),
    ],
)
def test_calls(bundle, call, words):
    """Nothing is sampled or written first."""
    with pytest.raises((ValueError, OSError)) as error:
        call(bundle)
    assert words in str(error.value) and "\n" not in str(error.value)


CHANGES = {
    "clip.tokenizer": (None, "has no tokenizer"),
    "prior_diffusion.diffusion.schedule": ("linear", "prior has the cosine schedule"),
    "prior_diffusion.embedding_space.kind": ("raw", "whitened by mean and standard deviation"),
    "prior_diffusion.model.text": ({}, "has a text encoder of its own"),
    "prior_diffusion.model.mlp_ratio": (2.0, "four times its width"),
    "decoder.diffusion.prediction": ("v", "decoder predicts eps, not v"),
    "decoder.model.conditioning.use_text_states": (False, "sees the text embedding and the text states"),
    "decoder.model.unet.out_channels": (3, "decoder has 6 output channels, not 3"),
    "decoder.model.unet.middle_attention": (False, "decoder has attention in the middle"),
    "decoder.model.unet.scale_shift": (False, "scales and shifts"),
    "upsampler_16.model.unet.middle_attention": (True, "upsampler has no attention"),
    "upsampler_16.model.resize": ("linear", "enlarges with the cubic filter"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_keeps_a_bundle_from_karlo(bundle, key):
    """Every difference is one sentence."""
    value, words = CHANGES[key]
    name, *path, last = key.split(".")
    config = copy.deepcopy(bundle.parts[name].config)
    node = config
    for step in path:
        node = node[step]
    node[last] = value
    if value is None:
        del node[last]
    parts = bundle.parts | {name: Part(config, bundle.parts[name].params)}
    changed = dataclasses.replace(bundle, parts=parts)
    assert any(words in sentence for sentence in karlo_export.obstacles(changed))


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("clip", {"tokenizer": {"kind": "clip_bpe", "length": 1, "vocab_size": 8192}}, "between 2"),
        (
            "prior_diffusion",
            {"embedding_space": {"kind": "scaled", "scale": -1.0}},
            "scale must be positive, not -1",
        ),
    ],
)
def test_configurations_of_parts(bundle, name, change, words):
    with pytest.raises(ValueError, match=words):
        check_config(bundle.parts[name].config | change, name)


@pytest.mark.parametrize(
    "merges, words",
    [(["a b", "a b"], "merges of this vocabulary repeat a token"), (["a b"], "1 merges, which does not fit")],
)
def test_vocabularies(merges, words):
    config = {"kind": "clip_bpe", "length": 8, "vocab_size": 516, "merges": merges}
    with pytest.raises(ValueError, match=words):
        ClipTokenizer.from_config(config)(["a"])
