"""The cascade of DALL-E: pictures of a bundle on disk, the ranking of candidates, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import random_params
from tests.runs import random_bundle
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.dalle import DALLE
from unclip_jax.models.dvae import DVAE
from unclip_jax.sampling.dalle import rank, sample_stages
from unclip_jax.sampling.edits.complete import complete
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.programs import Sampler

CODER = {"channels": 8, "levels": 2, "level_blocks": 1, "codes": 9, "embed_dim": 4}
MODEL = {"width": 16, "layers": 2, "heads": 2, "length": 8, "vocab_size": 600, "codes": 9, "side": 4}


def random_dalle():
    """Random weights: 4 x 4 codes, pictures of 8 pixels, and a CLIP."""
    clip = random_bundle().parts["clip"]
    dvae = Part({"kind": "dvae", "model": CODER}, random_params(DVAE(**CODER), jnp.zeros((1, 8, 8, 3))))
    text, codes = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 16), jnp.int32)
    config = {"kind": "dalle", "model": MODEL, "tokenizer": ClipTokenizer(8, 600).config()}
    config["frozen"] = {"dvae": params_hash(dvae.params)}
    dalle = Part(config, random_params(DALLE(**MODEL), text, text > 0, codes))
    parts = {"clip": clip, "dvae": dvae, "dalle": dalle}
    return Bundle(parts, "dalle", {"dalle": {"guidance_scale": 2.0}}, {"note": "random"})


@pytest.fixture(scope="module")
def bundle():
    return random_dalle()


@pytest.fixture(scope="module")
def sampler(bundle):
    return Sampler(bundle)


def test_pictures_and_their_ranks(sampler):
    """The kept picture has the largest cosine of its caption's candidates; the first candidate is the picture
    without ranking; the rest of the batch does not matter."""
    captions = ["a red fox", "a blue heart"]
    plain = sample_stages(sampler, captions, seed=2)
    assert plain.codes.shape == (2, 4, 4) and plain.images[0].shape == (2, 8, 8, 3) and plain.scores is None
    image = sampler.network("dvae").apply(jnp.asarray(plain.codes), method="decode_codes")
    np.testing.assert_allclose(plain.images[0], image, atol=1e-4)
    ranked = sample_stages(sampler, captions, seed=2, options={"dalle": {"candidates": 3}})
    assert ranked.scores.shape == (2, 3)
    np.testing.assert_allclose(
        rank(sampler, captions, ranked.images[0]), ranked.scores.max(axis=1), atol=1e-4
    )
    np.testing.assert_allclose(rank(sampler, captions, plain.images[0]), ranked.scores[:, 0], atol=1e-4)
    alone = sample_stages(sampler, captions[1:], seed=2, positions=[1])
    np.testing.assert_array_equal(alone.codes[0], plain.codes[1])
    assert np.abs(plain.images[0]).max() <= 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dalle": {"top_k": 10}}, "dalle: top_k must be between 1 and 9, got 10"),
        ({"dalle": {"candidates": 0}}, "candidates must be between 1 and"),
        ({"dalle": {"steps": 3}}, "unknown sampling option steps"),
    ],
)
def test_bad_options(sampler, options, words):
    with pytest.raises(InputError, match=words):
        sample_stages(sampler, ["a fox"], options=options)


def test_the_upper_rows_of_a_picture_stay(sampler):
    """The codes of the upper rows are the picture's; the rows below follow the caption; a CLIP ranks."""
    images = np.random.default_rng(3).integers(0, 256, (2, 12, 10, 3), np.uint8)
    target = ops.to_float(square(images, 8))
    codes = sampler.network("dvae").apply(jnp.asarray(target), method="encode_codes")[0]
    found = complete(sampler, images, ["a red fox", "a blue heart"], rows=0.5, seed=2)
    np.testing.assert_array_equal(found.codes[:, :2], codes[:, :2])
    assert found.images[0].shape == (2, 8, 8, 3) and found.scores is None
    image = sampler.network("dvae").apply(jnp.asarray(found.codes), method="decode_codes")
    np.testing.assert_allclose(found.images[0], image, atol=1e-4)
    other = complete(sampler, images, ["a green tree", "a blue heart"], rows=0.5, seed=2)
    np.testing.assert_array_equal(other.codes[1], found.codes[1])
    np.testing.assert_array_equal(other.codes[0, :2], codes[0, :2])
    assert (other.codes[0, 2:] != found.codes[0, 2:]).any()
    ranked = complete(
        sampler, images, ["a red fox", "a blue heart"], rows=0.5, seed=2, options={"dalle": {"candidates": 3}}
    )
    np.testing.assert_array_equal(ranked.codes[:, :2], codes[:, :2])
    assert ranked.scores.shape == (2, 3)
    best = rank(sampler, ["a red fox", "a blue heart"], ranked.images[0])
    np.testing.assert_allclose(best, ranked.scores.max(axis=1), atol=1e-4)


@pytest.mark.parametrize(
    "rows, words",
    [
        (0.0, r"in \(0, 1\), got 0"),
        (1.0, r"in \(0, 1\), got 1"),
        (float("nan"), r"in \(0, 1\), got nan"),
        (0.1, "rows=0.1 keeps 0 of 4 rows of codes: give a share from 0.25 to 0.75"),
        (0.9, "rows=0.9 keeps 4 of 4 rows of codes"),
    ],
)
def test_bad_rows(sampler, rows, words):
    with pytest.raises(InputError, match=words):
        complete(sampler, [np.zeros((8, 8, 3), np.uint8)], ["a fox"], rows=rows)


def test_known_codes_of_another_shape(sampler):
    with pytest.raises(
        InputError, match=r"known codes must be \(1, R, 4\) with R from 1 to 3, got \(1, 4, 4\)"
    ):
        sample_stages(sampler, ["a fox"], known=np.zeros((1, 4, 4), np.int32))


def test_the_command_draws(bundle, tmp_path, capsys):
    """`unclip sample` writes a grid. Without a CLIP candidates are refused in one line."""
    parts = {name: part for name, part in bundle.parts.items() if name != "clip"}
    folder = save_bundle(Bundle(parts, "dalle", bundle.sampling, {}), tmp_path / "bundle", np.float32)
    assert load_bundle(folder).system == "dalle"
    out = tmp_path / "grid.png"
    command = ["sample", "a red fox", "--bundle", str(folder), "--out", str(out)]
    assert not main(command) and out.stat().st_size > 200
    Image.fromarray(np.full((9, 8, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    given = [str(tmp_path / "picture.png"), "a red fox", "--bundle", str(folder), "--out", str(out)]
    complete = ["complete", *given, "--rows", "0.5", "--count", "2"]
    assert not main(complete) and np.asarray(Image.open(out)).shape[1] == 8 + 3 * 168
    capsys.readouterr()
    for refused, words in (
        ([*command, "--set", "dalle.candidates=4"], "candidates=4 need a CLIP"),
        ([*complete, "--set", "dalle.candidates=4"], "candidates=4 need a CLIP"),
        ([*complete, "--rows", "0.1"], "keeps 0 of 4 rows of codes"),
        ([*complete, "--prior", "none"], "the system dalle has no prior"),
        ([*complete, "--steps", "4"], "unknown sampling option steps"),
    ):
        assert main(refused) == 1
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1
