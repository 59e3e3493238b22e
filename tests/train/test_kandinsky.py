"""Kandinsky's stage: exact sizes, a run that learns, its inpainting twin, and the bundle of the runs."""

import json

import jax
import numpy as np
import pytest

from tests.helpers import param_count, param_shapes, struct
from tests.runs import ROOT, STEPS, Repeating, losses, random_bundle, wrap_batches
from unclip_jax import sharding
from unclip_jax.checkpoint.check import kandinsky_shapes
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.bundle import collect
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.generate.text import TextConditioning
from unclip_jax.run.frozen import EMPTY
from unclip_jax.run.resume import config_json, load_widened_latent
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.train import kandinsky, prior_diffusion

CONFIG = f"{ROOT}/configs/kandinsky/latent.py"


@pytest.mark.parametrize("variant, count", [("", 1_253_057_288), (":inpaint", 1_253_074_568)])
def test_published_sizes(variant, count):
    """The recipe describes the public networks, and starts from them."""
    config = load_config(CONFIG + variant)
    kandinsky.check(config)
    assert param_count(kandinsky_shapes(config_json(config.model) | {"embed_dim": 1280})) == count


def test_recipe_of_the_prior():
    config = load_config(f"{ROOT}/configs/kandinsky/prior_diffusion.py")
    prior_diffusion.check(config)
    assert config.sampling.clip == 10 and config.model.layers == 20


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model.unet.out_channels": 6}, "out_channels must be 4, or 8 with learned variance"),
        ({"model.unet.attention_resolutions": (5,)}, "attention_resolutions has 5"),
        ({"sampling.variance": "learned", "model.unet.out_channels": 4}, "needs a network that predicts it"),
    ],
)
def test_refused(settings, words):
    config = load_config(CONFIG + ":tiny")
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match=words):
        kandinsky.check(config)


def train(folder, variant="", init_from=None, **changes):
    config = load_config(f"{CONFIG}:tiny{variant}")
    settings = {"steps": STEPS, "eval_every": 0, "checkpoint_every": STEPS, "data.backend": "numpy"}
    settings |= {"optimizer.eps": 1e-6, "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 2}
    for key, value in {**settings, **changes}.items():
        override(config, key, value)
    return kandinsky.train_and_evaluate(config, str(folder), init_from)


@pytest.mark.parametrize("variant, channels", [("tiny", 4), ("tiny-inpaint", 9)])
def test_objective(variant, channels):
    """The loss of a batch, traced with a random CLIP and autoencoder; the network has the inputs it needs."""
    part = random_bundle().parts["clip"]
    clip = Network(build_model(part.config), part.params, part.config)
    model = {"latent_channels": 4, "channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "groups": 4}
    config = {"kind": "vq_autoencoder", "model": model | {"codes": 9}, "scale_factor": 0.5}
    module = build_model(config)
    autoencoder = Network(module, param_shapes(module, struct(1, 8, 8, 3)), config)
    empty = TextConditioning(
        np.zeros((1, 16), np.float32), np.zeros((1, 16, 32), np.float32), np.ones((1, 16))
    )
    networks = {"clip": clip, "autoencoder": autoencoder, EMPTY: Network(None, empty, {})}
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    stage = kandinsky.stage(load_config(f"{ROOT}/configs/kandinsky/latent.py:{variant}"), mesh, networks)
    params = jax.eval_shape(stage.init, jax.random.key(0))[0]
    assert params["unet"]["conv_in"]["kernel"].shape[2] == channels
    batch = {"image": struct(4, 16, 16, 3), "clip_image": struct(4, 16, 16, 3)}
    batch |= {"known": struct(4, 16, 16, 1, dtype=bool)} if channels == 9 else {}
    frozen = {"clip": clip.params, "autoencoder": autoencoder.params}
    trace = lambda params, frozen, batch: stage.objective(
        params, {}, jax.random.key(0), batch, 0, frozen=frozen
    )
    loss, _ = jax.eval_shape(trace, params, frozen, batch)
    assert loss.shape == () and loss.dtype == np.float32


@pytest.mark.slow
def test_learns_and_draws(tiny_run, tmp_path, monkeypatch):
    """The loss on a fixed batch falls; the runs make a bundle that draws for captions."""
    for name in ("clip", "prior_diffusion", "autoencoder"):
        (tmp_path / name).symlink_to(tiny_run(name))
    wrap_batches(monkeypatch, Repeating)
    figures = train(tmp_path / "latent", eval_every=STEPS)
    curve = losses(tmp_path / "latent")
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3]), curve
    assert np.isfinite(figures["eval_loss"])
    assert (tmp_path / "latent" / "samples" / f"{STEPS:07d}.png").stat().st_size > 1000
    meta, _, _ = load_run(tmp_path / "latent")
    assert meta["name"] == "latent" and set(meta["part"]["frozen"]) == {"clip", "autoencoder"}
    bundle = collect(tmp_path)
    assert bundle.system == "kandinsky"
    options = {"latent": {"steps": 2}, "prior_diffusion": {"steps": 2}}
    drawn = text_to_image(bundle, ["a fox", "a cat"], options=options)
    assert drawn.shape == (2, 16, 16, 3) and np.abs(drawn[0].astype(int) - drawn[1]).max() > 0

    # The twin that inpaints starts from it, with zero weights for what it also sees.
    part, _ = load_widened_latent(str(tmp_path / "latent"), "latent_inpaint")
    plain, _ = load_part(str(tmp_path / "latent"), "latent")
    kernel, before = (one.params["unet"]["conv_in"]["kernel"] for one in (part, plain))
    assert kernel.shape[2] == 9 and not kernel[:, :, 4:].any()
    np.testing.assert_array_equal(kernel[:, :, :4], before)
    train(tmp_path / "latent_inpaint", "-inpaint", str(tmp_path / "latent"), steps=4, checkpoint_every=4)
    rows = (tmp_path / "latent_inpaint" / "metrics.jsonl").read_text().splitlines()
    assert len([row for row in map(json.loads, rows) if np.isfinite(row.get("loss", np.nan))]) == 4
    assert set(collect(tmp_path).parts) >= {"latent", "latent_inpaint"}
