"""`unclip doctor` finds planted faults at the right stage, and is quiet about the sound shipped bundle."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file

import unclip_jax
from tests.runs import without_image_tower
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_part
from unclip_jax.cli.main import main
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate.doctor.examine import examine
from unclip_jax.evaluate.doctor.load import Opened, make_subject, open_patient, with_clip
from unclip_jax.evaluate.doctor.report import FAULT, OK, WARN, Finding, Limits, Report, explained, finding
from unclip_jax.sampling.programs import Sampler

ROWS = 20  # the two batches of a network, 3 times and 2 times a quarter of it, then pad to one size
TESTED = ("clip", "prior_diffusion", "decoder", "upsampler_64")


@pytest.fixture(scope="module")
def emoji():
    """The shipped bundle without the parts that no test here needs."""
    bundle = unclip_jax.load_bundle("emoji")
    parts = {name: part for name, part in bundle.parts.items() if name in TESTED}
    return dataclasses.replace(bundle, parts=parts)


@pytest.fixture(scope="module")
def sound(emoji):
    source = make_source({"name": "emoji", "split": "compose"})
    return make_subject(Opened(emoji, {}), source, rows=ROWS, drawn=0)


# What is examined beside a planted fault: the parts before it, which must not be blamed, and for CLIP those
# behind it too.
BESIDE = {
    "clip": ("clip", "prior_diffusion", "decoder"),
    "prior_diffusion": ("clip", "prior_diffusion"),
    "decoder": ("clip", "decoder"),
    "upsampler_64": ("clip", "upsampler_64"),
}
# The program that reads what the planted configurations change. The others see a part's module alone.
READS = {
    "clip": "encode_image",
    "prior_diffusion": "doctor prior",
    "decoder": "doctor decoder",
    "upsampler_64": "doctor upsampler",
}


def changed(sound, name, params=None, config=None):
    """A subject that differs in one part. It keeps the compiled programs that stay the same."""
    bundle = sound.sampler.bundle
    part = bundle.parts[name]
    new = Part(part.config if config is None else config, part.params if params is None else params)
    parts = {other: bundle.parts[other] for other in BESIDE[name]} | {name: new}
    sampler = Sampler(dataclasses.replace(bundle, parts=parts))
    first = lambda key: key if isinstance(key, str) else key[0]
    sampler._programs = {
        key: program
        for key, program in sound.sampler._programs.items()
        if config is None or first(key) != READS[name]
    }
    return dataclasses.replace(sound, sampler=sampler, broken=set(), kept={})


def edited(part, **edits):
    """A part's configuration with values at dotted paths."""
    config = copy.deepcopy(part.config)
    for path, value in edits.items():
        *keys, last = path.split("__")
        node = config
        for key in keys:
            node = node[key]
        node[last] = value
    return config


