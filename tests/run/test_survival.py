"""What a run survives: lost hosts, kills at any moment, damaged checkpoints, hanging devices, NaN."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.runs import SMALL, STEPS, Repeating, losses, tiny_config, train_tiny, wrap_batches
from unclip_jax.checkpoint.store import CheckpointStore, load_run
from unclip_jax.run.hosts import RESTART
from unclip_jax.run.logger import Logger, parse_profile
from unclip_jax.run.resume import check_best, restore_or_init, resumed_provenance

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
LONG = (
    *(
        "steps=5000",
        "eval_every=0",
        "checkpoint_every=5000",
        "data.backend=numpy",
        "track.tensorboard=false",
        "watchdog=10.0",
    ),
    "model.unet.channel_mult=(1,)",
)
RUN = """
import sys
import jax
address, count, index, workdir = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if count > 1:
    jax.distributed.initialize(address, count, index)
from tests.runs import train_tiny
from unclip_jax.train import upsampler
if count > 1:  # on a pod, a host's devices need not be neighbours on the mesh either
    make_mesh, devices = upsampler.make_mesh, jax.devices()
    upsampler.make_mesh = lambda shape: make_mesh(shape, devices[::2] + devices[1::2])
# TensorBoard would wait for the import of TensorFlow.
train_tiny("upsampler_16", workdir, track__tensorboard=False, **eval(sys.argv[5]))
"""


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run without interruptions."""
    run = tmp_path_factory.mktemp("small") / "run"
    train_tiny("upsampler_16", run, eval_every=0, **SMALL)
    return run


