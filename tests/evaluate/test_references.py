"""`unclip evaluate` from the images to the number, beside the reference programs on the same images.

The references read the files, prepare the pictures and run their networks on their own: torch-fidelity's
Inception, and the DINOv2 and the CLIP of transformers. The numbers come from torch-fidelity, from prdc, and
for CMMD and the CLIP score from the published definitions in NumPy.

The fast tests take emoji and random weights. The slow one takes random images of CIFAR-10's two halves and
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
from prdc import compute_prdc

from tests.checkpoint import peers
from tests.checkpoint.providers.test_dinov2 import saved
from tests.fidelity import torch_fidelity
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.providers.inception import CONVOLUTIONS
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.models.clip import MEAN, STD
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


def frechet(first, second):
    """torch-fidelity's Fréchet distance of features (N, D)."""
    metric = torch_fidelity("metric_fid")
    described = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (first, second)]
    return metric.fid_statistics_to_metric(*described, verbose=False)["frechet_inception_distance"]


def theirs(first, second, weights, size):
    """What torch-fidelity and prdc say of two lists of files, of one pass of torch-fidelity's Inception."""
    metrics, seen = torch_fidelity("metrics"), {"pool": [], "spatial": []}
    name, registry = "inception-v3-compat", torch_fidelity("registry").FEATURE_EXTRACTORS_REGISTRY

    class Watched(registry[name]):
        """Keeps what it computes. The spatial features are those of ADM's evaluator: the first 7 channels, in
        the order height, width, channel."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_forward_hook(
                lambda *args: seen["pool"].append(self.convert_features_tuple_to_dict(args[-1])["2048"])
            )
            self.Mixed_6d.branch1x1.register_forward_hook(
                lambda *args: seen["spatial"].append(args[-1][:, :7].permute(0, 2, 3, 1).flatten(1))
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry, name, Watched)
        found = metrics.calculate_metrics(
            input1=Pictures(first), input2=Pictures(second), fid=True, kid=True, isc=True, prc=True,
            feature_extractor=name, feature_extractor_weights_path=str(weights), kid_subset_size=size,
            cuda=False, cache=False, verbose=False, batch_size=16, save_cpu_ram=True,
        )  # fmt: skip
    pool, spatial = (torch.cat(seen[name]).numpy() for name in ("pool", "spatial"))
    assert len(pool) == len(spatial) == len(first) + len(second)
    dense = compute_prdc(pool[len(first) :], pool[: len(first)], nearest_k=5)
    return {
        "fid": found["frechet_inception_distance"],
        "sfid": frechet(spatial[: len(first)], spatial[len(first) :]),
        "kid": found["kernel_inception_distance_mean"],
        "inception_score": found["inception_score_mean"],
        # torch-fidelity takes its first input as the reference.
        "precision": found["recall"],
        "recall": found["precision"],
        "density": dense["density"],
        "coverage": dense["coverage"],
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
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, found, expected)


def write_emoji(folder, split, rows):
    """Pictures of three shapes, and their captions beside them."""
    source = make_source({"name": "emoji", "split": split})
    folder.mkdir()
    for i in range(rows):
        picture = Image.fromarray(ops.decode_image(source.read(i).image))
        picture.resize(((64, 64), (80, 51), (33, 47))[i % 3]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"{'red' if i % 3 else 'a'} {i}")
    return folder


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


def value_of(name, sets, weights, work):
    """The number of a figure by the command."""
    command = ["evaluate", name, *map(str, sets), "--weights", str(weights), "--partial", "--work", str(work)]
    assert main([*command, "--json", str(work / "r.json")]) == 0
    (found,) = json.loads((work / "r.json").read_text())["values"].values()
    return found["value"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures with captions: more pictures than the tiny networks have features."""
    folder = tmp_path_factory.mktemp("emoji")
    return [write_emoji(folder / split, split, 40) for split in ("val", "compose")]


def pixels_of(folder, prepare, mean, std):
    """The pictures of a folder as a network of transformers takes them, (N, 3, H, W)."""
    pictures = [prepare(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))]
    return peers.nchw(np.float32((np.float32(pictures) / 255 - np.float32(mean)) / np.float32(std)))


def test_fd_dinov2(folders, tmp_path):
    """Registers, because there the positions are resized as in transformers (`test_features`)."""
    network = saved(tmp_path, registers=True, image_size=518)
    squeeze = lambda picture: picture.resize((224, 224), Image.Resampling.BICUBIC)
    with torch.no_grad():
        features = [
            network(pixels_of(folder, squeeze, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            .pooler_output.numpy()
            for folder in folders
        ]  # fmt: skip
    expected = frechet(*features)
    assert expected > 1e-3 * sum(np.trace(np.cov(x, rowvar=False)) for x in features)
    assert value_of("fd-dinov2", folders, tmp_path, tmp_path) == pytest.approx(expected, rel=1e-3)


def test_cmmd_and_clip_score(folders, tmp_path):
    """Both by one CLIP of transformers, which embeds the pictures and captions by itself."""
    from transformers import CLIPConfig, CLIPModel

    text, image = peers.clip_configs()
    settings = {"text_config": text.to_dict(), "vision_config": image.to_dict(), "projection_dim": peers.DIM}
    clip = peers.randomize(CLIPModel(CLIPConfig(**settings)))
    clip.save_pretrained(tmp_path)
    tokenizer = peers.write_tokenizer(tmp_path)

    def square(picture):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BICUBIC)

    captions = [file.read_text() for file in sorted(folders[0].glob("*.txt"))]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        x, y = (
            clip.visual_projection(clip.vision_model(pixels_of(folder, square, MEAN, STD)).pooler_output)
            for folder in folders
        )
        z_text = clip.text_projection(clip.text_model(tokens).pooler_output)
    x, y, z_text = (each.double().numpy() for each in (x, y, z_text))
    x, y, z_text = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y, z_text))

    def kernel(a, b):  # the mean over all pairs of exp(-|a - b|^2 / (2 10^2))
        return np.mean(np.exp(-np.square(a[:, None] - b[None]).sum(axis=-1) / 200))

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 1e-3
    assert value_of("cmmd", folders, tmp_path, tmp_path) == pytest.approx(expected, rel=1e-3)
    cosines = np.sum(x * z_text, axis=1)
    assert np.abs(cosines.mean()) > 1e-3
    found = value_of("clip-score", folders[:1], tmp_path, tmp_path)
    assert found == pytest.approx(cosines.mean(), rel=1e-3)


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
