"""`unclip evaluate` from the images to the number, beside torch-fidelity on the same images.

The fast test takes emoji and random weights. The slow one takes random images of CIFAR-10's two halves and
the public weights: `pytest -m slow tests/evaluate/test_references.py`. UNCLIP_ROWS says how many images of
each half are read (1000).
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoint import peers
from tests.fidelity import torch_fidelity
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.providers.inception import CONVOLUTIONS
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.run import features
from unclip_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]


class Pictures(torch.utils.data.Dataset):
    """The pictures of files, as torch-fidelity wants them: uint8 (3, H, W)."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(Image.open(self.files[i]).convert("RGB"))).permute(2, 0, 1)


def theirs(first, second, weights, size):
    """What torch-fidelity says of two lists of files."""
    metrics = torch_fidelity("metrics")
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(weights)}
    options |= {"cuda": False, "cache": False, "verbose": False, "batch_size": 16, "save_cpu_ram": True}
    found = metrics.calculate_metrics(
        input1=Pictures(first), input2=Pictures(second), fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=size, **options,
    )  # fmt: skip
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "inception_score": found["inception_score_mean"],
        # torch-fidelity takes its first input as the reference.
        "precision": found["recall"],
        "recall": found["precision"],
    }


def ours(first, second, work, *words):
    """What the command says of two sets."""
    values = {}
    for name in ("fid", "kid", "prdc", "inception-score"):
        sets = [first] if name == "inception-score" else [first, second]
        command = ["evaluate", name, *map(str, sets), "--partial", "--work", str(work), *words]
        assert main([*command, "--json", str(work / "r.json")]) == 0
        found = json.loads((work / "r.json").read_text())["values"]
        values |= {key: value["value"] for key, value in found.items()}
    return values


def compare(first, second, weights, work):
    """Writes what differs by more than 0.1 %. With fewer images than features, covariances are singular."""
    found = ours(first, second, work, "--weights", str(weights.parent))
    files = [sorted(folder.iterdir()) for folder in (first, second)]
    expected = theirs(*files, weights, min(1000, *map(len, files)))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, found, expected)


def test_emoji(tmp_path, monkeypatch):
    """At random weights. The program is that of `test_features`, which is compiled once."""
    for split in ("val", "compose"):
        source = make_source({"name": "emoji", "split": split})
        (tmp_path / split).mkdir()
        for i in range(12):
            picture = Image.fromarray(ops.decode_image(source.read(i).image))
            picture.save(tmp_path / split / f"{i:02d}.png")
    weights = tmp_path / "weights" / "pt_inception-2015-12-05-random.pth"
    weights.parent.mkdir()
    torch.save(peers.inception_state(), weights)
    mesh, opened = make_mesh({"data": 2}, jax.devices()[:2]), features.open_network
    monkeypatch.setattr(
        features, "open_network", lambda name, weights, mesh=mesh: opened(name, weights, mesh=mesh, rows=1)
    )
    monkeypatch.setattr("unclip_jax.cli.figure.open_mesh", lambda *_: mesh)
    compare(tmp_path / "val", tmp_path / "compose", weights, tmp_path / "work")


@pytest.mark.slow
def test_cifar10_halves(tmp_path):
    """At the weights of `unclip fetch inception`, to which a random classifier is added."""
    rows = int(os.environ.get("UNCLIP_ROWS", "1000"))
    subprocess.run([sys.executable, ROOT / "benchmarks" / "cifar10.py", tmp_path / "cifar10"], check=True)
    files = sorted((tmp_path / "cifar10" / "train").rglob("*.png"), key=lambda file: file.name)
    for name, half in (("a", files[: len(files) // 2]), ("b", files[len(files) // 2 :])):
        (tmp_path / name).mkdir()
        for i in np.random.default_rng(0).choice(len(half), rows, replace=False):
            (tmp_path / name / half[i].name).symlink_to(half[i])
    assert main(["fetch", "inception"]) == 0
    state, params = (
        peers.inception_state(),
        load_part(features.fetched_folder("inception"), "inception")[0].params,
    )
    for ours_, theirs_ in CONVOLUTIONS.items():
        leaf = functools.reduce(lambda tree, key: tree[key], ours_.split("/"), params)
        state[f"{theirs_}.conv.weight"] = torch.from_numpy(np.transpose(leaf["kernel"], (3, 2, 0, 1)).copy())
        for at, key in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            state[f"{theirs_}.bn.{at}"] = torch.from_numpy(np.array(leaf[key]))
    weights = tmp_path / "weights" / "pt_inception-2015-12-05-fetched.pth"
    weights.parent.mkdir()
    torch.save(state, weights)
    compare(tmp_path / "a", tmp_path / "b", weights, tmp_path / "work")
