#!/usr/bin/env python3
"""Runs MLflow's server for launch/tracking, and starts it again whenever it ends: `tracking_server.py DIR`.

DIR holds `settings.json`, written by launch/tracking (`host`, `port`, `database`, `artifacts` and the
`python` that has MLflow). While the server runs, this process holds a lock on `supervisor.lock`, which has
its process id, and `server.json` has the server's process group and whether it has answered. SIGTERM ends
both.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

SETTINGS, LOCK, SERVER, LOG = "settings.json", "supervisor.lock", "server.json", "server.log"
STOP_SECONDS = 10  # that the server gets to end by itself


def address(settings):
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings["host"], settings["host"])
    return f"http://{f'[{host}]' if ':' in host else host}:{settings['port']}"


def with_driver(database):
    """A database's URI that names PostgreSQL's client: the default is not the same in every SQLAlchemy."""
    return re.sub("^postgresql://", "postgresql+psycopg2://", database)


def read_json(path):
    """A JSON object from a file; an empty one where there is no file, or an unfinished one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path, value):
    """Writes a file that only its owner may read (it may hold a password), whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    partial.replace(path)


def answers(settings):
    """Whether the server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address(settings)}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def supervise(folder):
    """Runs the server, and starts it again when it ends, until SIGTERM.

    Returns:
      The exit status: 0 after SIGTERM; 1 when another supervisor runs, or the server ends and never answered.
    """
    lock = open(folder / LOCK, "a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 1
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    settings, answered, pause = read_json(folder / SETTINGS), False, 1
    while not stopping:
        began = time.monotonic()
        command, env = server_command(settings)
        server, ready = subprocess.Popen(command, env=env, start_new_session=True), False
        write_json(folder / SERVER, {"group": server.pid, "ready": ready})
        while server.poll() is None and not stopping:
            if not ready and answers(settings):
                ready = answered = True
                write_json(folder / SERVER, {"group": server.pid, "ready": ready})
            time.sleep(0.1)
        if stopping:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # MLflow's process starts others
        server.wait()
        (folder / SERVER).unlink(missing_ok=True)
        if not answered:
            return 1
        pause = 1 if time.monotonic() - began > 60 else min(2 * pause, 30)
        if not stopping:
            print(
                f"launch/tracking: the server ended with status {server.returncode}; it is started again",
                flush=True,
            )
            wake = time.monotonic() + pause
            while time.monotonic() < wake and not stopping:
                time.sleep(0.1)
    return 0


def server_command(settings):
    """The command of MLflow's server and its environment, which holds what may have a password."""
    command = [settings["python"], "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", settings["host"], "--port", str(settings["port"])]
    command += ["--serve-artifacts", "--artifacts-destination", settings["artifacts"]]
    env = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_UVICORN_OPTS": "--no-access-log",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": with_driver(settings["database"]),
    }
    return command, env


if __name__ == "__main__":
    sys.exit(supervise(pathlib.Path(sys.argv[1])))
