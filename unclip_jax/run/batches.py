"""A run's data: its sources, its training batches, and its evaluation batches on the mesh."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax.data import pipeline
from unclip_jax.data.record import Source
from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.run.hosts import on_every_host
from unclip_jax.sharding import Mesh, own_rows, shard_batch

CHECKED = 64  # rows that `check_held_out` holds at a time


class Data(NamedTuple):
    """The training source, and the evaluation sources by name. The name of a single source is `eval`."""

    train: Source
    held_out: dict[str, Source]


def open_data(config: ConfigDict, mesh: Mesh) -> Data:
    """Opens the sources of `config.data`, and checks that batches and evaluations of this size can be made.

    Raises:
      ValueError, FileNotFoundError: as `data.sources.make_source`; when a batch does not divide over the mesh
        or into the parts of `grad_accumulation`; when an evaluation source has too few rows.
    """
    check_divides(config, mesh)
    evaluation = config.data.get("eval", {})
    if isinstance(evaluation.get("name"), str):  # a single source, not several by name
        evaluation = {"eval": evaluation}
    data = Data(
        make_source(config.data.train), {name: make_source(source) for name, source in evaluation.items()}
    )
    least = config.get("eval", {}).get("candidates", 1) if config.eval_every else 0
    for name, source in data.held_out.items():
        if len(source) < least:
            wanted = f"eval.candidates={least}" if least > 1 else "an evaluation"
            raise InputError(
                f"{wanted} needs as many rows, but data.eval {name!r} ({source.name}) has {len(source)}"
            )
    return data


def check_divides(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError when a batch does not divide over the mesh, nor its rows into equal parts."""
    ways, parts, groups = mesh.shape["data"] * mesh.shape["fsdp"], config.grad_accumulation, 1
    if "sam" in config and config.sam.rho:
        groups = config.sam.group_size
    if config.batch_size % ways:
        raise InputError(
            f"a batch of {config.batch_size} does not divide over data x fsdp = {ways} devices; "
            "change batch_size or the mesh"
        )
    rows = config.batch_size // ways
    if rows % parts:
        raise InputError(f"grad_accumulation={parts} does not divide the {rows} rows of a device")
    if rows % groups:
        raise InputError(f"sam.group_size={groups} does not divide the {rows} rows of a device")


def train_batches(
    config: ConfigDict, source: Source, make_example: pipeline.MakeExample, mesh: Mesh, start: int, stop: int
) -> pipeline.TrainBatches:
    """This host's training batches for the steps from `start` to `stop`, as `config.data` describes them."""
    backend = config.data.backend
    if backend == "auto":
        backend = "tf" if importlib.util.find_spec("tensorflow") else "numpy"
    return pipeline.train_batches(
        source,
        make_example,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        num_steps=stop - start,
        local_rows=own_rows(mesh, config.batch_size),
        max_bad_fraction=config.data.max_bad_fraction,
        workers=pipeline.Workers(backend),
    )


def eval_batches(
    source: Source, make_example: Callable, mesh: Mesh, batch_size: int, limit: int
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Evaluation batches of the first `limit` records (`pipeline.eval_batches`), on the mesh.

    Args:
      source: the records.
      make_example: the stage's function; it is called with training=False.
      mesh: the devices.
      batch_size: rows of a batch; rounded up to a number that divides over the devices.
      limit: largest number of records.

    Yields:
      (batch, number of its rows that count).
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def example(record, rng):
        return make_example(record, rng, training=False)

    for batch, valid in pipeline.eval_batches(source, example, -(-batch_size // ways) * ways, limit):
        yield shard_batch(batch, mesh, whole=True), valid


def check_held_out(config: ConfigDict, make_example: Callable, data: Data) -> None:
    """Reads the rows of all evaluations once, so that a bad one is told before the first step.

    Raises:
      ValueError: naming a record that cannot be used (`pipeline.eval_batches`).
    """
    settings = config.get("eval", {})
    rows = max(settings.get("rows", 0), settings.get("samples", 0), settings.get("fid_rows", 0))
    if not config.eval_every or not rows:
        return

    def example(record, rng):
        return make_example(record, rng, training=False)

    for source in data.held_out.values():
        for _ in pipeline.eval_batches(source, example, min(rows, CHECKED), rows):
            pass


def joined_rows(outputs: Iterable[tuple[Any, int]]) -> Any:
    """Joins the rows of several batches' outputs.

    Args:
      outputs: pairs of a tree of arrays (B, ...) and the number of its rows that count.

    Returns:
      One tree of NumPy arrays, on every host.
    """
    rows = [jax.tree.map(lambda a, n=valid: on_every_host(a)[:n], tree) for tree, valid in outputs]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *rows)
