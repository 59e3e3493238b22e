"""`launch/tracking` with MLflow's real server, on a free port of loopback."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.gcs import Gcs
from unclip_jax.run.trackers import MLflow

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = ["ps", "-A", "-ww", "-o", "pid=,command="]


def tracking(verb, folder, *arguments, **env):
    """Runs the command; what it asks for on the standard input is not answered."""
    command = [sys.executable, str(ROOT / "launch" / "tracking"), verb, "--dir", str(folder), *arguments]
    env = {**os.environ, **env}
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, env=env
    )


@pytest.fixture(scope="module")
def store():
    """launch/tracking_store.py as a module, in this process: to import MLflow takes seconds."""
    return load("tracking_store")


def load(name):
    """A module in launch/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(port):
    """The process ids of the servers that listen on a port."""
    lines = subprocess.run(PROCESSES, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "mlflow" in line and f"--port {port}" in line]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_server_from_start_to_clear(tmp_path, store):
    """It starts, records a run, comes back with its data when it is killed, stops, and is cleared."""
    folder, port = tmp_path / "tracking", free_port()
    url = f"http://127.0.0.1:{port}"
    assert tracking("status", folder).returncode == 3
    try:
        started = tracking("start", folder, "--port", str(port))
        assert started.returncode == 0, started.stderr
        assert f"--set track.mlflow={url}" in started.stdout
        again = tracking("start", folder)
        assert again.returncode == 0 and f"runs already at {url}" in again.stdout
        other = tracking("start", folder, "--port", str(free_port()))
        assert other.returncode == 1 and "runs already with another --port" in other.stderr
        refused = tracking("clear", folder, "--yes")
        assert refused.returncode == 1 and "it is running; stop it first" in refused.stderr

        workdir = tmp_path / "runs" / "clip"
        workdir.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(workdir / "00000010.png")
        tracker = MLflow(workdir, "clip", {"steps": 10}, {"mlflow": url, "experiment": "tests"}, 0)
        tracker.scalars(10, {"loss": 0.5})
        tracker.picture(10, workdir / "00000010.png")

        before = processes_of(port)
        assert before
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: tracking("status", folder).returncode == 0 and set(processes_of(port)).isdisjoint(before)
        )
        kept = tracker.client.get_run(tracker.run).data
        assert kept.metrics == {"loss": 0.5} and kept.params["steps"] == "10"
        assert [f.path for f in tracker.client.list_artifacts(tracker.run, "samples")] == [
            "samples/00000010.png"
        ]

        shown = tracking("status", folder).stdout.splitlines()
        assert shown[0] == "running" and shown[1].split() == ["address", url]
        assert shown[2].split() == ["database", f"sqlite:///{folder}/mlflow.db"]
        assert shown[3].split() == ["artifacts", f"{folder}/artifacts"]
    finally:
        stopped = tracking("stop", folder)
    assert stopped.returncode == 0 and "is stopped" in stopped.stdout and processes_of(port) == []
    assert tracking("stop", folder).stdout.strip() == "the tracking server was not running"
    status = tracking("status", folder)
    assert status.returncode == 3 and status.stdout.splitlines()[0] == "stopped"

    # What PostgreSQL is cleared with drops all of MLflow's tables, and no others.
    database = tmp_path / "copy.db"
    shutil.copy(folder / "mlflow.db", database)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE mine (x)")
    request = {"database": f"sqlite:///{database}", "artifacts": str(folder / "artifacts")}
    assert store.describe(request) == {"database": False, "artifacts": False}
    command = [sys.executable, str(ROOT / "launch" / "tracking_store.py"), "experiments"]
    done = subprocess.run(command, capture_output=True, text=True, input=json.dumps(request))
    assert sorted(json.loads(done.stdout)) == ["0", "1"], done.stderr
    store.delete_tables(request)
    with sqlite3.connect(database) as connection:
        names = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
    assert [name for name in names if not name.startswith("sqlite_")] == ["mine"]

    asked = tracking("clear", folder)
    assert asked.returncode == 1 and "say --yes" in asked.stderr and (folder / "mlflow.db").exists()
    (folder / "artifacts" / "mine").mkdir()
    cleared = tracking("clear", folder, "--yes")
    assert cleared.returncode == 0 and cleared.stdout.count("deleted: ") == 2
    assert [str(p.relative_to(folder)) for p in sorted(folder.rglob("*"))] == ["artifacts", "artifacts/mine"]
    assert "nothing to clear" in tracking("clear", folder, "--yes").stdout


def test_artifacts_in_a_store(tmp_path, monkeypatch, store):
    """Those of the experiments are deleted, and nothing beside them."""
    pytest.importorskip("google.cloud.storage")
    cloud = Gcs(tmp_path)
    try:
        for name, value in cloud.env().items():
            monkeypatch.setenv(name, value)
        request = {"database": f"sqlite:///{tmp_path / 'new.db'}", "artifacts": "gs://bucket/mlflow"}
        assert store.describe(request) == {"database": True, "artifacts": True}
        for name in (
            "mlflow/1/run/artifacts/a.png",
            "mlflow/10/run/artifacts/b.png",
            "mlflow/mine",
            "mlflow2/1/c",
        ):
            cloud.put("bucket", name, b"x")
        assert store.describe(request) == {"database": True, "artifacts": False}
        store.delete_artifacts({**request, "experiments": ["0", "1"]})
        left = sorted(name for _, name in cloud.objects)
        assert left == ["mlflow/10/run/artifacts/b.png", "mlflow/mine", "mlflow2/1/c"]
    finally:
        cloud.close()


