"""Release bundles: they are written whole, read back the same, and every damage is named in one line."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tests.helpers import param_count
from unclip_jax.checkpoint import files
from unclip_jax.checkpoint.bundle import (
    Bundle,
    Part,
    check_frozen,
    check_target,
    last_step,
    save_bundle,
    update_provenance,
    upsamplers,
)
from unclip_jax.checkpoint.check import check_shapes
from unclip_jax.checkpoint.files import open_weights, read_json
from unclip_jax.checkpoint.load import SHIPPED, bundle_path, load_bundle, load_part, stored_bytes
from unclip_jax.checkpoint.store import params_hash


@pytest.fixture(scope="module")
def made():
    from tests.runs import random_bundle

    return random_bundle()


@pytest.fixture
def bundle(made):
    """Four parts of a bundle of random networks."""
    names = ("clip", "codec", "prior_ar", "prior_diffusion")
    parts = {name: Part(copy.deepcopy(made.parts[name].config), made.parts[name].params) for name in names}
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
    assert read.parts["clip"].params["logit_scale"].shape == ()
    assert read.parts["clip"].params["logit_scale"].dtype == np.float32
    top = json.loads((path / "bundle.json").read_text())
    assert top.keys() == {"format_version", "system", "parts", "sampling", "provenance"}
    assert (top["format_version"], top["system"]) == (2, "unclip")
    assert top["parts"]["clip"] == {
        "hash": read.parts["clip"].hash,
        "parameters": param_count(bundle.parts["clip"].params),
    }


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


def edit(folder, change):
    """Changes the tensors of a part on disk."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


