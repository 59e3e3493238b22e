"""The cascade of DALL-E: pictures of a bundle on disk, the ranking of candidates, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from tests.runs import random_bundle
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.dalle import DALLE
from unclip_jax.models.dvae import DVAE
from unclip_jax.sampling.dalle import rank, sample_stages
from unclip_jax.sampling.programs import Sampler

CODER = {"channels": 8, "levels": 2, "level_blocks": 1, "codes": 9, "embed_dim": 4}
MODEL = {"width": 16, "layers": 2, "heads": 2, "length": 8, "vocab_size": 600, "codes": 9, "side": 4}


@pytest.fixture(scope="module")
def bundle():
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


def test_the_command_draws(bundle, tmp_path, capsys):
    """`unclip sample` writes a grid. Without a CLIP candidates are refused in one line."""
    parts = {name: part for name, part in bundle.parts.items() if name != "clip"}
    folder = save_bundle(Bundle(parts, "dalle", bundle.sampling, {}), tmp_path / "bundle", np.float32)
    assert load_bundle(folder).system == "dalle"
    out = tmp_path / "grid.png"
    command = ["sample", "a red fox", "--bundle", str(folder), "--out", str(out)]
    assert not main(command) and out.stat().st_size > 200
    capsys.readouterr()
    assert main([*command, "--set", "dalle.candidates=4"]) == 1
    err = capsys.readouterr().err
    assert "candidates=4 need a CLIP" in err and len(err.splitlines()) == 1
