"""What the verbs share: overrides of the form key=value, progress, and the compilation cache."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unclip_jax.errors import InputError
from unclip_jax.paths import cache_folder, store_errors, user_path


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
            raise InputError(f"{item!r} is not KEY=VALUE")
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
            raise InputError(f"{key!r} is not PART.OPTION, e.g. decoder.steps=50")
        if option == "steps" and isinstance(value, tuple):
            value = ",".join(map(str, value))
        options.setdefault(part, {})[option] = value
    return options


def use_compilation_cache() -> None:
    """Compiled programs are kept in UNCLIP_CACHE or ~/.cache/unclip_jax, so that a second process starts warm."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def join_hosts() -> None:
    """Joins the other hosts of the job, which may come half an hour later."""
    import jax

    jax.distributed.initialize(initialization_timeout=1800)


def save_memory_on_cpu() -> None:
    """XLA's CPU backend orders a program for threads that run many operations at once, and so keeps what they need at once. Where two
    cores share one large convolution this only costs memory (docs/performance.md). To be called before JAX first looks for devices."""
    import jax

    flags, option = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_enable_concurrency_optimized_scheduler"
    if option not in flags and jax.__version_info__ < (
        0,
        11,
    ):  # a flag that a later version does not know would end the process
        os.environ["XLA_FLAGS"] = f"{flags} {option}=false".strip()


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


def parse_numbers(name: str, text: str | None) -> list[float]:
    """ "1,2.5" -> [1.0, 2.5]; None -> []. Raises ValueError naming the argument."""
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{name} must be a number, or several with commas between them, got {text!r}"
        ) from None


def parse_steps(text: str | None) -> int | str | tuple[int, ...] | None:
    """What `--steps` says: "50" -> 50, "10,10,3,2,2" and names stay text, "[999, 500, 0]" -> (999, 500, 0); None stays None."""
    if text is None:
        return None
    return part_options([f"decoder.steps={text}"])["decoder"]["steps"]


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """`--bundle` and `--mesh`, for `open_bundle`."""
    parser.add_argument(
        "--bundle",
        default="emoji",
        metavar="DIR",
        help="a bundle's folder, or the name of a shipped one (emoji)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices to sample on: data=8 splits the batch, fsdp=8 the weights too, tensor=2 the layers; one number may be -1 "
        "(all devices; weights are split where one device cannot hold them)",
    )


def open_bundle(args: argparse.Namespace) -> Any:
    """The bundle of `--bundle`, straight onto the mesh of `--mesh`.

    Raises:
      ValueError, OSError: one line each.
    """
    from unclip_jax.checkpoint.load import load_bundle, stored_bytes
    from unclip_jax.sharding import sampling_mesh

    save_memory_on_cpu()
    shape = None if args.mesh is None else parse_assignments(args.mesh.split(","))
    if shape and not all(isinstance(size, int) for size in shape.values()):
        raise InputError(f"--mesh {args.mesh}: sizes are whole numbers, as in data=4,fsdp=2")
    return load_bundle(args.bundle, mesh=sampling_mesh(shape, stored_bytes(args.bundle)))


def check_seed(seed: int) -> int:
    """The seed. Raises ValueError unless it fits 32 bits."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")
    return seed


def check_out(path: str) -> str:
    """The name of a picture to write. Raises ValueError when it is a folder."""
    if user_path(path).is_dir():
        raise InputError(f"--out {path} is a folder; name a file")
    return path


def read_image(path: str):
    """A picture from a file, uint8 (H, W, 3).

    Raises:
      ValueError, OSError: one line naming the file.
    """
    from unclip_jax.data import ops

    try:
        with store_errors(path):
            return ops.decode_image(user_path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {path}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def add_image_arguments(
    parser: argparse.ArgumentParser,
    *,
    count: int | None,
    guidance: float | None = 1.0,
    steps: str | None = "50",
    otherwise: str = "the bundle's",
) -> None:
    """The arguments shared by the verbs that start from a picture.

    Args:
      count: the default of `--count`; None: there is no such argument.
      guidance, steps: defaults; None: what the verb takes then, which is `otherwise` in words.
    """
    said = lambda value: otherwise if value is None else f"{value:g}" if isinstance(value, float) else value
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the picture (grid.png)")
    if count is not None:
        parser.add_argument(
            "--count", type=int, default=count, metavar="N", help=f"how many to draw ({count})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument(
        "--steps", default=steps, metavar="N", help=f"the decoder's sampling steps ({said(steps)})"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=guidance,
        metavar="S",
        help=f"the decoder's guidance scale ({said(guidance)})",
    )


@dataclass(frozen=True)
class ImageTask:
    """What a verb that starts from a picture works with: `sampler`, parsed `steps`, `progress`, and `save(images, labels)`."""

    sampler: Any
    steps: int | str | tuple[int, ...] | None
    progress: Callable[[int, int], None]
    out: str

    def save(self, images, labels: Sequence[str]) -> None:
        """Writes the labelled grid and prints its path."""
        from unclip_jax.grid import save_grid

        print(save_grid(self.out, images, labels, columns=min(len(images), 9)))


def image_task(args: argparse.Namespace) -> ImageTask:
    """Checks the shared arguments and loads the bundle.

    Raises:
      ValueError, KeyError, OSError: one line each.
    """
    check_seed(args.seed)
    out = check_out(args.out)
    use_compilation_cache()
    from unclip_jax.sampling.programs import Sampler

    return ImageTask(Sampler(open_bundle(args)), parse_steps(args.steps), progress_bar("sampling"), out)
