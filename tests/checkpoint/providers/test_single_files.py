"""Stable Diffusion's single files with CompVis' names: their names, what they say, and what is refused."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.helpers import param_shapes, struct
from unclip_jax.checkpoint.check import latent_shapes
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import autoencoder
from unclip_jax.checkpoint.providers.latent_names import compvis_unet, diffusers_unet
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import KLAutoencoder

both = pytest.mark.parametrize("version", [1, 2])


def unet_config(version):
    """A U-Net of the contexts that single files are known by."""
    return dict(
        image_size=64,
        in_channels=4,
        out_channels=4,
        channels=64,
        channel_mult=(1, 2),
        res_blocks=2,
        heads=(8, 8) if version == 1 else (1, 2),
        attention_levels=(0,),
        context_dim=768 if version == 1 else 1024,
        transformer_depth=1,
        linear=version == 2,
    )


VAE = dict(latent_channels=4, channels=32, channel_mult=(1, 2), res_blocks=1)


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(0.05 * rng.normal(size=leaf.shape)), shapes)


@pytest.fixture(scope="module")
def parts():
    """The parameters of a tiny network of each version."""
    vae = KLAutoencoder(**VAE)
    decoder = random_tree(param_shapes(vae, struct(1, 2, 2, 3)), 1)
    return {
        v: {"latent": random_tree(latent_shapes(unet_config(v)), v), "autoencoder": decoder} for v in (1, 2)
    }


def text_tensors(version, layers=2, vocab=600, seed=5):
    """A text tower by the names of the version's files."""
    rng, width = np.random.default_rng(seed), 768 if version == 1 else 1024
    new = lambda *shape: np.float32(0.05 * rng.normal(size=shape))
    if version == 1:
        at = "cond_stage_model.transformer.text_model."
        tensors = {
            f"{at}embeddings.token_embedding.weight": new(vocab, width),
            f"{at}embeddings.position_embedding.weight": new(16, width),
            f"{at}embeddings.position_ids": np.arange(16)[None],
            f"{at}final_layer_norm.weight": new(width),
            f"{at}final_layer_norm.bias": new(width),
        }
        names = [
            ("layer_norm1", 0, 0),
            ("layer_norm2", 0, 0),
            ("mlp.fc1", 128, width),
            ("mlp.fc2", width, 128),
        ]
        names += [(f"self_attn.{name}_proj", width, width) for name in ("q", "k", "v", "out")]
        block = f"{at}encoder.layers."
    else:
        at = "cond_stage_model.model."
        tensors = {
            f"{at}token_embedding.weight": new(vocab, width),
            f"{at}positional_embedding": new(16, width),
            f"{at}ln_final.weight": new(width),
            f"{at}ln_final.bias": new(width),
            f"{at}text_projection": new(width, width),
            f"{at}logit_scale": new(),
        }
        names = [("ln_1", 0, 0), ("ln_2", 0, 0), ("mlp.c_fc", 128, width), ("mlp.c_proj", width, 128)]
        names += [("attn.out_proj", width, width)]
        block = f"{at}transformer.resblocks."
    for i in range(layers):
        for name, out, into in names:
            tensors[f"{block}{i}.{name}.weight"] = new(out, into) if into else new(width)
            tensors[f"{block}{i}.{name}.bias"] = new(out or width)
        if version == 2:
            tensors[f"{block}{i}.attn.in_proj_weight"] = new(3 * width, width)
            tensors[f"{block}{i}.attn.in_proj_bias"] = new(3 * width)
    return tensors


def write_file(path, parts, version, metadata=None, **extra):
    """A single file by CompVis' names."""
    unet = export(parts[version]["latent"], compvis_unet(unet_config(version)), "the U-Net")
    vae = export(parts[version]["autoencoder"], autoencoder.compvis_rules(), "the autoencoder")
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.items()} | text_tensors(version) | extra
    tensors["model_ema.decay"] = np.float32(0.9999)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return unet, vae


@both
def test_names_of_single_files(parts, version):
    """diffusers' own converter makes of our CompVis names what our rules of its names read."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = unet_config(version)
    tensors = export(parts[version]["latent"], compvis_unet(config), "the U-Net")
    theirs = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": torch.from_numpy(np.array(v)) for k, v in tensors.items()},
        dict(layers_per_block=config["res_blocks"], class_embed_type=None, addition_embed_type=None),
    )
    ours = export(parts[version]["latent"], diffusers_unet(config), "the U-Net")
    assert theirs.keys() == ours.keys() and len(tensors) == len(ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value, err_msg=name)


@both
def test_single_file(parts, version, tmp_path):
    """The file's networks, their heads and activation, and what is asked for."""
    path = tmp_path / "sd.safetensors"
    write_file(path, parts, version)
    if version == 2:
        with pytest.raises(
            InputError, match="does not say whether it predicts the noise or v: write"
        ) as error:
            load_bundle(path)
        assert str(tmp_path / "sd.json") in str(error.value) and "\n" not in str(error.value)
        (tmp_path / "sd.json").write_text('{"prediction_type": "v_prediction"}')
    found = load_bundle(path)
    assert found.system == "latent"
    latent, tower = found.parts["latent"].config, found.parts["clip"].config
    model = unet_config(version)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in latent["model"].items()} == model
    assert latent["diffusion"]["prediction"] == ("eps" if version == 1 else "v")
    assert tower["model"]["text"]["layers"] == (2 if version == 1 else 1)  # 2.x leaves its last block out
    assert tower["model"]["activation"] == ("quick_gelu" if version == 1 else "gelu")
    assert tower["tokenizer"].get("pad_id", 0) == (599 if version == 1 else 0)
    for name, wanted in parts[version].items():
        jax.tree.map(np.testing.assert_array_equal, found.parts[name].params, wanted)
    block = found.parts["clip"].params["text_tower"]["transformer"]["block_0"]["attn"]
    tensors = text_tensors(version)
    if version == 2:
        query = tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"][:1024]
    else:
        query = tensors["cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(block["query"]["kernel"].reshape(query.shape[1], -1), query.T)


def test_single_file_says_it_itself(parts, tmp_path):
    """The metadata of the file say what it predicts."""
    write_file(tmp_path / "sd.safetensors", parts, 2, {"modelspec.prediction_type": "v"})
    assert load_bundle(tmp_path / "sd.safetensors").parts["latent"].config["diffusion"]["prediction"] == "v"


@pytest.mark.parametrize(
    "drop, extra, words",
    [
        ("first_stage_model.", {}, "without its autoencoder"),
        ("model.diffusion_model.middle_block.1.", {}, "is missing"),
        ("model.diffusion_model.out.0.", {}, "parameters are missing"),
        (None, {"model.diffusion_model.extra": np.float32([1])}, "have no use: extra"),
        (None, {"alphas_cumprod": np.linspace(0.9, 0.1, 1000, dtype=np.float32)}, "another noise schedule"),
    ],
)
def test_single_files_that_are_refused(parts, drop, extra, words, tmp_path):
    path = tmp_path / "sd.safetensors"
    write_file(path, parts, 1, **extra)
    if drop:
        kept = {k: v for k, v in load_file(path).items() if not k.startswith(drop)}
        save_file(kept, path)
    with pytest.raises(InputError, match=words):
        load_bundle(path)
