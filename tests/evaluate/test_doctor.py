"""`unclip doctor` finds planted faults at the right stage, and is quiet about the sound shipped bundle."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

import unclip_jax
from unclip_jax.checkpoint.bundle import Part
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate.doctor.examine import examine
from unclip_jax.evaluate.doctor.load import Opened, make_subject
from unclip_jax.evaluate.doctor.report import FAULT, OK
from unclip_jax.sampling.programs import Sampler

ROWS = 32


@pytest.fixture(scope="module")
def emoji():
    """The shipped bundle without the parts that no test here needs."""
    bundle = unclip_jax.load_bundle("emoji")
    parts = {name: part for name, part in bundle.parts.items() if name != "decoder_inpaint"}
    return dataclasses.replace(bundle, parts=parts)


@pytest.fixture(scope="module")
def sound(emoji):
    source = make_source({"name": "emoji", "split": "compose"})
    return make_subject(Opened(emoji, {}), source, rows=ROWS, drawn=0)


def changed(sound, name, params=None, config=None):
    """A subject that differs in one part. Programs stay compiled where its configuration stays."""
    bundle = sound.sampler.bundle
    part = bundle.parts[name]
    new = Part(part.config if config is None else config, part.params if params is None else params)
    sampler = Sampler(dataclasses.replace(bundle, parts=bundle.parts | {name: new}))
    if config is None:
        sampler._programs = sound.sampler._programs
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
    part = parts["decoder"]
    return changed(sound, "decoder", jax.tree.map(lambda a, b: (a + b) / 2, part.params, at_start(part)))


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
    average_of_start: ("decoder", "linear filter"),
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
    stage, words = PLANTED[plant]
    report = examine(plant(sound, sound.sampler.bundle.parts), "planted", "emoji/compose")
    faults = [found for found in report.findings if found.verdict == FAULT]
    assert {found.stage for found in faults} == {stage}, show(report)
    assert any(words in found.figure and found.change for found in faults), show(report)
