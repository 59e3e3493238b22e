"""`benchmarks/gpu.sh`: its steps, with a stand-in for Python; and the whole script with tiny networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = ["karlo-1", "karlo-8", "sd15-1", "sd15-8", "decoder-train", "prior-train", "clip-train"]
# Looks for packages ($MISSING is not there), runs benchmarks (those with $BROKEN fail), and makes the table.
STAND_IN = """#!/bin/bash
case "$1" in
  -c) shift 2; for p in "$@"; do [ "$p" = "$MISSING" ] && exit 1; done; exit 0 ;;
  benchmarks/measure.py) shift; cat "$@"; exit 0 ;;
esac
echo "$@" >> "$CALLS"
[[ -n "$BROKEN" && "$*" = *"$BROKEN"* ]] && { echo "no memory"; exit 1; }
while [ "$1" != --json ]; do shift; done
echo '{"value": 1}' > "$2"
"""


def run(folder, *arguments, **env):
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = {"MISSING": "", "BROKEN": "", "CALLS": str(folder / "calls"), "PYTHON": str(python)} | env
    command = [SCRIPT, "--tiny", "--out", folder / "out", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    calls = folder / "calls"
    made = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, made


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """A step that failed, or whose packages were missing, leaves no rows, and runs the next time."""
    done, calls = run(tmp_path, MISSING="diffusers", BROKEN="clip")
    assert done.returncode == 1 and len(calls) == 3
    said = done.stdout.splitlines()
    assert said[0] == "karlo-1: skipped, it needs torch diffusers transformers"
    assert any(line.startswith("clip-train: FAILED") and line.endswith("no memory") for line in said)
    finished = {path.stem for path in (tmp_path / "out").glob("*.jsonl")}
    assert finished == {"decoder-train", "prior-train"}
    done, calls = run(tmp_path)
    assert done.returncode == 0 and len(calls) == len(STEPS) - 2
    assert "decoder-train: done before" in done.stdout
    assert not any("--network tiny" in call or "--network prior" in call for call in calls)
    assert (tmp_path / "out" / "table.md").read_text().count("value") == len(STEPS)


def test_one_step(tmp_path):
    done, calls = run(tmp_path, "--only", "sd15-8")
    assert done.returncode == 0 and len(calls) == 1 and "--captions 8" in calls[0]
    done, calls = run(tmp_path, "--only", "sd16")
    assert done.returncode == 2 and "the steps are " + " ".join(STEPS) in done.stderr and not calls


@pytest.mark.parametrize(
    "arguments, env, words",
    [(["--small"], {}, "unknown argument --small"), ([], {"MISSING": "flax"}, "install this package first")],
)
def test_refused(tmp_path, arguments, env, words):
    done, calls = run(tmp_path, *arguments, **env)
    assert done.returncode != 0 and words in done.stderr and not calls


@pytest.mark.slow
def test_tiny(tmp_path):
    """Every step runs with tiny networks, and gives rows with times and memory."""
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = [SCRIPT, "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    for name in STEPS:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert rows and all(row["value"] > 0 and row["memory"] > 0 for row in rows)
        assert all(row["what"] in done.stdout and row["versions"]["jax"] for row in rows)


def test_rows_and_table(tmp_path, monkeypatch):
    """A ratio is of one round's times; the table has a line for each library."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measure

    path = tmp_path / "rows.jsonl"
    times = {"diffusers": [8.0, 9.0, 2.0], "unclip_jax": [2.0, 3.0, 1.0]}
    measure.record(str(path), "a program", times, {"diffusers": 4.0, "unclip_jax": 5.0})
    theirs, ours = (json.loads(line) for line in path.read_text().splitlines())
    assert theirs["value"] == 8.0 and theirs["ratio"] == 3.0 and theirs["range"] == [2.0, 4.0]
    assert "ratio" not in ours
    lines = measure.table([str(path)]).splitlines()
    assert lines[-2] == "| a program | diffusers | 8 s | 4.00 | 3.00 (2.00 to 4.00) |"
    assert lines[-1] == "| a program | unclip_jax | 2 s | 5.00 |  |"
