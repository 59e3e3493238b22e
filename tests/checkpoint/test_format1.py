"""Bundles and runs of format 1 are read as those of format 2 are."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.bundle import Part, last_step, save_bundle, upsamplers
from unclip_jax.checkpoint.format1 import upgrade_run_meta
from unclip_jax.checkpoint.load import load_bundle, load_part

OLD_NAMES = {"prior_diffusion": "prior", "codec": "pca", "polish": "upsampler_16_last"}
TEXT_TOKENIZER = {"kind": "clip_bpe", "length": 7, "vocab_size": 600}


@pytest.fixture(scope="module")
def new(tiny_bundle, tmp_path_factory):
    """A bundle with all that the formats tell differently: also a text encoder's tokenizer, and a network for
    a last step."""
    bundle = load_bundle(tiny_bundle)
    for part in bundle.parts.values():
        if "frozen" in part.config:
            part.config["frozen"] = {"clip": part.config["frozen"]["clip"]}  # format 1 knows no other role
    bundle.parts["prior_ar"].config["tokenizer"] = TEXT_TOKENIZER
    upsampler = bundle.parts["upsampler_16"]
    bundle.parts["polish"] = Part(upsampler.config | {"last_step_of": "upsampler_16"}, upsampler.params)
    bundle.provenance["training"] = {
        "prior_diffusion": {"config": {"stage": "prior_diffusion", "clip": "../clip"}},
        "codec": {"config": {"stage": "pca", "clip": "../clip"}},
    }
    bundle.provenance["figures"] = {"prior_cosine": 0.5}
    return save_bundle(bundle, tmp_path_factory.mktemp("formats") / "new")


@pytest.fixture(scope="module")
def old(new):
    """The same bundle as format 1 was written, by hand."""
    path = new.with_name("old")
    shutil.copytree(new, path)
    for name, old_name in OLD_NAMES.items():
        (path / name).rename(path / old_name)
    renamed = lambda by_name: {OLD_NAMES.get(name, name): value for name, value in by_name.items()}
    top = json.loads((path / "bundle.json").read_text())
    tokenizer = json.loads((path / "clip" / "config.json").read_text())["tokenizer"]
    training = renamed(top["provenance"]["training"])
    top = {
        "format_version": 1,
        "parts": renamed(top["parts"]),
        "tokenizer": tokenizer,
        "sampling": renamed(top["sampling"]),
        "provenance": top["provenance"] | {"training": training},
    }
    (path / "bundle.json").write_text(json.dumps(top))
    for name in top["parts"]:
        file = path / name / "config.json"
        config = json.loads(file.read_text())
        if "frozen" in config:
            config["clip"] = config.pop("frozen")["clip"]
        tokenizer = config.pop("tokenizer", None)
        if name == "prior_ar":
            config["text_tokenizer"] = tokenizer
        config.pop("last_step_of", None)
        if config["kind"] == "codec":
            config["kind"] = "pca"
        file.write_text(json.dumps(config))
    return path


def same_part(ours, theirs):
    assert ours.config == theirs.config and ours.hash == theirs.hash
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_a_bundle_of_format_1_is_the_same_bundle(old, new):
    """Equal to the bundle of format 2 but for the name of the network for the last step, which format 1
    fixes; and nothing is left of the old names."""
    read, expected = load_bundle(old), load_bundle(new)
    polish = expected.parts.pop("polish")
    same_part(read.parts.pop("upsampler_16_last"), polish)
    assert read.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        same_part(read.parts[name], part)
    assert (read.system, read.sampling, read.provenance) == (
        expected.system,
        expected.sampling,
        expected.provenance,
    )
    assert read.parts["prior_ar"].config["tokenizer"] == TEXT_TOKENIZER
    again = load_bundle(old)
    assert upsamplers(again.parts) == ["upsampler_16"]
    assert last_step(again.parts, "upsampler_16") == "upsampler_16_last"


@pytest.mark.parametrize("name", ["clip", "codec", "prior_diffusion", "prior_ar"])
def test_a_part_of_format_1(name, old, new):
    """By its new name; the old one is unknown."""
    (part, meta), (expected, expected_meta) = load_part(old, name), load_part(new, name)
    same_part(part, expected)
    assert meta == expected_meta
    if name in OLD_NAMES:
        with pytest.raises(KeyError, match=f"no part '{OLD_NAMES[name]}'; it has .*{name}"):
            load_part(old, OLD_NAMES[name])


def test_writing_it_again_converts_it(old, new, tmp_path):
    """The files of the weights stay the same bytes."""
    path = save_bundle(load_bundle(old), tmp_path / "again")
    assert json.loads((path / "bundle.json").read_text())["format_version"] == 2
    for name in load_bundle(new).parts:
        written = OLD_NAMES[name] if name == "polish" else name
        weights = (path / written / "model.safetensors").read_bytes()
        assert weights == (new / name / "model.safetensors").read_bytes()


TOKENIZER = {"kind": "clip_bpe", "length": 24, "vocab_size": 8192}
REST = {
    "sampling": {"steps": 4},
    "config": {"stage": "x", "clip": "../clip", "text_tokenizer": None},
    "provenance": {"step": 3, "config": {"pca": "../pca"}},
    "checksums": {"state": 1},
}
METAS = {  # case: (name, part, tokenizer) of format 1, (name, part) of format 2
    "clip": (
        ("clip", {"kind": "clip", "model": {"text": {}}}, TOKENIZER),
        ("clip", {"kind": "clip", "model": {"text": {}}, "tokenizer": TOKENIZER}),
    ),
    "prior": (
        ("prior", {"kind": "prior_diffusion", "clip": "ab", "x0_error": [1.0]}, TOKENIZER),
        ("prior_diffusion", {"kind": "prior_diffusion", "frozen": {"clip": "ab"}, "x0_error": [1.0]}),
    ),
    "text encoder": (
        ("prior_ar", {"kind": "prior_ar", "clip": "ab", "text_tokenizer": TEXT_TOKENIZER}, TOKENIZER),
        ("prior_ar", {"kind": "prior_ar", "frozen": {"clip": "ab"}, "tokenizer": TEXT_TOKENIZER}),
    ),
    "codec": (
        ("pca", {"kind": "pca", "dims": 6, "clip": "ab"}, TOKENIZER),
        ("codec", {"kind": "codec", "dims": 6, "frozen": {"clip": "ab"}}),
    ),
    "upsampler": (
        ("upsampler_64", {"kind": "upsampler", "factor": 2}, None),
        ("upsampler_64", {"kind": "upsampler", "factor": 2}),
    ),
    "last step": (
        ("upsampler_64_last", {"kind": "upsampler", "factor": 2}, None),
        ("upsampler_64_last", {"kind": "upsampler", "factor": 2, "last_step_of": "upsampler_64"}),
    ),
}


@pytest.mark.parametrize("case", METAS)
def test_the_meta_of_a_run(case):
    """It is converted, what it records stays as it was, and the argument is not changed; a second time
    changes nothing."""
    (name, part, tokenizer), (new_name, new_part) = METAS[case]
    meta = {"name": name, "part": part, **REST} | ({"tokenizer": tokenizer} if tokenizer else {})
    before = copy.deepcopy(meta)
    upgraded = upgrade_run_meta(meta)
    assert upgraded == {"name": new_name, "part": new_part, **REST}
    assert meta == before
    assert upgrade_run_meta(upgraded) == upgraded


def test_the_meta_of_a_new_run_stays():
    part = {"kind": "prior_ar", "frozen": {"clip": "ab", "codec": "cd"}, "tokenizer": TEXT_TOKENIZER}
    meta = {"name": "prior_ar", "part": part, **REST}
    assert upgrade_run_meta(meta) == meta
