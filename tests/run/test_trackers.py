"""Figures and pictures of a run reach the trackers. MLflow's is a real server with a database."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request

import jax
import pytest

from tests.runs import SMALL, STEPS, Signalling, tiny_config, train_tiny, wrap_batches
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.compile import step as compiled
from unclip_jax.run import hardware, loop, resume, trackers
from unclip_jax.sharding import make_mesh

NAME = "upsampler_16"


def train(run, **changes):
    return train_tiny(NAME, run, **SMALL, **changes)


def figures(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """MLflow's own server on loopback, with SQLite, which also serves the artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder / 'runs.db'}",
        "--workers",
        "1",
    ]
    command += [
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_mlflow(server, tmp_path, monkeypatch):
    """A training that stops and resumes is one run on the server, with all settings, figures and samples."""
    import mlflow

    client, run = mlflow.MlflowClient(tracking_uri=server), tmp_path / "run"
    with monkeypatch.context() as patch:
        wrap_batches(patch, lambda inner: Signalling(inner, 6))
        with pytest.raises(SystemExit):
            train(run, track__mlflow=server, track__experiment="small")
    number = (run / "mlflow_run").read_text().strip()
    assert client.get_run(number).info.status == "KILLED"
    train(run, track__mlflow=server, track__experiment="small")
    recorded = client.get_run(number)
    assert recorded.info.status == "FINISHED" and (run / "mlflow_run").read_text().strip() == number
    assert recorded.info.experiment_id == client.get_experiment_by_name("small").experiment_id
    assert (
        recorded.data.params["optimizer.learning_rate"] == "0.003"
        and recorded.data.params["stage"] == "upsampler"
    )
    expected = figures(run)
    for key in ("loss", "grad_norm", "examples_per_second", "input_wait", "eval_loss"):
        history = {metric.step: metric.value for metric in client.get_metric_history(number, key)}
        assert history == {row["step"]: pytest.approx(row[key], rel=1e-6) for row in expected if key in row}
    (picture,) = client.list_artifacts(number, "samples")
    local = client.download_artifacts(number, picture.path, str(tmp_path))
    assert open(local, "rb").read() == (run / "samples" / f"{STEPS:07d}.png").read_bytes()
    config = json.load(open(client.download_artifacts(number, "config.json", str(tmp_path))))
    assert config["batch_size"] == load_run(run)[0]["config"]["batch_size"]


def test_a_server_that_does_not_answer(tmp_path, capsys):
    """The command fails before the first step, with one line that names the server."""
    command = [
        "train",
        "configs/emoji/upsampler.py:tiny",
        "--workdir",
        str(tmp_path / "run"),
        "--set",
        "track.mlflow=http://127.0.0.1:9",
    ]
    assert main([*command, "--set", "data.backend=numpy"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "MLflow at http://127.0.0.1:9 does not answer" in message and "track.mlflow=None" in message
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    """The run logs failures and disables the tracker after the third. metrics.jsonl has all figures."""
    calls = []

    class Failing(trackers.TensorBoard):
        def scalars(self, step, values):
            calls.append(step)
            raise ConnectionError("gone")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Failing)
    train(tmp_path / "run", eval_every=0)
    assert calls == [1, 2, 3] and [row["step"] for row in figures(tmp_path / "run")] == list(
        range(1, STEPS + 1)
    )
    assert (
        "tensorboard failed (gone); the figures that it missed are in metrics.jsonl; "
        "it is disabled from here on" in caplog.text
    )


def test_wandb(tmp_path, monkeypatch):
    """The calls to wandb, against a stand-in. A resumed training continues the same run."""
    made = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.id, self.logged, self.code = settings, settings["id"] or "abc", {}, None
            made.append(self)

        def log(self, values, step):
            self.logged.setdefault(step, {}).update(values)

        def finish(self, exit_code):
            self.code = exit_code

    fake = types.SimpleNamespace(init=lambda **settings: Run(**settings), Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with monkeypatch.context() as patch:
        wrap_batches(patch, lambda inner: Signalling(inner, 2))
        with pytest.raises(SystemExit):
            train(tmp_path / "run", track__wandb="project")
    train(tmp_path / "run", track__wandb="project")
    first, second = made
    assert (
        first.settings["project"] == "project"
        and first.settings["id"] is None
        and second.settings["id"] == "abc"
    )
    assert (
        sorted(first.logged) == [1, 2]
        and sorted(second.logged) == list(range(3, STEPS + 1))
        and (first.code, second.code) == (0, 0)
    )
    assert second.logged[STEPS]["samples"] == (
        "image",
        str(tmp_path / "run" / "samples" / f"{STEPS:07d}.png"),
    )
    monkeypatch.setattr(fake, "init", lambda **settings: (_ for _ in ()).throw(RuntimeError("not logged in")))
    with pytest.raises(OSError, match="cannot be used .not logged in."):
        train(tmp_path / "other", track__wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(tmp_path / "other", track__wandb="project")


def test_what_a_record_tells_of_the_machine(tmp_path, monkeypatch):
    """A record has input wait, checkpoint and evaluation time, memory, and MFU if the peak is known."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(hardware.CHIPS, kind, hardware.Chip("here", 1e12, 1e9, 1e9, 1e9))
    train(tmp_path / "run", checkpoint_every=6, eval_every=6)
    rows = [row for row in figures(tmp_path / "run") if "loss" in row]
    assert all(
        0 <= row["input_wait"] < 60 and row["bad_records"] == 0 and 0.05 < row["host_memory_gib"] < 64
        for row in rows
    )
    for stall in ("checkpoint_seconds", "evaluation_seconds"):
        assert [row["step"] for row in rows if stall in row] == [7]
    operations = [row["mfu"] * row["step_time"] * 8 * 1e12 for row in rows]
    assert operations == pytest.approx([operations[0]] * STEPS, rel=1e-5) and 1e6 < operations[0] < 1e12


def test_remat_is_not_counted(monkeypatch):
    """Operations that remat computes twice do not count as the model's."""
    monkeypatch.setitem(
        hardware.CHIPS, jax.devices()[0].device_kind, hardware.Chip("here", 1e12, 1e9, 1e9, 1e9)
    )
    mesh, counts = make_mesh(), []
    for remat in ("none", "full"):
        config = tiny_config(NAME, remat=remat)
        step = compiled.train_step(config, None, mesh)
        arguments = step.state, step.frozen, step.batch
        again = hardware.flops(jax.make_jaxpr(step.update)(*arguments))
        counts.append((again, loop.count_operations(step.stage, 1, mesh, *arguments)))
    (plain, model), (twice, counted) = counts
    assert plain == model == counted < twice


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    """The lowest `eval_loss` decides. An unknown figure is refused with the names of the known ones."""
    given = iter([3.0, 1.0, 2.0])
    original = resume.keep_best
    monkeypatch.setattr(loop, "keep_best", lambda *args: original(*args[:-1], {"eval_loss": next(given)}))
    train(tmp_path / "run", eval_every=4, keep_best="-eval_loss")
    meta, _, step = load_run(tmp_path / "run" / "best")
    assert step == 8 and meta["figures"] == {"eval_loss": 1.0} and load_run(tmp_path / "run")[2] == STEPS
    original(
        types.SimpleNamespace(keep_best="eval_loss"),
        tmp_path / "new",
        1,
        None,
        {},
        {"eval_loss": float("nan")},
    )
    assert not (tmp_path / "new").exists()
    for best, every, words in (
        ("eval_loss", 0, "keep_best=eval_loss needs evaluations"),
        ("cosine", 4, "keep_best=cosine names no figure of the evaluation; its figures are eval_loss"),
    ):
        with pytest.raises(ValueError, match=words):
            train(tmp_path / "new", eval_every=every, keep_best=best)
    with pytest.raises(ValueError, match="keep_best names 'cosine'; the evaluation's figures are eval_loss"):
        original(types.SimpleNamespace(keep_best="cosine"), tmp_path, 1, None, {}, {"eval_loss": 1.0})
