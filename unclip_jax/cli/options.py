"""What several verbs use: arguments, overrides of the form key=value, progress, and the compilation cache."""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, get_type_hints

from unclip_jax.errors import InputError
from unclip_jax.paths import cache_folder, check_writable, store_errors, user_path

MOST_PICTURES = 10_000  # of one grid
OTHER_FORMATS = (".bmp", ".gif", ".jpeg", ".jpg", ".pdf", ".svg", ".tif", ".tiff", ".webp")


def read_text(name: str, text: str, kinds: Sequence[type]) -> Any:
    """Reads a value that was typed as text. The allowed types decide, so what is meant as text stays text.

    Args:
      name: what the value is for, for messages.
      text: the value: true or false, a number, a list such as (1, 2), None, or any text.
      kinds: the allowed types: of bool, int, float, tuple, dict, str and NoneType.

    Raises:
      ValueError: if the text is none of these.
    """
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds and re.fullmatch(r"[-+0-9._e]+|[-+]?(inf|nan)", text, re.IGNORECASE):
            with contextlib.suppress(ValueError):
                return kind(text)
    for kind, bracket in ((tuple, "(["), (dict, "{")):
        if kind in kinds and text[:1] in tuple(bracket):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = ast.literal_eval(text)
                if isinstance(value, (list, dict) if kind is dict else (list, tuple)):
                    return tuple(value) if kind is tuple else value
    if str in kinds:
        return text
    words = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list such as (1, 2)"}
    named = [words.get(kind, "None" if kind is type(None) else "a group") for kind in kinds]
    expected = " or ".join(dict.fromkeys(named))
    raise InputError(f"{name} must be {expected}, got {text!r}")


def parse_assignments(assignments: Sequence[str], *, once: bool = False) -> dict[str, str]:
    """Splits assignments: ["a.b=1", ...] -> {"a.b": "1"}. Whoever knows what a key is reads its text.

    Raises:
      ValueError: if an item has no "="; with `once`, if two items give a key two values. Otherwise the last
        one counts.
    """
    pairs: dict[str, str] = {}
    for item in assignments:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"{item!r} is not KEY=VALUE")
        if once and pairs.get(key, value) != value:
            raise InputError(f"{key} is given twice: {pairs[key]!r} and {value!r}")
        pairs[key] = value
    return pairs


