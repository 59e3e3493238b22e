"""Folders of public weights that are damaged, unknown or do not fit are refused in one line that says why."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.files import open_weights
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.providers import PROVIDERS, karlo_config
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.sampling.edits.inversion import embed_images


def test_unknown_public_weights_are_refused(tmp_path):
    """The error says what the folder holds, and which public weights can be read."""
    layouts = [provider.layout for provider in PROVIDERS.values()]
    assert layouts[0] == "Karlo in diffusers' layout" and len(layouts) > 5
    known = f"the public weights read here are: {'; '.join(layouts)}"
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


def edit_config(folder, name="config.json", **changes):
    file = folder / name
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
    "not a number": (
        lambda f: edit_weights(f / PRIOR, lambda w: w["proj_in.bias"].__setitem__(0, np.nan)),
        "the prior: proj_in.bias holds values that are not finite",
    ),
    "infinite statistics": (
        lambda f: edit_weights(f / PRIOR, lambda w: w["clip_std"].__setitem__((0, 0), np.inf)),
        "the prior: clip_std holds values that are not finite",
    ),
    "quantised": (
        lambda f: edit_weights(f / PRIOR, lambda w: w.update({"proj_in.bias": np.zeros(16, np.int8)})),
        "holds integers for proj_in.bias: quantised weights cannot be read",
    ),
    "another scheduler": (
        lambda f: edit_config(f / "prior_scheduler", "scheduler_config.json", _class_name="DDPMScheduler"),
        "prior_scheduler: _class_name is 'DDPMScheduler', but the network here has 'UnCLIPScheduler'",
    ),
    "a setting of the scheduler": (
        lambda f: edit_config(f / "decoder_scheduler", "scheduler_config.json", rescale_betas_zero_snr=True),
        "decoder_scheduler: 'rescale_betas_zero_snr' is True, a setting that is not known here",
    ),
    "a part of another class": (
        lambda f: edit_config(f, "model_index.json", prior_scheduler=["diffusers", "DDIMScheduler"]),
        "'prior_scheduler' is .*DDIMScheduler.*, but the part here is a UnCLIPScheduler",
    ),
    "a part too many": (
        lambda f: edit_config(f, "model_index.json", safety_checker=["stable_diffusion", "Checker"]),
        "'safety_checker' is .*, but Karlo has no such part",
    ),
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


UNET = {
    "sample_size": 8,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    "in_channels": 6,
    "add_attention": False,
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_channels": 3}, "in_channels is 3, but the network here has 6"),
        ({"in_channels": ...}, "a configuration lacks 'in_channels'"),
        ({"add_attention": ...}, "a configuration lacks 'add_attention'"),
        ({"sample_size": None}, "sample_size must be an integer, not None"),
        ({"sample_size": 7}, "7 px cannot be halved 1 times"),
        ({"layers_per_block": [1, 2]}, "layers_per_block must be an integer"),
        ({"layers_per_block": 10**9}, "layers_per_block must be between 1 and 1000"),
        ({"block_out_channels": "32"}, "block_out_channels must be a list of integers, not '32'"),
        ({"block_out_channels": []}, "levels of ResnetDownsampleBlock2D or"),
        ({"block_out_channels": [32, 48]}, "are not multiples of the first"),
        ({"norm_num_groups": 5}, "width 32 has no 5 equal groups"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "levels of ResnetDownsampleBlock2D or"),
        ({"down_block_types": [1, 2]}, "down_block_types must be a list of texts"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False, but the network here has True"),
        ({"num_class_embeds": 10}, "'num_class_embeds' is 10, a setting that is not known here"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial', but"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel', but"),
    ],
)
def test_settings_of_another_unet_are_refused(changes, message):
    config = {key: value for key, value in (UNET | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=f"super_res_first: .*{message}"):
        karlo_config.upsampler_model(config, "super_res_first")
    assert karlo_config.upsampler_model(UNET | {"new_setting": None, "_name_or_path": "x"}, "a")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"variance_type": "fixed_large"},
            "variance_type is 'fixed_large', but only fixed_small_log, learned",
        ),
        ({"clip_sample": False}, "clip_sample is False, but the network here has True"),
        ({"clip_sample_range": "1"}, "clip_sample_range must be a finite number, not '1'"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be positive"),
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear', but"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be between 1 and"),
        ({"thresholding": True}, "'thresholding' is True, a setting that is not known here"),
        ({"timestep_spacing": "leading"}, "'timestep_spacing' is 'leading', a setting"),
        ({"steps_offset": 1}, "'steps_offset' is 1, a setting"),
    ],
)
def test_settings_of_another_scheduler_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"decoder_scheduler: {message}"):
        karlo_config.sampling(changes, "decoder", "decoder_scheduler")
    assert karlo_config.sampling({"thresholding": False}, "decoder", "decoder_scheduler")["clip"] == 1.0


# ------------------------------------------------------------------------------------------- files
def shards(folder, files, weight_map, variant=""):
    folder.mkdir()
    for name, tensors in files.items():
        save_file({tensor: np.full(2, i, np.float32) for i, tensor in enumerate(tensors)}, folder / name)
    if weight_map is not None:
        index = folder / f"model.safetensors.index{variant}.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
def test_a_variant_is_read_when_it_is_alone(variant, tmp_path):
    """One file, and several with an index; the full weights come first where they are there too."""
    whole = shards(tmp_path / "whole", {f"model{variant}.safetensors": ["a", "b"]}, None)
    assert set(open_weights(whole)) == {"a", "b"}
    files = {f"model-1{variant}.safetensors": ["a"], f"model-2{variant}.safetensors": ["b"]}
    listed = dict(zip("ab", files))
    assert set(open_weights(shards(tmp_path / "cut", files, listed, variant))) == {"a", "b"}
    save_file({"d": np.zeros(2)}, whole / "model.fp16.safetensors")
    save_file({"c": np.zeros(2)}, whole / "model.safetensors")
    assert set(open_weights(whole)) == {"c"}


@pytest.mark.parametrize(
    "files, weight_map, message",
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], None, "only as bf16, fp16: keep one of"),
        (["model.non_ema.safetensors"], None, "only as non_ema: keep one of fp16"),
        (["one.safetensors", "two.safetensors"], {"a": "one.safetensors", "b": "two.safetensors"}, "another"),
        (["one.safetensors"], {"c": "one.safetensors"}, "lacks c, which model.safetensors.index.json lists"),
        (["one.safetensors"], {"a": "../one.safetensors"}, "has no weight_map of files beside it"),
        (["one.safetensors"], {"a": ["one.safetensors"]}, "has no weight_map of files beside it"),
        ([], {"a": "two.safetensors"}, "two.safetensors is missing"),
        ([], None, "is missing, and with it the weights"),
    ],
)
def test_files_that_do_not_say_which_weights_are_meant(files, weight_map, message, tmp_path):
    folder = shards(tmp_path / "f", {name: ["a", "b"] for name in files}, weight_map)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_weights(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_is_not_passed_over(tmp_path):
    """transformers would apply it."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter .* merge it"):
        load_bundle(tmp_path)


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
