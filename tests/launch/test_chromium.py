"""`launch/test` installs Chromium where it may, and goes on where it cannot."""

import os
import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[2] / "launch" / "common.sh"


@pytest.mark.parametrize(
    "programs, called, said",
    [
        ({"chromium": 0, "apt-get": 0, "id": "0"}, [], ""),
        ({"id": "0"}, [], ""),
        ({"apt-get": 0, "id": "0"}, ["apt-get update", "apt-get install"], "installing chromium"),
        ({"apt-get": 1, "id": "0"}, ["apt-get update"], "was not installed"),
        ({"apt-get": 0, "id": "1000"}, [], ""),
        ({"apt-get": 0, "id": "1000", "sudo": 1}, ["sudo -n"], ""),
        ({"apt-get": 0, "id": "1000", "sudo": 0}, ["sudo -n true", "sudo -n apt-get", "sudo -n apt-get"], ""),
    ],
)
def test_chromium(tmp_path, programs, called, said):
    log = tmp_path / "log"
    log.touch()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "basename").symlink_to("/usr/bin/basename")
    for name, answer in programs.items():
        ends = f"echo {answer}" if name == "id" else f'echo "{name} $*" >>"{log}"; exit {answer}'
        (folder / name).write_text(f"#!/bin/bash\n{ends}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    ran = subprocess.run(
        ["/bin/bash", "-c", f'set -euo pipefail; . "{COMMON}"; ensure_chromium; echo went on'],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": str(folder)},
    )
    assert ran.returncode == 0 and ran.stdout == "went on\n", ran.stderr
    calls = log.read_text(encoding="utf-8").splitlines()
    assert len(calls) == len(called) and all(map(str.startswith, calls, called)), calls
    assert said in ran.stderr and (said or not ran.stderr or "installing" in ran.stderr)
