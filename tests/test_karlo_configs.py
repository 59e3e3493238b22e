"""Karlo's configurations: exact sizes, computed from shapes alone.

The tiny variants train, are exported, and draw the same pictures in diffusers.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.peers import load_karlo, share_noise
from tests.helpers import param_count, param_shapes, struct
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.compile.step import train_step
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.run.resume import config_json
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.sharding import make_mesh
from unclip_jax.train import STAGES

KARLO = Path(__file__).resolve().parent.parent / "configs" / "karlo"
D, L = 768, 77
TEXT = {"text_embed": struct(1, D), "text_states": struct(1, L, D), "text_mask": struct(1, L, dtype=bool)}


def model_of(name):
    config = load_config(str(KARLO / f"{name}.py"))
    return config, config_json(config.model)


def test_sizes():
    """Every network has exactly the published number of parameters.

    The prior's statistics (2 x 768) belong to the embedding space here.
    """
    config, clip = model_of("clip")
    clip["text"] |= {"vocab_size": config.tokenizer.vocab_size, "length": config.tokenizer.length}
    shapes = param_shapes(CLIP(**clip), struct(1, 224, 224, 3), struct(1, L, dtype=jnp.int32))
    assert (
        param_count(shapes["text_tower"]) == 123_650_304 and param_count(shapes["image_tower"]) == 303_966_208
    )
    prior = model_of("prior_diffusion")[1] | {"embed_dim": D, "length": L}
    assert (
        param_count(param_shapes(DiffusionPrior(**prior), struct(1, D), struct(1), **TEXT))
        == 1_022_030_080 - 2 * D
    )
    inputs = {"image_embed": struct(1, D), "drop_image": struct(1, dtype=bool), **TEXT}
    shapes = param_shapes(Decoder(**model_of("decoder")[1]), struct(1, 8, 8, 3), struct(1), **inputs)
    assert param_count(shapes["unet"]) == 885_439_686 and param_count(shapes["conditioning"]) == 7_878_400
    upsampler = Upsampler(**model_of("upsampler_256")[1])
    assert (
        param_count(param_shapes(upsampler, struct(1, 32, 32, 3), struct(1), low_res=struct(1, 8, 8, 3)))
        == 691_579_523
    )


@pytest.mark.parametrize("name", ["clip", "prior_diffusion", "decoder", "upsampler_256"])
def test_tiny_variants_have_a_step(name):
    """Of the data's shapes, from the state to the state, with a loss; the slow test below runs them."""
    config, clip = load_config(f"{KARLO / name}.py:tiny"), load_config(f"{KARLO / 'clip'}.py:tiny")
    step = train_step(config, clip, make_mesh())
    state, metrics = jax.eval_shape(step.update, step.state, step.frozen, step.batch)
    assert jax.tree.structure(state) == jax.tree.structure(step.state) and metrics["loss"].shape == ()


@pytest.mark.slow
def test_trained_exported_and_drawn_by_the_peer(tmp_path, monkeypatch):
    """Trains a few steps of every stage, makes a bundle, and exports it.

    From the same noise, diffusers draws the same pictures from the folder, to one level.
    """
    runs = tmp_path / "runs"
    for name, run in (
        ("clip", "clip"),
        ("prior_diffusion", "prior_diffusion"),
        ("decoder", "decoder"),
        ("upsampler_256", "upsampler_32"),
    ):
        config = load_config(f"{KARLO / name}.py:tiny")
        settings = {
            "optimizer.learning_rate": 1e-2,
            "ema_decay": 0.0,
        }  # so that four steps leave the zeros of fresh networks
        for key, value in {"data.backend": "numpy", "eval_every": 0, **settings}.items():
            override(config, key, value)
        STAGES[config.stage].train_and_evaluate(config, str(runs / run))
    assert main(["bundle", str(runs), "--out", str(tmp_path / "bundle"), "--rows", "0"]) == 0
    assert main(["export", str(tmp_path / "bundle"), "--out", str(tmp_path / "karlo")]) == 0
    pipeline = load_karlo(tmp_path / "karlo")
    latents = share_noise(monkeypatch, 32)
    captions = ["a red fox", "a 3d emoji of a blue heart"]
    options = {"prior_diffusion": {"steps": 4}, "decoder": {"steps": 4}, "upsampler_32": {"steps": 3}}
    counts = dict(prior_num_inference_steps=4, decoder_num_inference_steps=4, super_res_num_inference_steps=3)
    expected = pipeline(captions, output_type="np", **counts, **latents).images
    drawn = text_to_image(load_bundle(tmp_path / "bundle"), captions, options=options)
    assert expected.std() > 0.05
    assert np.abs(drawn.astype(int) - np.round(expected * 255)).max() <= 1