def part_options(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads options of parts: ["decoder.steps=50"] -> {"decoder": {"steps": 50}}.

    Steps such as 10,10,3,2,2 stay text; only a list in brackets becomes a list.

    Raises:
      ValueError: if an item is not PART.OPTION=VALUE, or the value is not of the option's type; if two items
        give an option two values.
    """
    from unclip_jax.generate.options import OPTIONS
    from unclip_jax.run.settings import kinds_of

    hints = {name: hint for kind in OPTIONS.values() for name, hint in get_type_hints(kind).items()}
    options: dict[str, dict[str, Any]] = {}
    for key, text in parse_assignments(assignments, once=True).items():
        part, _, option = key.partition(".")
        if not part or not option:
            raise InputError(f"{key!r} is not PART.OPTION, e.g. decoder.steps=50")
        value = read_text(key, text, kinds_of(hints.get(option, str)))
        options.setdefault(part, {})[option] = value
    return options


def source_options(assignments: Sequence[str], source: str | None = None) -> dict[str, Any]:
    """Reads the arguments of a data source: ["name=folder", "path=7"] -> {"name": "folder", "path": "7"}.

    Args:
      assignments: the arguments as text.
      source: the source's name where they do not give it.

    Raises:
      ValueError: if an item is not KEY=VALUE, or the value is not of the argument's type; if two items give
        a key two values.
    """
    pairs = parse_assignments(assignments, once=True)
    kinds = {key: source_kinds(pairs.get("name", source), key) for key in pairs}
    return {key: read_text(key, text, kinds[key]) for key, text in pairs.items()}


def source_kinds(source: str | None, key: str) -> tuple[type, ...]:
    """The types of an argument of a data source; text where there is no such source or argument."""
    from unclip_jax.data.balance import balanced
    from unclip_jax.data.filters import Filters
    from unclip_jax.data.sources import SOURCES
    from unclip_jax.run.settings import kinds_of

    first, _, rest = key.partition(".")
    if rest:
        owner = {"filters": Filters, "balance": balanced}.get(first)
        return kinds_of(get_type_hints(owner).get(rest, str)) if owner else (str,)
    if first == "balance":
        return (dict,)
    hints = get_type_hints(SOURCES[source]) if source in SOURCES else {}
    return kinds_of(hints.get(key, str))


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `--mesh`: "data=4,fsdp=2" -> {"data": 4, "fsdp": 2}.

    Raises:
      ValueError: on anything but whole numbers by axis, or an axis that is given twice.
    """
    items = text.split(",")
    pairs = parse_assignments(items)
    if len(pairs) < len(items):
        raise InputError(f"--mesh {text}: an axis is given twice")
    if not all(re.fullmatch("-?[0-9]{1,9}", size) for size in pairs.values()):
        raise InputError(f"--mesh {text}: sizes must be whole numbers, as in data=4,fsdp=2")
    return {axis: int(size) for axis, size in pairs.items()}


def use_compilation_cache() -> None:
    """Makes JAX keep compiled programs in UNCLIP_CACHE or ~/.cache/unclip_jax, for later processes."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def join_hosts() -> None:
    """Joins the other hosts of the job. Waits for them for at most half an hour."""
    import jax

    jax.distributed.initialize(initialization_timeout=1800)


def save_memory_on_cpu() -> None:
    """Turns off a scheduler of XLA's CPU backend that costs memory. Call it before JAX looks for devices.

    That scheduler orders a program for many operations that run at the same time, and so keeps the buffers
    of all of them. Where a few cores share one large convolution, it gains nothing (docs/performance.md).
    """
    import jax

    flags, option = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_enable_concurrency_optimized_scheduler"
    # A flag that a later version does not know would end the process.
    if option not in flags and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = f"{flags} {option}=false".strip()


def progress_bar(words: str) -> Callable[[int, int], None]:
    """Makes a function of (done, total) that shows progress on stderr.

    On a terminal it shows a bar with the rate and the remaining time; elsewhere it prints lines.
    """
    from tqdm import tqdm

    began: list = []  # when the pass began, what was done then, what is done

    def line(done: int, total: int) -> None:
        if not began or done <= began[2]:
            began[:] = [time.monotonic(), done, done]
        began[2], spent, more, left = done, time.monotonic() - began[0], done - began[1], ""
        if more and done < total:
            left = f", {tqdm.format_interval(spent / more * (total - done))} left"
        print(f"{words}: {done}/{total}{left}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        return line
    bar = tqdm(desc=words, unit="image", dynamic_ncols=True)

    def show(done: int, total: int) -> None:
        if bar.n >= done:  # a new pass begins
            bar.reset()
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.refresh()

    return show


def number(text: str) -> float:
    """Parses a finite number; a type of argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def parse_numbers(name: str, text: str | None) -> list[float]:
    """Parses numbers: "1,2.5" -> [1.0, 2.5]; None -> []. Raises a ValueError that names the argument."""
    try:
        return [] if text is None else [number(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise InputError(
            f"{name} must be a finite number, or several separated by commas, got {text!r}"
        ) from None


def parse_steps(text: str | None) -> int | str | tuple[int, ...] | None:
    """Parses `--steps`: "50" -> 50; "[999, 500, 0]" -> a sequence of times; None -> None.

    Segments ("10,10,3,2,2") and names ("fast27") stay text.
    """
    if text is None:
        return None
    return part_options([f"decoder.steps={text}"])["decoder"]["steps"]


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--bundle`, `--index`, `--lora` and `--mesh`, which `open_bundle` reads."""
    parser.add_argument(
        "--bundle",
        default="emoji",
        metavar="DIR",
        help="a bundle's folder, or the name of a shipped one (emoji)",
    )
    parser.add_argument("--index", metavar="DIR", help="an index of neighbours, not the bundle's (retrieval)")
    add_lora_argument(parser)
    add_mesh_argument(parser)


def add_lora_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--lora`, which `checkpoint.lora.merge_loras` reads."""
    words = "a LoRA to merge into the weights, with its scale (1); may be given again"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[=SCALE]", help=words)


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--mesh`, which `read_mesh` reads."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices to sample on: data=8 splits the batch, fsdp=8 the batch and the weights, tensor=2 the "
        "layers. One size may be -1, for all other devices (all devices; splits the weights only if one "
        "device cannot hold them)",
    )


def open_bundle(args: argparse.Namespace) -> Any:
    """Loads the bundle of `--bundle` directly onto the mesh of `--mesh`.

    Raises:
      ValueError, OSError: with a message of one line.
    """
    from unclip_jax.checkpoint.load import load_bundle

    mesh = read_mesh(args)
    if not getattr(args, "lora", None):
        bundle = load_bundle(args.bundle, mesh=mesh)
    else:
        from unclip_jax.checkpoint.lora import merge_loras
        from unclip_jax.sampling.programs import placed

        bundle = placed(merge_loras(load_bundle(args.bundle), args.lora), mesh)
    if getattr(args, "index", None) is not None:
        from unclip_jax.sampling.retrieval import with_index

        bundle = with_index(bundle, args.index)
    return bundle


def read_mesh(args: argparse.Namespace) -> Any:
    """The mesh of `--mesh` for the weights of the bundle `args.bundle`.

    Raises:
      ValueError, OSError: with a message of one line.
    """
    from unclip_jax.checkpoint.load import stored_bytes
    from unclip_jax.sharding import sampling_mesh

    save_memory_on_cpu()
    shape = None if args.mesh is None else parse_mesh(args.mesh)
    return sampling_mesh(shape, stored_bytes(args.bundle))


def check_range(name: str, value: int | None, least: int, most: int) -> None:
    """Raises a ValueError that names the argument unless its value is None or in [least, most]."""
    if value is not None and not least <= value <= most:
        raise InputError(f"{name} must be between {least} and {most}, got {value}")


def check_seed(seed: int) -> int:
    """Returns the seed. Raises a ValueError unless it fits into 32 bits."""
    check_range("--seed", seed, 0, 2**32 - 1)
    return seed


def check_out(path: str, name: str = "--out") -> str:
    """Returns the path of a picture to write, and tries it. Call it before any long work.

    name: of the argument, for messages.

    Raises:
      ValueError, OSError: if it is a folder, has the ending of another format, or cannot be written.
    """
    ending = PurePath(path).suffix.lower()
    if ending in OTHER_FORMATS:
        raise InputError(f"{name} {path}: pictures are written as PNG; end the name in .png, not {ending}")
    try:
        check_writable(path)
    except (InputError, OSError) as error:
        raise type(error)(f"{name} {error}") from None
    return path


def read_image(path: str):
    """Reads a picture from a file, uint8 (H, W, 3).

    Raises:
      ValueError, OSError: with a message of one line that names the file.
    """
    from unclip_jax.data import ops

    data = read_picture(path)
    try:
        return ops.decode_image(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_picture(path: str) -> bytes:
    """Reads the bytes of a picture's file. Raises an OSError of one line that names the file."""
    file = user_path(path)
    try:
        with store_errors(path):
            return file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {path}") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None


def add_image_arguments(
    parser: argparse.ArgumentParser,
    *,
    count: int | None,
    guidance: float | None = 1.0,
    steps: str | None = "50",
    otherwise: str = "the bundle's",
) -> None:
    """Adds the arguments that all verbs with an input picture have.

    Args:
      parser: the verb's parser.
      count: the default of `--count`. With None, the verb has no such argument.
      guidance, steps: the defaults. With None, the verb chooses, and the help text shows `otherwise`.
      otherwise: what the verb chooses then, in words.
    """

    def shown(default: float | str | None) -> str:
        if default is None:
            return otherwise
        return f"{default:g}" if isinstance(default, float) else default

    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    if count is not None:
        parser.add_argument(
            "--count", type=int, default=count, metavar="N", help=f"number of pictures to draw ({count})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument(
        "--steps", default=steps, metavar="N", help=f"the decoder's sampling steps ({shown(steps)})"
    )
    parser.add_argument(
        "--guidance",
        type=number,
        default=guidance,
        metavar="S",
        help=f"the decoder's guidance scale ({shown(guidance)})",
    )


@dataclass(frozen=True)
class ImageTask:
    """What a verb with an input picture needs.

    sampler: the bundle's `Sampler`.
    images: the pictures, uint8 (H, W, 3) each.
    steps: the parsed `--steps`.
    progress: a function of (images done, total images).
    out: the file to write.
    """

    sampler: Any
    images: list[Any]
    steps: int | str | tuple[int, ...] | None
    progress: Callable[[int, int], None]
    out: str

    def save(self, images, labels: Sequence[str]) -> None:
        """Writes the labelled grid and prints its path."""
        from unclip_jax.grid import save_grid

        print(save_grid(self.out, images, labels, columns=min(len(images), 9)))


def image_task(args: argparse.Namespace, *paths: str, least: int = 1) -> ImageTask:
    """Checks the arguments of `add_image_arguments`, reads the pictures and then loads the bundle.

    Args:
      args: the arguments.
      paths: the pictures to read.
      least: the smallest `--count`.

    Raises:
      ValueError, KeyError, OSError: with a message of one line.
    """
    check_seed(args.seed)
    check_range("--count", getattr(args, "count", None), least, MOST_PICTURES)
    out, steps, images = check_out(args.out), parse_steps(args.steps), [read_image(path) for path in paths]
    use_compilation_cache()
    from unclip_jax.sampling.programs import Sampler

    return ImageTask(Sampler(open_bundle(args)), images, steps, progress_bar("sampling"), out)
