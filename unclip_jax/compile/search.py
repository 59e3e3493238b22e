"""Which settings of a step are worth their memory and their chips: a grid of compiled steps, and its front.

A row is a step compiled with some settings. It is on the front when no other row that fits needs both less
memory on a device and fewer chip-seconds an example. Times are those of the roofline (`step.Report`), so the
order of two rows that differ by a few per cent says nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from unclip_jax.compile.step import Report
from unclip_jax.errors import InputError, MemoryNeededError

START = '{"key": "'  # of a row in a file


@dataclass(frozen=True)
class Row:
    """What a step needs with some settings.

    settings: key -> value, as text.
    batch_size: rows of the global batch.
    memory: bytes on a device; None when the compiler gave up or the settings do not fit together.
    seconds: of a step by the roofline; None where `memory` is.
    limit: the resource that needs the most time; "" where `memory` is None.
    mfu: the model's share of the chips' arithmetic; None where `memory` is.
    fits: whether the chip has the memory.
    reason: why there are no figures; "" otherwise.
    padding: share of the work that is padding to whole lanes; None where `memory` is, and in older files.
    """

    settings: dict[str, str]
    batch_size: int
    memory: int | None = None
    seconds: float | None = None
    limit: str = ""
    mfu: float | None = None
    fits: bool = False
    reason: str = ""
    padding: float | None = None


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every way to choose one value for each key."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def usual_grid(devices: int, batch_size: int) -> dict[str, list[str]]:
    """The grid where none is named: every size of `mesh.fsdp` from 4 that divides the devices, three sizes of
    batch, and with and without remat."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0 and (n >= 4 or devices < 4)]
    batches = [n for n in (batch_size // 2, batch_size, 2 * batch_size) if n]
    return {
        "mesh.fsdp": [str(n) for n in sizes],
        "remat": ["none", "full"],
        "batch_size": [str(n) for n in batches],
    }


def measure(settings: dict[str, str], batch_size: int, compile_step: Callable[[], Report]) -> Row:
    """The row of some settings, on chips whose peaks are known. A step that does not fit, or settings that do
    not fit together, say why."""
    try:
        report = compile_step()
    except (MemoryNeededError, InputError) as error:
        return Row(settings, batch_size, reason=str(error))
    seconds, fits = report.seconds[report.limit], report.memory <= report.chip.memory
    figures = report.memory, seconds, report.limit, report.mfu, fits
    return Row(settings, batch_size, *figures, padding=report.padding)


def front(rows: Sequence[Row]) -> list[int]:
    """The numbers of the rows that no other row beats in both memory and time an example.

    Of equal rows the first is on the front.
    """
    costs = {i: (row.memory, row.seconds / row.batch_size) for i, row in enumerate(rows) if row.fits}
    beats = lambda a, b, i, j: a[0] <= b[0] and a[1] <= b[1] and (a != b or i < j)
    return [i for i, own in costs.items() if not any(beats(c, own, j, i) for j, c in costs.items() if j != i)]


def chip_hours(row: Row, devices: int, examples: int) -> float:
    """Chip-hours in which the row's step sees so many examples, by the roofline."""
    return row.seconds * devices * examples / row.batch_size / 3600


def table(rows: Sequence[Row], devices: int, examples: int, price: float | None = None) -> str:
    """The rows as text: those that fit by their chip-hours, then the others. A star marks the front.

    Args:
      rows: what was compiled.
      devices: of the topology.
      examples: that training sees in all.
      price: of a chip-hour, in any currency; None without the column.
    """
    stars, hours = set(front(rows)), lambda row: chip_hours(row, devices, examples)
    named = lambda row: " ".join(f"{key}={value}" for key, value in row.settings.items())
    wide = max(len(named(row)) for row in rows)
    head = f"  {'settings':{wide}}  GiB a device  step, ms  limit       MFU  padding  chip-hours"
    lines = [head + ("" if price is None else "       price")]
    fitting = sorted((i for i, row in enumerate(rows) if row.fits), key=lambda i: hours(rows[i]))
    for i in fitting:
        row = rows[i]
        line = f"{'*' if i in stars else ' '} {named(row):{wide}}  {row.memory / 2**30:12.2f}"
        line += f"  {1e3 * row.seconds:8.1f}  {row.limit:10}  {100 * row.mfu:2.0f}%"
        padding = "" if row.padding is None else f"{100 * row.padding:.0f}%"
        line += f"  {padding:>7}  {hours(row):10,.0f}"
        lines.append(line + ("" if price is None else f"  {hours(row) * price:10,.0f}"))
    for row in rows:
        if row.fits:
            continue
        reason = row.reason or f"it does not fit: {row.memory / 2**30:.2f} GiB a device"
        lines.append(f"  {named(row):{wide}}  {reason}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ rows on disk
def key_of(config: Any, clip_config: Any, topology: str, embedded: bool) -> str:
    """What a row depends on, as a short hash: configurations, devices and versions."""
    plain = [None if c is None else json.loads(c.to_json_best_effort()) for c in (config, clip_config)]
    text = json.dumps([plain, topology, embedded, jax.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: str | os.PathLike) -> dict[str, Row]:
    """key -> row of a file that `append_row` wrote; {} if there is none. A row that was cut off is left out.

    Raises:
      ValueError: when the file holds something else.
    """
    path, found = Path(path), {}
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(True), 1):
        try:
            values = json.loads(line)
            key = values.pop("key")
            found[key] = Row(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            if line.endswith("\n") or not line.startswith(START[: len(line)]):
                raise InputError(f"{path}, line {number}: not a row of `unclip compile --search`") from None
    return found


def append_row(path: str | os.PathLike, key: str, row: Row) -> None:
    """Adds a row to the file, in place of a last line that was cut off."""
    path = Path(path)
    whole = path.read_bytes() if path.exists() else b""
    with path.open("r+b" if whole else "wb") as file:
        file.truncate(whole.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write((json.dumps({"key": key} | asdict(row)) + "\n").encode())
