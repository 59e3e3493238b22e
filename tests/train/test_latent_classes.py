"""The latent stage of classes and without a condition: training, bundles, sampling and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from tests.runs import ROOT, losses
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.data.examples import latent_example
from unclip_jax.data.sources import make_source
from unclip_jax.diffusion.losses import training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.run.resume import config_json
from unclip_jax.sampling.latent import sample_stages
from unclip_jax.sampling.programs import Sampler
from unclip_jax.train import latent

STYLES = ("3d", "flat", "blob", "noto")
QUICK = {"latent": {"steps": 2, "guidance_scale": 3.0}}


def random_latent(config, **more):
    """A part with random weights, as a configuration describes it."""
    model = config_json(config.model)
    side = model["image_size"]
    given = {"label": jnp.zeros(1, jnp.int32)} if model.get("classes") else {}
    params = random_params(
        LatentUNet(**model), jnp.zeros((1, side, side, model["in_channels"])), jnp.zeros(1), **given
    )
    diffusion = config_json(config.diffusion)
    return Part({"kind": "latent", "model": model, "diffusion": diffusion, **more}, params)


def bundle_of(variant, **more):
    """A bundle of random networks."""
    config = load_config(str(ROOT / f"configs/latent/latent.py:{variant}"))
    vae = dict(latent_channels=4, channels=8, channel_mult=(1, 2), res_blocks=1, groups=4)
    params = random_params(KLAutoencoder(**vae), jnp.zeros((1, 8, 8, 3)))
    autoencoder = Part({"kind": "kl_autoencoder", "model": vae, "scale_factor": 0.5}, params)
    parts = {"latent": random_latent(config, **more), "autoencoder": autoencoder}
    return Bundle(parts, "latent", {"latent": config_json(config.sampling)})


def test_classes(tmp_path):
    """A class by name is that by number; another class is another picture, and so is more guidance."""
    save_bundle(bundle_of("tiny-cin", class_names=list(STYLES)), tmp_path / "cin", np.float32)
    sampler = Sampler(load_bundle(tmp_path / "cin"))
    draw = lambda words, **more: sample_stages(
        sampler, words, positions=[0] * len(words), options={"latent": QUICK["latent"] | more}
    ).images[0]
    a, b, c = draw(["blob", "2", "noto"])
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - c).max() > 0.02
    assert np.abs(draw(["blob"], guidance_scale=6.0)[0] - a).max() > 0.01
    for words, says in (
        ("fox", "'fox' is no class of this bundle: give a number from 0 to 3, or one of 3d"),
        ("4", "'4' is no class"),
        ("", "'' is no class"),
    ):
        with pytest.raises(InputError, match=says):
            draw([words])
    with pytest.raises(InputError, match="reads no captions: leave the negative one out"):
        draw(["blob"], negative="x")


def test_without_a_condition(tmp_path, capsys, monkeypatch):
    """`unclip sample` draws without captions, and says so where one is given."""
    monkeypatch.chdir(tmp_path)
    bundle = bundle_of("tiny")
    save_bundle(bundle, "free", np.float32)
    quick = ["--bundle", "free", "--steps", "2"]
    assert main(["sample", "--samples", "3", *quick]) == 0 and (tmp_path / "grid.png").exists()
    capsys.readouterr()
    for argv, says in (
        (["sample", "a fox", *quick], "this bundle draws without captions: leave them out"),
        (["serve", "--bundle", "free", "--port", "0"], "free reads no captions, so it cannot be served"),
    ):
        assert main(argv) == 1
        assert says in capsys.readouterr().err


def test_labels_of_records():
    source = make_source({"name": "emoji", "split": "val"})
    record = source.read(0)
    make = lambda **more: latent_example(record, np.random.default_rng(0), tokenizer=None, size=16, **more)
    assert make(classes=STYLES, label="style")["label"] == STYLES.index(record.meta["style"])
    assert "label" not in make()
    for classes, label, says in (
        (("a", "b"), "style", "is none of the 2 of data.classes"),
        (STYLES, "colour", "has no colour"),
    ):
        with pytest.raises(InputError, match=says):
            make(classes=classes, label=label)


def test_names_from_a_file(tmp_path):
    config = load_config(str(ROOT / "configs/latent/latent.py:cin"))
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(1000)) + "\n")
    override(config, "data.classes", str(tmp_path / "classes.txt"))
    assert latent.class_names(config)[999] == "c999"
    with config.unlocked():
        config.frozen.clip = "emoji"
    with pytest.raises(InputError, match="with model.classes there is no clip"):
        latent.check(config)
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="must be model.classes=1000 distinct names, got 2"):
        latent.class_names(config)


@pytest.mark.slow  # launch/test -m slow tests/train/test_latent_classes.py
def test_training_of_classes(tiny_run, tmp_path):
    """The loss falls, and the part keeps the names."""
    config = load_config(str(ROOT / "configs/latent/latent.py:tiny-cin"))
    settings = {
        "steps": 6, "eval_every": 6, "checkpoint_every": 6, "data.backend": "numpy", "optimizer.eps": 1e-6,
        "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 1, "drop_text": 0.3,
    }  # fmt: skip
    for key, value in settings.items():
        override(config, key, value)
    override(config, "frozen.autoencoder", str(tiny_run("autoencoder")))
    latent.train_and_evaluate(config, str(tmp_path / "run"))
    meta, params, _ = load_run(tmp_path / "run")
    assert meta["part"]["class_names"] == list(STYLES)
    curve = losses(tmp_path / "run")
    assert len(curve) == 6 and np.mean(curve[-2:]) < np.mean(curve[:2]), curve
    assert params["class_embed"]["embedding"].shape == (5, 32)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] > 0


def test_what_a_dropped_class_teaches():
    """Kept labels teach their own rows of the table, and dropped ones the last row."""
    config = load_config(str(ROOT / "configs/latent/latent.py:tiny-cin"))
    part = random_latent(config)
    x0 = np.float32(np.random.default_rng(0).normal(size=(2, 8, 8, 4)))
    schedule = training_tables(schedule_of(part.config["diffusion"]))

    @jax.jit
    def taught(params, drop):
        loss = lambda params: latent.loss_fn(
            params, jax.random.key(0), {"label": jnp.array([0, 2])}, frozen={"autoencoder": None},
            model=LatentUNet(**part.config["model"]), encode=lambda *args: x0, beside=None, tables=schedule,
            prediction="eps", clip=None, drop_text=drop,
        )[0]  # fmt: skip
        return jnp.abs(jax.grad(loss)(params)["class_embed"]["embedding"]).sum(1) > 0

    assert taught(part.params, 0.0).tolist() == [True, False, True, False, False]
    assert taught(part.params, 1.0).tolist() == [False] * 4 + [True]
