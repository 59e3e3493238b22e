"""Checks of the priors and the codec: embeddings against the pictures' own."""

from __future__ import annotations

import numpy as np

from unclip_jax.diffusion.embedding_space import normalize
from unclip_jax.evaluate.doctor import denoising
from unclip_jax.evaluate.doctor.limits import CODEC, OVER_MEAN, OVER_TEXT, SPACE_SCALE, WHAT_IF_SPACE, what_if
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.generate.networks import part_space
from unclip_jax.metrics.retrieval import mean_cosine, unit
from unclip_jax.models.codec import Codec, dequantize, project, quantize, unproject

NEEDS = ("clip",)


def _cosines(subject: Subject, name: str) -> dict[str, float]:
    # Of the prior's embeddings, and of the baselines, with the pictures' own.
    drawn, z = subject.drawn_embeddings(name), subject.z_image
    n, own = len(drawn), z[: len(drawn)]
    cosines = unit(drawn) @ unit(own).T
    others = (cosines.sum() - np.trace(cosines)) / max(n * n - n, 1)
    mean = (z.sum(axis=0) - own) / (len(z) - 1)  # of the other rows
    return {
        "prior": mean_cosine(drawn, own),
        "mean embedding": mean_cosine(mean, own),
        "other captions": float(others),
        "text embedding": mean_cosine(subject.texts.embed[:n], own),
    }


def over_mean(subject: Subject, name: str) -> Finding:
    """The prior's cosine above what needs no caption: the mean embedding, and the prior on other captions."""
    found = _cosines(subject, name)
    blind = max(found["mean embedding"], found["other captions"])
    change = "the prior knows no more than the mean: train it longer, or check its captions and its space"
    figure = "cosine with z_i, above the mean embedding's"
    return finding(name, figure, found["prior"] - blind, OVER_MEAN, change, NEEDS, found)


def over_text(subject: Subject, name: str) -> Finding:
    """The prior's cosine above that of the text embedding, which needs no prior."""
    found = _cosines(subject, name)
    change = (
        "the text embedding z_t alone is nearer to z_i than the prior is: train the prior longer, or draw "
        "more candidates"
    )
    value = found["prior"] - found["text embedding"]
    return finding(name, "cosine with z_i, above the text embedding's", value, OVER_TEXT, change, NEEDS)


def space_scale(subject: Subject, name: str) -> Finding:
    """The standard deviation of real embeddings in the space in which a prior diffuses; noise has 1."""
    z = np.asarray(normalize(part_space(subject.config(name)), subject.z_image))
    change = (
        "noise has deviation 1, so embeddings of another scale see another noise schedule: set "
        "embedding_space to whitened, or to scaled with a scale near sqrt(D)"
    )
    value = float(np.sqrt(np.mean(np.square(z - z.mean(axis=0)))))
    return finding(name, "deviation of real z_i in the prior's space", value, SPACE_SCALE, change, NEEDS)


def other_spaces(subject: Subject, name: str) -> Finding:
    """Would the prior fit better in another embedding space?"""
    losses = denoising.other_spaces(subject, name)
    change = "embedding_space is not the one that the prior was trained in: set its kind, mean, std and scale"
    figure = "error in another space, by the error as it is"
    return what_if(name, figure, losses, change, WHAT_IF_SPACE, NEEDS)


def restored(subject: Subject, name: str) -> Finding:
    """The cosine of real embeddings with what the codec makes of them."""
    config, z = subject.config(name), subject.z_image
    codec, dims = Codec(**subject.sampler.bundle.part(name).params), config["dims"]
    priors = [subject.config(prior)["model"] for prior in subject.names("prior_ar")]
    y = project(codec, z, priors[0]["codes"] if priors else dims)
    if priors:
        y = dequantize(codec, quantize(codec, y, priors[0]["buckets"]), priors[0]["buckets"])
    change = (
        "the codec does not hold these embeddings: fit it again on embeddings of this CLIP, or keep more dims"
    )
    value = mean_cosine(np.asarray(unproject(codec, y)), z)
    return finding(name, "cosine of z_i with its codes read back", value, CODEC, change, NEEDS)
