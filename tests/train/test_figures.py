"""FID and the like at a stage's evaluations, by a small network in place of Inception."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.evaluate.fake import FakeNetwork
from tests.runs import random_autoencoder, random_bundle, tiny_config, train_tiny
from unclip_jax.checkpoint.bundle import Bundle, save_bundle
from unclip_jax.data import ops
from unclip_jax.data.examples import picture_example
from unclip_jax.data.sources import make_source
from unclip_jax.metrics.fid import frechet_distance
from unclip_jax.metrics.kid import kernel_inception_distance
from unclip_jax.metrics.precision_recall import prdc
from unclip_jax.run import features
from unclip_jax.run.batches import Data
from unclip_jax.sharding import make_mesh
from unclip_jax.train import upsampler
from unclip_jax.train.figures import IMAGE_FIGURES, image_figures

ROWS = 20


@pytest.fixture
def network(monkeypatch):
    made = FakeNetwork()
    monkeypatch.setattr(features, "open_network", lambda name, outputs: made)
    return made


def prepared(rows=ROWS):
    source = make_source({"name": "emoji", "split": "val"})
    config = ConfigDict({"eval_every": 5, "seed": 0, "eval": {"fid_rows": rows, "batch_size": 8}})
    stage = SimpleNamespace(example=functools.partial(picture_example, size=16, crop_scale=None))
    return image_figures(stage, config, make_mesh(), Data(source, {"eval": source})), source


def test_figures_equal_those_of_the_images(network):
    """Noise against the held-out images, whose features are computed once."""
    measure, source = prepared()
    draw = lambda batch, key: jax.random.uniform(key, batch["image"].shape, minval=-1)
    drawn = []
    found = measure(lambda batch, key: drawn.append(draw(batch, key)) or drawn[-1], 5)
    real = [ops.resize_then_crop(ops.decode_image(source.read(i).image), 16) for i in range(ROWS)]
    reference = FakeNetwork()(real)["pool"]
    samples = FakeNetwork()(list(ops.to_uint8(np.concatenate(drawn)[:ROWS])))["pool"]
    assert set(found) == set(IMAGE_FIGURES)
    assert found["fid"] == pytest.approx(frechet_distance(samples, reference), rel=1e-4)
    expected = kernel_inception_distance(samples, reference, subset_size=ROWS).mean
    assert found["kid"] == pytest.approx(expected, rel=1e-3)
    rates = prdc(reference, samples)
    assert (found["precision"], found["recall"]) == (rates.precision, rates.recall)
    before = len(network.calls)
    other = measure(draw, 10)
    assert other["fid"] != found["fid"] and sum(network.calls[before:]) == ROWS
    same = measure(lambda batch, key: batch["image"], 15)
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1


def test_rows_out_of_range(network):
    for rows in (9, 10_000):
        with pytest.raises(
            ValueError, match=f"eval.fid_rows={rows} must be 0, or between 10 and the 685 rows"
        ):
            prepared(rows)
    assert prepared(0)[0](None, 5) == {}


def test_without_inception_no_run_begins(tmp_path):
    with pytest.raises(FileNotFoundError, match="unclip fetch inception"):
        train_tiny("upsampler_16", tmp_path / "runs" / "u", eval__fid_rows=10)
    assert not (tmp_path / "runs").exists()


def test_embeddings_are_no_pictures(network):
    """Latents alone are nothing to compare with."""
    source = make_source({"name": "emoji", "split": "val"})
    bare = dataclasses.replace(source, pictures=False)
    config = ConfigDict({"eval_every": 5, "eval": {"fid_rows": 10}})
    with pytest.raises(ValueError, match="eval.fid_rows=10 compares with pictures, and .* holds none"):
        image_figures(None, config, make_mesh(), Data(source, {"eval": bare}))


def test_latent_diffusion_measures_its_pictures(network, tmp_path):
    """It decodes what it draws: the network sees pictures of the evaluation source's size and number."""
    parts = random_bundle().parts
    clip = save_bundle(Bundle({"clip": parts["clip"]}), tmp_path / "clip")
    autoencoder = random_autoencoder("kl_autoencoder", tmp_path / "autoencoder", latents=4)
    small = {"model__channel_mult": (1,), "model__heads": (2,), "model__attention_levels": ()}
    small |= {"frozen__clip": str(clip), "frozen__autoencoder": str(autoencoder), "sampling__steps": 1}
    found = train_tiny("latent", tmp_path / "run", steps=3, eval_every=3, eval__fid_rows=10, **small)
    assert set(found) == {"eval_loss", *IMAGE_FIGURES} and found["fid"] > 0
    assert network.calls == [8, 8, 2, 2]


def test_a_stage_records_them_and_keeps_the_best(network, tmp_path):
    """In `metrics.jsonl`, from which trackers get them too. `keep_best` may name them only then."""
    found = train_tiny("upsampler_16", tmp_path / "u", steps=4, eval__fid_rows=10, keep_best="-fid")
    assert set(found) == {"eval_loss", *IMAGE_FIGURES} and np.isfinite(list(found.values())).all()
    rows = [json.loads(line) for line in (tmp_path / "u" / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in rows if "fid" in row)["fid"] == pytest.approx(found["fid"])
    assert (tmp_path / "u" / "best").is_dir()
    config = tiny_config("upsampler_16", keep_best="-fid")
    with pytest.raises(ValueError, match="keep_best=-fid names no figure of the evaluation"):
        upsampler.check(config)
