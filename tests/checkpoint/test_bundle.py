"""Release bundles: written whole, read back the same, and every damage named in one line."""

import json
import shutil

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.bundle import Bundle, Part, bundle_path, load_bundle, load_part, save_bundle, update_provenance
from unclip_jax.checkpoint.store import params_hash


@pytest.fixture
def bundle():
    rng = np.random.default_rng(0)
    clip = Part({"kind": "clip", "model": {}}, {"a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "scale": np.float32(0.1)}})
    prior = Part({"kind": "prior_diffusion", "clip": params_hash(clip.params)}, {"w": rng.normal(size=(2,)).astype(np.float32)})
    return Bundle({"clip": clip, "prior": prior}, {"kind": "clip_bpe"}, {"prior": {"steps": 4}}, {"note": "test"})


def test_round_trip(bundle, tmp_path):
    """Values are those of half precision, shapes (scalars too), configuration and hashes are unchanged."""
    read = load_bundle(save_bundle(bundle, tmp_path / "b"))
    assert (read.tokenizer, read.sampling, read.provenance) == (bundle.tokenizer, bundle.sampling, bundle.provenance)
    for name, part in bundle.parts.items():
        assert read.parts[name].config == part.config
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16)), read.parts[name].params, part.params)
        assert params_hash(read.parts[name].params) == params_hash(part.params)
    assert read.parts["clip"].params["a"]["scale"].shape == ()
    assert read.parts["clip"].params["a"]["kernel"].dtype == np.float32


def test_parts_of_different_clips_are_refused(bundle, tmp_path):
    bundle.parts["prior"].config["clip"] = "0123456789abcdef"
    with pytest.raises(ValueError, match="0123456789abcdef.*but the clip part is"):
        save_bundle(bundle, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_failed_write_leaves_nothing(bundle, tmp_path):
    bundle.parts["prior"].config["bad"] = object()
    with pytest.raises(TypeError):
        save_bundle(bundle, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_overwritten(bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a bundle"):
        save_bundle(bundle, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "bundle.json").unlink(), "not a bundle"),
        (lambda p: (p / "bundle.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "prior" / "model.safetensors").unlink(), "prior/model.safetensors is missing"),
        (lambda p: (p / "prior" / "config.json").unlink(), "prior/config.json is missing"),
        (lambda p: (p / "clip" / "model.safetensors").write_bytes((p / "clip" / "model.safetensors").read_bytes()[:-3]), "cannot be read"),
        (lambda p: shutil.copy(p / "prior" / "model.safetensors", p / "clip" / "model.safetensors"), "hash differs"),
        (lambda p: (p / "bundle.json").write_text(json.dumps({"format_version": 99})), "format version 99"),
    ],
)
def test_damage_is_named(bundle, tmp_path, damage, message):
    path = save_bundle(bundle, tmp_path / "b")
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_bundle(path)
    assert "\n" not in str(error.value)


def test_unknown_bundle_and_part(bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a bundle"):
        bundle_path(tmp_path / "nothing")
    with pytest.raises(KeyError, match="has no part 'decoder'; it has clip, prior"):
        bundle.part("decoder")
    with pytest.raises(FileNotFoundError, match="neither checkpoints nor a bundle"):
        load_part(tmp_path / "nothing", "clip")


def test_load_part_of_a_bundle(bundle, tmp_path):
    part, meta = load_part(save_bundle(bundle, tmp_path / "b"), "prior")
    assert part.config["kind"] == "prior_diffusion" and meta["sampling"] == {"steps": 4}


def test_update_provenance(bundle, tmp_path):
    path = save_bundle(bundle, tmp_path / "b")
    update_provenance(path, figures={"a": 1})
    assert load_bundle(path).provenance == {"note": "test", "figures": {"a": 1}}
