"""Paths of this machine, and of a store.

TensorFlow's, TensorStore's and Google's clients use a stand-in for the store, on loopback.
"""

import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gcs import Gcs
from unclip_jax.errors import InputError
from unclip_jax.paths import (
    absolute,
    check_writable,
    local_copy,
    total_bytes,
    user_path,
    whole_folder,
    write_whole,
)

ROOT = Path(__file__).resolve().parents[1]


def test_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a" and local_copy("~/a") == tmp_path / "a"
    assert (
        absolute("~/a/../b") == str(tmp_path / "b")
        and absolute("gs://bucket/runs/a/../b") == "gs://bucket/runs/b"
    )
    assert str(user_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    (tmp_path / "loop").symlink_to("loop")
    assert absolute(tmp_path / "loop") == str(tmp_path / "loop")
    with pytest.raises(ValueError, match="ftp://x: paths may begin with gs://"):
        user_path("ftp://x")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made"
    for text in ("one", "two"):
        with whole_folder(target, "last") as folder:
            write_whole(folder / "below" / "file", text)
            write_whole(folder / "last", b"x")
        assert (target / "below" / "file").read_text() == text
    assert total_bytes(target) == 4
    with pytest.raises(RuntimeError), whole_folder(target, "last") as folder:
        write_whole(folder / "other", "")
        raise RuntimeError
    assert sorted(p.name for p in target.iterdir()) == ["below", "last"] and list(tmp_path.iterdir()) == [
        target
    ]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """A failure leaves neither the file nor new folders, and what was there before stays."""
    kept = tmp_path / "kept"
    kept.write_text("old")
    kept.chmod(0o600)

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        for target in (kept, tmp_path / "new" / "below" / "file"):
            with pytest.raises(OSError, match="No space left"):
                write_whole(target, "words")
    assert list(tmp_path.iterdir()) == [kept] and kept.read_text() == "old"
    write_whole(kept, "new")
    assert kept.read_text() == "new" and kept.stat().st_mode & 0o777 == 0o600
    write_whole(tmp_path / ("n" * 255), "a name of the largest length")


def test_links_are_followed(tmp_path):
    """A link stays a link, whether the file or folder that it names exists or not."""
    (tmp_path / "far").mkdir()
    link, folder = tmp_path / "link", tmp_path / "folder"
    link.symlink_to(tmp_path / "far" / "file")
    folder.symlink_to(tmp_path / "far" / "made")
    for text in ("one", "two"):
        write_whole(link, text)
        with whole_folder(folder, "last") as made:
            write_whole(made / "last", text)
        assert link.is_symlink() and (tmp_path / "far" / "file").read_text() == text
        assert folder.is_symlink() and (tmp_path / "far" / "made" / "last").read_text() == text
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["file", "made"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for act in (check_writable, lambda path: write_whole(path, "x")):
        with pytest.raises(OSError, match="(?i)too many levels of symbolic links"):
            act(tmp_path / "loop")


def test_devices_and_pipes_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "words")
    assert os.read(reader, 10) == b"words" and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)
    check_writable("/dev/null")
    write_whole("/dev/null", "words")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_whole("/dev/full", "words")


