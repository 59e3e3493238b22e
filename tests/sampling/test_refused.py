"""What sampling refuses: values that are not finite after any stage, seeds and positions out of range."""

import jax
import numpy as np
import pytest

import unclip_jax
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.inpaint import inpaint
from unclip_jax.sampling.edits.interpolation import interpolate
from unclip_jax.sampling.edits.reconstruct import reconstruct
from unclip_jax.sampling.edits.text_diff import text_diff
from unclip_jax.sampling.edits.variations import fresh_variations, variations
from unclip_jax.sampling.programs import Sampler, as_positions, as_seed
from unclip_jax.sampling.unclip import sample_stages

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def sampler(tiny_bundle):
    return Sampler(unclip_jax.load_bundle(tiny_bundle))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["clip", "prior_ar", "codec", "decoder", "upsampler_16"])
def test_an_error_names_the_part_whose_values_are_not_finite(sampler, monkeypatch, part, value):
    """Also the codes of prior_ar, which are finite whatever the logits are."""
    spoilt = jax.tree.map(
        lambda a: jax.device_put(np.full(a.shape, value, a.dtype), a.sharding), sampler.params[part]
    )
    monkeypatch.setitem(sampler.params, part, spoilt)
    maker = "prior_ar" if part == "codec" else part
    with pytest.raises(
        NumericalError, match=f"the part '{maker}' of the bundle .* made values that are not finite"
    ):
        unclip_jax.text_to_image(sampler, ["a fox"], prior="prior_ar")


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None, "0", np.float32(1), float("nan")])
def test_seeds_are_checked_before_any_work(sampler, monkeypatch, seed):
    """Every function that takes a seed refuses a bad one in the same words, before a program runs."""
    monkeypatch.setattr(Sampler, "in_batches", None)
    calls = [
        lambda: unclip_jax.text_to_image(sampler, "a fox", seed=seed),
        lambda: variations(sampler, [IMAGE], seed=seed),
        lambda: fresh_variations(sampler, [IMAGE], seed=seed),
        lambda: interpolate(sampler, IMAGE, IMAGE, seed=seed),
        lambda: text_diff(sampler, IMAGE, "a", "b", seed=seed),
        lambda: reconstruct(sampler, IMAGE, seed=seed),
        lambda: inpaint(sampler, IMAGE, np.ones((8, 8), bool), "a fox", seed=seed),
    ]
    for call in calls:
        with pytest.raises(InputError, match="^seed must be a whole number between 0 and 4294967295, got"):
            call()


def test_edits_check_their_options_before_any_work(sampler, monkeypatch):
    monkeypatch.setattr(Sampler, "in_batches", None)
    calls = [
        ("eta must be in", lambda: variations(sampler, [IMAGE], eta=2.0)),
        (
            "guidance_scale must be a finite",
            lambda: variations(sampler, [IMAGE], guidance_scale=float("nan")),
        ),
        ("between 1 and", lambda: interpolate(sampler, IMAGE, IMAGE, steps=0)),
        ("steps must be", lambda: text_diff(sampler, IMAGE, "a", "b", steps=None)),
        (
            "unknown sampling option",
            lambda: fresh_variations(sampler, [IMAGE], options={"decoder": {"x": 1}}),
        ),
        ("components must be between 1", lambda: reconstruct(sampler, IMAGE, dims=[2, 10_000])),
        ("give at least one", lambda: reconstruct(sampler, IMAGE, dims=[])),
        ("images must be uint8", lambda: variations(sampler, [IMAGE / 2])),
    ]
    for words, call in calls:
        with pytest.raises(InputError, match=words):
            call()


def test_a_caption_is_drawn_alone_as_in_a_longer_call(sampler):
    """Position i of a call is drawn alone with positions=[i]; a later default position differs."""
    captions = ["a fox", "a heart", "a pizza"]
    together = sample_stages(sampler, captions, seed=3, prior="prior_ar").images[-1]
    alone = sample_stages(sampler, captions[1:2], seed=3, prior="prior_ar", positions=[1]).images[-1]
    first = sample_stages(sampler, captions[1:2], seed=3, prior="prior_ar").images[-1]
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)
    assert np.abs(first[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("positions", [[0], [0, -1], [0, 2**32], [0, 0.5], [[0, 1]], 3])
def test_positions_out_of_range(sampler, positions):
    with pytest.raises(InputError, match="position"):
        sample_stages(sampler, ["a", "b"], positions=positions)
    assert as_positions(None, 3).tolist() == [0, 1, 2] and as_seed(np.int64(7)).dtype == np.uint32


@pytest.mark.parametrize("z", [np.zeros((2, 3)), np.zeros((0, 16)), np.full((1, 16), np.nan), np.zeros(16)])
def test_embeddings_that_do_not_fit(sampler, z):
    with pytest.raises(InputError, match="z_image"):
        inversion.decode(sampler, inversion.Latents(z))


def test_the_words_that_a_caption_loses_are_said_once(caplog):
    """Two captions that differ only in their ends may draw the same: the shipped bundle reads 24 tokens."""
    sampler = Sampler(unclip_jax.load_bundle("emoji"))
    start = "a 3d emoji of a grinning squinting face with medium-dark skin tone and a small"
    arrays = sampler.captions([f"{start} party hat", f"{start} blue umbrella"])
    assert (arrays["clip_tokens"][0] == arrays["clip_tokens"][1]).all()
    (said,) = caplog.messages
    assert said.startswith("2 of 2 captions are cut to the 24 tokens") and 'party hat", "' in said
    sampler.captions(["a fox"])
    assert len(caplog.messages) == 1
