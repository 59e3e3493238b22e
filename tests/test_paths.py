"""Paths of this machine, and of a store.

TensorFlow's, TensorStore's and Google's clients use a stand-in for the store, on loopback.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gcs import Gcs
from unclip_jax.paths import absolute, local_copy, total_bytes, user_path, whole_folder, write_whole

ROOT = Path(__file__).resolve().parents[1]


def test_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a" and local_copy("~/a") == tmp_path / "a"
    assert (
        absolute("~/a/../b") == str(tmp_path / "b")
        and absolute("gs://bucket/runs/a/../b") == "gs://bucket/runs/b"
    )
    assert str(user_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
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
    assert results["train"] == [0, 0] and results["run"] == 2 and "resuming from step 2" in done.stderr
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
