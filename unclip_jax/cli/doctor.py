"""`unclip doctor BUNDLE`: tests every stage of a bundle or a run, and says which one is to blame."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_mesh_argument
from unclip_jax.errors import InputError

ROWS, DRAWN = 128, 16
MOST_ROWS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "bundle",
        nargs="?",
        default="emoji",
        metavar="BUNDLE",
        help="a bundle's folder, the name of a shipped one, public weights, or the folder of a training run "
        "(emoji)",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="the CLIP with the image tower that BUNDLE lacks, as Karlo does: a bundle, public weights, or a "
        "training run (without it, what needs true image embeddings is left out)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="K=V",
        help="an argument of the source of captioned pictures, e.g. name=folder, path=DIR (the embedded "
        "emoji, split compose)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        metavar="N",
        help=f"largest number of records, chosen at random ({ROWS})",
    )
    parser.add_argument(
        "--drawn",
        type=int,
        metavar="N",
        help="number of captions to draw where a check samples pictures; 0 leaves these checks out "
        f"({DRAWN}, or half of the rows)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_mesh_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON (nothing)")
    parser.add_argument(
        "--grid",
        metavar="FILE",
        help="write a picture that swaps one stage at a time: real, drawn from true z_i, from the prior's, "
        "from z_t, and enlarged from true low resolution (nothing)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb. Returns the exit status: 1 when a stage has a fault, else 0."""
    from unclip_jax.cli.options import (
        check_out,
        check_range,
        check_seed,
        progress_bar,
        read_mesh,
        source_options,
        use_compilation_cache,
    )
    from unclip_jax.data.sources import make_source
    from unclip_jax.evaluate.doctor.examine import examine, swap_grid
    from unclip_jax.evaluate.doctor.load import LEAST_ROWS, make_subject, open_patient, with_clip
    from unclip_jax.evaluate.doctor.report import FAULT
    from unclip_jax.grid import save_grid
    from unclip_jax.paths import check_writable, user_path, write_json

    check_range("--rows", args.rows, LEAST_ROWS, MOST_ROWS)
    drawn = min(DRAWN, args.rows // 2) if args.drawn is None else args.drawn
    if drawn:
        check_range("--drawn", drawn, 2, args.rows // 2)
    elif args.grid:
        raise InputError("--grid shows drawn pictures: leave out --drawn 0")
    check_seed(args.seed)
    if args.grid:
        check_out(args.grid, "--grid")
    if args.json and args.json == args.grid:
        raise InputError("--json and --grid write to the same file: give two names")
    if args.json:
        try:
            check_writable(args.json)
        except (InputError, OSError) as error:
            raise type(error)(f"--json {error}") from None
    use_compilation_cache()
    given = source_options(args.data, "emoji")
    if "balance" in given:
        raise InputError("balance repeats records, which only training wants: leave it out of --data")
    source = make_source({"name": "emoji", **({} if args.data else {"split": "compose"}), **given})
    mesh = read_mesh(args)
    opened = open_patient(args.bundle, mesh)
    if args.clip is not None:
        opened = with_clip(opened, args.clip)
    subject = make_subject(
        opened,
        source,
        rows=args.rows,
        drawn=drawn,
        seed=args.seed,
        mesh=mesh,
        progress=progress_bar("drawing"),
    )
    words = f"{len(subject.pictures)} of {len(source)} records of {source.name}"
    report = examine(subject, str(args.bundle), words, opened.read)
    print("\n".join(report.describe()))
    if args.json:
        write_json(user_path(args.json), report.to_json())
    if args.grid:
        images, labels, columns = swap_grid(subject)
        print(save_grid(args.grid, images, labels, columns=columns))
    return 1 if report.verdict == FAULT else 0
