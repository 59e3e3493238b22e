"""Autoencoders alone, in the folders that diffusers writes: the same images; other settings are refused."""

import json

import numpy as np
import pytest
import torch

from tests.checkpoint.peers import randomize
from tests.models.test_autoencoder import array_of, images
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.autoencoder import Moments

SHARED = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
KINDS = {
    "AutoencoderKL": {"latent_channels": 4, "scaling_factor": 0.25, **SHARED},
    "VQModel": {"latent_channels": 3, "num_vq_embeddings": 20, **SHARED},
    "MoVQ": {"latent_channels": 3, "num_vq_embeddings": 20, "norm_type": "spatial", **SHARED},
}


def save(name, folder, **changes):
    """An autoencoder of diffusers with random weights, saved; returns it."""
    import diffusers

    theirs = randomize(getattr(diffusers, "VQModel" if name == "MoVQ" else name)(**KINDS[name] | changes))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", list(KINDS))
def test_the_same_images(name, tmp_path):
    theirs = save(name, tmp_path)
    part = load_bundle(tmp_path).parts["autoencoder"]
    assert part.config["scale_factor"] == (0.25 if name == "AutoencoderKL" else 1.0)
    assert part.config["model"]["attention_levels"] == [1]
    x, x_torch = images(16, 20)
    model, variables = build_model(part.config), {"params": part.params}
    with torch.no_grad():
        encoded = theirs.encode(x_torch)
        encoded = encoded.latent_dist.mean if name == "AutoencoderKL" else encoded.latents
        decoded = array_of(theirs.decode(encoded).sample)
    found = model.apply(variables, x, method="encode")
    found = found.mean if isinstance(found, Moments) else found
    np.testing.assert_allclose(found, array_of(encoded), atol=1e-4)
    made = model.apply(variables, array_of(encoded), method="decode")
    np.testing.assert_allclose(made, decoded, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"act_fn": "relu"}, "act_fn is 'relu', but the network here has 'silu'"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"latents_mean": [0.0]}, "latents_mean is [0.0]"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "have attention at other levels"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types must be 2 of DownEncoderBlock2D"),
        ({"block_out_channels": [32, 48]}, "are no multiples of the first"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive"),
        ({"layers_per_block": 2}, "parameters are missing in it"),
        ({"new_setting": 3}, "a setting that is not known here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(changes, words, tmp_path):
    save("AutoencoderKL", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError) as error:
        load_part(tmp_path, "autoencoder")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_widths_of_the_codebook_are_refused(tmp_path):
    save("VQModel", tmp_path, vq_embed_dim=5)
    with pytest.raises(InputError, match="vq_embed_dim must be latent_channels, not 5"):
        load_part(tmp_path, "autoencoder")
    with pytest.raises(KeyError, match="clip"):
        load_part(tmp_path, "clip")