def at_start(part, seed=0):
    """Weights of the part's shapes at their initialisation, with small noise where that is zero."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name, shape = path[-1].key, np.shape(leaf)
        if name == "scale":
            return np.ones(shape, np.float32)
        fan_in = max(int(np.prod(shape[:-1])), 1)
        out = any(key.key.startswith(("conv_out", "out")) for key in path)
        return np.float32(rng.normal(size=shape) * (0.01 if out or name != "kernel" else fan_in**-0.5))

    return jax.tree_util.tree_map_with_path(fill, part.params)


def rewritten(params, **edits):
    """A tree with some leaves changed by functions, by their paths with __."""
    flat = traverse_util.flatten_dict(params, sep="__")
    return traverse_util.unflatten_dict(
        flat | {k: f(np.asarray(flat[k])) for k, f in edits.items()}, sep="__"
    )


# ------------------------------------------------------------------------------------------ planted faults
def scaled_prior(sound, parts):
    std = [2 * value for value in parts["prior_diffusion"].config["embedding_space"]["std"]]
    config = edited(parts["prior_diffusion"], embedding_space__std=std)
    return changed(sound, "prior_diffusion", config=config)


def untrained_decoder(sound, parts):
    return changed(sound, "decoder", at_start(parts["decoder"]))


def swapped_decoder(sound, parts):
    blue_first = [2, 1, 0, 5, 4, 3]
    swap = lambda value: value[..., blue_first]
    params = rewritten(parts["decoder"].params, unet__conv_out__kernel=swap, unet__conv_out__bias=swap)
    return changed(sound, "decoder", params)


def linear_decoder(sound, parts):
    return changed(sound, "decoder", config=edited(parts["decoder"], diffusion__schedule="linear"))


def linear_upsampler(sound, parts):
    return changed(sound, "upsampler_64", config=edited(parts["upsampler_64"], diffusion__schedule="linear"))


def shifted_text(sound, parts):
    roll = lambda value: np.roll(value, 1, axis=0)
    return changed(sound, "clip", rewritten(parts["clip"].params, text_tower__token_embedding=roll))


def average_of_start(sound, parts):
    """An average that still holds half of the start. A run also has the weights that were trained."""
    part = parts["decoder"]
    mixed = changed(sound, "decoder", jax.tree.map(lambda a, b: (a + b) / 2, part.params, at_start(part)))
    return dataclasses.replace(mixed, raw={"decoder": part.params})


def unit_decoder(sound, parts):
    """A decoder that takes embeddings of unit norm."""
    norm = float(np.mean(np.linalg.norm(sound.z_image, axis=1)))
    grow = lambda value: norm * value
    edits = {f"conditioning__image_embed_{name}__kernel": grow for name in ("cond", "tokens")}
    return changed(sound, "decoder", rewritten(parts["decoder"].params, **edits))


def raw_pixels(sound, parts):
    """An image tower that forgets the mean and the deviation of its pixels."""
    config = edited(parts["clip"], model__image__mean=(0.0,) * 3, model__image__std=(1.0,) * 3)
    return changed(sound, "clip", config=config)


def nan_prior(sound, parts):
    poison = lambda value: np.where(np.arange(value.size).reshape(value.shape) == 7, np.nan, value)
    return changed(sound, "prior_diffusion", rewritten(parts["prior_diffusion"].params, z_out__kernel=poison))


PLANTED = {
    scaled_prior: ("prior_diffusion", "another space"),
    untrained_decoder: ("decoder", "linear filter"),
    swapped_decoder: ("decoder", "blue before red"),
    linear_decoder: ("decoder", "another schedule"),
    linear_upsampler: ("upsampler_64", "another schedule"),
    shifted_text: ("clip", "shifted tokens"),
    average_of_start: ("decoder", "linear filter", "error of the average"),
    unit_decoder: ("decoder", "another norm"),
    raw_pixels: ("clip", "another form"),
    nan_prior: ("prior_diffusion", "not finite"),
}


def show(report):
    return "\n".join(report.describe())


def test_the_sound_bundle_has_no_fault(sound):
    report = examine(sound, "emoji", "emoji/compose")
    assert report.verdict == OK, show(report)
    assert set(report.stages()) == set(sound.sampler.bundle.parts)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_faults_are_found_at_their_stage(plant, sound):
    """Faults are found at the planted stage and at no other, by the figure that names the cause."""
    stage, *figures = PLANTED[plant]
    report = examine(plant(sound, sound.sampler.bundle.parts), "planted", "emoji/compose")
    faults = [found for found in report.findings if found.verdict == FAULT]
    assert {found.stage for found in faults} == {stage}, show(report)
    for words in figures:
        assert any(words in found.figure and found.change for found in faults), show(report)


# ------------------------------------------------------------------------------------------ loading
def test_a_damaged_part_on_disk_is_named(emoji, tmp_path, capsys):
    """Loading refuses a NaN. The doctor names the part, and tests the others."""
    parts = {name: emoji.parts[name] for name in ("clip", "prior_diffusion")}
    folder = save_bundle(dataclasses.replace(emoji, parts=parts, path=""), tmp_path / "damaged")
    file = folder / "prior_diffusion" / "model.safetensors"
    tensors = load_file(file)
    tensors["z_out/kernel"][3, 5] = np.nan
    save_file(tensors, file)
    report = tmp_path / "report.json"
    words = ["doctor", str(folder), "--rows", "16", "--drawn", "0", "--json", str(report)]
    assert main(words) == 1
    assert "prior_diffusion: fault" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["verdict"] == FAULT
    (only,) = found["stages"]["prior_diffusion"]["findings"]
    assert "z_out/kernel holds values that are not finite" in only["change"]
    assert found["stages"]["clip"]["verdict"] != FAULT and len(found["stages"]["clip"]["findings"]) > 2
    assert any("prior_diffusion" in words for words in found["untested"])


@pytest.fixture(scope="module")
def towerless(tiny_bundle, tmp_path_factory):
    """The folder of a bundle with a CLIP and a prior, without CLIP's image tower, as Karlo's is."""
    made = without_image_tower(unclip_jax.load_bundle(tiny_bundle))
    return save_bundle(made, tmp_path_factory.mktemp("towerless") / "towerless")


def test_an_image_tower_from_elsewhere(towerless, tiny_bundle, tmp_path, capsys):
    """`--clip` gives what the bundle lacks: the same figures as those of the whole bundle."""
    source = make_source({"name": "emoji", "split": "compose"})
    whole = unclip_jax.load_bundle(tiny_bundle)
    parts = {name: whole.parts[name] for name in ("clip", "prior_diffusion")}
    subject = make_subject(Opened(dataclasses.replace(whole, parts=parts), {}), source, rows=16, drawn=0)
    expected = examine(subject, "whole", "compose").to_json()["stages"]
    words, file = ["doctor", str(towerless), "--rows", "16", "--drawn", "0"], tmp_path / "report.json"
    main([*words, "--clip", str(tiny_bundle), "--json", str(file)])
    found = json.loads(file.read_text())
    assert not any("CLIP's image tower" in words for words in found["untested"])
    for stage in parts:
        ours, theirs = (
            {one["figure"]: one["value"] for one in stages[stage]["findings"]}
            for stages in (found["stages"], expected)
        )
        assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)
    main([*words, "--json", str(file)])
    found = json.loads(file.read_text())
    assert any("CLIP's image tower" in words for words in found["untested"])
    assert len(found["stages"]["prior_diffusion"]["findings"]) < len(expected["prior_diffusion"]["findings"])


def test_an_image_tower_that_does_not_belong(towerless, tiny_bundle, tiny_judge, tmp_path):
    """Another CLIP, one without towers, and a bundle that needs none: one line each."""
    opened = open_patient(towerless)
    rounded = load_part(tiny_bundle, "clip")[0]
    half = jax.tree.map(lambda x: np.asarray(np.asarray(x, jax.numpy.bfloat16), np.float32), rounded.params)
    save_bundle(Bundle({"clip": Part(rounded.config, half)}), tmp_path / "half")
    assert with_clip(opened, tmp_path / "half").bundle.parts["clip"].config["model"]["image"] is not None
    other = copy.deepcopy(rounded.config)
    other["model"]["activation"] = "gelu"
    save_bundle(Bundle({"clip": Part(other, rounded.params)}), tmp_path / "gelu")
    for clip, says in {
        tiny_judge: "in another space than that of .*: .* of its text tower differs by 2 of its root",
        tmp_path / "gelu": "in another space than that of .*: its activation is gelu, not quick_gelu",
        towerless: "has no image tower: name a CLIP with both",
    }.items():
        with pytest.raises(ValueError, match=says):
            with_clip(opened, clip)
    parts = unclip_jax.load_bundle(tiny_bundle).parts
    alone = Opened(Bundle({"prior_diffusion": parts["prior_diffusion"]}, path="prior"), {})
    assert set(with_clip(alone, tiny_bundle).bundle.parts) == {"clip", "prior_diffusion"}
    with pytest.raises(ValueError, match="'prior_diffusion' was trained in the embedding space of CLIP"):
        with_clip(alone, tiny_judge)
    upsampler = Bundle({"upsampler_16": parts["upsampler_16"]}, path="u")
    with pytest.raises(ValueError, match="no part of u was trained with a CLIP: leave out --clip"):
        with_clip(Opened(upsampler, {}), tiny_bundle)


def test_a_bundle_of_a_clip_alone(capsys):
    """What needs other parts is left out, and no pictures are asked for."""
    assert main(["doctor", "judge", "--rows", "32"]) == 0
    out = capsys.readouterr().out
    assert "clip: ok" in out and "decoder" not in out


def test_random_networks_are_examined_to_the_end(tiny_bundle, tmp_path, capsys):
    """Every check runs on every kind of part, draws, and writes its files."""
    grid, report = tmp_path / "grid.png", tmp_path / "report.json"
    words = ["doctor", str(tiny_bundle), "--rows", str(ROWS), "--drawn", "2"]
    assert main([*words, "--grid", str(grid), "--json", str(report)]) == 1
    out = capsys.readouterr().out
    stages = json.loads(report.read_text())["stages"]
    assert set(stages) == set(unclip_jax.load_bundle(tiny_bundle).parts)
    figures = {name: [found["figure"] for found in stage["findings"]] for name, stage in stages.items()}
    for name in ("prior_diffusion", "prior_ar"):
        assert "likeness with its z_i, by that with true z_i" in figures[name]
        assert "norm of image_embed, by that of real ones" in figures[name]
    assert any("guidance" in figure for figure in figures["decoder"])
    assert "change of the decoder's picture, by its variance" in figures["upsampler_16"]
    for stage in stages.values():
        for found in stage["findings"]:
            assert bool(found["change"]) == (found["verdict"] != OK)
            assert found["figure"] in out
    columns, rows = 2, 6  # real, true z_i, two priors, z_t, true low_res
    with Image.open(grid) as picture:
        assert picture.size == (8 + columns * 168, 8 + rows * 206)


@pytest.mark.slow
def test_a_training_run(tiny_run):
    """A run is examined with its frozen CLIP, and its average is compared with what was trained."""
    opened = open_patient(tiny_run("decoder"))
    assert set(opened.bundle.parts) == {"clip", "decoder"} and set(opened.raw) == {"decoder"}
    source = make_source({"name": "emoji", "split": "compose"})
    subject = make_subject(opened, source, rows=16, drawn=0)
    found = [one for one in examine(subject, "run", "x").findings if "average" in one.figure]
    assert [one.stage for one in found] == ["decoder"] and np.isfinite(found[0].value)


# ------------------------------------------------------------------------------------------ verdicts
@pytest.mark.parametrize(
    "value, verdict", [(1.0, OK), (0.5, WARN), (0.1, FAULT), (np.nan, FAULT), (np.inf, FAULT)]
)
def test_verdicts(value, verdict):
    found = finding("decoder", "a figure", value, Limits((0.8, 2.0), (0.3, 3.0)), "change it")
    assert found.verdict == verdict and bool(found.change) == (verdict != OK)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_fault_before_explains_a_fault_behind():
    """A figure that needs a part with a fault is a warning that names the part; another fault stays."""
    one = lambda stage, *needs: Finding(stage, "f", 0.0, "1", FAULT, "change it", needs)
    findings = [one("clip"), one("decoder", "clip"), one("upsampler_64"), one("prior_ar", "clip", "codec")]
    found = explained(findings)
    assert [one.verdict for one in found] == [FAULT, WARN, FAULT, WARN]
    assert "clip" in found[1].change and Report("b", "d", found).verdict == FAULT
    assert [one.verdict for one in explained(findings[1:2])] == [FAULT]
