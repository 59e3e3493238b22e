"""What the benchmarks share: the memory of a process, the machine's name, and rows of results in a file."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

PACKAGES = ("jax", "torch", "diffusers", "transformers")


def memory(field: str) -> float:
    """Reads a field of this process's /proc status (Linux), in GiB. Returns 0 where the system lacks it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0) / 2**20


class Peak:
    """Records the peak of anonymous resident memory in GiB from its creation on; it samples every 5 ms."""

    def __init__(self):
        self.gib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, memory("RssAnon"))
            time.sleep(5e-3)


def device_gib() -> float:
    """The peak of the memory that this process took on its GPU, in GiB; 0 without a GPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    stats = jax.local_devices()[0].memory_stats() if jax is not None else None
    return stats["peak_bytes_in_use"] / 2**30 if stats else 0.0


def peak_gib() -> float:
    """The peak of this process's memory in GiB: the device's on a GPU, else resident memory."""
    return device_gib() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> str:
    """The GPU's name, or the CPU's where there is none. It starts no library that would take the GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    return found[0].strip() if found else f"CPU, {platform.machine()}"


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def add_arguments(parser: argparse.ArgumentParser, peer: str) -> None:
    """Adds the arguments that the comparisons with a peer share: --compile, --alone and --json."""
    parser.add_argument("--compile", action="store_true", help=f"also time {peer} with torch.compile")
    parser.add_argument("--alone", action="store_true", help=f"time unclip_jax without {peer}")
    parser.add_argument("--json", metavar="FILE", help="append the medians to FILE as JSON lines")


def append_row(path: str | None, what: str, library: str, **figures: float | str | list | None) -> None:
    """Appends one result to a file of JSON lines, with the day, the machine and the versions.

    Args:
      path: the file; None writes nothing.
      what: the program that was timed, in words.
      library: who ran it.
      figures: `value` and its `unit`; `memory`, the peak in GiB; `ratio`, how many times as fast unclip_jax
        is, with the `range` of the rounds; None for what there is not.
    """
    if path is None:
        return
    row = {"what": what, "library": library, **figures, "machine": machine(), "versions": versions()}
    row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def record(path: str | None, what: str, later: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Prints how many times as fast unclip_jax is as each peer, and appends a row for every library.

    Args:
      path: the file; None writes nothing.
      what: the program that was timed, in words.
      later: library -> the seconds that it took in each round.
      memory: library -> its peak in GiB.
    """
    for library, seconds in later.items():
        figures = {"value": statistics.median(seconds), "unit": "s", "memory": memory[library]}
        if library != "unclip_jax":
            ratios = [theirs / ours for theirs, ours in zip(seconds, later["unclip_jax"])]
            figures |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
            print(f"{library} / unclip_jax: {figures['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        append_row(path, what, library, **figures)


def table(paths: list[str]) -> str:
    """Formats the rows of several files as a table in Markdown; machines, versions and days stand above."""
    rows = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    lines = []
    for heading in dict.fromkeys(
        f"{row['date']}, {row['machine']}, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in rows
    ):
        lines.append(heading)
    lines += ["", "| program | library | figure | memory, GiB | unclip_jax is faster by |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        ratio, memory = row.get("ratio"), row.get("memory")
        spread = f" ({row['range'][0]:.2f} to {row['range'][1]:.2f})" if row.get("range") else ""
        cells = [row["what"], row["library"], f"{row['value']:.4g} {row['unit']}"]
        cells += ["" if memory is None else f"{memory:.2f}", "" if ratio is None else f"{ratio:.2f}{spread}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
