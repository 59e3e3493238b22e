"""Every stage on the embedded data: it learns, resumes bit for bit, and does not depend on the mesh."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.runs import STAGES, STEPS, Repeating, Signalling, losses, train_tiny, wrap_batches
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import load_bundle
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main

# Tests of one stage share its run, so they go to one worker.
GROUPS = {"clip": "stages_1", "decoder": "stages_1", "prior": "stages_2", "upsampler_16": "stages_2"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(group)) for name, group in GROUPS.items()])
def name(request):
    return request.param


@pytest.fixture
def beside(tiny_run, name, tmp_path):
    """A fresh run folder with the shared CLIP where the configuration looks for it."""
    if name in ("prior", "decoder"):
        (tmp_path / "clip").symlink_to(tiny_run("clip"))
    return tmp_path / name


def test_run_writes_what_it_promises(name, tiny_run):
    """Metrics of every step, TensorBoard events, checkpoints, and sample grids where the stage draws."""
    workdir = tiny_run(name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate", "examples_per_second", "step_time"):
        assert all(np.isfinite(row[key]) for row in steps), key
    assert list((workdir / "tb").glob("events*"))
    assert (workdir / "checkpoints" / str(STEPS)).is_dir()
    if name in ("decoder", "upsampler_16"):
        assert (workdir / "samples" / f"{STEPS:07d}.png").stat().st_size > 1000
    evaluations = [row for row in rows if "loss" not in row]
    assert len(evaluations) == 1 and all(np.isfinite(v) for v in evaluations[0].values())
    meta, params, step = load_run(workdir)
    assert step == STEPS and meta["name"] == name
    assert len(meta["provenance"]["data_checksum"]) == 64
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_loss_on_a_fixed_batch_falls(name, beside, monkeypatch):
    wrap_batches(monkeypatch, Repeating)
    train_tiny(name, beside, eval_every=0)
    curve = losses(beside)
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3]), curve


def test_eight_devices_equal_one(name, tiny_run, beside, monkeypatch):
    """The first ten losses, dropout on, Adam epsilon 1e-6."""
    assert jax.device_count() == 8
    monkeypatch.setattr(STAGES[name][0], "make_mesh", lambda shape: sharding.make_mesh(None, jax.devices()[:1]))
    train_tiny(name, beside, eval_every=0)
    np.testing.assert_allclose(losses(beside)[:10], losses(tiny_run(name))[:10], rtol=1e-4)


def test_stopped_and_resumed_equals_running_through(name, tiny_run, beside, monkeypatch):
    """SIGTERM during step 5; the same command again ends with the same bits."""
    with monkeypatch.context() as patch:
        wrap_batches(patch, lambda inner: Signalling(inner, at=5))
        with pytest.raises(SystemExit) as stopped:
            train_tiny(name, beside)
        assert stopped.value.code == 130
    assert load_run(beside)[2] == 5
    train_tiny(name, beside)
    (_, resumed, step), (_, through, _) = load_run(beside), load_run(tiny_run(name))
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    assert losses(beside) == losses(tiny_run(name))


@pytest.mark.xdist_group("stages_2")
def test_init_from_a_run(tiny_run, tmp_path):
    """A new run may start from trained weights: its first loss is not a fresh network's."""
    source = tiny_run("upsampler_16")
    train_tiny("upsampler_16", tmp_path / "run", init_from=str(source))
    assert losses(tmp_path / "run")[0] < 0.95 * losses(source)[0]
    assert load_run(tmp_path / "run")[0]["provenance"]["initialised_from"]["step"] == STEPS


@pytest.mark.xdist_group("stages_1")
def test_bundle_of_runs(tiny_run, tmp_path, capsys):
    """`unclip bundle` collects the runs' averaged weights, measures them, and they sample."""
    runs = {name: tiny_run(name) for name in STAGES}
    assert main(["bundle", str(runs["clip"].parent), "--out", str(tmp_path / "b"), "--rows", "8", "--sampling", "decoder.steps=2"]) == 0
    assert "own caption first of 8" in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "b")
    assert set(bundle.parts) == set(STAGES) and bundle.sampling["decoder"]["steps"] == 2
    assert bundle.provenance["figures"]["chance"] == 0.125 and bundle.provenance["training"]["prior"]["step"] == STEPS
    trained = load_run(runs["prior"])[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16)), bundle.parts["prior"].params, trained)


@pytest.mark.xdist_group("stages_2")
def test_another_model_in_the_workdir_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run("upsampler_16"), tmp_path / "run")
    with pytest.raises(ValueError, match="another workdir"):
        train_tiny("upsampler_16", tmp_path / "run", model__unet__channels=12)


def test_missing_clip_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="train 'clip' first"):
        train_tiny("prior", tmp_path / "prior")


@pytest.mark.xdist_group("stages_2")
def test_not_finite_gradient_skips_the_update(tmp_path, monkeypatch):
    """A batch of NaN leaves parameters and optimizer alone; the data goes on."""

    class Poisoned(Repeating):
        def __next__(self):
            return {k: np.full_like(v, np.nan) for k, v in super().__next__().items()}

    wrap_batches(monkeypatch, Poisoned)
    train_tiny("upsampler_16", tmp_path / "run", eval_every=0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == 1 for row in rows)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(tmp_path / "run")[1]))
