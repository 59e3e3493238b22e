"""Image edits with (z_i, x_T): an invariant for each edit, on a tiny bundle with random parameters."""

import dataclasses

import numpy as np
import pytest
from flax import traverse_util

import unclip_jax
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.inpaint import inpaint
from unclip_jax.sampling.edits.interpolation import interpolate
from unclip_jax.sampling.edits.inversion import Latents, psnr, slerp
from unclip_jax.sampling.edits.reconstruct import reconstruct, truncate
from unclip_jax.sampling.edits.text_diff import text_diff
from unclip_jax.sampling.edits.variations import variations
from unclip_jax.sampling.programs import Sampler

STEPS = 8


@pytest.fixture(scope="module")
def whole(tiny_bundle):
    return unclip_jax.load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def bundle(whole):
    """A bundle without upsampler, with a decoder whose output is small.

    Its samples stay in range, and depend on z_i more than those of a random decoder.
    """
    decoder = whole.parts["decoder"]
    factors = {("unet", "conv_out"): 0.8, ("conditioning", "image_embed_cond"): 8.0}
    flat = traverse_util.flatten_dict(decoder.params)
    params = traverse_util.unflatten_dict(
        {path: factors.get(path[:2], 1.0) * value for path, value in flat.items()}
    )
    parts = {name: part for name, part in whole.parts.items() if name != "upsampler_16"}
    return Sampler(
        dataclasses.replace(whole, parts=parts | {"decoder": dataclasses.replace(decoder, params=params)})
    )


@pytest.fixture(scope="module")
def images():
    """An emoji, the negative of another, and a picture that is not square."""
    source = make_source({"name": "emoji", "split": "val"})
    first, second = (ops.decode_image(source.read(i).image) for i in (0, 40))
    return [first, 255 - second, np.tile(second, (1, 2, 1))]


# ---------------------------------------------------------------------------------------- slerp
def test_slerp_ends_norms_and_angles():
    """The ends are exact. Norm and angle change linearly. Swapped ends give the same arc in reverse."""
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3, 4)) * [[[[1.0]]], [[[7.0]]]]
    np.testing.assert_allclose(slerp(a, b, 0.0), a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, rtol=1e-5, atol=1e-6)
    norm = lambda v: np.linalg.norm(v.reshape(5, -1), axis=1)
    unit = lambda v: v.reshape(5, -1) / norm(v)[:, None]
    full = np.arccos(np.sum(unit(a) * unit(b), axis=1))
    for theta in (0.25, 0.7):
        mid = slerp(a, b, theta)
        np.testing.assert_allclose(norm(mid), (1 - theta) * norm(a) + theta * norm(b), rtol=1e-5)
        np.testing.assert_allclose(np.arccos(np.sum(unit(a) * unit(mid), axis=1)), theta * full, rtol=1e-4)
        np.testing.assert_allclose(slerp(b, a, 1 - theta), mid, rtol=1e-4, atol=1e-5)


def test_slerp_of_nearly_equal_and_of_opposite_rows():
    """Parallel rows are interpolated along the chord; opposite and zero rows have no arc."""
    a = np.array([[1.0, 2.0]])
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, a, np.array([0.3])), a, rtol=1e-6)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match="not zero"):
        slerp(a, 0 * a, 0.5)


# ---------------------------------------------------------------------------------------- latents
def test_decoding_at_eta_zero_reconstructs(bundle, images):
    """Decoding (z_i, x_T) gives the image; more steps bring it nearer.

    Another x_T or another z_i gives another image.
    """
    target = ops.to_float(inversion.square(images, 8))
    errors = []
    for steps in (15, 60):
        code = inversion.encode(bundle, images, steps=steps)
        assert code.z_image.shape == (3, 16) and code.x_T.shape == (3, 8, 8, 3)
        drawn = inversion.decode(bundle, code, steps=steps)
        assert [d.shape for d in drawn] == [(3, 8, 8, 3)]
        errors.append(np.sqrt(np.mean((drawn[0] - target) ** 2)))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05, errors
    for other in (Latents(-code.z_image, code.x_T), Latents(code.z_image, code.x_T[::-1])):
        assert np.sqrt(np.mean((inversion.decode(bundle, other, steps=60)[0] - target) ** 2)) > 4 * errors[1]