def start(workdir, index=0, count=1, port=0, devices=4, log=subprocess.PIPE, **changes):
    """Starts a training process. With several hosts, each one has `devices` devices."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}",
    }
    command = [
        sys.executable,
        "-c",
        RUN,
        f"127.0.0.1:{port}",
        str(count),
        str(index),
        str(workdir),
        repr(SMALL | changes),
    ]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=log, text=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_step(workdir, step, processes, timeout=240):
    end = time.monotonic() + timeout
    while steps_done(workdir) < step:
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert time.monotonic() < end and not ended, ended
        time.sleep(0.02)


def test_two_hosts_are_one(small_run, tmp_path):
    """Two processes of four devices have the losses of one process with eight devices.

    Each process reads its own rows. SIGTERM to one of them stops both after the same step. One process with
    eight devices then resumes from the checkpoint that the two wrote.
    """
    port, run = free_port(), tmp_path / "run"
    hosts = [start(run, i, 2, port, checkpoint_every=100, eval_every=0) for i in range(2)]
    try:
        wait_for_step(run, 3, hosts)
        hosts[1].send_signal(signal.SIGTERM)
        errors = [host.communicate(timeout=240)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [RESTART] * 2, errors
    meta, _, stopped = load_run(run)
    assert 3 <= stopped < STEPS and meta["name"] == "upsampler_16"
    train_tiny("upsampler_16", run, eval_every=0, **SMALL)
    curve, expected = losses(run), losses(small_run)
    assert len(curve) == STEPS
    np.testing.assert_allclose(curve[:stopped], expected[:stopped], rtol=1e-4)
    np.testing.assert_allclose(curve, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "lost", [pytest.param(1, id="other"), pytest.param(0, id="coordinator", marks=pytest.mark.slow)]
)
def test_a_lost_host_ends_the_others(tmp_path, lost):
    """The other host ends with a status on which a launcher starts the job again.

    It ends at once, or when the watchdog sees that no step finishes. If jax's coordination service notices
    the loss first, jax aborts the process.
    """
    run, port = tmp_path / "run", free_port()
    command = [
        sys.executable,
        "-m",
        "unclip_jax.cli.main",
        "train",
        "configs/emoji/upsampler.py:tiny",
        "--workdir",
        str(run),
    ]
    command += ["--distributed", *(part for setting in LONG for part in ("--set", setting))]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {FLAGS}",
    }
    # A SLURM job of two tasks, which jax detects by itself. The port depends on the job's number.
    env |= {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    env_of = lambda i: env | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    hosts = [
        subprocess.Popen(command, cwd=ROOT, env=env_of(i), stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        wait_for_step(run, 2, hosts)
        hosts[lost].kill()
        error = hosts[1 - lost].communicate(timeout=120)[1]
    finally:
        for host in hosts:
            host.kill()
    assert hosts[1 - lost].returncode in {RESTART, -signal.SIGABRT}, error
    if hosts[1 - lost].returncode == RESTART:
        assert (
            "another host is gone or does not answer; start the same command again" in error
            or "or another host hangs" in error
        )


def kill_and_resume(workdir, reference, kills, seed):
    """Kills a run at random times and resumes it. The result must be that of an uninterrupted run."""
    chance = random.Random(seed)
    for _ in range(kills):
        before = steps_done(workdir)
        process = start(workdir, devices=8, checkpoint_every=1, eval_every=0)
        while process.poll() is None and steps_done(workdir) <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))  # the next step, or the checkpoint being written
        process.kill()
        process.communicate()
    train_tiny("upsampler_16", workdir, checkpoint_every=1, eval_every=0, **SMALL)
    (_, resumed, step), (_, through, _) = load_run(workdir), load_run(reference)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    assert losses(workdir) == losses(reference)


def test_killed_at_any_moment(small_run, tmp_path):
    """SIGKILLs, also while a checkpoint is written, do not change a bit of parameters and losses."""
    kill_and_resume(tmp_path / "run", small_run, kills=2, seed=0)


@pytest.mark.slow
def test_killed_many_times(small_run, tmp_path):
    for seed in range(5):
        kill_and_resume(tmp_path / f"run{seed}", small_run, kills=6, seed=seed)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, small_run, caplog):
    """If the newest checkpoint has a flipped byte, the run warns and resumes from the one before."""
    run = tmp_path / "run"
    train_tiny("upsampler_16", run, eval_every=0, checkpoint_every=4, **SMALL)
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [8, STEPS]
    for file in (run / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(bytes(data))
    with caplog.at_level("WARNING", logger="unclip_jax"):
        train_tiny("upsampler_16", run, eval_every=0, checkpoint_every=4, **SMALL)
    assert (
        f"checkpoint {STEPS} in" in caplog.text
        and "is damaged" in caplog.text
        and "going back to 8" in caplog.text
    )
    (_, again, step), (_, through, _) = load_run(run), load_run(small_run)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, again, through)


def test_changed_settings_are_printed(tmp_path, small_run, capsys):
    """A resumed run prints the settings and the data that differ from those in the checkpoint.

    It does not go back to fewer steps than are done.
    """
    shutil.copytree(small_run, tmp_path / "run")
    changes = {"eval_every": 0, "data__train__split": "val"} | SMALL
    train_tiny("upsampler_16", tmp_path / "run", ema_decay=0.5, **changes)
    error = capsys.readouterr().err
    assert f"all {STEPS} steps are done already" in error
    assert "ema_decay was" in error and "is 0.5" in error and "the training data has changed" in error
    assert "learning_rate was" not in error
    with pytest.raises(ValueError, match=f"{STEPS} steps are done already, more than steps={STEPS - 1}"):
        train_tiny("upsampler_16", tmp_path / "run", steps=STEPS - 1, **changes)


def test_changed_data_is_noted():
    """The provenance of a resumed run names the data of before, and up to which step they were read."""
    before = {"started": "then", "data_checksum": "a"}
    assert resumed_provenance(before, {"started": "now", "data_checksum": "a"}, 6) == before
    noted = resumed_provenance(before, {"started": "now", "data_checksum": "b"}, 6)
    first = {"until_step": 6, "data_checksum": "a"}
    assert noted == {"started": "then", "data_checksum": "b", "earlier_data": [first]}
    assert resumed_provenance(noted, {"data_checksum": "a"}, 9)["earlier_data"] == [
        first,
        {"until_step": 9, "data_checksum": "b"},
    ]
    start = {"data_checksum": "a", "eval_checksums": {"val": "x"}}
    noted = resumed_provenance(start, start | {"eval_checksums": {"val": "y"}}, 6)
    assert noted["eval_checksums"] == {"val": "y"} and noted["data_checksum"] == "a"
    assert noted["earlier_data"] == [{"until_step": 6, "eval_checksums": {"val": "x"}}]
    assert resumed_provenance({"data_checksum": "a"}, start, 6) == {"data_checksum": "a"}  # an older run


@pytest.mark.parametrize(
    "change, words",
    [
        ({"provenance": {"eval_checksums": {"val": "y"}}}, "another evaluation data"),
        ({"config": {"keep_best": "cosine", "eval": {"rows": 4}}}, "another keep_best"),
        ({"config": {"keep_best": "-loss", "eval": {"rows": 8}}}, "another eval,"),
    ],
)
def test_a_best_checkpoint_of_another_evaluation_is_not_compared(tmp_path, change, words):
    """The figures would be of other data, or another figure; `best/` is not replaced by such a one."""
    settings = {"keep_best": "-loss", "eval": {"rows": 4}}
    best = {"config": settings, "provenance": {"eval_checksums": {"val": "x"}}}
    config = SimpleNamespace(keep_best="-loss")
    check_best(config, tmp_path, best)  # there is none yet
    with contextlib.closing(CheckpointStore(tmp_path / "best", keep=1)) as store:
        store.write(4, {"ema_params": {"a": np.zeros(1)}}, best)
    check_best(config, tmp_path, best)
    check_best(SimpleNamespace(keep_best=None), tmp_path, best | change)
    with pytest.raises(ValueError, match=f"best was chosen with {words}"):
        check_best(config, tmp_path, best | change)


def test_a_run_of_another_part_is_not_resumed():
    store = SimpleNamespace(
        workdir="run", latest=lambda: 4, newest_meta=lambda: {"name": "decoder", "part": {}}
    )
    meta = {"name": "clip", "config": {"steps": 8}, "part": {"frozen": {}}}
    with pytest.raises(ValueError, match="run is a run of decoder, not of clip; use another workdir"):
        restore_or_init(store, None, None, meta, None)


def test_bad_lines_of_the_metrics_are_set_aside(tmp_path, caplog):
    """They do not keep a run from going on. Later steps and a line that was cut off are dropped."""
    good, later, cut = b'{"step": 2, "loss": 1.0}\n', b'{"step": 9}\n', b'{"step": 3, "lo'
    bad = [b"\n", b"[1]\n", b"\xff\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"null\n", b"{\n"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([bad[0], good, *bad[1:], good, later, cut]))
    config = tiny_config("upsampler_16", track__tensorboard=False)
    Logger(config, tmp_path, "upsampler_16", 4).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good * 2
    assert (tmp_path / "metrics.bad.jsonl").read_bytes() == b"".join(bad)
    assert f"{len(bad)} lines of {tmp_path / 'metrics.jsonl'} are no records" in caplog.text


def test_too_many_skipped_updates_stop_the_run(tmp_path, monkeypatch):
    """The error names the metrics that were not finite. The last checkpoint has finite parameters."""
    monkeypatch.setattr("unclip_jax.run.logger.MAX_SKIPPED", 4)

    class Poisoned(Repeating):
        count = 0

        def __next__(self):
            self.count += 1
            batch = super().__next__()
            return {k: np.full_like(v, np.nan) for k, v in batch.items()} if self.count > 3 else batch

    wrap_batches(monkeypatch, Poisoned)
    with pytest.raises(
        FloatingPointError, match=r"step 7: 4 updates in a row were skipped, their .*loss.* not finite"
    ):
        train_tiny("upsampler_16", tmp_path / "run", eval_every=0, checkpoint_every=2, **SMALL)
    _, params, step = load_run(tmp_path / "run")
    assert step >= 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]


HANGING = """
import sys, time
from tests.runs import train_tiny
from unclip_jax.run import batches
original = batches.train_batches

