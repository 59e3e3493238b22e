"""Upscaling: pictures of any size with a bundle's upsamplers, and the command's files."""

import jax
import numpy as np
import pytest
from PIL import Image

import unclip_jax
from unclip_jax.checkpoint.bundle import Part
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.sampling.edits.upscale import chain, in_shapes, padding, plan_of, upscale_rows
from unclip_jax.sampling.programs import Sampler, row_keys
from unclip_jax.sampling.unclip import UPSAMPLERS

RNG = np.random.default_rng(3)
OPTIONS = {"upsampler_16": {"steps": 2, "sampler": "ddpm"}}
picture = lambda *size: RNG.integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def sampler(tiny_bundle):
    return Sampler(unclip_jax.load_bundle(tiny_bundle))


def part(size, factor, levels, **more):
    """The configuration of an upsampler, without weights."""
    unet = {"image_size": size, "channel_mult": (1,) * levels}
    return Part({"kind": "upsampler", "factor": factor, "model": {"unet": unet}, **more}, {})


def test_which_upsamplers():
    """A picture starts at the first upsampler whose small images are not smaller than it."""
    parts = {"b": part(1024, 4, 6), "a": part(256, 4, 4), "end": part(256, 4, 4, last_step_of="a")}
    assert chain(parts, (64, 48)) == ["a", "b"] and chain(parts, (10, 64)) == ["a", "b"]
    assert chain(parts, (65, 3)) == ["b"] and chain(parts, (900, 900)) == ["b"]
    assert chain(parts, (900, 900), ["b", "a"]) == ["a", "b"]
    # Six levels halve five times: 32 must divide 4 h, so 8 must divide h. In a row both want an even h.
    assert padding(parts, ["b"], (64, 65)) == (0, 7) and padding(parts, ["a", "b"], (63, 64)) == (1, 0)
    with pytest.raises(InputError, match="end is no upsampler of the bundle; choose of a, b"):
        chain(parts, (8, 8), ["end"])
    with pytest.raises(InputError, match="the bundle has no upsampler"):
        chain({}, (8, 8))


def test_sides_that_do_not_fit():
    """Pictures are continued by reflection, and the results cut."""
    parts, image, seen = {"a": part(64, 4, 5)}, picture(7, 1), []

    def draw(numbers, batch, names):
        seen.append(batch)
        return np.repeat(np.repeat(batch, 4, axis=1), 4, axis=2)

    ((number, drawn),) = in_shapes([image], plan_of(parts, None), draw)
    assert number == 0 and seen[0].shape == (1, 8, 4, 3)
    np.testing.assert_array_equal(drawn, np.kron(image, np.ones((4, 4, 1), np.uint8)))
    np.testing.assert_array_equal(seen[0][0, 7], seen[0][0, 5])  # the row before the last
    np.testing.assert_array_equal(seen[0][0, :, 3], seen[0][0, :, 0])


def test_pictures_of_several_sizes(sampler):
    """Each is what its upsampler draws of it, with its own noise."""
    images = [picture(8, 8), picture(7, 9), picture(8, 8)]
    drawn = dict(upscale_rows(sampler, images, seed=4, options=OPTIONS))
    assert [drawn[i].shape for i in range(3)] == [(16, 16, 3), (14, 18, 3), (16, 16, 3)]
    network, options = sampler.networks["upsampler_16"], sampler.options(OPTIONS)["upsampler_16"]

    @jax.jit
    def direct(low_res, positions):
        keys = fold_in(row_keys(np.full(2, 4, np.uint32), positions), UPSAMPLERS)
        return sample_upsampler(network, low_res, keys, options)

    square = ops.to_float(np.stack(images[::2]))
    wanted = ops.to_uint8(direct(square, np.array([0, 2], np.uint32)))
    assert np.abs(np.stack([drawn[0], drawn[2]]).astype(int) - wanted).max() <= 1 and wanted.std() > 10


@pytest.mark.parametrize(
    "images, more, words",
    [
        ([], {}, "no images"),
        ([np.zeros((8, 8, 3))], {}, "images must be uint8"),
        ([np.zeros((8, 4097, 3), np.uint8)], {}, "2 times a picture of 4097x8 is 8194x16; the most is 8192"),
        (
            [picture(8, 8)],
            {"parts": ["decoder"]},
            "decoder is no upsampler of the bundle; choose of upsampler",
        ),
        ([picture(8, 8)], {"captions": ["a fox"]}, "read no caption"),
        (
            [picture(8, 8)],
            {"options": {"upsampler_16": {"steps": 0}}},
            "upsampler_16: sampling steps must be",
        ),
    ],
)
def test_refused(sampler, monkeypatch, images, more, words):
    monkeypatch.setattr(Sampler, "in_batches", None)
    with pytest.raises(InputError, match=words):
        list(upscale_rows(sampler, images, **more))


def test_files(tiny_bundle, tmp_path, monkeypatch, capsys):
    """One picture becomes one file; several become a folder, which must not hold their names."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.fromarray(picture(8, 8)).save(name)
    settings = ["--bundle", str(tiny_bundle), "--set", "upsampler_16.steps=2"]
    assert main(["upscale", "a.png", "--out", "big.png", *settings]) == 0
    assert main(["upscale", "a.png", "b.png", "--out", "big", *settings]) == 0
    assert "big/b.png: 16x16" in capsys.readouterr().out
    for name in ("big.png", "big/a.png", "big/b.png"):
        assert Image.open(name).size == (16, 16)
    np.testing.assert_array_equal(Image.open("big.png"), Image.open("big/a.png"))