PRIOR = "prior_diffusion"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "bundle.json").unlink(), "not a bundle"),
        (lambda p: (p / "bundle.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / PRIOR / "model.safetensors").unlink(), f"{PRIOR}/model.safetensors is missing"),
        (lambda p: (p / PRIOR / "config.json").unlink(), f"{PRIOR}/config.json is missing"),
        (lambda p: truncate(p / "clip" / "model.safetensors"), "cannot be read"),
        (lambda p: edit(p / "clip", lambda w: w.update(logit_scale=np.zeros(()))), "hash differs"),
        (
            lambda p: shutil.copy(p / PRIOR / "model.safetensors", p / "clip" / "model.safetensors"),
            r"clip does not hold the network .* tensors have no use: ln_out.* parameters are missing: im",
        ),
        (
            lambda p: edit(p / "clip", lambda w: w.update(logit_scale=np.zeros(2))),
            r"1 shapes differ \(\[2\] for \[\]\): logit_scale",
        ),
        (
            lambda p: edit(p / "clip", lambda w: w.update(logit_scale=np.zeros((), np.int8))),
            "clip holds integers for logit_scale: quantised",
        ),
        (
            lambda p: edit(p / PRIOR, lambda w: w["query"].__setitem__(0, np.nan)),
            f"{PRIOR}: query holds values that are not finite",
        ),
        (
            lambda p: edit(p / PRIOR, lambda w: w["query"].__setitem__(0, -np.inf)),
            f"{PRIOR}: query holds values that are not finite",
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


def set_in(value, path, new):
    """Sets a value in nested dictionaries; `path` joins the keys by dots. None of `...` removes the key."""
    *inner, last = path.split(".")
    for key in inner:
        value = value.setdefault(key, {})
    if new is ...:
        del value[last]
    else:
        value[last] = new


CONFIGS = [
    ("clip", "kind", "vqgan", "config.json: unknown kind of network 'vqgan'"),
    ("clip", "kind", ["clip"], r"unknown kind of network \['clip'\]"),
    ("clip", "colour", 1, "unknown key 'colour'; known: kind, frozen"),
    ("clip", "model", [], r"config.json: model must be an object, not \[\]"),
    ("clip", "model.embed_dim", "16", "model: embed_dim must be an integer, not '16'"),
    ("clip", "model.embed_dim", True, "model: embed_dim must be an integer, not True"),
    ("clip", "model.image.heads", 0, "model: image: heads must be between 1 and"),
    ("clip", "model.image.heads", 3, "describes no network: width 32 is not a multiple of heads 3"),
    ("clip", "model.image.layers", 10**9, "layers must be between 1 and 1000"),
    ("clip", "model.image.width", ..., "model: image lacks 'width'"),
    ("clip", "model.image.std", [1, 0, 1], "std must be between"),
    ("clip", "model.activation", "relu", "unknown activation 'relu'; choose one of quick_gelu, gelu"),
    ("clip", "model.text.length", 7, "the text encoder reads 7 of"),
    ("clip", "tokenizer", ..., "lacks 'tokenizer', which its text encoder needs"),
    ("clip", "tokenizer.kind", "spm", "config.json: tokenizer: unknown tokenizer kind 'spm'"),
    ("clip", "tokenizer.length", 2.5, "tokenizer: length must be an integer, not 2.5"),
    ("clip", "tokenizer.vocab_size", 5, "vocab_size=5 must lie in"),
    ("clip", "frozen", {"../x": "a"}, r"frozen: '../x' is no name of a part"),
    ("codec", "embed_dim", -1, "embed_dim must be between 1 and"),
    ("codec", "embed_dim", 17, "codec does not hold the network that its config.json describes"),
    (PRIOR, "diffusion.schedule", "sine", "unknown schedule 'sine'; choose one of cosine"),
    (PRIOR, "diffusion.prediction", None, "prediction must be text, not None"),
    (PRIOR, "diffusion.num_steps", 10**12, "num_steps must be between"),
    (PRIOR, "embedding_space.kind", "whitend", "embedding_space: unknown kind 'whitend'"),
    (PRIOR, "embedding_space.mean", [0.1], "mean has 1 numbers, and the embeddings 16"),
    (PRIOR, "embedding_space.std", [0.0] * 16, "embedding_space: std must be positive"),
    (PRIOR, "embedding_space.std", ["1"] * 16, "std must be a list of numbers or null"),
    (PRIOR, "model.dropout", 1.5, r"dropout must be in \[0, 1\), not 1.5"),
    (PRIOR, "model.remat", "full", "model: unknown key 'remat'"),
    (PRIOR, "x0_error", [0.5], "x0_error must have a number for each"),
    ("prior_ar", "dot_edges", [0.2, 0.0, -0.2], "dot_edges must be 3 ascending numbers for 4 bins"),
    ("prior_ar", "model.codes", 3, "shapes differ"),
    ("prior_ar", "model.mlp_ratio", 1e300, "mlp_ratio must be between"),
]
TOPS = [
    ("parts", [], r"bundle.json: parts must be an object, not \[\]"),
    ("parts", {}, "bundle.json lists no parts"),
    ("parts.clip", "x", "part clip must be an object, not 'x'"),
    ("parts.clip.hash", 5, "part clip: hash must be text, not 5"),
    ("parts", {"../evil": {"hash": "0"}}, "'../evil' is no name of a part; a name has small letters"),
    ("parts", {"": {"hash": "0"}}, "'' is no name of a part"),
    ("parts", {"clip\n": {"hash": "0"}}, r"'clip\\n' is no name of a part"),
    ("sampling", "fast", "sampling must be an object, not 'fast'"),
    ("sampling.clip", 3, "sampling: clip must be an object, not 3"),
    ("provenance", None, "provenance must be an object, not None"),
    ("provenance.training", [], "provenance: training must be an object"),
    ("system", 3, "system must be text, not 3"),
    ("colour", 3, "unknown key 'colour'"),
    ("format_version", True, "has format version True"),
    ("format_version", "2", "has format version '2'"),
]


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    """A bundle on disk; tests change its JSON and put it back."""
    return save_bundle(made, tmp_path_factory.mktemp("typed") / "b")


def refused(file, path, new, message, folder):
    before = file.read_text()
    value = json.loads(before)
    set_in(value, path, new)
    file.write_text(json.dumps(value))
    try:
        with pytest.raises(ValueError, match=message) as error:
            load_bundle(folder)
    finally:
        file.write_text(before)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))


@pytest.mark.parametrize("part, path, new, message", CONFIGS)
def test_values_of_a_parts_configuration_are_typed(part, path, new, message, saved):
    """One line that names the file, the key and the value."""
    refused(saved / part / "config.json", path, new, message, saved)


@pytest.mark.parametrize("path, new, message", TOPS)
def test_values_of_a_bundles_description_are_typed(path, new, message, saved):
    refused(saved / "bundle.json", path, new, message, saved)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"kind": NaN}', "NaN is no number of JSON"),
        ('{"kind": 1e400}', "1e400 is no number of 64 bits"),
        ('{"kind": 1' + "0" * 9000 + "}", "10000000000000000000 is no whole number of 64 bits"),
        ('{"kind": "clip", "kind": "codec"}', "the key 'kind' stands there twice"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"kind": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_json_that_is_none(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="cannot be read .Is a directory"):
        read_json(tmp_path)


def test_names_of_parts_are_no_paths(bundle, tmp_path):
    """On writing too: nothing appears outside the bundle's folder, or in it."""
    for name in ("../evil", "a/b", "/tmp/evil", "..", "A", ""):
        parts = {name: bundle.parts["codec"]}
        with pytest.raises(ValueError, match="is no name of a part"):
            save_bundle(dataclasses.replace(bundle, parts=parts), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["bundle.json", "codec/config.json", "codec/model.safetensors", "codec"])
def test_links_out_of_a_bundle_are_not_followed(file, bundle, tmp_path):
    """Links inside it are, and those of the hub's cache, which keeps the files beside its snapshots."""
    path, outside = save_bundle(bundle, tmp_path / "b"), tmp_path / "outside"
    (path / file).rename(outside)
    (path / file).symlink_to(outside)
    with pytest.raises(ValueError, match="is a symbolic link to .*outside.*, outside the bundle; copy"):
        load_bundle(path)
    (path / file).unlink()
    inside = path / "kept"
    outside.rename(inside)
    (path / file).symlink_to(inside)
    assert load_bundle(path).parts.keys() == bundle.parts.keys()
    hub = tmp_path / "models--a--b"
    (hub / "snapshots").mkdir(parents=True)
    path = path.rename(hub / "snapshots" / "0123")
    (path / "kept").rename(hub / "blob")
    (path / file).unlink()
    (path / file).symlink_to(hub / "blob")
    assert load_bundle(path).parts.keys() == bundle.parts.keys()


def test_values_that_cannot_be_stored_are_refused(tmp_path):
    """In half precision a large value would become infinite."""
    part = Part({"kind": "prior_diffusion"}, {"w": np.float32([1, 1e6])})
    with pytest.raises(ValueError, match="the part a: w reaches 1e.06, too large for float16; write"):
        save_bundle(Bundle({"a": part}), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SHIPPED.glob("*/bundle.json")))
