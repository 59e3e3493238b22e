"""`unclip compile CONFIG --topology v5e:4x4`: compiles a train step for devices that are not here.

The command prints the memory and the time that the step needs. `--search` compares steps with other settings.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from unclip_jax.errors import InputError, MemoryNeededError
from unclip_jax.paths import check_writable

ADVICE = (
    "raise mesh.fsdp or (except for clip) grad_accumulation, lower --batch, set remat=full or "
    "optimizer.mu_dtype=bfloat16, or use more chips"
)
SHOWN = 5  # of the largest operations that would be slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a configuration file, optionally with :VARIANT, as for `unclip train`",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="v5e:4x4, v5p:2x2x4, v6e:8x8, v4:2x2x2 (needs libtpu), or cpu:8; cuda:a100, cuda:h100 and "
        "cuda:h200 lower the step for one GPU, and say what would be slow there",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="e.g. data=2,fsdp=8; one size may be -1, for all other devices (the configuration's)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="the global batch size (the configuration's)")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="compile the stage's sampler, not its train step; --batch is then one row per device by default",
    )
    parser.add_argument(
        "--embeddings",
        action="store_true",
        help="compile the step of a prior that reads the output of `unclip embed` and needs no CLIP",
    )
    parser.add_argument(
        "--clip", metavar="CONFIG", help="the frozen CLIP's configuration (clip.py in the folder of CONFIG)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="override a setting, as for `unclip train`",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="compile the step with each of these values of a setting, in all combinations, and print which "
        "are worth their memory and chips; 'auto' tries sizes of mesh.fsdp, remat and three batches",
    )
    parser.add_argument(
        "--rows", metavar="FILE", help="with --search: keep the rows in FILE, and compile none of them again"
    )
    parser.add_argument(
        "--price", type=float, metavar="X", help="with --search: the price of a chip-hour, in any currency"
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="save the compiled program in the format of `jax.experimental.serialize_executable`",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    kind, _, count = args.topology.partition(":")
    if "jax" not in sys.modules:  # JAX reads these variables only once
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", count):
            os.environ["XLA_FLAGS"] = (
                f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
            )
    from unclip_jax.cli.options import parse_assignments, parse_mesh
    from unclip_jax.cli.train import check_stage, load_config, override
    from unclip_jax.compile import step

    if args.sample and args.embeddings:
        raise InputError("--embeddings is for a train step; a sampler reads captions")
    check_search(args)
    for path in (args.save, args.rows):
        if path is not None:
            check_writable(path)
    chip = gpu_of(args)
    config = load_config(args.config)
    for key, value in parse_assignments(args.assignments).items():
        override(config, key, value)
    check_stage(config)
    if args.batch is not None:
        override(config, "batch_size", args.batch)
    if args.search:
        search_settings(args, config, clip_of(args, config))
        return
    if chip is not None:
        print(describe_gpu(config, clip_of(args, config), args, chip))
        return
    shape = dict(config.mesh) if args.mesh is None else parse_mesh(args.mesh)
    mesh = step.make_abstract_mesh(args.topology, shape)
    if args.batch is None and args.sample:
        override(config, "batch_size", mesh.shape["data"] * mesh.shape["fsdp"])
    clip_config = clip_of(args, config)
    if args.sample:
        report, compiled = step.compile_sampler(config, clip_config, mesh)
    else:
        report, compiled = step.compile_step(config, clip_config, mesh, args.embeddings)
    print(describe(report, args.topology), flush=True)
    print(verdict(report), end="\n" if report.chip else "")
    if args.save is not None:
        save(compiled, args.save)
        print(f"saved {args.save}")


def gpu_of(args: argparse.Namespace) -> str | None:
    """The GPU that a topology "cuda:a100" names; None for other topologies.

    Raises:
      ValueError: on an unknown GPU, or with options that need a compiler.
    """
    from unclip_jax.compile.cuda import CAPABILITIES

    kind, _, chip = args.topology.partition(":")
    if kind != "cuda":
        return None
    if chip not in CAPABILITIES:
        raise InputError(f"unknown topology {args.topology!r}; write cuda:{', cuda:'.join(CAPABILITIES)}")
    given = [name for name in ("mesh", "save", "search") if getattr(args, name)]
    if given:
        raise InputError(f"{args.topology} lowers for one GPU and compiles nothing: leave --{given[0]} out")
    return chip


def describe_gpu(config, clip_config, args: argparse.Namespace, chip: str) -> str:
    """Lowers the step, or the sampler, for one GPU, and formats what would be slow there as lines of text."""
    from unclip_jax.compile import cuda

    program, arguments = cuda.stage_program(config, clip_config, args.sample, args.embeddings)
    found = cuda.examine(cuda.lower(program, arguments, chip))
    lines = [f"lowered for one {chip}, batch {config.batch_size}; a loop's body counts once"]
    lines.append(f"operations: {found.operations:.3e}, {100 * found.float32_share:.2f}% of them in float32")
    lines += [f"  {operations:.3e} in a {words}" for operations, words in found.largest[:SHOWN]]
    lines.append(f"arrays transposed beside a convolution: {len(found.transposes)}")
    lines += [f"  {words}" for words in found.transposes[:SHOWN]]
    lines.append(f"attention: {found.fused} kernels of cuDNN, {len(found.plain)} products outside them")
    lines += [f"  {words}" for words in dict.fromkeys(found.plain[: 2 * SHOWN])]
    return "\n".join(lines)


def clip_of(args: argparse.Namespace, config):
    """The configuration of the frozen CLIP of a stage; None for a stage without one.

    Raises:
      ValueError: if the file is not a CLIP's configuration.
    """
    from unclip_jax.cli.train import check_stage, load_config

    if all(config.get("frozen", {}).get(role) is None for role in ("clip", "text")):
        return None
    path, _, variant = args.config.partition(":")
    beside = f"{Path(path).parent / 'clip.py'}" + (":tiny" if variant.startswith("tiny") else "")
    clip_config = load_config(args.clip or beside)
    if clip_config.get("stage") != "clip":
        raise InputError(f"{args.clip or beside} is not a CLIP's configuration; name one with --clip")
    check_stage(clip_config)
    return clip_config


def check_search(args: argparse.Namespace) -> None:
    """Raises a ValueError where options do not belong together."""
    given = [name for name in ("rows", "price") if getattr(args, name) is not None]
    if given and not args.search:
        raise InputError(f"--{given[0]} belongs to --search")
    if args.search and (args.sample or args.save is not None):
        raise InputError(f"--search compares train steps: leave --{'sample' if args.sample else 'save'} out")
    if args.search and args.mesh is not None:
        raise InputError("--search takes the mesh as settings: --set mesh.fsdp=8, or --search mesh.fsdp=4,8")
    if args.price is not None and not 0 < args.price < float("inf"):
        raise InputError(f"--price must be a number above 0, got {args.price:g}")


def search_settings(args: argparse.Namespace, config, clip_config) -> None:
    """Compiles the step with every combination of settings, and prints the table (`compile.search`).

    Raises:
      ValueError: before anything is compiled, if a setting is unknown, a value is not of its type, the chips'
        peaks are not known, or the file of rows holds something else.
      MemoryError: if no combination fits.
    """
    from unclip_jax.cli.options import parse_assignments
    from unclip_jax.cli.train import override
    from unclip_jax.compile import search, step

    devices = step.topology(args.topology)
    if args.search == ["auto"]:
        grid = search.usual_grid(len(devices), config.batch_size)
    else:
        grid = {key: text.split(",") for key, text in parse_assignments(args.search, once=True).items()}
    chosen = []
    for settings in search.combinations(grid):
        changed = config.copy_and_resolve_references()
        for key, value in settings.items():
            override(changed, key, value)
        chosen.append((settings, changed))
    found, rows = {} if args.rows is None else search.read_rows(args.rows), []
    if devices[0].device_kind not in step.CHIPS:
        raise InputError("--search needs chips whose peaks are known: name a TPU, such as v5e:8x8")
    for number, (settings, changed) in enumerate(chosen, 1):
        key = search.key_of(changed, clip_config, args.topology, args.embeddings)
        if key not in found:

            def compiled(changed=changed):
                mesh = step.make_abstract_mesh(args.topology, dict(changed.mesh))
                return step.compile_step(changed, clip_config, mesh, args.embeddings)[0]

            found[key] = search.measure(settings, changed.batch_size, compiled)
            if args.rows is not None:
                search.append_row(args.rows, key, found[key])
        rows.append(found[key])
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        print(f"{number} of {len(chosen)}: {words}", file=sys.stderr, flush=True)
    print(search.table(rows, len(devices), config.steps * config.batch_size, args.price))
    if not any(row.fits for row in rows):
        raise MemoryNeededError(f"none of them fits: {ADVICE}")


def describe(report, topology: str) -> str:
    """Formats the report as lines of text."""
    from unclip_jax.compile.step import HELD

    gib, lines = 2**30, []
    sizes = " x ".join(f"{axis}={n}" for axis, n in report.mesh.items())
    lines.append(f"{report.devices} devices of {topology}, mesh {sizes}, batch {report.batch_size}")
    parts = ", ".join(
        f"{name} {getattr(report, name) / gib:.2f}" for name in (*HELD, "temporary") if getattr(report, name)
    )
    limit = "" if report.chip is None else f" of {report.chip.memory / gib:.1f}"
    lines.append(f"memory a device: {report.memory / gib:.2f}{limit} GiB ({parts})")
    extra = report.flops / report.model_flops - 1
    each = report.flops / report.devices
    lines.append(
        f"operations a step: {report.flops:.3e}, {each:.3e} a device; "
        f"{100 * extra:.0f}% of the model's are done twice"
    )
    lines.append(f"padding to whole lanes of a TPU, from the shapes: {100 * report.padding:.0f}% of the work")
    lines.append(f"bytes moved a device: {report.traffic / gib:.1f} GiB")
    for kind, (times, size) in sorted(report.collectives.items()):
        lines.append(f"{kind}: {times} a step, {size / gib:.3f} GiB arrive at a device")
    times, size = report.between_slices
    if times:
        unknown = "" if report.chip is None or report.chip.network else ", in a time that is not known"
        lines.append(f"between slices: {times} a step, {size / gib:.3f} GiB arrive at a device{unknown}")
    if report.chip is not None:
        took = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in report.seconds.items())
        lines.append(f"roofline, ms: {took}; limited by {report.limit}, MFU at most {100 * report.mfu:.0f}%")
        per_second = report.batch_size / report.seconds[report.limit]
        lines.append(f"at most {per_second:.1f} examples/s, {per_second / report.devices:.2f} a chip")
    return "\n".join(lines)


def verdict(report) -> str:
    """Says that the program fits into the chip's memory; "" if the chip is unknown.

    Raises:
      MemoryError: if it does not fit; the message says what helps.
    """
    if report.chip is None:
        return ""
    if report.memory > report.chip.memory:
        raise MemoryNeededError(f"it does NOT fit: {ADVICE}")
    return "it fits"


def save(compiled, path: str) -> None:
    """Writes the program and the trees of its arguments and results. The file appears whole or not at all."""
    import pickle

    from jax.experimental import serialize_executable

    from unclip_jax.paths import write_whole

    try:
        data = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"this platform's program cannot be stored ({' '.join(str(error).split())[:200]})"
        ) from None
    write_whole(path, pickle.dumps(data))
