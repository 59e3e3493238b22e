"""What the verbs share: overrides of the form key=value, progress, and the compilation cache."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parse_value(text: str) -> Any:
    """A Python literal ("3e-4", "(1, 2)", "None", "true"), else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """["a.b=1", ...] -> {"a.b": 1}.

    Raises:
      ValueError: on an item without "=".
    """
    pairs = {}
    for item in assignments:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{item!r} is not KEY=VALUE")
        pairs[key] = parse_value(value)
    return pairs


def part_options(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["decoder.steps=50"] -> {"decoder": {"steps": 50}}. Steps such as 10,10,3,2,2 stay text; a list has brackets.

    Raises:
      ValueError: on an item that is not PART.OPTION=VALUE.
    """
    options: dict[str, dict[str, Any]] = {}
    for key, value in parse_assignments(assignments).items():
        part, dot, option = key.partition(".")
        if not dot:
            raise ValueError(f"{key!r} is not PART.OPTION, e.g. decoder.steps=50")
        if option == "steps" and isinstance(value, tuple):
            value = ",".join(map(str, value))
        options.setdefault(part, {})[option] = value
    return options


def use_compilation_cache() -> None:
    """Compiled programs are kept in UNCLIP_CACHE or ~/.cache/unclip_jax, so that a second process starts warm."""
    import jax

    folder = Path(os.environ.get("UNCLIP_CACHE", Path.home() / ".cache" / "unclip_jax")) / "xla"
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def progress_bar(words: str) -> Callable[[int, int], None]:
    """A function of (done, total): a bar with rate and remaining time when a person watches, plain lines when not."""
    if not sys.stderr.isatty():
        return lambda done, total: print(f"{words}: {done}/{total}", file=sys.stderr, flush=True)
    from tqdm import tqdm

    bar = tqdm(desc=words, unit="image", dynamic_ncols=True)

    def show(done: int, total: int) -> None:
        if bar.n >= done:  # a new pass
            bar.reset()
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.refresh()

    return show
