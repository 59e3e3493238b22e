"""Release bundles: they are written whole, read back the same, and every damage is named in one line."""

import json
import shutil

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.bundle import (
    Bundle,
    Part,
    check_frozen,
    last_step,
    save_bundle,
    update_provenance,
    upsamplers,
)
from unclip_jax.checkpoint.load import bundle_path, load_bundle, load_part, stored_bytes
from unclip_jax.checkpoint.store import params_hash


@pytest.fixture
def bundle():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tokenizer = {"kind": "clip_bpe"}
    clip = Part(
        {"kind": "clip", "model": {}, "tokenizer": tokenizer}, {"a": {"kernel": draw(3, 4), "scale": draw()}}
    )
    frozen = {"clip": params_hash(clip.params)}
    codec = Part({"kind": "codec", "frozen": frozen}, {"components": draw(4, 4)})
    frozen_ar = frozen | {"codec": params_hash(codec.params)}
    parts = {
        "clip": clip,
        "codec": codec,
        "prior_ar": Part({"kind": "prior_ar", "frozen": frozen_ar}, {"w": draw(2)}),
        "prior_diffusion": Part({"kind": "prior_diffusion", "frozen": frozen}, {"w": draw(2)}),
    }
    return Bundle(parts, "unclip", {"prior_diffusion": {"steps": 4}}, {"note": "test"})


def test_round_trip(bundle, tmp_path):
    """Values are those of half precision (the codec's of full precision); shapes (scalars too),
    configurations and hashes are unchanged."""
    path = save_bundle(bundle, tmp_path / "b")
    read = load_bundle(path)
    assert (read.system, read.sampling, read.provenance) == (
        bundle.system,
        bundle.sampling,
        bundle.provenance,
    )
    assert read.path == str(path) and read.parts.keys() == bundle.parts.keys()
    for name, part in bundle.parts.items():
        dtype = np.float32 if name == "codec" else np.float16
        assert read.parts[name].config == part.config
        jax.tree.map(
            lambda a, b, dtype=dtype: np.testing.assert_array_equal(a, np.asarray(b, dtype)),
            read.parts[name].params,
            part.params,
        )
        assert read.parts[name].hash == params_hash(read.parts[name].params) == params_hash(part.params)
    assert read.parts["clip"].params["a"]["scale"].shape == ()
    assert read.parts["clip"].params["a"]["kernel"].dtype == np.float32
    top = json.loads((path / "bundle.json").read_text())
    assert top.keys() == {"format_version", "system", "parts", "sampling", "provenance"}
    assert (top["format_version"], top["system"]) == (2, "unclip")
    assert top["parts"]["clip"] == {"hash": read.parts["clip"].hash, "parameters": 13}


@pytest.mark.parametrize(
    ("part", "role", "message"),
    [
        (
            "prior_diffusion",
            "clip",
            "part 'prior_diffusion' was trained in the embedding space of CLIP 0123456789abcdef, "
            "but the clip part is {}; combine parts trained with the same clip",
        ),
        (
            "prior_ar",
            "codec",
            "part 'prior_ar' was trained with the codec 0123456789abcdef, "
            "but the codec part is {}; combine parts trained with the same codec",
        ),
    ],
)
def test_parts_trained_with_another_network_are_refused(part, role, message, bundle, tmp_path):
    """The error names both hashes, on writing and on reading; without the frozen part there is nothing to
    compare."""
    path, expected = (
        save_bundle(bundle, tmp_path / "good"),
        message.format(params_hash(bundle.parts[role].params)),
    )
    bundle.parts[part].config["frozen"] = bundle.parts[part].config["frozen"] | {role: "0123456789abcdef"}
    with pytest.raises(ValueError) as error:
        save_bundle(bundle, tmp_path / "b")
    assert str(error.value) == expected and not (tmp_path / "b").exists()
    (path / part / "config.json").write_text(json.dumps(bundle.parts[part].config))
    with pytest.raises(ValueError) as error:
        load_bundle(path)
    assert str(error.value) == expected
    check_frozen({name: value for name, value in bundle.parts.items() if name != role})


