"""`unclip bundle RUNS --out DIR`: collects averaged weights of the stages in a bundle, and measures it."""

from __future__ import annotations

import argparse
from typing import Any

from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "runs",
        metavar="RUNS",
        help="the folder with the runs: clip, prior_diffusion, decoder, upsampler_64, ...",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the bundle's folder; replaces a bundle that is already there",
    )
    parser.add_argument(
        "--base", metavar="BUNDLE", help="a bundle to take the parts from that have no run in RUNS"
    )
    parser.add_argument(
        "--index", metavar="DIR", help="an index to keep in the bundle, for the system retrieval"
    )
    parser.add_argument(
        "--sampling",
        action="append",
        default=[],
        metavar="PART.OPTION=VALUE",
        help="a sampling default, e.g. decoder.guidance_scale=3",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=100,
        metavar="N",
        help="number of rows of each split to measure unCLIP on; 0 measures nothing (100)",
    )
    parser.add_argument(
        "--judge",
        default="judge",
        metavar="BUNDLE",
        help="a bundle whose CLIP judges the samples (judge: the shipped one)",
    )


def collect(runs: Any, base: str | None = None):
    """Collects the runs in a folder into a bundle.

    Each subfolder with checkpoints is a run and gives one part. The run's metadata name the part. A CLIP
    alone makes a bundle too: it can be evaluated, stand under other stages, or judge samples.

    Args:
      runs: the folder, a path with pathlib's methods.
      base: a bundle to take the parts from that have no run in the folder.

    Returns:
      The `Bundle`.

    Raises:
      FileNotFoundError: if the folder has no run, or a part of the system is missing.
      ValueError: if two runs trained the same part, the runs are of two systems, or a part was trained with
        other frozen parts.
    """
    from unclip_jax.checkpoint.bundle import Bundle, check_frozen
    from unclip_jax.checkpoint.check import check_config
    from unclip_jax.checkpoint.load import load_bundle, load_trained
    from unclip_jax.checkpoint.store import FOLDER
    from unclip_jax.sampling.text_to_image import system_of_runs

    folders = sorted(p for p in runs.iterdir() if (p / FOLDER).is_dir()) if runs.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{runs} has no run; train clip, prior_diffusion and decoder first")
    start = load_bundle(base) if base else Bundle({})
    parts, sampling = dict(start.parts), dict(start.sampling)
    training, origin = dict(start.provenance.get("training", {})), {}
    for folder in folders:
        part, meta, step = load_trained(folder)
        name = meta["name"]
        if "lora" in meta["part"]:
            raise InputError(
                f"{folder} trained adapters: move it away, and merge its lora.safetensors with --lora when "
                "you draw, or with `unclip convert`"
            )
        check_config(meta["part"], f"step {step} of {folder}: part")
        if name in origin:
            raise InputError(f"{origin[name]} and {folder} are both runs of {name}; move one of them away")
        origin[name] = folder
        parts[name] = part
        training[name] = meta["provenance"] | {"config": meta["config"], "step": step}
        if meta["sampling"]:
            sampling[name] = meta["sampling"]
    try:
        system, needed = system_of_runs(parts)
    except InputError as error:
        raise InputError(f"{runs}: {error}; move the runs of the others away") from None
    missing = [name for name in needed if name not in parts]
    if missing:
        raise FileNotFoundError(
            f"{runs} has no run of {', '.join(missing)}; train it first (it has: {', '.join(origin)})"
        )
    check_frozen(parts)
    return Bundle(parts, system, sampling, {"training": training})


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.checkpoint.bundle import check_target, save_bundle, update_provenance
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.cli.options import part_options, progress_bar, use_compilation_cache
    from unclip_jax.evaluate import samples
    from unclip_jax.paths import total_bytes, user_path
    from unclip_jax.sampling.programs import Sampler, stage_options
    from unclip_jax.sampling.retrieval import with_index

    if args.rows:
        samples.check_rows(args.rows)
    check_target(args.out)
    use_compilation_cache()
    bundle = collect(user_path(args.runs), args.base)
    if args.index is not None:
        bundle = with_index(bundle, args.index)
    defaults = part_options(args.sampling)
    stage_options(bundle, defaults)
    for part, options in defaults.items():
        bundle.sampling.setdefault(part, {}).update(options)
    measures = args.rows > 0 and "decoder" in bundle.parts
    judge = samples.open_judge(bundle, args.judge) if measures else None
    path = save_bundle(bundle, args.out)
    print(f"{path}: {', '.join(bundle.parts)}; {total_bytes(path) / 2**20:.1f} MiB")
    if judge is not None:
        # Measures the bundle as it was written, in half precision.
        progress = progress_bar("measuring")
        measured = samples.measure(Sampler(load_bundle(path)), judge, rows=args.rows, progress=progress)
        update_provenance(path, figures=measured.figures)
        print("\n".join(samples.describe(measured.figures)))
