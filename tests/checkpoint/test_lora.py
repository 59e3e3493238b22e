"""LoRA files of peft and kohya, merged into Stable Diffusion: the weights are those of torch's arithmetic."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from tests.checkpoint import peers
from unclip_jax.checkpoint.bundle import check_frozen
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.lora import adapted_layers, as_matrix, lora_tensors, merge_lora, peft_adapter
from unclip_jax.checkpoint.providers import latent_names
from unclip_jax.checkpoint.providers.clip import TEXT
from unclip_jax.cli.main import main
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.run.lora import BASE, whole

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = [f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_out.0", f"{ATTENTION}.ff.net.0.proj"]
UNET += ["down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1"]
TOWER = ["text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "sd"
    return folder, peers.stable_diffusion(folder), load_bundle(folder)


def weight_of(module, name):
    """A layer's weight; new versions of transformers leave `text_model.` out."""
    state = module.state_dict()
    return state.get(f"{name}.weight", state.get(f"{name.removeprefix('text_model.')}.weight"))


def write_lora(path, pipeline, style, rank=3, alpha=6.0):
    """A LoRA in one of the two styles, and the changes of the weights, by (module, layer)."""
    rng, tensors, changes = np.random.default_rng(0), {}, {}
    for module, prefix, layers in ((pipeline.unet, "unet", UNET), (pipeline.text_encoder, "te", TOWER)):
        for layer in layers:
            shape = weight_of(module, layer).shape
            down = np.float32(rng.normal(size=(rank, *shape[1:])))
            up = np.float32(rng.normal(size=(shape[0], rank, *(1,) * (len(shape) - 2))))
            if style == "kohya":
                name = f"lora_{prefix}_{layer.replace('.', '_')}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
            else:
                name = f"{'text_encoder' if prefix == 'te' else 'unet'}.{layer}"
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            factor = alpha / rank if style == "kohya" else 1.0
            product = torch.from_numpy(up).flatten(1) @ torch.from_numpy(down).flatten(1)
            changes[prefix, layer] = factor * product.reshape(shape)
    save_file(tensors, path)
    return changes


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_merged_weights(made, style, tmp_path):
    folder, pipeline, bundle = made
    changes = write_lora(tmp_path / "lora.safetensors", pipeline, style)
    merged = merge_lora(bundle, tmp_path / "lora.safetensors", 0.5)
    unet = export(
        merged.parts["latent"].params,
        latent_names.diffusers_unet(bundle.parts["latent"].config["model"]),
        "u",
    )
    text = export(merged.parts["clip"].params, TEXT, "t")
    ours = {"unet": unet, "te": text}
    for (prefix, layer), change in changes.items():
        module = pipeline.unet if prefix == "unet" else pipeline.text_encoder
        wanted = (weight_of(module, layer) + 0.5 * change).numpy()
        np.testing.assert_allclose(ours[prefix][f"{layer}.weight"], wanted, atol=1e-4)
    untouched = "up_blocks.1.attentions.0.proj_in"
    np.testing.assert_array_equal(unet[f"{untouched}.weight"], weight_of(pipeline.unet, untouched).numpy())
    check_frozen(merged.parts)
    assert merged.parts["latent"].hash != bundle.parts["latent"].hash
    assert merged.provenance["lora"] == [{"file": "lora.safetensors", "scale": 0.5}]


def test_scale_zero_changes_nothing_and_back_again(made, tmp_path):
    folder, pipeline, bundle = made
    write_lora(tmp_path / "lora.safetensors", pipeline, "peft")
    there = merge_lora(bundle, tmp_path / "lora.safetensors", 0.0)
    np.testing.assert_array_equal(
        there.parts["latent"].params["middle_res_0"]["conv1"]["kernel"],
        bundle.parts["latent"].params["middle_res_0"]["conv1"]["kernel"],
    )