def test_shipped_bundles_have_the_shapes_of_their_networks(name):
    """Loading skips this check for them."""
    for folder in (SHIPPED / name).iterdir():
        if folder.is_dir():
            config = json.loads((folder / "config.json").read_text())
            weights = open_weights(folder, ["model"], "bundle")
            check_shapes(config, {tensor: weights.shape(tensor) for tensor in weights}, str(folder))


def without_frozen(part, **changes):
    config = {key: value for key, value in part.config.items() if key != "frozen"}
    return Part(config | changes, part.params)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            lambda p: {"codec": small_codec(p["codec"])},
            "codec takes embeddings of 8, but those here are of 16",
        ),
        (
            lambda p: {"codec": small_codec(p["codec"]), "clip": None},
            "takes embeddings of 16, but those here are of 8",
        ),
        (
            lambda p: {"upsampler_16": without_frozen(p["upsampler_16"], last_step_of="none")},
            "upsampler_16 makes the last step of none, which is no upsampler here",
        ),
        (
            lambda p: {"upsampler_16": without_frozen(p["upsampler_16"], last_step_of="clip")},
            "upsampler_16 makes the last step of clip, which is no upsampler here",
        ),
        (
            lambda p: {"upsampler_16": without_frozen(p["upsampler_16"], last_step_of="upsampler_16")},
            "upsampler_16 makes the last step of upsampler_16, which is no upsampler here",
        ),
        (
            lambda p: {"upsampler_16": without_frozen(p["upsampler_16"], factor=10**6)},
            "upsampler_16 enlarges pictures to 16 pixels by 1000000, but decoder draws 8 pixels",
        ),
    ],
)
def test_parts_of_other_sizes_are_refused(changes, message, made, tmp_path):
    """Also where no part names the hash of another."""
    parts = {name: without_frozen(part) for name, part in made.parts.items()}
    parts = {name: part for name, part in (parts | changes(parts)).items() if part is not None}
    path = save_bundle(Bundle(parts), tmp_path / "b")
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(path)
    assert "\n" not in str(error.value)


def small_codec(part):
    params = {name: value[:8, :8] if value.ndim == 2 else value[:8] for name, value in part.params.items()}
    return Part({"kind": "codec", "embed_dim": 8, "dims": 8}, params)


def test_what_lies_in_a_bundle_is_not_lost(bundle, tmp_path):
    """A bundle is replaced whole, so nothing else may lie in it; and the folder is tried first."""
    path = save_bundle(bundle, tmp_path / "b")
    (path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="b is a bundle that also holds notes.txt, which would be lost"):
        save_bundle(bundle, path)
    (path / "notes.txt").unlink()
    assert load_bundle(save_bundle(bundle, path)).parts.keys() == bundle.parts.keys()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written: Not a directory"):
        check_target(tmp_path / "file" / "b")
    with pytest.raises(ValueError, match="file exists and is not a bundle"):
        check_target(tmp_path / "file")
    assert check_target(tmp_path / "new" / "b") and not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line(bundle, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="cannot be written .*No space left on device") as error:
        save_bundle(bundle, tmp_path / "b")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


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
