"""The cascade from a bundle: shapes, determinism, guidance, compilations, and bad input."""

import jax
import numpy as np
import pytest

import unclip_jax
from unclip_jax.sampling import programs, unclip
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.unclip import PRIORS, sample_stages
from unclip_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Sampler(unclip_jax.load_bundle(tiny_bundle))


def test_pictures(bundle):
    images = unclip_jax.text_to_image(bundle, ["a red fox", "a blue heart", ""], seed=0)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert images.std() > 0
    assert not np.array_equal(images[0], images[1])


def test_same_seed_same_picture_whatever_the_batch(bundle):
    """The noise depends on position and seed, not on the rest of the batch."""
    alone = unclip_jax.text_to_image(bundle, "a red fox", seed=5)
    among = unclip_jax.text_to_image(bundle, ["a red fox", "a 3d emoji of a pizza", "x" * 10_000], seed=5)
    assert np.abs(alone[0].astype(int) - among[0]).max() <= 1
    other = unclip_jax.text_to_image(bundle, "a red fox", seed=6)
    assert np.abs(alone[0].astype(int) - other[0]).max() > 1


def test_a_fixed_number_of_compilations(bundle, monkeypatch):
    """A sampler compiles at most one program per power of two.

    The calls have 1 to 16 captions, and vary the captions, seeds and guidance scales.
    """
    monkeypatch.setattr(programs, "MAX_BATCH", 4)
    traced = []
    original = unclip.encode_text
    monkeypatch.setattr(unclip, "encode_text", lambda *args: traced.append(1) or original(*args))
    sampler = Sampler(bundle.bundle)
    for count in (1, 2, 3, 4, 5, 9):
        for scale in (2.0, 3.5):
            unclip_jax.text_to_image(
                sampler, ["a fox"] * count, seed=count, options={"decoder": {"guidance_scale": scale}}
            )
    assert len(traced) == 2 * 3  # captions and the empty caption, for batches of 1, 2 and 4


def test_guidance_scale_one_is_the_conditional_model(bundle):
    """The program without guidance and the guided one at scale 1 agree."""
    plain = sample_stages(
        bundle,
        ["a fox"],
        options={"prior_diffusion": {"guidance_scale": 1}, "decoder": {"guidance_scale": 1}},
    )
    almost = {"guidance_scale": np.float32(1.0)}
    guided = sample_stages(bundle, ["a fox"], options={"prior_diffusion": almost, "decoder": almost})
    np.testing.assert_allclose(plain.z_image, guided.z_image, atol=1e-3)
    np.testing.assert_allclose(plain.images[0], guided.images[0], atol=2e-3)


def test_every_way_to_z_image(bundle):
    """Both priors, the text embedding and the null embedding give different pictures.

    The stages hold the z_i of each.
    """
    stages = {prior: sample_stages(bundle, ["a fox", "a heart"], prior=prior) for prior in PRIORS}
    np.testing.assert_array_equal(stages["none"].z_image, stages["none"].z_text)
    assert not stages["null"].z_image.any()
    pictures = [s.images[0] for s in stages.values()]
    for i, first in enumerate(pictures):
        assert first.shape == (2, 8, 8, 3)
        assert all(np.abs(first - second).max() > 0.02 for second in pictures[i + 1 :])
    codec = bundle.bundle.part("codec").params
    codes = (stages["prior_ar"].z_image - codec["mean"]) @ codec["components"].T
    np.testing.assert_allclose(codes[:, 6:], 0.0, atol=1e-4)  # the prior has six codes
    with pytest.raises(ValueError, match="unknown prior 'gan'; choose one of prior_diffusion, prior_ar"):
        unclip_jax.text_to_image(bundle, "x", prior="gan")


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        ([], None, "no captions"),
        (["x"], {"decoder": {"steps": 0}}, "steps must be between 1 and 1000, got 0"),
        (["x"], {"decoder": {"stepz": 3}}, "unknown sampling option stepz"),
        (["x"], {"decodr": {"steps": 3}}, "unknown part decodr"),
        (["x"], {"decoder": {"guidance_scale": float("nan")}}, "finite"),
        (["x"], {"decoder": {"sampler": "magic"}}, "unknown sampler 'magic'"),
    ],
)
def test_bad_input_is_one_line(bundle, captions, options, message):
    with pytest.raises(ValueError, match=message) as error:
        unclip_jax.text_to_image(bundle, captions, options=options)
    assert "\n" not in str(error.value)


