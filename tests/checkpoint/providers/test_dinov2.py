"""DINOv2 in transformers' folders against transformers, at random weights."""

import json

import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.errors import InputError
from unclip_jax.models.dinov2 import MEAN, STD

RNG = np.random.default_rng(0)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)


def saved(folder, registers=False, **changes):
    """A tiny network of transformers at random weights, saved."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config, model = (
        (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    )
    made = peers.randomize(model(config(**(SIZES | changes))))
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("side", [70, 42, 98])
def test_dinov2_of_transformers(registers, side, tmp_path):
    """The class token of images of the learned size, of smaller and of larger ones; and as a bundle."""
    theirs = saved(tmp_path / "theirs", registers, mlp_ratio=3)
    pixels = np.float32(RNG.uniform(-1, 1, (2, side, side, 3)))
    with torch.no_grad():
        expected = theirs(nchw(((pixels + 1) / 2 - np.float32(MEAN)) / np.float32(STD))).pooler_output
    bundle = load_bundle(tmp_path / "theirs")
    close(run_part(bundle, "dinov2", pixels), expected)
    again = load_bundle(save_bundle(bundle, tmp_path / "ours"))
    close(run_part(again, "dinov2", pixels), expected)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (
            "config.json",
            {"use_swiglu_ffn": True},
            "is a DINOv2-giant (use_swiglu_ffn); DINOv2-S, -B and -L are",
        ),
        ("config.json", {"hidden_act": "silu"}, "hidden_act is 'silu', but the network here has 'gelu'"),
        ("config.json", {"qkv_bias": False}, "qkv_bias is False"),
        ("config.json", {"colour": "red"}, "'colour' is 'red', a setting that is not known here"),
        ("config.json", {"num_attention_heads": 3}, "its width 32 is no multiple of its 3 heads"),
        ("config.json", {"image_size": 518}, "shapes do not fit: embeddings.position_embeddings"),
        ("config.json", {"num_hidden_layers": 1}, "tensors of the file have no use: encoder.layer.1"),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3},
            "image_mean is [0.5, 0.5, 0.5], but DINOv2 has",
        ),
    ],
)
def test_other_networks_are_refused(file, changes, words, tmp_path):
    saved(tmp_path)
    before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    (tmp_path / file).write_text(json.dumps(before | changes))
    with pytest.raises(InputError) as error:
        load_part(tmp_path, "dinov2")
    assert words in str(error.value) and "\n" not in str(error.value)
