"""The recipes of latent diffusion: exact sizes, checked settings, and what is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import param_count
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.check import latent_shapes
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.run.resume import config_json, load_widened_latent
from unclip_jax.train import latent

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZES = {
    "stable_diffusion/latent.py": 859_520_964,
    "stable_diffusion/latent.py:v2-base": 865_910_724,
    "stable_diffusion/latent.py:v2-768": 865_910_724,
    "stable_diffusion/latent.py:inpaint": 859_535_364,
    "latent/latent.py": 274_056_163,
    "latent/latent.py:churches": 294_966_916,
    # The published networks of classes, and the table of 1,000 classes and of no class.
    "latent/latent.py:cin": 400_920_579 + 1001 * 512,
    "latent/latent.py:cin-f8": 394_984_196 + 1001 * 512,
    "latent/latent.py:sr": 113_622_563,
    "latent/latent.py:inpaint": 387_245_827,
}
OTHERS = ["stable_diffusion/latent.py:tiny", "stable_diffusion/latent.py:tiny-v2", "latent/latent.py:tiny"]
OTHERS += ["latent/latent.py:tiny-cin", "latent/latent.py:tiny-sr"]
OTHERS += [f"emoji/latent.py{variant}" for variant in ("", ":64", ":inpaint", ":tiny", ":tiny-inpaint")]


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    config = load_config(f"{CONFIGS}/{name}")
    latent.check(config)
    assert param_count(latent_shapes(config_json(config.model))) == SIZES[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_describe_networks(name):
    config = load_config(f"{CONFIGS}/{name}")
    latent.check(config)
    assert param_count(latent_shapes(config_json(config.model))) > 0


def test_v_and_eps():
    kinds = {v: load_config(f"{CONFIGS}/stable_diffusion/latent.py{v}") for v in ("", ":v2-base", ":v2-768")}
    assert [c.diffusion.prediction for c in kinds.values()] == ["eps", "eps", "v"]
    assert kinds[":v2-768"].model.image_size == 96


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model.in_channels": 5}, "or 9 to inpaint"),
        ({"model.heads": (2,)}, "must fit the 2 levels"),
        ({"model.attention_levels": (2,)}, "must fit the 2 levels"),
        ({"model.groups": 5}, "multiple of model.groups=5"),
        ({"model.heads": (2, 5)}, "multiple of its 5 heads"),
        ({"frozen.clip": None}, "frozen.clip makes the context"),
        ({"model.transformer_depth": 0}, "transformer_depth=0"),
        ({"diffusion.schedule": "sigmoid"}, "diffusion.schedule must be one of"),
        ({"sampling.sampler": "heun"}, "unknown sampler 'heun'"),
        ({"sampling.guidance_scale": float("inf")}, "guidance_scale|guidance scale"),
    ],
)
def test_refused_settings(settings, words):
    config = load_config(f"{CONFIGS}/emoji/latent.py:tiny")
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match=words):
        latent.check(config)


def test_an_ordinary_network_is_widened_to_inpaint(tmp_path):
    """Its new channels have zero weights, and the others are its own."""
    model = config_json(load_config(f"{CONFIGS}/emoji/latent.py:tiny").model)
    shapes, rng = latent_shapes(model), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), shapes)
    diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"}
    part = Part({"kind": "latent", "model": model, "diffusion": diffusion}, params)
    save_bundle(Bundle({"latent": part}, "latent"), tmp_path / "b", np.float32)
    widened, _ = load_widened_latent(str(tmp_path / "b"), "latent_inpaint")
    kernel = widened.params["conv_in"]["kernel"]
    assert kernel.shape == (3, 3, 9, 16)
    np.testing.assert_array_equal(kernel[:, :, :4], params["conv_in"]["kernel"])
    np.testing.assert_array_equal(kernel[:, :, 4:], 0)
