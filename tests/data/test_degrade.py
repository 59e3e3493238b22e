"""The upsamplers' conditioning image: the blur against its closed form, its probability, and its range."""

import numpy as np
import pytest

from unclip_jax.data import degrade, ops


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(-1, 1, (32, 32, 3)).astype(np.float32)


def test_blur_of_a_point_is_the_gaussian():
    point = np.zeros((9, 9, 3), np.float32)
    point[4, 4] = 1
    taps = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * 0.6**2))
    taps /= taps.sum()
    expected = np.zeros((9, 9))
    expected[3:6, 3:6] = np.outer(taps, taps)
    np.testing.assert_allclose(degrade.gaussian_blur(point)[:, :, 1], expected, atol=1e-6)


def test_blur_keeps_constants_and_loses_detail(image):
    constant = np.full((8, 8, 3), -0.7, np.float32)
    np.testing.assert_allclose(degrade.gaussian_blur(constant, 5, 2.0), constant, atol=1e-6)
    spread = [
        image.std(),
        degrade.gaussian_blur(image, 3, 0.3).std(),
        degrade.gaussian_blur(image).std(),
        degrade.gaussian_blur(image, 7, 2.0).std(),
    ]
    assert spread == sorted(spread, reverse=True)
    np.testing.assert_allclose(degrade.gaussian_blur(image, 1, 1.0), image)


@pytest.mark.parametrize("method", ["bicubic", "box"])
def test_never_and_always(image, method):
    clean = np.clip(ops.resize(image, 8, method), -1, 1)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(degrade.low_resolution(image, 8, rng, method=method, blur_prob=0), clean)
    blurred = degrade.low_resolution(image, 8, rng, method=method, blur_prob=1)
    np.testing.assert_allclose(blurred, np.clip(degrade.gaussian_blur(ops.resize(image, 8, method)), -1, 1))
    assert blurred.dtype == np.float32 and blurred.shape == (8, 8, 3) and not np.array_equal(blurred, clean)


def test_probability_range_and_draws(image):
    checks = np.where(np.indices((32, 32)).sum(0) % 8 < 4, 1, -1).astype(np.float32)[:, :, None].repeat(3, 2)
    rng = np.random.default_rng(1)
    outcomes = [degrade.low_resolution(checks, 16, rng) for _ in range(400)]
    clean = np.clip(ops.resize(checks, 16), -1, 1)
    share = np.mean([np.array_equal(outcome, clean) for outcome in outcomes])
    assert 0.4 < share < 0.6
    assert max(np.abs(outcome).max() for outcome in outcomes) <= 1  # bicubic overshoots, the result does not
    after = set()
    for prob in (0, 1):  # the generator moves on by the same amount
        rng = np.random.default_rng(2)
        degrade.low_resolution(image, 8, rng, blur_prob=prob)
        after.add(rng.random())
    assert len(after) == 1


def test_jitter_varies_the_blur(image):
    rng = np.random.default_rng(3)
    jittered = {
        degrade.low_resolution(image, 8, rng, blur_prob=1, sigma_jitter=0.5).tobytes() for _ in range(5)
    }
    fixed = {degrade.low_resolution(image, 8, rng, blur_prob=1).tobytes() for _ in range(5)}
    assert len(jittered) == 5 and len(fixed) == 1


@pytest.mark.parametrize(
    "words, options",
    [
        ("kernel=4", {"kernel": 4}),
        ("sigma=0", {"sigma": 0}),
        ("blur_prob=1.5", {"blur_prob": 1.5}),
        ("sigma_jitter=1", {"sigma_jitter": 1}),
    ],
)
def test_bad_options(image, words, options):
    with pytest.raises(ValueError, match=words):
        degrade.low_resolution(image, 8, np.random.default_rng(0), **{"blur_prob": 1, **options})


def test_bad_images(image):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="uint8"):
        degrade.low_resolution(ops.to_uint8(image), 8, rng)
    with pytest.raises(ValueError, match="64x64 out of 32x32"):
        degrade.low_resolution(image, 64, rng)
    with pytest.raises(ValueError, match="too wide"):
        degrade.gaussian_blur(image[:2], 5, 1.0)


def test_bsr_is_a_mild_degradation(image):
    """The result is near the clean reduction of a smooth picture, and never equal to it.

    Every draw differs, and the same draw gives the same bytes.
    """
    wave = (
        np.sin(np.linspace(0, 9, 64))[:, None, None]
        * np.cos(np.linspace(0, 7, 64))[None, :, None]
        * [0.9, -0.7, 0.5]
    )
    wave = wave.astype(np.float32)
    clean = ops.resize(wave, 16, "box")
    draws = [degrade.bsr_light(wave, 16, np.random.default_rng(seed)) for seed in range(40)]
    errors = np.array([np.sqrt(np.mean((d - clean) ** 2)) for d in draws])
    assert all(d.shape == (16, 16, 3) and d.dtype == np.float32 and np.abs(d).max() <= 1 for d in draws)
    assert errors.min() > 0.003 and errors.max() < 0.35 and errors.max() > 2 * errors.min()
    assert len({d.tobytes() for d in draws}) == 40
    np.testing.assert_array_equal(draws[3], degrade.bsr_light(wave, 16, np.random.default_rng(3)))


def test_bsr_kernels():
    """Kernels sum to one, are symmetric, and have the stated sizes; they do not change a constant image."""
    rng = np.random.default_rng(0)
    kernels = [degrade._gaussian_kernel(rng, 4.0) for _ in range(200)]
    assert {len(k) for k in kernels} == set(range(5, 15))
    for k in kernels:
        np.testing.assert_allclose(k.sum(), 1.0, rtol=1e-5)
        np.testing.assert_allclose(k, k[::-1, ::-1], atol=1e-6)
    assert any(np.abs(k - k.T).max() > 1e-3 for k in kernels) and any(
        np.allclose(k, k.T, atol=1e-7) for k in kernels
    )
    flat = np.full((9, 9, 3), 0.25, np.float32)
    for k in kernels[:10]:
        np.testing.assert_allclose(degrade._filter(flat, k), flat, rtol=1e-5)


def test_bsr_noise_level():
    """The standard deviation is one to two of 255 levels; a part of the noise is grey."""
    rng = np.random.default_rng(0)
    levels = np.array([degrade._noise((64, 64, 3), rng).std() for _ in range(60)]) * 255 / 2
    assert levels.max() < 2.1 and np.mean((levels > 0.9) & (levels < 2.1)) > 0.7
    grey = sum(np.ptp(degrade._noise((4, 4, 3), rng), axis=2).max() == 0 for _ in range(200))
    assert 50 < grey < 110


def test_bsr_refuses_what_it_cannot_do(image):
    with pytest.raises(ValueError, match="cannot make 64x64 out of 32x32"):
        degrade.bsr_light(image, 64, np.random.default_rng(0))
    with pytest.raises(ValueError, match="square float32"):
        degrade.bsr_light(image[:16], 8, np.random.default_rng(0))
