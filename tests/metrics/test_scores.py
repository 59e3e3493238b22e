"""The Inception score beside torch-fidelity's, and the CLIP score against closed forms."""

import numpy as np
import pytest
import torch

from tests.fidelity import torch_fidelity
from unclip_jax.metrics.clip_score import clip_score
from unclip_jax.metrics.inception_score import inception_score

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(207, 20))).astype(np.float32)
IMAGE = RNG.normal(size=(500, 16))
TEXT = IMAGE + RNG.normal(size=(500, 16))


@pytest.mark.parametrize("splits, seed", [(10, 2020), (10, None), (1, 7)])
def test_inception_score_equals_torch_fidelity(splits, seed):
    reference = torch_fidelity("metric_isc").isc_features_to_metric
    theirs = reference(torch.tensor(LOGITS), splits, seed is not None, seed)
    ours = inception_score(LOGITS, splits=splits, seed=seed)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9) and ours.mean > 2
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_inception_score_at_its_limits():
    """Sure and evenly spread answers give the number of classes; equal answers give 1; logits of any size."""
    sure = 1e4 * np.tile(np.eye(5), (40, 1))
    assert inception_score(sure, splits=2, seed=None) == pytest.approx((5, 0), abs=1e-9)
    assert inception_score(np.ones((40, 5))) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(1e4 * np.eye(5)[[0] * 40]) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize(
    "logits, options, message",
    [
        (LOGITS[:9], {}, "at least as many rows as parts"),
        (LOGITS[:0], {"splits": 1}, "at least as many rows as parts"),
        (LOGITS[0], {}, r"the shape \(20,\) and 10 parts"),
        (LOGITS * np.nan, {}, "a logit is not finite"),
        (LOGITS, {"splits": 0}, "and 0 parts"),
        (LOGITS, {"seed": -1}, "got -1"),
    ],
)
def test_bad_logits_are_refused(logits, options, message):
    with pytest.raises(ValueError, match=message):
        inception_score(logits, **options)


def test_clip_score():
    """The mean cosine, whatever the norms; Hessel's clips at 0 and weighs; the interval covers the mean."""
    cosine = np.sum(IMAGE * TEXT, axis=1) / np.linalg.norm(IMAGE, axis=1) / np.linalg.norm(TEXT, axis=1)
    score = clip_score(IMAGE * 3, TEXT)
    assert score.mean == pytest.approx(cosine.mean(), rel=1e-12)
    half = 1.96 * cosine.std() / np.sqrt(500)
    assert (score.low, score.high) == pytest.approx((score.mean - half, score.mean + half), abs=0.2 * half)
    signs = np.where(np.arange(500) % 2, 1, -1)[:, None]
    assert clip_score(IMAGE, TEXT * signs, hessel=True).mean == pytest.approx(
        2.5 * np.where(signs[:, 0] > 0, cosine, 0).mean(), rel=0.01
    )
    assert clip_score(IMAGE, -TEXT).mean == pytest.approx(-score.mean, rel=1e-12)


@pytest.mark.parametrize(
    "image, text, message",
    [
        (IMAGE[:0], TEXT[:0], "one picture per caption"),
        (IMAGE, TEXT[:3], r"got \(500, 16\) and \(3, 16\)"),
        (IMAGE, TEXT * np.nan, "not finite"),
        (IMAGE, TEXT * 0, "is zero"),
    ],
)
def test_bad_embeddings_are_refused(image, text, message):
    with pytest.raises(ValueError, match=message):
        clip_score(image, text)
