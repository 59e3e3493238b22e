"""Checks of the joints: has what a part makes the norm and the spread of what the next part was trained on?

The joints are those that the bundle's system declares (`System.joints`).
"""

from __future__ import annotations

import numpy as np

from unclip_jax.evaluate.doctor.limits import NORM_RATIO, SPREAD_RATIO
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.generate.networks import image_size
from unclip_jax.sampling.text_to_image import Joint


def made(subject: Subject, maker: str) -> np.ndarray:
    """What a part makes: embeddings (embedded, D), or images (drawn, H, W, 3)."""
    if subject.config(maker)["kind"] == "decoder":
        return subject.drawn_oracle
    return subject.drawn_embeddings(maker)


def real(subject: Subject, maker: str) -> np.ndarray:
    """What the next part was trained on in place of `made`."""
    config = subject.config(maker)
    if config["kind"] == "decoder":
        return subject.images(image_size(config))[: subject.drawn]
    return subject.z_image[: len(made(subject, maker))]


def norm(subject: Subject, joint: Joint) -> Finding:
    """The mean norm at a joint."""
    length = lambda x: float(np.mean(np.linalg.norm(x.reshape(len(x), -1), axis=1)))
    given, trained = length(made(subject, joint.maker)), length(real(subject, joint.maker))
    change = (
        f"what {joint.maker} makes has another scale than what {joint.taker} was trained on: check "
        "embedding_space (kind, mean, std, scale), clip, and the guidance scale"
    )
    return finding(
        joint.maker, f"norm of {joint.what}, by that of real ones", given / max(trained, 1e-12), NORM_RATIO,
        change, needs=("clip",), more={"made": given, "real": trained},
    )  # fmt: skip


def spread(subject: Subject, joint: Joint) -> Finding:
    """The deviation from row to row at a joint."""
    width = lambda x: float(np.sqrt(np.mean(np.var(x.reshape(len(x), -1), axis=0))))
    given, trained = width(made(subject, joint.maker)), width(real(subject, joint.maker))
    change = (
        f"{joint.maker} makes nearly the same for all captions where the ratio is small, and exaggerates "
        "where it is large: check its captions and its guidance scale, or train it longer"
    )
    return finding(
        joint.maker, f"spread of {joint.what}, by that of real ones", given / max(trained, 1e-12),
        SPREAD_RATIO, change, needs=("clip",), more={"made": given, "real": trained},
    )  # fmt: skip
