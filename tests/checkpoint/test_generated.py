"""Files of bundles with generated faults: whatever they hold, reading them gives a bundle or one line."""

import copy
import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from unclip_jax.checkpoint.files import open_weights
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.errors import UserError
from unclip_jax.sampling.programs import Sampler, stage_options

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 1e39, -0.0, 0.5, 1e-300]),
    st.sampled_from(
        ["", "1", "../x", "clip", "decoder", "linear", "cosine", "eps", "unit", "gelu", "\ud800", "\0"]
    ),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.none(), st.text(max_size=2)), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


def places(value, path=()):
    """The paths of all values in a JSON object; of long lists only the first two items."""
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, below in items:
        yield from places(below, (*path, key))


def spoilt(draw, top: dict) -> dict:
    """A JSON object with one to three values replaced, left out or added."""
    top = copy.deepcopy(top)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(top) if path] or [("x",)]))
        around = top
        for key in path[:-1]:
            around = around[key]
        act = draw(st.sampled_from(["replace", "replace", "leave out", "add"]))
        if act == "leave out" and len(path) and path[-1] in (around if isinstance(around, dict) else ()):
            del around[path[-1]]
        elif act == "add" and isinstance(around, dict):
            around[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            around[path[-1]] = draw(VALUES)
    return top


def gives_one_line(call) -> None:
    """Calls a function, which may succeed or raise an error of the user that is one line."""
    try:
        call()
    except (UserError, OSError) as error:
        assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    """A copy of the tiny bundle that the tests may change."""
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("generated") / "bundle")


def use(path) -> None:
    """Loads a bundle and does everything with it that comes before a network runs."""
    bundle = load_bundle(path)
    sampler = Sampler(bundle)
    stage_options(bundle)
    sampler.captions(["a fox"])


@pytest.mark.parametrize(
    "file", ["bundle.json", "clip", "prior_diffusion", "prior_ar", "codec", "decoder", "upsampler_16"]
)
def test_json_of_a_bundle(folder, file):
    file = folder / file if file == "bundle.json" else folder / file / "config.json"
    whole = file.read_text()

    @settings(max_examples=25)
    @given(st.data())
    def check(data):
        file.write_text(json.dumps(spoilt(data.draw, json.loads(whole))))
        gives_one_line(lambda: use(folder))

    try:
        check()
    finally:
        file.write_text(whole)


@settings(max_examples=25 * 5)
@given(st.data())
def test_headers_of_safetensors(tmp_path_factory, data):
    """Values of the header replaced, its length changed, or bytes of the file cut off or changed."""
    file = save({"a": np.zeros((2, 3), np.float32), "b/c": np.ones(4, np.float16)}, {"format": "pt"})
    (length,) = struct.unpack("<Q", file[:8])
    act = data.draw(st.sampled_from(["header", "header", "length", "cut", "bytes"]))
    if act == "header":
        header = json.dumps(spoilt(data.draw, json.loads(file[8 : 8 + length]))).encode()
        file = struct.pack("<Q", len(header)) + header + file[8 + length :]
    elif act == "length":
        file = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + file[8:]
    elif act == "cut":
        file = file[: data.draw(st.integers(0, len(file)))]
    else:
        at = data.draw(st.integers(0, len(file) - 1))
        file = file[:at] + data.draw(st.binary(min_size=1, max_size=8)) + file[at + 1 :]
    folder = tmp_path_factory.mktemp("weights")
    (folder / "model.safetensors").write_bytes(file)

    def read():
        weights = open_weights(folder)
        for name in weights:
            assert weights[name].shape == weights.shape(name)
            weights.release(name)

    gives_one_line(read)
    shutil.rmtree(folder)
