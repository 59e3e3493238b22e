"""Files of torch are read without torch, to the bit; what is no tensor in them is never run."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.errors import InputError

LEGACY = {"_use_new_zipfile_serialization": False}


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 2))
        self.register_buffer("count", torch.arange(4, dtype=torch.int32))
        self.sizes = [1, 2]

    def forward(self, x):
        return x @ self.weight


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.list = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.ReLU())

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("options", [{}, LEGACY, {"pickle_protocol": 4}])
def test_every_tensor_is_read(options, tmp_path):
    """Types, views, transposed and shared values, parameters, empty tensors, and things that are none."""
    base = torch.randn(4, 6)
    values = {
        "transposed": base.T,
        "shared": base[1:3, ::2],
        "half": torch.randn(5).half(),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "inner": {"parameter": torch.nn.Parameter(torch.randn(2, 2)), "epoch": 3, "names": ["a", None]},
        "list": [torch.tensor([True, False]), (torch.arange(3),)],
        "bfloat": torch.randn(3).bfloat16(),
        7: torch.ones(1, dtype=torch.uint8),
    }
    torch.save(values, tmp_path / "x.pt", **options)
    read = open_torch(tmp_path / "x.pt")
    expected = {
        **{name: values[name] for name in ("transposed", "shared", "half", "empty", "one", "bfloat")},
        **{"inner.parameter": values["inner"]["parameter"], "7": values[7]},
        **{"list.0": values["list"][0], "list.1.0": values["list"][1][0]},
    }
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read.shape(name) == tuple(tensor.shape) == read[name].shape
        np.testing.assert_array_equal(read[name].astype(np.float64), tensor.detach().double().numpy())
        assert str(read.dtype(name)) == str(tensor.dtype).removeprefix("torch.") == str(read[name].dtype)


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_state_of_a_network(options, tmp_path):
    module = Outer()
    torch.save(module.state_dict(), tmp_path / "state.pth", **options)
    read = open_torch(tmp_path / "state.pth")
    assert read.keys() == module.state_dict().keys()
    assert all(np.array_equal(read[name], value.numpy()) for name, value in module.state_dict().items())


def test_torchscript(tmp_path):
    """Its modules are dictionaries of their attributes; the names are those of the state."""
    script = torch.jit.script(Outer().eval())
    script.save(tmp_path / "script.pt")
    read = open_torch(tmp_path / "script.pt")
    assert read.keys() == script.state_dict().keys()
    assert all(np.array_equal(read[name], value.numpy()) for name, value in script.state_dict().items())


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def archive(path, pickled, **entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in ({"data.pkl": pickled} | entries).items():
            file.writestr(f"x/{name}", data)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("


@pytest.mark.parametrize(
    "pickled, words",
    [
        (pickle.dumps(Attack(eval, "1"), 2), "it asks for '__builtin__.eval'; only tensors"),
        (
            b"\x80\x04\x8c\x02io\x8c\x04open\x93\x8c\x01x\x8c\x01w\x86R.",
            "it asks for 'io.open'; only tensors",
        ),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "it asks for 'os.system'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2 __globals__\n.", "it asks for"),
        (b"\x80\x02ctorch\nload\n.", "it asks for 'torch.load'"),
        (b"\x80\x02c__torch__.a\nB\n(K\x01tR.", "it calls '__torch__.a.B' with arguments that are not known"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "it makes a 'collections.OrderedDict'"),
        (b"(S'x'\nios\nsystem\n.", "it has the instruction STRING"),
        (b"\x80\x02(K\x01ios\nsystem\n.", "it has the instruction INST"),
        (b"\x80\x02\x82\x01.", "it has the instruction EXT1"),
        (REBUILD + STORAGE + b"K\x00(K\x05t(K\x01ttR.", "[5] reaches beyond its 4 values"),
        (REBUILD + STORAGE + b"K\x00(K\x04t(K\x02ttR.", "[4] reaches beyond its 4 values"),
        (REBUILD + STORAGE + b"K\x00(J\xff\xff\xff\x7ft(K\x00ttR.", "reaches beyond its 4 values"),
        (REBUILD + STORAGE + b"J\xff\xff\xff\xff(K\x01t(K\x01ttR.", "a tensor's offset is -1"),
        (REBUILD + STORAGE + b"K\x00(K\x02t(K\x01K\x01ttR.", "a tensor has 1 axes and 2 strides"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01R.", "instructions do not fit their values"),
        (b"\x80\x02}}s.", "damaged"),
        (b"\x80\x02]q\x00h\x00a.", "lie too deep inside one another"),
        (b"\x80\x02" + b"}" * 5, "damaged"),
        (b"", "damaged"),
        (b"\x00\x01\x02", "damaged"),
        (pickle.dumps({"a": 1}, 2), "holds no tensors"),
    ],
)
def test_other_pickles_are_refused(pickled, words, tmp_path):
    archive(tmp_path / "x.pt", pickled)
    with pytest.raises(InputError) as error:
        open_torch(tmp_path / "x.pt")
    assert words in str(error.value) and str(tmp_path / "x.pt") in str(error.value)
    assert "\n" not in str(error.value)


def test_values_many_times_in_others(tmp_path):
    """A list of two of a list of two of ...: 2**60 values from a small file."""
    pickled = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"."
    archive(tmp_path / "x.pt", pickled)
    with pytest.raises(InputError, match="lie too deep inside one another"):
        open_torch(tmp_path / "x.pt")


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_cut_files(options, tmp_path):
    """Wherever the file ends early: one line."""
    torch.save({"weight": torch.randn(100)}, tmp_path / "whole.pt", **options)
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (*range(0, len(whole), 37), len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.pt"):
            open_torch(tmp_path / "cut.pt")


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_changed_bytes(options, tmp_path):
    """A changed byte gives one line, or tensors: never another error."""
    torch.save({"weight": torch.randn(20), "n": 1}, tmp_path / "whole.pt", **options)
    whole = (tmp_path / "whole.pt").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.choice(len(whole), min(400, len(whole)), replace=False):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            read = open_torch(tmp_path / "changed.pt")
            for name in read:
                read[name].sum()
        except InputError as error:
            assert "changed.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_damaged_values(tmp_path):
    """The checksum of the values is compared, and their number."""
    torch.save({"weight": torch.zeros(64)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    place = data.index(bytes(256))
    (tmp_path / "x.pt").write_bytes(data[: place + 9] + b"\x01" + data[place + 10 :])
    with pytest.raises(InputError, match="the checksum of .*data/0 differs"):
        open_torch(tmp_path / "x.pt")["weight"]
    archive(tmp_path / "y.pt", REBUILD + STORAGE + b"K\x00(K\x04t(K\x01ttR.", **{"data/0": bytes(12)})
    with pytest.raises(InputError, match="12 bytes in place of 16"):
        _ = open_torch(tmp_path / "y.pt")[""]


def test_other_files(tmp_path):
    for name, data, words in (
        ("text.pt", b"weights", "was not written by torch"),
        ("empty.pt", b"", "is empty"),
        ("pickle.pt", pickle.dumps({"a": 1}), "was not written by torch"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=words):
            open_torch(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme", "x")
    with pytest.raises(InputError, match="none that torch wrote"):
        open_torch(tmp_path / "other.zip")
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_torch(tmp_path / "no.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        file.writestr("x/byteorder", "big")
    with pytest.raises(InputError, match="another order of bytes"):
        open_torch(tmp_path / "big.pt")