def test_a_sampler_of_a_bundle_on_a_mesh(tiny_bundle):
    """A sampler keeps the mesh that the bundle was loaded onto, and rejects another one."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    placed = unclip_jax.load_bundle(tiny_bundle, mesh=mesh)
    assert Sampler(placed).mesh == mesh
    with pytest.raises(ValueError, match="lies on another mesh"):
        Sampler(placed, make_mesh({"data": 1}, jax.devices()[:1]))


def test_shipped_bundle_is_sound():
    """Its parts belong together. It has at most 32 MB, and records how it was made and its figures."""
    from unclip_jax.checkpoint.load import bundle_path

    path = bundle_path("emoji")
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) <= 32e6
    shipped = unclip_jax.load_bundle("emoji")
    assert set(shipped.parts) == {
        "clip",
        "prior_diffusion",
        "codec",
        "prior_ar",
        "decoder",
        "decoder_inpaint",
        "upsampler_64",
    }
    for name, run in shipped.provenance["training"].items():
        assert run["seconds"] > 0 and run["step"] > 0 and run["hardware"] and run["data_checksum"], name
    figures = shipped.provenance["figures"]
    for split in ("train", "compose"):
        assert figures["splits"][split]["samples"]["caption_first"]["low"] >= 20 * figures["chance"]
    assert jax.tree.leaves(shipped.parts["decoder"].params)[0].dtype == np.float32


def test_a_seed_and_a_scale_a_row(bundle):
    """A row of a call is the same as drawn alone at its seed, position and guidance scale, to the level."""
    options = [{"decoder": {"guidance_scale": scale}} for scale in (1.5, 4.0)]
    both = unclip_jax.text_to_image(
        bundle, ["a fox", "a heart"], seed=[3, 9], positions=[2, 0], options=options
    ).astype(int)
    for i, (caption, seed, position) in enumerate((("a fox", 3, 2), ("a heart", 9, 0))):
        alone = unclip_jax.text_to_image(bundle, caption, seed=seed, positions=[position], options=options[i])
        assert np.abs(both[i] - alone[0]).max() <= 1
    other = unclip_jax.text_to_image(
        bundle, ["a fox", "a heart"], seed=[3, 9], positions=[2, 0], options=options[::-1]
    )
    assert all(np.abs(both[i] - other[i]).max() > 1 for i in range(2))
    for wrong, message in (
        ({"seed": [1]}, "one seed, or one per row, 2"),
        ({"options": [None]}, "options for 2 rows, got 1"),
        (
            {"options": [{"decoder": {"guidance_scale": scale}} for scale in (2, 1)]},
            "decoder: .* all of them must be guided, or none",
        ),
        ({"options": [{"decoder": {"steps": steps}} for steps in (2, 3)]}, "other options must be equal"),
    ):
        with pytest.raises(ValueError, match=message):
            unclip_jax.text_to_image(bundle, ["a fox", "a heart"], **wrong)


def test_a_stream_ends_with_the_same_pictures(bundle):
    """Predictions on the way come nearer to the decoder's picture."""
    from unclip_jax.sampling.programs import Partial
    from unclip_jax.sampling.stream import stream_stages

    shared = {"seed": 4, "options": {"decoder": {"steps": 9}}}
    *partials, last = stream_stages(bundle, ["a fox", "a heart"], partials=3, **shared)
    whole = sample_stages(bundle, ["a fox", "a heart"], **shared)
    for streamed, drawn in zip((last.z_text, last.z_image, *last.images), (*whole[:2], *whole.images)):
        np.testing.assert_allclose(streamed, drawn, atol=2e-3)
    assert all(isinstance(partial, Partial) for partial in partials)
    assert [partial.done for partial in partials] == [0.25, 0.5, 0.75]
    errors = [np.abs(partial.image - whole.images[0]).mean() for partial in partials]
    assert errors[0] > errors[-1] > 0


def test_programs_are_compiled_without_being_run(bundle):
    """`compiling` makes what a call needs; the call then compiles nothing; `forget` drops it."""
    sampler, options = Sampler(bundle.bundle), {"decoder": {"steps": 2}}
    draw = lambda: unclip_jax.text_to_image(sampler, ["a fox"] * 2, options=options)
    keys = sampler.compiling(draw)
    programs_ = [sampler._programs[key] for key in keys]
    assert programs_ and all(len(program._compiled) == 1 for program in programs_)
    drawn = draw()
    assert all(len(program._compiled) == 1 for program in programs_)
    np.testing.assert_array_equal(drawn, unclip_jax.text_to_image(bundle, ["a fox"] * 2, options=options))
    sampler.forget(keys)
    assert not sampler._programs
