"""What the passes of `unclip embed` share: a folder of shards that a later call completes.

A shard is a run of records in the source's order. Every host makes its own shards on its own devices; hosts
share only the folder.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from unclip_jax.data import embeddings
from unclip_jax.data.pipeline import DATA_ERRORS, MAX_LOGGED, MIN_BAD, BadDataError
from unclip_jax.data.record import Record, Source, error_summary
from unclip_jax.errors import InputError
from unclip_jax.paths import check_store, check_writable, store_errors, user_path, write_json
from unclip_jax.run.hosts import leave_if_stopped, stop_signals, wait_for_hosts

log = logging.getLogger("unclip_jax")


def check_folder(out: str | os.PathLike) -> None:
    """Checks that a folder holds embeddings, or nothing; call it before anything is loaded.

    Raises:
      ValueError: when it holds anything else.
      OSError: when it cannot be reached or written.
    """
    check_store(out)
    folder = user_path(out)
    with store_errors(out):
        if not (folder / "plan.json").is_file() and folder.exists():
            if not folder.is_dir() or any(folder.iterdir()):
                raise InputError(f"{folder} exists and holds no embeddings; name another folder")
    check_writable(folder / "plan.json")


def check_plan(out: Any, plan: dict) -> bool:
    """Whether the folder was begun with this plan. Raises ValueError if it was begun with another one."""
    file = out / "plan.json"
    with store_errors(out):
        begun = file.is_file()
    if begun:
        before = embeddings.read_json(file)
        differing = [
            f"{key} was {before.get(key)}, is {plan.get(key)}"
            for key in {**plan, **before}
            if before.get(key) != plan.get(key)
        ]
        if differing:
            raise InputError(f"{out} holds other embeddings ({'; '.join(differing)}); name another folder")
    wait_for_hosts("embed_plan")
    return begun


def make_shards(
    out: Any,
    plan: dict,
    source: Source,
    make: Callable[..., tuple[dict[str, np.ndarray], dict, list[str]]],
    *,
    shard_records: int,
    max_bad_fraction: float,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Makes this host's shards that are missing or damaged, and waits for the other hosts.

    Args:
      out: the folder, with pathlib's methods.
      plan: what decides the contents; a folder is continued only with the same plan.
      source: the records.
      make: (records, allowed, pool, stop) -> the arrays of one shard; the content of its `shard.json`, with
        `images`, `bad` and `last_bad`; and why records were skipped. It may return early when more records
        than `allowed` are bad, or when `stop` is true; then the arrays are not written.
      shard_records: number of the source's records in a shard.
      max_bad_fraction: largest fraction of records that may be bad.
      progress: function that is called with this host's (shards done, total of shards).

    Returns:
      The number of shards, of all hosts.

    Raises:
      ValueError: as `check_plan`.
      BadDataError: when too many records are bad.
    """
    begun, count = check_plan(out, plan), -(-len(source) // shard_records)
    shards_of_host = range(jax.process_index(), count, jax.process_count())
    seen = bad = 0
    with (
        stop_signals(alone=True) as stop,
        ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="unclip-data") as pool,
    ):
        for done, number in enumerate(shards_of_host):
            folder = embeddings.shard_path(out, number)
            records = range(number * shard_records, min((number + 1) * shard_records, len(source)))
            described = embeddings.finished(folder)
            if described is None:
                more = _allowed(max_bad_fraction, len(source)) - bad
                arrays, described, skipped = make(records, more, pool, stop)
                if stop:
                    break
            else:
                arrays, skipped = None, []
            seen, bad = seen + described["images"] + described["bad"], bad + described["bad"]
            if bad == len(source):
                raise BadDataError(f"none of the {bad} records can be used, as {described['last_bad']}")
            if bad > _allowed(max_bad_fraction, seen):
                raise BadDataError(
                    f"{bad} of {seen} records cannot be used, more than max_bad_fraction={max_bad_fraction}; "
                    f"the last is {described['last_bad']}; mend the data, or leave them out with --skip-bad"
                )
            for line in skipped[:MAX_LOGGED]:
                log.warning("skipped %s", line)
            if arrays is not None:
                if not begun:  # a start that fails leaves no folder
                    write_json(out / "plan.json", plan)
                    begun = True
                embeddings.write_arrays(folder, arrays, described)
            if progress is not None:
                progress(done + 1, len(shards_of_host))
    leave_if_stopped(stop)
    wait_for_hosts("embedded")
    return count


def _allowed(max_bad_fraction: float, records: int) -> float:
    # How many of so many records may be bad.
    return max(MIN_BAD if max_bad_fraction else 0, max_bad_fraction * records)


def read_record(source: Source, i: int) -> Record | str:
    """Record i, or the reason why it is unusable.

    Raises:
      OSError: a failing disk or network does not make a record bad.
    """
    try:
        return source.read(i)
    except DATA_ERRORS as error:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            reason = error_summary(error)
            raise OSError(
                f"record {i} of {source.name} cannot be reached ({reason}); "
                "run the same command again to resume from here"
            ) from None
        return unusable(source, i, error_summary(error))


def unusable(source: Source, i: int, reason: str) -> str:
    """The line that says why a record is left out."""
    return f"record {i} of {source.name}: {reason}"


def behind(dispatched: Iterable[tuple[Any, int]]) -> Iterator[Any]:
    """Turns (arrays on the devices, number of rows that count) into those rows on the host.

    It stays one batch behind the devices, so that they do not wait.
    """
    waiting: collections.deque = collections.deque()
    first = lambda tree, count: jax.tree.map(lambda a: np.asarray(a)[:count], tree)
    for item in dispatched:
        waiting.append(item)
        if len(waiting) > 1:
            yield first(*waiting.popleft())
    for item in waiting:
        yield first(*item)


def filled(rows: list, count: int) -> list:
    """The list up to `count` rows, by repeating the last one."""
    return rows + [rows[-1]] * (count - len(rows))


def check_finite_rows(arrays: dict[str, np.ndarray], source: Source, records: range) -> None:
    """Raises ValueError naming the first of the arrays of a shard that has a value that is not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            where = f"records {records.start} to {records.stop - 1} of {source.name}"
            raise InputError(
                f"{name} of {where} is not finite: check the network, or embed with --dtype float32"
            )