def write_settings(folder, **changes):
    """The settings of a server that ran once, and its files."""
    database, artifacts = f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts")
    (folder / "artifacts" / "1").mkdir(parents=True)
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        connection.execute("INSERT INTO experiments VALUES (1)")
    settings = {
        "host": "127.0.0.1",
        "port": 5000,
        "database": database,
        "artifacts": artifacts,
        "python": sys.executable,
    }
    settings |= {"made": [database, artifacts]} | changes
    (folder / "settings.json").write_text(json.dumps(settings))


def test_clear_keeps_what_was_there_before(tmp_path):
    write_settings(tmp_path, made=[])
    cleared = tracking("clear", tmp_path, "--yes")
    assert cleared.returncode == 0 and cleared.stdout.count("kept: ") == 2 and "deleted" not in cleared.stdout
    assert (tmp_path / "mlflow.db").exists() and (tmp_path / "artifacts" / "1").exists()


def test_clear_asks_on_a_terminal(tmp_path):
    """Anything but y deletes nothing."""
    write_settings(tmp_path)
    command = [sys.executable, str(ROOT / "launch" / "tracking"), "clear", "--dir", str(tmp_path)]
    for answer, status in ((b"\n", 1), (b"y\n", 0)):
        terminal, inside = os.openpty()
        process = subprocess.Popen(command, stdin=inside, stdout=subprocess.PIPE)
        os.write(terminal, answer)
        shown = process.communicate(timeout=60)[0].decode()
        os.close(terminal)
        os.close(inside)
        assert process.returncode == status and "Delete all runs: the artifacts" in shown
        assert (tmp_path / "mlflow.db").exists() == (status == 1) == (tmp_path / "artifacts" / "1").exists()


def test_the_server_of_a_team(tmp_path):
    """The database's client is named, and the password is in no command line."""
    settings = {"python": "python", "host": "0.0.0.0", "port": 5001, "artifacts": "gs://bucket/mlflow"}
    server = load("tracking_server")
    command, env = server.server_command({**settings, "database": "postgresql://user:secret@host/mlflow"})
    assert env["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://user:secret@host/mlflow"
    assert "secret" not in " ".join(command) and "gs://bucket/mlflow" in command
    assert server.address(settings) == "http://127.0.0.1:5001"
    assert server.address({**settings, "host": "::1"}) == "http://[::1]:5001"


def test_a_password_is_not_shown(tmp_path):
    write_settings(tmp_path, database="postgresql://user:secret@host/mlflow")
    shown = tracking("status", tmp_path)
    assert shown.returncode == 3 and "postgresql://user:***@host/mlflow" in shown.stdout


def test_a_server_that_cannot_start_says_why(tmp_path):
    """Its database is no database: the log's last line, no supervisor, and no process."""
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    port = free_port()
    done = tracking("start", tmp_path, "--port", str(port))
    assert (
        done.returncode == 1 and "the server did not start: " in done.stderr and "server.log" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1 and processes_of(port) == []
    assert tracking("status", tmp_path).returncode == 3


def test_mistakes_are_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "file").touch()
        for arguments, message in (
            (["--port", str(taken.getsockname()[1])], "choose another --port"),
            (["--port", "70000"], "--port must be between 1 and 65535, got 70000"),
            (
                ["--host", "no.such.host.invalid", "--port", str(free_port())],
                "cannot listen on no.such.host.invalid",
            ),
            (["--database", "mysql://host/db"], "--database must be postgresql://"),
            (
                ["--artifacts", "s3://bucket"],
                "--artifacts must be a folder or gs://bucket/path, got s3://bucket",
            ),
            (["--artifacts", str(tmp_path / "file"), "--port", str(free_port())], "file is not a folder"),
        ):
            done = tracking("start", tmp_path / "new", *arguments)
            assert done.returncode == 1 and message in done.stderr, arguments
            assert done.stderr.count("\n") == 1 and done.stderr.startswith("launch/tracking: "), arguments
            assert not (tmp_path / "new" / "settings.json").exists()


def test_a_missing_client_is_named(tmp_path):
    """PostgreSQL needs psycopg2, also where MLflow is installed."""
    (tmp_path / "hidden" / "psycopg2").mkdir(parents=True)
    hook = "import sys\nfor name in ('psycopg2',): sys.modules[name] = None\n"
    (tmp_path / "hidden" / "sitecustomize.py").write_text(hook)
    arguments = ["--database", "postgresql://user@host/mlflow", "--port", str(free_port())]
    done = tracking("start", tmp_path / "new", *arguments, PYTHONPATH=str(tmp_path / "hidden"))
    assert (
        done.returncode == 1 and "psycopg2: " in done.stderr and "pip install psycopg2-binary" in done.stderr
    )
