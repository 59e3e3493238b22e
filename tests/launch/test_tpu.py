"""`launch/tpu` with a stand-in gcloud, which checks its arguments and acts as the hosts on this machine."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TPU = [sys.executable, str(ROOT / "launch" / "tpu")]
ZONE = ["--zone", "us-west4-a"]

# It knows the commands and flags of the real gcloud that `launch/tpu` uses. `ssh` runs the line in the host's
# home folder, and `scp` copies into it.
GCLOUD = """#!{python}
import os, pathlib, shutil, subprocess, sys
home, words = pathlib.Path(os.environ["HOSTS"]), sys.argv[1:]
with open(home / "calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
flags = dict((w[2:].split("=", 1) + [""])[:2] for w in words if w.startswith("--"))
plain = [w for w in words if not w.startswith("--")]
KNOWN = {{
    ("queued-resources", "create"): {{"node-id", "node-count", "node-prefix", "zone", "project"}}
    | {{"accelerator-type", "spot", "runtime-version"}},
    ("queued-resources", "describe"): {{"zone", "project", "format"}},
    ("queued-resources", "delete"): {{"zone", "project", "force", "quiet"}},
    ("tpu-vm", "ssh"): {{"zone", "project", "worker", "command"}},
    ("tpu-vm", "scp"): {{"zone", "project", "worker"}},
}}
assert plain[:2] == ["compute", "tpus"] and set(flags) <= KNOWN[tuple(plain[2:4])], words
assert flags["zone"]
what, rest = tuple(plain[2:4]), plain[4:]
if what == ("queued-resources", "create"):
    assert ("node-id" in flags) != ("node-count" in flags and "node-prefix" in flags)
    for i in range(int(flags.get("node-count", 1))):
        (home / (flags.get("node-id") or f"{{flags['node-prefix']}}-{{i}}")).mkdir()
elif what == ("queued-resources", "describe"):
    print("ACTIVE")
elif what == ("tpu-vm", "scp"):
    node, _, target = rest[1].partition(":")
    shutil.copy(rest[0], home / node / target)
elif what == ("tpu-vm", "ssh"):
    sys.exit(subprocess.run(["bash", "-c", flags["command"]], cwd=home / rest[0]).returncode)
"""


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Makes a folder for every slice, and puts the stand-in on PATH."""
    folder, bin_ = tmp_path / "hosts", tmp_path / "bin"
    folder.mkdir()
    bin_.mkdir()
    (bin_ / "gcloud").write_text(GCLOUD.format(python=sys.executable))
    (bin_ / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTHON", raising=False)  # the interpreter of this machine, not of the hosts
    monkeypatch.setenv("HOSTS", str(folder))
    return folder


def tpu(*arguments):
    return subprocess.run([*TPU, *arguments], capture_output=True, text=True)


IMAGES = [
    ("v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-256", "v2-alpha-tpuv6e"),
]


@pytest.mark.parametrize("kind, image", IMAGES)
def test_dry_run_prints_what_would_run(kind, image, hosts):
    done = tpu("create", "pod", "--type", kind, "--spot", "--project", "p", "--dry-run", *ZONE)
    words = shlex.split(done.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {
        "--node-id=pod",
        f"--accelerator-type={kind}",
        f"--runtime-version={image}",
        "--spot",
        "--project=p",
    } <= set(words)
    assert not (hosts / "calls").exists()


def test_from_nothing_to_a_run_that_is_started_again(hosts, tmp_path):
    """Creates two slices, sets them up with this commit, and trains on both.

    The command starts the runs and returns at once. A killed run restarts; a run that fails does not; a run
    that is told to stop saves and ends. No run starts twice.
    """
    two = ["--slices", "2", *ZONE]
    assert tpu("create", "pod", "--type", "v5litepod-16", *two).returncode == 0
    assert sorted(p.name for p in hosts.iterdir() if p.is_dir()) == ["pod-0", "pod-1"]
    assert tpu("status", "pod", *two).stdout.strip() == "ACTIVE"
    # On the host, python3 makes an environment whose pip and unclip are stand-ins. In its third run, unclip
    # works until it is told to stop.
    fake = tmp_path / "bin" / "python3"
    fake.write_text(
        """#!/bin/bash
[ "$1" = -c ] || [ "$1" = --version ] && exit 0
[ "$1 $2" = "-m venv" ] || exit 9
mkdir -p $3/bin
printf '#!/bin/bash\\n[ -e ../broken ] && exit 7\\necho "$@" >> ../pips\\n' > $3/bin/python
cp $(dirname $0)/unclip $3/bin/unclip
chmod +x $3/bin/*
"""
    )
    (tmp_path / "bin" / "unclip").write_text(
        """#!/bin/bash
echo "$@" >> ../runs
case $(wc -l < ../runs) in
  1) exit 75;;
  2) kill -KILL $$;;
  3) trap 'touch ../saved; exit 75' TERM; touch ../working; while :; do sleep 0.05; done;;
esac
echo the end
exit 1
"""
    )
    fake.chmod(0o755)
    (hosts / "pod-1" / "broken").touch()  # what does not install is not taken for installed
    assert tpu("setup", "pod", *two).returncode == 7
    (hosts / "pod-1" / "broken").unlink()
    done = tpu("setup", "pod", *two)
    assert done.returncode == 0, done.stderr
    for node in ("pod-0", "pod-1"):
        assert (hosts / node / "unclip_jax" / "setup.py").is_file()
        assert f"-e {hosts / node / 'unclip_jax'}[tpu]" in (hosts / node / "pips").read_text()
    command = [
        "run",
        "pod",
        *two,
        "--",
        "configs/dalle2/decoder.py",
        "--workdir",
        "/mnt/my runs/decoder",
        "--set",
        "steps=5",
    ]
    try:
        run = tpu(*command)
        assert run.returncode == 0, run.stderr
        wait_for(hosts / "pod-0" / "working", hosts / "pod-1" / "working")
        again = tpu(*command)
        assert again.returncode == 0 and again.stdout.splitlines() == ["a run is going on here"] * 2
    finally:
        assert tpu("stop", "pod", *two).returncode == 0
    for node in ("pod-0", "pod-1"):
        wait_for(hosts / node / "saved")
        free = ["flock", "--wait", "20", str(hosts / node / "unclip_jax" / ".running"), "true"]
        assert subprocess.run(free).returncode == 0
    assert tpu(*command).returncode == 0
    for node in ("pod-0", "pod-1"):
        seen = f"until grep -q 'the end' {hosts / node}/unclip_jax/train.log; do sleep 0.05; done"
        assert subprocess.run(["timeout", "20", "bash", "-c", seen]).returncode == 0
        lines = (hosts / node / "runs").read_text().splitlines()
        assert (
            lines
            == ["train configs/dalle2/decoder.py --workdir /mnt/my runs/decoder --set steps=5 --distributed"]
            * 4
        )
    shown = tpu(
        "run",
        "pod",
        *two,
        "--dry-run",
        "--",
        "embed",
        "--clip",
        "gs://b/clip",
        "--data",
        "name=emoji",
        "--out",
        "gs://b/embedded",
    )
    assert (
        shown.returncode == 0
        and "unclip embed --clip gs://b/clip --data name=emoji --out gs://b/embedded --distributed"
        in shown.stdout
    )
    assert tpu("delete", "pod", *two).returncode == 0
    assert "--force --quiet" in (hosts / "calls").read_text().splitlines()[-1]


def wait_for(*paths):
    end = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.05)


def test_mistakes_are_one_line(hosts, monkeypatch):
    for arguments, message in (
        (["create", "pod", "--type", "v9-8", *ZONE], "no image is known for v9-8"),
        (["run", "pod", *ZONE, "--", "configs/dalle2/decoder.py"], "run needs what `unclip train` gets"),
        (["run", "pod", *ZONE, "--", "embed", "--clip", "gs://b/clip"], "or -- embed and what that gets"),
        (["create", "My_Pod", "--type", "v4-8", *ZONE], "is no name"),
        (["status", "pod"], "--zone"),
        (["create", "pod", "--type", "v4-8", "--slices", "0", *ZONE], "at least 1, got 0"),
    ):
        done = tpu(*arguments)
        assert done.returncode and message in done.stderr.splitlines()[-1], arguments
    assert not (hosts / "calls").exists()
    (hosts.parent / "bin" / "gcloud").write_text("#!/bin/sh\nexit 5\n")
    assert tpu("status", "pod", *ZONE).returncode == 5
    monkeypatch.setenv("PATH", "/nowhere")
    done = tpu("status", "pod", *ZONE)
    assert done.returncode == 1 and "gcloud is not installed" in done.stderr