class Hanging:
    def __init__(self, inner): self.inner, self.count, self.stats = inner, 0, inner.stats
    def __next__(self):
        self.count += 1
        if self.count == 4: time.sleep(600)
        return next(self.inner)
    def close(self): self.inner.close()

batches.train_batches = lambda *args: Hanging(original(*args))
train_tiny(
    "upsampler_16", sys.argv[1], eval_every=0, checkpoint_every=2, watchdog=3.0, track__tensorboard=False,
    **eval(sys.argv[2]),
)
"""


def test_a_run_that_hangs_ends(tmp_path):
    """It prints the stack where it hangs and ends with RESTART. The last checkpoint is intact."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HANGING, str(tmp_path / "run"), repr(SMALL)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == RESTART, done.stderr
    assert "no step finished for" in done.stderr and "__next__" in done.stderr
    assert load_run(tmp_path / "run")[2] == 2


def test_steps_are_heard_between_records(tmp_path):
    """The watchdog learns that a step has finished, even between records. It ignores unfinished steps."""
    config = tiny_config("upsampler_16", steps=100, log_every=100, watchdog=60.0, track__tensorboard=False)
    logger = Logger(config, tmp_path, "upsampler_16", 0)
    try:
        logger.step(1, {"loss": SimpleNamespace(is_ready=lambda: False)})
        assert logger.watchdog.asleep
        logger.pending[0] = 1, {"loss": SimpleNamespace(is_ready=lambda: True)}
        logger.step(2, {"loss": SimpleNamespace(is_ready=lambda: False)})
        assert not logger.watchdog.asleep and logger.finished == 1
    finally:
        logger.close()


def test_traced_steps(tmp_path, monkeypatch):
    """The run traces the requested steps, even if it ends before the last. Wrong settings are refused."""
    train_tiny("upsampler_16", tmp_path / "run", eval_every=0, profile="10:20", **SMALL)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert parse_profile("10:20") == (10, 20) and parse_profile(None) == ()
    for text in ("10", "20:10", "a:b", "0:3"):
        with pytest.raises(ValueError, match="profile must be FIRST:LAST"):
            parse_profile(text)