def test_embeddings_do_not_depend_on_the_batch(bundle, images):
    """A row's result does not depend on the batch. A picture and its centred square give the same result."""
    z = inversion.embed_images(bundle, images)
    np.testing.assert_allclose(inversion.embed_images(bundle, images[:1]), z[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        inversion.embed_images(bundle, [ops.center_crop_square(images[2])]), z[2:], rtol=1e-4, atol=1e-5
    )


def test_psnr():
    """20 log10(2 / rms error)."""
    a = np.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(psnr(a, a + 0.02), 40.0)
    assert np.all(np.isinf(psnr(a, a)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, i: inversion.encode(b, []), "no images"),
        (lambda b, i: inversion.encode(b, [i[0].astype(float)]), "images must be uint8"),
        (lambda b, i: inversion.encode(b, i, steps=0), "decoder: sampling steps must be between 1"),
        (lambda b, i: inversion.encode(b, i, captions=["one"]), "one caption per image, got 1 and 3"),
        (lambda b, i: inversion.decode(b, Latents(np.zeros((2, 5)))), r"z_image must be \(N, 16\)"),
        (
            lambda b, i: inversion.decode(b, Latents(np.ones((1, 16)), np.zeros((1, 4, 4, 3)))),
            r"x_T must be \(1, 8, 8, 3\)",
        ),
        (lambda b, i: variations(b, i, count=0), "at least 1, got 0"),
        (lambda b, i: variations(b, i, eta=1.5), "eta must be in"),
        (lambda b, i: interpolate(b, i[0], i[1], count=1), "at least 2 images"),
        (lambda b, i: interpolate(b, i[0], i[1], noise="none"), "unknown noise 'none'"),
        (lambda b, i: text_diff(b, i[0], "a", "b", max_theta=0.0), "max_theta must be in"),
        (lambda b, i: text_diff(b, i[0], "a fox", "A  fox"), "same to CLIP"),
        (lambda b, i: reconstruct(b, i[0], dims=[0]), "between 1 and 16, got 0"),
        (lambda b, i: reconstruct(b, i[0], dims=[17]), "between 1 and 16, got 17"),
        (lambda b, i: inpaint(b, i[0], np.ones((3, 3), bool), "x"), "of the image's size"),
        (lambda b, i: inpaint(b, i[0], np.ones(i[0].shape[:2]), "x"), "must be boolean"),
        (
            lambda b, i: inpaint(b, i[0], np.ones(i[0].shape[:2], bool), "x", resamples=0),
            "resamples must be between 1 and 1000, got 0",
        ),
        (
            lambda b, i: inpaint(b, i[0], np.ones(i[0].shape[:2], bool), "x", method="magic"),
            "choose one of trained, resample",
        ),
    ],
)
def test_bad_input_is_one_line(bundle, images, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(bundle, images)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- edits
def test_variations(bundle, images):
    """At eta 0 all variations equal the decoded image.

    At eta 1 they differ from it and from one another, and depend on the seed.
    """
    plain = ops.to_uint8(
        inversion.decode(bundle, inversion.encode(bundle, images[:2], steps=STEPS), steps=STEPS)[0]
    )
    drawn = variations(bundle, images[:2], count=2, eta=0.0, steps=STEPS)
    assert drawn.shape == (2, 2, 8, 8, 3) and drawn.dtype == np.uint8
    for i in range(2):
        assert np.abs(drawn[:, i].astype(int) - plain).max() <= 1
    loose = variations(bundle, images[:2], count=2, eta=1.0, steps=STEPS)
    assert all(
        np.abs(a.astype(int) - b).max() > 20
        for a, b in ((loose[:, 0], loose[:, 1]), (loose[:, 0], plain), (loose[:, 1], plain))
    )
    np.testing.assert_array_equal(loose, variations(bundle, images[:2], count=2, eta=1.0, steps=STEPS))
    assert not np.array_equal(loose, variations(bundle, images[:2], count=2, eta=1.0, steps=STEPS, seed=1))


def test_upsamplers_enlarge_what_the_decoder_drew(whole, images):
    """The last size is the largest upsampler's; equal positions get equal noise."""
    drawn = variations(whole, images[:1], count=2, eta=0.0, steps=3)
    assert drawn.shape == (1, 2, 16, 16, 3)
    small, large = inversion.decode(
        whole, Latents(np.ones((2, 16)), inversion.one_noise((8, 8, 3), 2, 0)), steps=3, positions=[4, 4]
    )
    assert small.shape == (2, 8, 8, 3) and large.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(large[0], large[1], atol=1e-5)


@pytest.mark.parametrize("noise", ["slerp", "fixed"])
def test_interpolation(bundle, images, noise):
    """The ends equal the two decoded images; the middle equals neither.

    With fixed noise, the ends are decoded from that noise.
    """
    drawn = interpolate(bundle, images[0], images[1], count=3, noise=noise, steps=STEPS, seed=2)
    assert drawn.shape == (3, 8, 8, 3) and drawn.dtype == np.uint8
    code = inversion.encode(bundle, images[:2], steps=STEPS)
    x_T = code.x_T if noise == "slerp" else inversion.one_noise(code.x_T.shape[1:], 2, 2)
    ends = ops.to_uint8(
        inversion.decode(bundle, Latents(code.z_image, x_T), steps=STEPS, seed=2, positions=[0, 0])[-1]
    )
    assert np.abs(drawn[[0, 2]].astype(int) - ends).max() <= 2
    assert all(np.abs(drawn[1].astype(int) - end).max() > 2 for end in ends)


def test_text_diff(bundle, images):
    """Theta 0 gives the decoded image, and larger theta gives images further from it.

    Swapped captions give other images.
    """
    drawn = text_diff(bundle, images[0], "a red fox", "a blue heart", count=3, max_theta=0.5, steps=STEPS)
    code = inversion.encode(bundle, images[:1], steps=STEPS)
    start = ops.to_uint8(inversion.decode(bundle, code, steps=STEPS)[-1])[0]
    assert np.abs(drawn[0].astype(int) - start).max() <= 1
    way = [np.abs(d.astype(int) - start).mean() for d in drawn]
    assert 0 <= way[0] < way[1] < way[2]
    back = text_diff(bundle, images[0], "a blue heart", "a red fox", count=3, max_theta=0.5, steps=STEPS)
    assert np.abs(back[2].astype(int) - drawn[2]).max() > 8


def test_reconstruction(bundle, images):
    """All components give the same picture as the image's own z_i, decoded from the noise.

    With fewer components, each further one brings the result nearer to it.
    """
    drawn, dims = reconstruct(bundle, images[0], steps=STEPS, seed=1)
    assert dims == (16,) and drawn.shape == (1, 8, 8, 3)
    z = inversion.embed_images(bundle, images[:1])
    noise = inversion.one_noise((8, 8, 3), 1, 1)
    own = ops.to_uint8(inversion.decode(bundle, Latents(z, noise), steps=STEPS, seed=1)[-1])
    assert np.abs(drawn.astype(int) - own).max() <= 1
    np.testing.assert_allclose(truncate(bundle.bundle, z, 16), z, rtol=1e-3, atol=1e-3)
    left = [np.linalg.norm(truncate(bundle.bundle, z, d) - z) for d in (1, 4, 8, 12, 16)]
    assert all(a > b for a, b in zip(left, left[1:])) and left[-1] < 1e-3 * left[0]


@pytest.mark.parametrize("method", ["trained", "resample"])
def test_inpainting(method, bundle, images):
    """An all-true mask returns the input.

    Half a mask keeps its half exactly and draws the other half, differently for other seeds.
    """
    size = ops.resize(images[0], 8)
    everything = np.ones(size.shape[:2], bool)
    options = {"decoder": {"steps": 3}, "decoder_inpaint": {"steps": 3}, "prior_diffusion": {"steps": 2}}
    passes = 2 if method == "resample" else None
    draw = lambda mask, **kw: inpaint(
        bundle, size, mask, "a red fox", count=2, method=method, resamples=passes, options=options, **kw
    )
    np.testing.assert_array_equal(draw(everything), np.stack([size, size]))
    half = everything.copy()
    half[:, 4:] = False
    drawn = draw(half)
    np.testing.assert_array_equal(drawn[:, :, :4], np.stack([size, size])[:, :, :4])
    assert not np.array_equal(drawn[0, :, 4:], drawn[1, :, 4:])
    assert not np.array_equal(drawn, draw(half, seed=1))
    if method == "trained":  # which is what a bundle that can does
        np.testing.assert_array_equal(
            drawn, inpaint(bundle, size, half, "a red fox", count=2, options=options)
        )
