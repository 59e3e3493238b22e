"""Checks of a part's weights: finite, alive, and the average against the weights that were trained."""

from __future__ import annotations

import jax
import numpy as np

from unclip_jax.evaluate.doctor import clip, denoising
from unclip_jax.evaluate.doctor.limits import DEAD, EMA
from unclip_jax.evaluate.doctor.report import FAULT, OK, Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.sharding import path_name


def not_finite(subject: Subject, name: str) -> Finding:
    """Values that are NaN or infinite."""
    leaves = jax.tree_util.tree_flatten_with_path(subject.sampler.bundle.part(name).params)[0]
    counts = {path_name(path): int(np.sum(~np.isfinite(np.asarray(leaf)))) for path, leaf in leaves}
    bad = [tensor for tensor, count in counts.items() if count]
    change = (
        f"the weights are damaged, first in {bad[0]}: copy or convert the part again, or go back to an older "
        "checkpoint" if bad else ""
    )  # fmt: skip
    verdict = FAULT if bad else OK
    return Finding(name, "weights that are not finite", float(sum(counts.values())), "0", verdict, change)


def dead(subject: Subject, name: str) -> Finding:
    """The share of output units whose weights are all zero: layers that training never reached."""
    leaves = jax.tree_util.tree_flatten_with_path(subject.sampler.bundle.part(name).params)[0]
    units = zeros = 0
    for path, leaf in leaves:
        if path_name(path).endswith("kernel"):
            columns = np.asarray(leaf).reshape(-1, np.shape(leaf)[-1])
            units, zeros = units + columns.shape[1], zeros + int(np.sum(~np.any(columns, axis=0)))
    change = (
        "layers are still at their zero initialisation: they got no gradient, or the part was not trained"
    )
    return finding(name, "share of units whose weights are all zero", zeros / max(units, 1), DEAD, change)


def average(subject: Subject, name: str) -> Finding | None:
    """The error of the averaged weights against that of the weights that were trained; None without these."""
    if name not in subject.raw:
        return None
    kind, raw = subject.config(name)["kind"], subject.raw[name]
    if kind == "clip":
        z_text = subject.embed_captions(raw).embed
        z_image = subject.embed_images(subject.images(subject.clip_size), raw)
        value = clip.loss(subject) / clip.loss(subject, z_image, z_text)
    elif kind in denoising.KINDS:
        case = denoising.case_of(subject, name)
        trained = denoising.error_of(subject, name, denoising.step(subject, name, case, params=raw))
        value = denoising.error_of(subject, name) / trained
    else:
        return None
    change = (
        "the average (EMA) is worse than the weights that it averages: it still holds the start of training. "
        "Lower ema_decay, or train longer"
    )
    return finding(name, "error of the average, by that of the trained weights", value, EMA, change)
