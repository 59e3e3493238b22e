"""GLIDE's public layout: networks, tokenizer, sampling and inpainting against a derivation in torch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from tests.checkpoint.peer_glide import BASE, write_glide, write_tokenizer
from tests.helpers import param_count
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers.glide import FILES, SUPER_RES, part_config
from unclip_jax.checkpoint.shapes import glide_shapes
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.data.glide_tokenizer import GlideTokenizer
from unclip_jax.diffusion.schedule import time_steps
from unclip_jax.generate.networks import build_model
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import system_of

CAPTIONS = ["a red fox", ""]
QUICK = {
    name: {"steps": 2} for name in ("glide", "glide_32", "glide_inpaint", "glide_32_inpaint")
}  # for every part


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glide")
    networks, tokenizer = write_glide(folder)
    return folder, networks, tokenizer, Sampler(load_bundle(folder))


@pytest.mark.parametrize(
    "name, count",
    [("base", 385_030_726), ("upsample", 398_361_286)],
)
def test_published_sizes(name, count):
    """Also those of the twins that inpaint, which have four more input channels of 192 3x3 kernels."""
    options = (SUPER_RES if "upsample" in name else {}) | FILES[name]
    config = part_config(options, 50_257, name)
    assert param_count(glide_shapes(config["model"])) == count
    twin = part_config(options | {"inpaint": True}, 50_257, name)["model"]
    assert twin == config["model"] | {"inpaint": True}
    assert count + 4 * 9 * 192 == {"base": 385_037_638, "upsample": 398_368_198}[name]


@pytest.mark.parametrize("name, part", [("base", "glide"), ("upsample_inpaint", "glide_32_inpaint")])
def test_networks(made, name, part):
    """The networks equal torch's at random weights, at a size that is not the training size."""
    _, peers, tokenizer, sampler = made
    part = sampler.bundle.part(part)
    rng = np.random.default_rng(0)
    image = lambda h, w: np.float32(rng.normal(size=(2, h, w, 3)))
    x, t, (tokens, mask) = image(12, 20), np.array([3.0, 911.0], np.float32), tokenizer(CAPTIONS)
    given = {}
    if "upsample" in name:
        given["low_res"] = image(5, 7)
    if "inpaint" in name:
        given |= {"known_image": image(12, 20), "known": rng.random((2, 12, 20, 1)) < 0.5}
    apply = jax.jit(build_model(part.config).apply)
    ours = apply({"params": part.params}, x, t, tokens=tokens, token_mask=mask, **given)
    torch_of = lambda a: torch.from_numpy(np.moveaxis(a, -1, 1).copy())
    with torch.no_grad():
        theirs = peers[name](
            torch_of(x), torch.from_numpy(t), torch.from_numpy(tokens).long(), torch.from_numpy(mask),
            **{key: torch_of(value) for key, value in given.items()},
        )  # fmt: skip
    np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), atol=2e-4)


