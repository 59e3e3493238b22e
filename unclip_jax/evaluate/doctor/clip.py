"""Checks of CLIP: do pictures lie near their captions, and would they under another reading of the input?

The figures are CLIP's own loss (InfoNCE at its own temperature) and the distance between own and other
captions in standard deviations. A reading of the input, such as blue before red, is wrong if another one has
a clearly lower loss on the same rows.
"""

from __future__ import annotations

import math

import numpy as np
from flax import traverse_util

from unclip_jax.evaluate.doctor.limits import ALIGNMENT, WHAT_IF_OF_TEXT, what_if
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.metrics.retrieval import unit
from unclip_jax.models.clip import MAX_LOGIT_SCALE, MEAN, STD

FLOOR = 0.02  # of the loss, as a share of that of chance
# Means and deviations of pixels in [0, 1] by which public image towers normalise.
NORMALISATIONS = {
    "CLIP's statistics": (MEAN, STD),
    "ImageNet's statistics": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5, deviation 0.5": ((0.5,) * 3, (0.5,) * 3),
    "mean 0, deviation 1": ((0.0,) * 3, (1.0,) * 3),
}


def info_nce(z_image: np.ndarray, z_text: np.ndarray, scale: float) -> float:
    """CLIP's loss on N pairs of embeddings (N, D), in nats."""
    logits = scale * unit(z_image) @ unit(z_text).T
    total = lambda rows: np.mean(np.log(np.sum(np.exp(rows - rows.max(1, keepdims=True)), 1)) + rows.max(1))
    return float((total(logits) + total(logits.T)) / 2 - np.mean(np.diag(logits)))


def separation(z_image: np.ndarray, z_text: np.ndarray) -> float:
    """How far the cosine of own pairs lies above that of other pairs, in deviations of the others."""
    cosines = unit(z_image) @ unit(z_text).T
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    return float((np.mean(np.diag(cosines)) - others.mean()) / max(others.std(), 1e-12))


def loss(subject: Subject, z_image: np.ndarray | None = None, z_text: np.ndarray | None = None) -> float:
    """InfoNCE at CLIP's own temperature, with a floor, because a ratio of losses near zero is noise.

    z_image, z_text: (N, D) in place of the subject's.
    """
    params = subject.sampler.network("clip").params
    scale = math.exp(min(float(np.asarray(params["logit_scale"])), MAX_LOGIT_SCALE))
    z_image = subject.z_image if z_image is None else z_image
    z_text = subject.texts.embed if z_text is None else z_text
    return info_nce(z_image, z_text, scale) + FLOOR * math.log(len(z_image))


def alignment(subject: Subject, name: str) -> Finding:
    """Own captions against other captions."""
    z_image, z_text = subject.z_image, subject.texts.embed
    cosines = unit(z_image) @ unit(z_text).T
    first = np.mean(np.argmax(cosines, axis=1) == np.arange(len(cosines)))
    others = (cosines.sum() - np.trace(cosines)) / (cosines.size - len(cosines))
    more = {
        "own cosine": np.mean(np.diag(cosines)),
        "other cosine": others,
        "own caption first": first,
        "chance": 1 / len(cosines),
    }
    change = (
        "CLIP does not know its captions: train it longer, or check that tokenizer, captions and pictures "
        "are those it was trained with"
    )
    figure = "own captions above others, in deviations"
    return finding(name, figure, separation(z_image, z_text), ALIGNMENT, change, more=more)


def token_shift(subject: Subject, name: str) -> Finding:
    """Would captions fit better if the text tower read them one place off?

    Either every token takes the row of its neighbour in the table of embeddings, or the position of its
    neighbour.
    """
    params, as_is, losses = subject.sampler.network(name).params, loss(subject), {}
    flat = traverse_util.flatten_dict(params)
    for words, table in (("token numbers", "token_embedding"), ("positions", "position_embedding")):
        key = ("text_tower", table)
        for shift in (-1, 1):
            rolled = np.roll(np.asarray(flat[key]), -shift, axis=0)
            moved = traverse_util.unflatten_dict(flat | {key: rolled})
            z_text = subject.embed_captions(moved).embed
            losses[f"{words} {shift:+d}"] = loss(subject, z_text=z_text) / as_is
    change = (
        "the text tower reads its tokens one place off: check the vocabulary, the start token and the "
        "embeddings of tokens and positions"
    )
    return what_if(name, "loss with shifted tokens, by the loss as it is", losses, change, WHAT_IF_OF_TEXT)


def image_reading(subject: Subject, name: str) -> Finding:
    """Would pictures fit better with blue before red, or with another mean and deviation?"""
    model, as_is = subject.config(name)["model"]["image"], loss(subject)
    own = model.get("mean", MEAN), model.get("std", STD)
    images, losses = subject.images(subject.clip_size), {}
    for words, (mean, std) in NORMALISATIONS.items():
        if np.allclose(own, (mean, std), atol=0.02):
            continue
        # The tower applies its own statistics: these pixels become what the others would make.
        pixels = ((images + 1) / 2 - np.asarray(mean)) / np.asarray(std) * np.asarray(own[1]) + own[0]
        losses[words] = loss(subject, subject.embed_images(np.float32(pixels * 2 - 1))) / as_is
    losses["blue before red"] = loss(subject, subject.embed_images(images[..., ::-1])) / as_is
    change = (
        "the pictures reach CLIP in another form than in training: set the image tower's mean and std, or "
        "the order of channels"
    )
    return what_if(name, "loss with pictures in another form, by the loss as it is", losses, change)
