"""CLIP as open_clip saves it, against that library, run at random weights in the same test."""

import copy
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import open_clip

RNG = np.random.default_rng(0)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.5, 0.7]
CONFIG = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 40, "head_width": 10, "layers": 2},
        "text_cfg": {"context_length": 10, "vocab_size": 600, "width": 24, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
}


@pytest.fixture(scope="module")
def library():
    """open_clip's models from their modules alone: the whole package needs torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("open_clip is not installed")
    package = types.ModuleType("open_clip")
    package.__path__ = list(found.submodule_search_locations)
    absent = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "open_clip.hf_model")
    modules = {name: types.ModuleType(name) for name in absent} | {"open_clip": package}
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    modules["open_clip.hf_model"].HFTextEncoder = None
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("open_clip.model")


@pytest.mark.parametrize("quick, custom", [(False, True), (True, False)])
def test_embeddings(quick, custom, library, tmp_path):
    """Heads that are not of 64 channels, both activations, the images' statistics, and the text tower's names
    with and without their prefix."""
    config = copy.deepcopy(CONFIG)
    config["model_cfg"] |= {"quick_gelu": quick} | ({"custom_text": True} if custom else {})
    settings = {key: value for key, value in config["model_cfg"].items() if key != "custom_text"}
    model = peers.randomize((library.CustomTextCLIP if custom else library.CLIP)(**settings))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    peers.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # LAION's have it for other files
    pixels = np.float32(RNG.uniform(-1, 1, (2, 16, 16, 3)))
    tokens = np.zeros((2, 10), np.int64)
    tokens[:, :4] = [[598, 5, 7, 599], [598, 599, 0, 0]]
    with torch.no_grad():
        z_image = model.encode_image(nchw(((pixels + 1) / 2 - np.float32(MEAN)) / np.float32(STD)))
        z_text = model.encode_text(torch.from_numpy(tokens))
    bundle = load_bundle(tmp_path)
    assert bundle.parts["clip"].config["model"]["image"]["heads"] == 4
    close(run_part(bundle, "clip", pixels, method="encode_image"), z_image)
    close(run_part(bundle, "clip", tokens.astype(np.int32), method="encode_text").embed, z_text)


@pytest.mark.parametrize(
    "where, changes, message",
    [
        ("model_cfg", {"init_logit_bias": -10}, "model_cfg: 'init_logit_bias' is -10, a setting that is not"),
        ("model_cfg", {"multimodal_cfg": {"width": 8}}, "'multimodal_cfg' is"),
        ("model_cfg", {"quick_gelu": "yes"}, "quick_gelu must be true or false, not 'yes'"),
        ("vision_cfg", {"timm_model_name": "vit_base"}, "'timm_model_name' is 'vit_base', a setting"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "layers must be an integer"),
        ("vision_cfg", {"head_width": 16}, "width 40 is no multiple of head_width 16"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type is 'avg', but the network here has 'tok'"),
        ("vision_cfg", {"ls_init_value": 0.1}, "'ls_init_value' is 0.1, a setting"),
        ("vision_cfg", {"no_ln_pre": True}, "'no_ln_pre' is True"),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}, "'norm_kwargs' is"),
        ("text_cfg", {"no_causal_mask": True}, "'no_causal_mask' is True"),
        ("text_cfg", {"hf_tokenizer_name": "xlm-roberta"}, "'hf_tokenizer_name' is"),
        ("text_cfg", {"pool_type": "last"}, "pool_type is 'last'"),
        ("text_cfg", {"heads": 0}, "heads must be between 1 and 1048576, not 0"),
        ("preprocess_cfg", {"resize_mode": "squash"}, "resize_mode is 'squash', but the network here has"),
        ("preprocess_cfg", {"interpolation": "bilinear"}, "interpolation is 'bilinear'"),
        ("preprocess_cfg", {"size": 384}, "size is 384, but the image tower takes 16 pixels"),
        ("preprocess_cfg", {"mean": [0.5]}, "mean must be a list of 3 numbers"),
    ],
)
def test_settings_of_another_network_are_refused(where, changes, message):
    config = copy.deepcopy(CONFIG)
    (config | config["model_cfg"])[where].update(changes)
    with pytest.raises(ValueError, match=message):
        open_clip.model_config(config)