@pytest.mark.parametrize(
    "path, message",
    [
        ("file/grid.png", "file/grid.png cannot be written: Not a directory"),
        ("file/below/grid.png", "file/below/grid.png cannot be written: Not a directory"),
        ("n" * 256, "cannot be written: File name too long"),
        ("new/" + "n" * 256, "cannot be written: File name too long"),
        ("/proc/grid.png", "/proc/grid.png cannot be written: "),
        ("/proc/new/grid.png", "/proc/new/grid.png cannot be written: "),
        ("folder", "folder is a folder; name a file"),
        ("", "'': a path is not empty"),
        ("a\0b", "a path has no NUL characters"),
        ("~nobody-of-this-name/grid.png", "~nobody-of-this-name/grid.png: "),
        ("s3://bucket/grid.png", "s3://bucket/grid.png: paths may begin with gs://"),
    ],
)
def test_what_cannot_be_written_is_known_first(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    with pytest.raises((OSError, ValueError), match=re.escape(message)) as error:
        check_writable(path)
    assert "\n" not in str(error.value) and isinstance(error.value, (OSError, InputError))
    check_writable("file")
    check_writable("new/below/grid.png")
    assert sorted(os.listdir()) == ["file", "folder"] and Path("file").read_bytes() == b""


# This code runs in a process of its own, because the clients read their environment only once. It prints its
# results as one JSON object.
STORE = """
import json, sys
from pathlib import Path
import numpy as np
from unclip_jax import paths
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.data.sources import make_source
from unclip_jax.grid import save_grid

root, results = Path(sys.argv[1]), {}
config = str(root / "configs" / "emoji")
train = ["train", config + "/clip.py:tiny", "--workdir", "gs://bucket/runs/clip"]
train += ["--set", "eval_every=0", "--set", "log_every=1"]
results["train"] = [main([*train, "--set", "steps=2", "--set", "checkpoint_every=1"]) for _ in range(2)]
results["run"] = load_run("gs://bucket/runs/clip")[2]
lines = paths.user_path("gs://bucket/runs/clip/metrics.jsonl").read_text().splitlines()
results["metrics"] = [json.loads(line)["step"] for line in lines]

few = ["--data", "name=emoji", "--data", "split=compose"]
embed = ["embed", "--clip", "gs://bucket/runs/clip", *few, "--out", "gs://bucket/embedded", "--shard", "400"]
results["embed"] = main(embed)
codec = ["train", config + "/codec.py:tiny", "--workdir", "gs://bucket/runs/codec"]
codec += ["--embeddings", "gs://bucket/embedded"]
results["codec"] = main([*codec, "--set", "steps=2"])

bundle = load_bundle("emoji")
del bundle.parts["decoder"], bundle.parts["upsampler_64"]
save_bundle(bundle, "gs://bucket/bundle")
results["first"] = paths.total_bytes("gs://bucket/bundle")
for _ in range(2):  # fetched, and found in the cache
    same = load_bundle("gs://bucket/bundle")
results["parts"] = {name: part.hash == same.parts[name].hash for name, part in bundle.parts.items()}

shard = next((root / "unclip_jax/data/emoji").glob("compose-*.tfrecord"))
paths.write_whole("gs://bucket/data/a.tfrecord", shard.read_bytes())
patterns = (str(shard), "gs://bucket/data/*.tfrecord")
here, there = (make_source({"name": "tfrecord", "pattern": pattern}) for pattern in patterns)
same_images = all(here.read(i).image == there.read(i).image for i in (0, 100))
results["records"] = len(here) == len(there) and same_images
for i in (0, 1):
    paths.write_whole(f"gs://bucket/pictures/{i}/x.png", here.read(i).image)
    paths.write_whole(f"gs://bucket/pictures/{i}/x.txt", f"number {i}")
pictures = make_source({"name": "folder", "path": "gs://bucket/pictures"})
results["pictures"] = [pictures.read(i).captions[0] for i in range(len(pictures))]
save_grid("gs://bucket/grids/x.png", np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"])

prior = ["train", config + "/prior_diffusion.py:tiny", "--workdir", "gs://bucket/runs/prior"]
clip = ["train", config + "/clip.py:tiny", "--workdir"]
results["errors"] = [
    main([*clip, "gs://elsewhere/run"]),
    main([*clip, "ftp://bucket/run"]),
    main([*prior, "--clip", "gs://bucket/nothing"]),
    main([*clip, "gs://bucket/x", "--set", "data.train.name=tfrecord"]),
]
print("RESULTS", json.dumps(results))
"""


def test_a_store(tmp_path):
    """Training, checkpoints, resuming, embeddings, bundles, data and pictures work under gs://."""
    gcs = Gcs(tmp_path)
    env = os.environ | gcs.env() | {"UNCLIP_CACHE": str(tmp_path / "cache")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", STORE, str(ROOT)], env=env, capture_output=True, text=True, timeout=300
        )
    finally:
        gcs.close()
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, done.stdout + done.stderr
    results = json.loads(lines[0].removeprefix("RESULTS "))
    assert results["train"] == [0, 0] and results["run"] == 2
    assert "all 2 steps are done already" in done.stderr
    assert results["metrics"] == [1, 2]
    assert results["embed"] == 0 and results["codec"] == 0
    assert results["first"] > 1e6 and results["parts"] and all(results["parts"].values())
    assert results["records"] and results["pictures"] == ["number 0", "number 1"]
    names = {name for _, name in gcs.objects}
    assert {
        "embedded/manifest.json",
        "embedded/00001/shard.json",
        "embedded/codec/bundle.json",
        "grids/x.png",
    } <= names
    assert (
        any(name.startswith("runs/clip/tb/events") for name in names)
        and "runs/clip/checkpoints/2/commit_success.txt" in names
    )
    # Each load requests a network's tensors once; the second load finds them in the cache.
    fetched = [
        line
        for line in gcs.log
        if line.startswith("GET /bucket/bundle%2Fprior_diffusion%2Fmodel.safetensors")
    ]
    assert 0 < len(fetched) <= 2, fetched
    assert results["errors"] == [1, 1, 1, 1]
    for message in ("gs://elsewhere/run", "paths may begin with gs://", "gs://bucket/nothing"):
        assert message in done.stderr
    assert "Traceback" not in done.stderr
