"""The embedding space of a stage: its statistics are measured on training data before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unclip_jax.diffusion.embedding_space import EmbeddingSpace
from unclip_jax.generate.networks import Network
from unclip_jax.run.frozen import ClipReader
from unclip_jax.run.hosts import on_every_host
from unclip_jax.run.stage import Fit


def embedding_statistics(clip: ClipReader, params, source, batches) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,), float64 on the host, of the raw image embeddings of training batches.

    Where the source holds embeddings, they are those of all its embeddings. `params` are the CLIP's.
    """
    if source.embedded is not None:
        return source.embedded.mean, source.embedded.std
    encode = jax.jit(clip.images)
    rows = [on_every_host(encode(params, batch)) for batch in batches]
    z = np.concatenate(rows).astype(np.float64)
    return z.mean(axis=0), np.maximum(z.std(axis=0), 1e-6)


def placeholder(settings: Mapping[str, Any], dim: int) -> dict:
    """The part's `embedding_space` until it is measured, of the shape that it will have.

    settings: `kind` and `scale`. dim: D.
    """
    space = {"kind": settings["kind"], "scale": settings["scale"]}
    return space | {"mean": [0.0] * dim, "std": [1.0] * dim}


def embedding_fit(clip: ClipReader, network: Network, space: Mapping[str, Any], count: int) -> Fit:
    """What a run measures: the mean and the deviation of `count` batches of embeddings.

    Args:
      clip: the reader of the stage's CLIP, and `network` that CLIP.
      space: the part's `embedding_space`.
    """

    def measure(run) -> dict:
        batches = run.measuring_batches(count)
        mean, std = embedding_statistics(clip, network.params, run.data.train, batches)
        return {"embedding_space": {**space, "mean": mean.tolist(), "std": std.tolist()}}

    def fitted(part):
        return {name: np.asarray(part["embedding_space"][name], np.float32) for name in ("mean", "std")}

    return Fit(measure, fitted, ("embedding_space",))


def space_of(part: dict, fitted) -> EmbeddingSpace:
    """The part's embedding space, with the statistics in `fitted`: mean and std, each (D,)."""
    space = part["embedding_space"]
    return EmbeddingSpace(space["kind"], space["scale"], fitted["mean"], fitted["std"])
