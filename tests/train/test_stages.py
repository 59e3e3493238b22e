"""Every stage on the embedded data: it learns, resumes bit for bit, and does not depend on the mesh."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import STAGES, STEPS, Repeating, Signalling, losses, tiny_config, wrap_batches
from unclip_jax import sharding
from unclip_jax.checkpoint.store import load_run

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=list(STAGES))
def name(request):
    return request.param


def train(name, tiny_runs, workdir, **changes):
    """Runs a stage beside the shared tiny CLIP."""
    changes = changes if name in ("clip", "upsampler_16") else {"clip": str(tiny_runs / "clip"), **changes}
    return STAGES[name][0].train_and_evaluate(tiny_config(name, ROOT, **changes), str(workdir))


def test_run_writes_what_it_promises(name, tiny_runs):
    """Metrics of every step, TensorBoard events, checkpoints, and sample grids where the stage draws."""
    workdir = tiny_runs / name
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
    moved = [float(np.abs(x).max()) for x in jax.tree.leaves(params)]
    assert all(np.isfinite(moved))


def test_loss_on_a_fixed_batch_falls(name, tiny_runs, tmp_path, monkeypatch):
    wrap_batches(monkeypatch, Repeating)
    train(name, tiny_runs, tmp_path / name, eval_every=0)
    curve = losses(tmp_path / name)
    assert np.mean(curve[-4:]) < 0.85 * np.mean(curve[:4]), curve


def test_eight_devices_equal_one(name, tiny_runs, tmp_path, monkeypatch):
    """The first ten losses, dropout on, Adam epsilon 1e-6."""
    assert jax.device_count() == 8
    monkeypatch.setattr(STAGES[name][0], "make_mesh", lambda shape: sharding.make_mesh(None, jax.devices()[:1]))
    train(name, tiny_runs, tmp_path / name, eval_every=0)
    np.testing.assert_allclose(losses(tmp_path / name)[:10], losses(tiny_runs / name)[:10], rtol=1e-4)


def test_stopped_and_resumed_equals_running_through(name, tiny_runs, tmp_path, monkeypatch):
    """SIGTERM during step 5; the same command again ends with the same bits."""
    with monkeypatch.context() as patch:
        wrap_batches(patch, lambda inner: Signalling(inner, at=5))
        with pytest.raises(SystemExit) as stopped:
            train(name, tiny_runs, tmp_path / name)
        assert stopped.value.code == 130
    assert load_run(tmp_path / name)[2] == 5
    train(name, tiny_runs, tmp_path / name)
    (_, resumed, step), (_, through, _) = load_run(tmp_path / name), load_run(tiny_runs / name)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    assert losses(tmp_path / name) == losses(tiny_runs / name)


def test_init_from_a_run(name, tiny_runs, tmp_path):
    """A new run may start from trained weights: its first loss is not a fresh network's."""
    config = tiny_config(name, ROOT, eval_every=0, checkpoint_every=0, steps=3, optimizer__learning_rate=1e-9)
    if "clip" in config:
        with config.unlocked():
            config.clip = str(tiny_runs / "clip")
    STAGES[name][0].train_and_evaluate(config, str(tmp_path / name), init_from=str(tiny_runs / name))
    assert losses(tmp_path / name)[0] < losses(tiny_runs / name)[0]


def test_another_model_in_the_workdir_is_refused(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs / "upsampler_16", tmp_path / "upsampler_16")
    config = tiny_config("upsampler_16", ROOT, model__unet__channels=12)
    with pytest.raises(ValueError, match="another workdir"):
        STAGES["upsampler_16"][0].train_and_evaluate(config, str(tmp_path / "upsampler_16"))


def test_missing_clip_is_one_line(tmp_path):
    config = tiny_config("prior", ROOT)
    with pytest.raises(FileNotFoundError, match="train 'clip' first"):
        STAGES["prior"][0].train_and_evaluate(config, str(tmp_path / "prior"))


def test_not_finite_gradient_skips_the_update(tiny_runs, tmp_path, monkeypatch):
    """A batch of NaN leaves parameters and optimizer alone; the data goes on."""

    class Poisoned(Repeating):
        def __next__(self):
            batch = super().__next__()
            return {k: np.full_like(v, np.nan) if v.dtype == np.float32 else v for k, v in batch.items()}

    wrap_batches(monkeypatch, Poisoned)
    train("upsampler_16", tiny_runs, tmp_path / "run", eval_every=0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == 1 for row in rows)
    _, params, _ = load_run(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
