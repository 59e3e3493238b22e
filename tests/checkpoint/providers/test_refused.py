"""Folders of public weights that are damaged, unknown or do not fit are refused in one line that says why."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.sampling.edits.inversion import embed_images


def test_unknown_public_weights_are_refused(tmp_path):
    """The error says what the folder holds, and which public weights can be read."""
    known = (
        "the public weights read here are: Karlo in diffusers' layout; CLIP of transformers or of OpenAI; "
        "CLIP of open_clip"
    )
    for name, files, contents in (
        ("pipeline", {"model_index.json": '{"_class_name": "FluxPipeline"}'}, "is a FluxPipeline"),
        ("model", {"config.json": '{"model_type": "bert"}'}, "holds a 'bert' model"),
        ("tensors", {}, "has no config.json, and its tensors are not those of a network known here"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"weight": np.zeros(1)}, folder / "model.safetensors")
        for file, text in files.items():
            (folder / file).write_text(text)
        for read in (load_bundle, lambda path: load_part(path, "clip")):
            with pytest.raises(ValueError) as error:
                read(folder)
            assert str(error.value) == f"{folder} {contents}; {known}"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file, change):
    held = load_file(file)
    change(held)
    save_file(held, file)


def pickled(folder):
    """In place of the weights, a pickle that would write a file."""
    weights = folder / "prior" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    code = b'cbuiltins\nexec\n(S\'open("%s", "w")\'\ntR.' % str(folder / "executed").encode()
    weights.with_suffix(".bin").write_bytes(code)


PRIOR, SR = "prior/diffusion_pytorch_model.safetensors", "super_res_last/diffusion_pytorch_model.safetensors"
BROKEN = {
    "missing": (
        lambda f: edit_weights(f / PRIOR, lambda w: w.pop("proj_in.bias")),
        "1 parameters are missing in it: z_in/bias",
    ),
    "extra": (
        lambda f: edit_weights(f / PRIOR, lambda w: w.update(more=np.zeros(3))),
        "1 tensors of the file have no use: more",
    ),
    "mis-shaped": (
        lambda f: edit_weights(f / SR, lambda w: w.update({"conv_in.bias": np.zeros(31)})),
        r"conv_in.bias \[31\] for",
    ),
    "truncated": (
        lambda f: (f / PRIOR).write_bytes((f / PRIOR).read_bytes()[:-100]),
        "cannot be read as safetensors",
    ),
    "corrupted": (lambda f: (f / PRIOR).write_bytes(b"\xff" * 100), "cannot be read as safetensors"),
    "no weights": (lambda f: (f / PRIOR).unlink(), "is missing, and with it the weights"),
    "pickle": (pickled, "is a pickle, which could run code"),
    "no config": (lambda f: (f / "decoder" / "config.json").unlink(), "decoder/config.json is missing"),
    "bad json": (lambda f: (f / "decoder" / "config.json").write_text("{"), "is not valid JSON"),
    "not an object": (
        lambda f: (f / "decoder" / "config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "no number": (lambda f: (f / "decoder" / "config.json").write_text("{}"), "a configuration lacks"),
    "another activation": (
        lambda f: edit_config(f / "decoder", act_fn="gelu"),
        "act_fn is 'gelu', but the network here has 'silu'",
    ),
    "another clip": (
        lambda f: edit_config(f / "text_encoder", projection_dim=24),
        "the text encoder makes 10 and 24: they are",
    ),
    "a prior of another clip": (
        lambda f: edit_config(f / "prior", embedding_dim=24),
        "they are of different CLIPs",
    ),
    "another pipeline": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
        "is a FluxPipeline",
    ),
    "sizes": (
        lambda f: edit_config(f / "super_res_last", sample_size=64),
        "super_res_first makes 32 px, but super_res_last, its last step, 64 px",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no CLIP tokenizer"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_folders_are_refused(how, karlo, tmp_path, capsys):
    """One line that says what is wrong; nothing is written, nothing from a file is run."""
    folder = tmp_path / "karlo"
    shutil.copytree(karlo[0], folder)
    breaks, message = BROKEN[how]
    breaks(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_bundle(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and not (tmp_path / "out").exists() and not (folder / "executed").exists()


def test_a_hub_repository(karlo, bundle, monkeypatch):
    """The hub's own library fetches a pinned revision, without pickles; what goes wrong there is one line."""
    import huggingface_hub

    calls = []

    def fetch(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        if revision == "nowhere":
            raise RuntimeError("404 Client Error.\nRevision Not Found")
        return str(karlo[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    read = load_bundle("hf:kakaobrain/karlo-v1-alpha@0123abc")
    assert calls == [("kakaobrain/karlo-v1-alpha", "0123abc")] and set(read.parts) == set(bundle.parts)
    assert (
        load_part("hf:kakaobrain/karlo-v1-alpha@0123abc", "prior_diffusion")[0].config
        == bundle.parts["prior_diffusion"].config
    )
    with pytest.raises(OSError, match="cannot be fetched: 404 Client Error. Revision Not Found"):
        load_bundle("hf:kakaobrain/karlo-v1-alpha@nowhere")
    for text in ("hf:kakaobrain/karlo-v1-alpha", "hf:karlo@main"):
        with pytest.raises(ValueError, match="write hf:owner/name@revision"):
            load_bundle(text)


def test_parts_of_another_clip_are_refused(karlo, bundle, tiny_bundle, tmp_path):
    """A converted decoder does not go with another CLIP."""
    import dataclasses

    mixed = dataclasses.replace(bundle, parts=bundle.parts | {"clip": load_bundle(tiny_bundle).parts["clip"]})
    with pytest.raises(ValueError, match="was trained in the embedding space of CLIP"):
        save_bundle(mixed, tmp_path / "mixed")


def test_images_without_an_image_encoder(bundle):
    with pytest.raises(ValueError, match="has no image encoder"):
        embed_images(bundle, [ops.to_uint8(np.zeros((8, 8, 3)))])