def test_samples(made):
    """Ancestral steps with learned variance and guidance, then DDIM from 256 levels and 0.997 noise.

    The noise is ours; everything else is computed with torch's networks.
    """
    _, peers, tokenizer, sampler = made
    stages = system_of(sampler.bundle).sample(sampler, CAPTIONS[:1], seed=3, options=QUICK)
    base, large = stages.images
    assert base.shape == (1, 16, 16, 3) and large.shape == (1, 32, 32, 3)

    key = jax.random.fold_in(jax.random.key(np.uint32(3)), 0)  # the row's
    tokens, mask = (torch.from_numpy(a) for a in tokenizer(["a red fox", ""]))

    def normal(*folds, shape):
        at = key
        for fold in folds:
            at = jax.random.fold_in(at, fold)
        return np.asarray(jax.random.normal(at, shape), np.float64)

    def network(name, x, t, rows, **given):
        nchw = lambda a: torch.from_numpy(np.moveaxis(np.float32(a), -1, 1).repeat(rows, 0))
        with torch.no_grad():
            out = peers[name](
                nchw(x), torch.full((rows,), float(t)), tokens[:rows].long(), mask[:rows],
                **{k: nchw(v) for k, v in given.items()},
            )  # fmt: skip
        return np.moveaxis(out.double().numpy(), 1, -1)

    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    x = normal(0, 0, shape=(16, 16, 3))[None]
    for i, (t, previous) in enumerate(((999, abar[0]), (0, 1.0))):
        cond, empty = np.split(network("base", x, t, 2), 2)
        eps, v = empty[..., :3] + 3 * (cond - empty)[..., :3], (cond[..., 3:] + 1) / 2
        x0 = np.clip((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -1, 1)
        beta = 1 - abar[t] / previous
        mean = (np.sqrt(previous) * beta * x0 + np.sqrt(1 - beta) * (1 - previous) * x) / (1 - abar[t])
        small = beta * (1 - previous) / (1 - abar[t])
        deviation = np.exp((v * np.log(beta) + (1 - v) * np.log(max(small, 1e-30))) / 2)
        x = mean + (previous < 1) * deviation * normal(0, 1, i, shape=(16, 16, 3))[None]
    np.testing.assert_allclose(base, np.clip(x, -1, 1), atol=5e-3)

    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = 0.997 * normal(1, 0, shape=(32, 32, 3))[None]
    low_res = np.round((base + 1) * 127.5) / 127.5 - 1
    for t, previous in ((999, abar[0]), (0, 1.0)):
        eps = network("upsample", x, t, 1, low_res=low_res)[..., :3]
        x0 = np.clip((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -1, 1)
        eps = (x - np.sqrt(abar[t]) * x0) / np.sqrt(1 - abar[t])
        x = np.sqrt(previous) * x0 + np.sqrt(1 - previous) * eps
    np.testing.assert_allclose(large, np.clip(x, -1, 1), atol=5e-3)


def test_published_steps():
    """100 steps at a stride of 999 / 99, and the 27 of the upsampler."""
    wanted = sorted({round(i * 999 / 99) for i in range(100)}, reverse=True)
    assert list(time_steps(1000, 100)) == wanted and wanted[-3:] == [20, 10, 0] and wanted[1] == 989
    assert len(time_steps(1000, "fast27")) == 27 and time_steps(1000, "fast27")[0] == 997


def test_inpainting(made):
    """The known pixels stay, and the others change with the seed."""
    sampler = made[3]
    rng = np.random.default_rng(1)
    image, kept = rng.integers(0, 256, (32, 32, 3), np.uint8), np.ones((32, 32), bool)
    kept[8:24, 8:24] = False
    rows = [image] * 2, [kept] * 2, ["a fox"] * 2
    inpaint = system_of(sampler.bundle).inpaint
    drawn = inpaint(sampler, *rows, seed=[0, 1], positions=[0, 0], options=QUICK)
    np.testing.assert_array_equal(drawn[0][kept], image[kept])
    assert np.abs(drawn[0][~kept].astype(int) - drawn[1][~kept]).max() > 10
    with pytest.raises(ValueError, match="by the method trained, not 'resample'"):
        inpaint(sampler, *rows, method="resample")
    parts = {name: part for name, part in sampler.bundle.parts.items() if "inpaint" not in name}
    with pytest.raises(KeyError, match="no part 'glide_inpaint'"):
        inpaint(dataclasses.replace(sampler.bundle, parts=parts), *rows)


def test_command_line(made, tmp_path, capsys):
    """A folder draws, and is converted to a bundle without loss."""
    folder, sampler = made[0], made[3]
    settings = [word for name in QUICK for word in ("--set", f"{name}.steps=2")]
    shown = ["a red fox", "--bundle", str(folder), "--out", str(tmp_path / "fox.png")]
    assert main(["sample", *shown, *settings[:4], "--seed", "3"]) == 0
    assert main(["sample", *shown, "--prior", "none"]) == 1
    assert "has no prior" in capsys.readouterr().err
    assert main(["sample", *shown, "--set", "glide.noise_scale=0"]) == 1
    assert "noise_scale must be in (0, 10]" in capsys.readouterr().err
    again = load_bundle(save_bundle(sampler.bundle, tmp_path / "bundle", np.float32))
    assert again.system == "glide" and again.sampling == sampler.bundle.sampling
    for name, part in sampler.bundle.parts.items():
        assert params_hash(part.params) == again.part(name).hash


def test_tokenizer(tmp_path):
    """No start or end token; padding is masked; the empty caption is padding alone; GPT-2's merging."""
    from transformers import GPT2Tokenizer

    tokenizer = write_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text((tmp_path / "vocab.bpe").read_text())
    (tmp_path / "vocab.json").write_text((tmp_path / "encoder.json").read_text())
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in ("A red FOX's  fox,  12 foxes!", "naïve fox\n ", "don't 日本"):
        tokens, mask = tokenizer([text])
        wanted = theirs(text.lower())["input_ids"][:12]
        assert list(tokens[0][mask[0]]) == wanted
    tokens, mask = tokenizer.empty()
    assert not mask.any() and set(tokens) == {tokenizer.vocab_size - 1}
    assert tokenizer.lost("a fox") == "" and tokenizer.lost("a" + " fox" * 12) == "fox"
    again = GlideTokenizer.from_config(json.loads(json.dumps(tokenizer.config())))
    np.testing.assert_array_equal(again(["a fox"])[0], tokenizer(["a fox"])[0])


def test_what_is_refused(tmp_path, made):
    folder = tmp_path / "glide"
    folder.mkdir()
    (folder / "base.pt").write_bytes((made[0] / "base.pt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"put vocab.bpe.gz and encoder.json.gz of glide-text2im"):
        load_bundle(folder)
    write_tokenizer(folder)
    with pytest.raises(ValueError, match=r"base.pt does not fit these weights"):
        load_bundle(folder)
    for change, message in (
        ({"xf_padding": False}, "xf_padding is False, but the network here has True"),
        ({"noise_schedule": "sqrt"}, "noise_schedule is 'sqrt'"),
        ({"channel_mult": "1;2"}, "whole numbers separated by commas"),
        ({"colour": 3}, "'colour' is 3, a setting that is not known here"),
    ):
        (folder / "base.json").write_text(json.dumps(BASE | change))
        with pytest.raises(ValueError, match=message):
            load_bundle(folder)
    (folder / "base.json").write_text(json.dumps(BASE))
    (folder / "encoder.json").write_text("{}")
    with pytest.raises(ValueError, match="are not of one GPT-2 tokenizer"):
        load_bundle(folder)


def test_image_to_image_and_upscaling(made):
    """Both read the caption, and what is drawn depends on the picture."""
    sampler = made[3]
    system, image = system_of(sampler.bundle), np.full((16, 16, 3), 90, np.uint8)
    options = {name: {"steps": 4} if name == "glide" else {"steps": 2} for name in QUICK}
    drawn = {
        caption: dict(system.upscale(sampler, [image], captions=[caption], options=options))[0]
        for caption in CAPTIONS
    }
    assert drawn[""].shape == (32, 32, 3) and np.abs(drawn[""].astype(int) - drawn["a red fox"]).max() > 2
    shared = {"strength": 0.5, "options": options, "positions": [0, 0]}
    a, b = system.img2img(sampler, [image, 255 - image], CAPTIONS[:1] * 2, **shared).astype(int)
    assert a.shape == (32, 32, 3) and np.abs(a - b).max() > 5