def test_convert_with_a_lora(made, tmp_path):
    """The command merges for good."""
    folder, pipeline, bundle = made
    write_lora(tmp_path / "lora.safetensors", pipeline, "kohya")
    arguments = ["convert", str(folder), "--lora", f"{tmp_path}/lora.safetensors=0.5", "--dtype", "float32"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    wanted = merge_lora(bundle, tmp_path / "lora.safetensors", 0.5).parts["latent"].params
    found = load_bundle(tmp_path / "out").parts["latent"].params
    np.testing.assert_array_equal(
        found["middle_res_0"]["conv1"]["kernel"], wanted["middle_res_0"]["conv1"]["kernel"]
    )


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"unet.conv_in.hada_w1_a": (2, 2)}, "1 tensors are not those of a LoRA"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "lack one of their two matrices: conv_in"),
        (
            {"unet.nothing.lora_A.weight": (2, 4), "unet.nothing.lora_B.weight": (4, 2)},
            "layers that the part 'latent' does not have: nothing",
        ),
        (
            {"unet.conv_in.lora_A.weight": (2, 5, 3, 3), "unet.conv_in.lora_B.weight": (32, 2, 1, 1)},
            "does not fit conv_in/kernel",
        ),
        (
            {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 3, 1, 1)},
            "do not fit",
        ),
    ],
)
def test_refused(made, tensors, words, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=words):
        merge_lora(made[2], path)


def test_another_system(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({f"unet.conv_in.lora_{half}.weight": np.ones((2, 2), np.float32) for half in "AB"}, path)
    with pytest.raises(InputError, match="changes the part 'latent'; .*emoji has clip"):
        merge_lora(load_bundle("emoji"), path)


def check_peft(network, tensors, rank):
    """The folder for peft's own loader names linear layers of diffusers' network, and fits them."""
    renamed, config = peft_adapter(tensors)
    assert len(renamed) == len(tensors) == 2 * len(config["target_modules"])
    modules = dict(network.named_modules())
    attention = [name for name in modules if re.search(r"attn[12]\.(to_[qkv]|to_out\.0)$", name)]
    assert config["target_modules"] == sorted(attention)
    for layer in config["target_modules"]:
        down, up = (renamed[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        assert down.shape == (rank, modules[layer].in_features)
        assert up.shape == (modules[layer].out_features, rank)
        np.testing.assert_array_equal(down, tensors[f"unet.{layer}.lora_A.weight"])
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == rank
    assert (config["bias"], config["lora_dropout"], config["fan_in_fan_out"]) == ("none", 0.0, False)
    assert config == json.loads(json.dumps(config))


def test_written_adapters_in_torch(made):
    """Adapters by the names of their file: torch's U-Net with them equals ours with them merged."""
    _, pipeline, bundle = made
    part, unet = bundle.parts["latent"], copy.deepcopy(pipeline.unet)
    rng, tree = np.random.default_rng(0), {}
    shapes = {path: value.shape for path, value in flatten_dict(part.params, sep="/").items()}
    for path in adapted_layers("latent", part.config, shapes):
        rows, columns = as_matrix(path, shapes[path])
        tree[f"{path}/down"] = np.float32(0.2 * rng.normal(size=(rows, 3)))
        tree[f"{path}/up"] = np.float32(0.2 * rng.normal(size=(3, columns)))
    pairs = {path: (tree[f"{path}/down"], tree[f"{path}/up"]) for path in shapes if f"{path}/up" in tree}
    tensors = lora_tensors("latent", part.config, pairs)
    check_peft(unet, tensors, 3)
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            layer = name.removeprefix("unet.").removesuffix(".lora_A.weight")
            up, down = (torch.from_numpy(tensors[f"unet.{layer}.lora_{half}.weight"]) for half in "BA")
            weight_of(unet, layer).add_(up @ down)
    x = np.float32(rng.normal(size=(2, 4, 8, 6)))
    states = np.float32(rng.normal(size=(2, 7, part.config["model"]["context_dim"])))
    with torch.no_grad():
        given = torch.from_numpy(x), torch.tensor([7, 500]), torch.from_numpy(states)
        theirs, plain = (network(*given).sample for network in (unet, pipeline.unet))
    params = whole(unflatten_dict(tree, sep="/"), {BASE: part.params})
    ours = build_model(part.config).apply(
        {"params": params}, x.transpose(0, 2, 3, 1), np.float32([7, 500]), context=states
    )
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=2e-4)
    assert (theirs - plain).abs().max() > 0.01