def test_upsamplers_come_by_size_and_not_by_name():
    """Neither the names nor their order decide, but the image sizes; networks for a last step are found by
    their configuration."""
    upsampler = lambda size, **more: Part(
        {"kind": "upsampler", "model": {"unet": {"image_size": size}}, **more}, {}
    )
    parts = {
        "upsampler_a": upsampler(1024),
        "large": upsampler(256),
        "polish": upsampler(256, last_step_of="large"),
        "decoder": Part({"kind": "decoder", "model": {"unet": {"image_size": 32}}}, {}),
        "upsampler_z_last": upsampler(64),
    }
    assert upsamplers(parts) == ["upsampler_z_last", "large", "upsampler_a"]
    assert last_step(parts, "large") == "polish"
    assert last_step(parts, "upsampler_a") is None and last_step(parts, "polish") is None


def test_a_failed_write_leaves_nothing(bundle, tmp_path):
    bundle.parts["prior_diffusion"].config["bad"] = object()
    with pytest.raises(TypeError):
        save_bundle(bundle, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_overwritten(bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a bundle"):
        save_bundle(bundle, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


PRIOR = "prior_diffusion"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "bundle.json").unlink(), "not a bundle"),
        (lambda p: (p / "bundle.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / PRIOR / "model.safetensors").unlink(), f"{PRIOR}/model.safetensors is missing"),
        (lambda p: (p / PRIOR / "config.json").unlink(), f"{PRIOR}/config.json is missing"),
        (lambda p: truncate(p / "clip" / "model.safetensors"), "cannot be read"),
        (
            lambda p: shutil.copy(p / PRIOR / "model.safetensors", p / "clip" / "model.safetensors"),
            "hash differs",
        ),
        (
            lambda p: (p / "bundle.json").write_text(json.dumps({"format_version": 99})),
            "format version 99; this version reads 1 and 2",
        ),
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
    expected = "has no part 'decoder'; it has clip, codec, prior_ar, prior_diffusion"
    with pytest.raises(KeyError, match=expected):
        bundle.part("decoder")
    with pytest.raises(KeyError, match=expected):
        load_part(save_bundle(bundle, tmp_path / "b"), "decoder")
    with pytest.raises(FileNotFoundError, match="neither checkpoints nor a bundle"):
        load_part(tmp_path / "nothing", "clip")


def test_load_part_of_a_bundle(bundle, tmp_path):
    """One part, what its bundle says of it, and nothing of the others: they may be damaged."""
    path = save_bundle(bundle, tmp_path / "b")
    shutil.rmtree(path / "codec")
    part, meta = load_part(path, PRIOR)
    assert part.config == bundle.parts[PRIOR].config and part.hash == params_hash(bundle.parts[PRIOR].params)
    assert meta == {"sampling": {"steps": 4}, "provenance": {"note": "test"}}


def test_stored_bytes(bundle, tmp_path):
    """The size of all tensors' files; also of a shipped bundle by its name."""
    path = save_bundle(bundle, tmp_path / "b")
    assert stored_bytes(path) == sum(
        (path / name / "model.safetensors").stat().st_size for name in bundle.parts
    )
    assert stored_bytes("emoji") > 2**20 and stored_bytes(tmp_path / "nothing") == 0


def test_update_provenance(bundle, tmp_path):
    path = save_bundle(bundle, tmp_path / "b")
    update_provenance(path, figures={"a": 1})
    assert load_bundle(path).provenance == {"note": "test", "figures": {"a": 1}}


def test_the_shipped_bundle_is_of_the_newest_format():
    """So that nothing is converted when it is loaded; its tokenizer lies with CLIP."""
    path = bundle_path("emoji")
    assert json.loads((path / "bundle.json").read_text())["format_version"] == 2
    bundle = load_bundle("emoji")
    assert {"clip", "codec", "prior_diffusion", "prior_ar", "decoder"} < bundle.parts.keys()
    assert upsamplers(bundle.parts) == ["upsampler_64"]
    assert bundle.parts["clip"].config["tokenizer"]["vocab_size"] == 8192
    assert all(part.config["kind"] in name for name, part in bundle.parts.items())
