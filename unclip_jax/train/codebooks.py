"""What stages with a codebook share: its settings, its loss for a batch, and its moving averages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.models.quantiser import (
    Averages,
    Quantised,
    Usage,
    averaged_codebook,
    init_averages,
    quantiser_loss,
    restart_dead,
    trained_averages,
    update_averages,
    usage,
)
from unclip_jax.run import settings
from unclip_jax.run.loop import Run

CODEBOOKS = ("gradient", "averages")
QUANTISER = {
    "codebook": settings.text(*CODEBOOKS),
    "weight": settings.number("(0, inf)"),
    "beta": settings.number("[0, inf)"),
    "legacy": settings.FLAG,
    "decay": settings.number("(0, 1)"),
    "debias": settings.FLAG,
    "restart": settings.number("[0, inf)"),
}


def codebook_loss(
    quantiser: Any, z: jax.Array, found: Quantised, size: int, averages: Averages | None, key: jax.Array
) -> tuple[jax.Array, Usage, Averages | None]:
    """The weighted loss () of a codebook for a batch, how the batch uses it, and its averages, moved.

    Args:
      quantiser: the section of the configuration (`defaults.quantiser`).
      z: (..., Z) the encoder's outputs of the global batch.
      found: their vectors.
      size: of the codebook.
      averages: of a codebook of averages; None for one that learns by gradient.
      key: random, for dead codes that start again.
    """
    if quantiser.codebook == "averages":
        vectors = jax.lax.stop_gradient(found.vectors)
        loss = quantiser.beta * jnp.mean(jnp.square(vectors - z))
        averages = update_averages(averages, z, found.codes, quantiser.decay)
        if quantiser.restart:
            how = {"decay": quantiser.decay, "debias": quantiser.debias}
            averages = restart_dead(averages, z, key, quantiser.restart, **how)
    else:
        loss = quantiser_loss(z, found.vectors, quantiser.beta, quantiser.legacy)
    return quantiser.weight * loss, usage(found.codes, size), averages


def start_averages(quantiser: Any, codebook: jax.Array) -> Averages:
    """The averages behind a codebook (K, Z) before the first step."""
    return init_averages(codebook, quantiser.debias)


def codebook_of(quantiser: Any, averages: Averages) -> jax.Array:
    """The codebook (K, Z) that the averages stand for."""
    return averaged_codebook(averages, quantiser.decay, quantiser.debias)


def continue_averages(run: Run, outputs: dict[str, int]) -> None:
    """Makes the averages of a run that starts from trained weights stand for the codebooks of those.

    Args:
      run: before its first step; its `extra["averages"]` holds averages by the codebook's name.
      outputs: name of a codebook among the parameters -> the encoder's outputs for it in a batch.
    """
    placed = {}
    for name, count in outputs.items():
        shardings = run.shardings.extra["averages"][name]
        place = jax.jit(trained_averages, static_argnums=1, out_shardings=shardings)
        placed[name] = place(run.state.params[name], count)
    run.state = run.state.replace(extra=run.state.extra | {"averages": placed})
