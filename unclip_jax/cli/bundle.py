"""`unclip bundle RUNS --out DIR`: collects the stages' averaged weights into a release bundle and measures it."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", metavar="RUNS", help="the folder with the runs: clip, prior, decoder, upsampler_<px>")
    parser.add_argument("--out", required=True, metavar="DIR", help="the bundle's folder; a bundle found there is replaced")
    parser.add_argument("--base", metavar="BUNDLE", help="a bundle that gives the parts which have no run in RUNS")
    parser.add_argument(
        "--sampling", action="append", default=[], metavar="PART.OPTION=VALUE", help="a sampling default, e.g. decoder.guidance_scale=3"
    )
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="held-out rows per split to measure on; 0: none (100)")


def collect(runs: Any, base: str | None = None):
    """The bundle of all runs below a folder; each folder there that holds checkpoints is a part.

    Args:
      runs: the folder, with pathlib's methods.
      base: a bundle that gives the parts that have no run there.

    Raises:
      FileNotFoundError, ValueError: when clip, prior or decoder is missing or parts do not belong together.
    """
    from unclip_jax.checkpoint.bundle import Bundle, check_same_clip, load_bundle, load_part
    from unclip_jax.checkpoint.store import FOLDER

    names = sorted(p.name for p in runs.iterdir() if (p / FOLDER).is_dir()) if runs.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{runs} has no run; train clip, prior and decoder first")
    start = load_bundle(base) if base else Bundle({}, {}, {})
    parts, training = dict(start.parts), dict(start.provenance.get("training", {}))
    tokenizer, sampling = start.tokenizer, dict(start.sampling)
    for name in names:
        parts[name], meta = load_part(runs / name, name)
        training[name] = meta["provenance"] | {"config": meta["config"]}
        if meta["sampling"]:
            sampling[name] = meta["sampling"]
        if name == "clip":
            tokenizer = meta["tokenizer"]
    missing = [name for name in ("clip", "prior", "decoder") if name not in parts]
    if missing:
        raise FileNotFoundError(f"{runs} has no run of {', '.join(missing)}; train it first (it has: {', '.join(names)})")
    check_same_clip(parts)
    return Bundle(parts, tokenizer, sampling, {"training": training})


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.checkpoint.bundle import load_bundle, save_bundle, update_provenance
    from unclip_jax.cli.options import part_options, progress_bar, use_compilation_cache
    from unclip_jax.paths import total_bytes, user_path
    from unclip_jax.sampling import figures, programs

    if args.rows < 0 or args.rows == 1:
        raise ValueError(f"--rows must be 0 or at least 2, got {args.rows}")
    use_compilation_cache()
    bundle = collect(user_path(args.runs), args.base)
    for part, options in part_options(args.sampling).items():
        bundle.sampling.setdefault(part, {}).update(options)
    programs.stage_options(bundle)
    path = save_bundle(bundle, args.out)
    print(f"{path}: {', '.join(bundle.parts)}; {total_bytes(path) / 2**20:.1f} MiB")
    if args.rows:
        # Measured on what was written: half precision.
        measured = figures.measure(load_bundle(path), rows=args.rows, progress=progress_bar("measuring"))
        update_provenance(path, figures=measured)
        print("\n".join(figures.describe(measured)))
