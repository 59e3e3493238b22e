"""`unclip mix ITEM ITEM ... --weights W,W,... --out grid.png`: draws mixtures of pictures and captions."""

from __future__ import annotations

import argparse
import os

from unclip_jax.cli.options import OTHER_FORMATS, add_bundle_arguments
from unclip_jax.cli.sample import add_drawing_arguments
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("items", nargs="+", metavar="ITEM", help="a picture's file, or a caption")
    parser.add_argument(
        "--weights",
        metavar="W",
        help="a number for each item, e.g. 0.3,0.7; they need not add up to 1, but should (equal ones)",
    )
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of pictures to draw (6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_drawing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task, parse_numbers
    from unclip_jax.cli.sample import read_options
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.edits.mixing import mix
    from unclip_jax.sampling.text_to_image import prior_of, system_of
    from unclip_jax.sampling.unclip import check_prior_name

    for item in args.items:
        if item.lower().endswith((".png", *OTHER_FORMATS)) and not os.path.isfile(item):
            raise InputError(f"{item} looks like a picture's file, and there is none")
    weights = parse_numbers("--weights", args.weights) or None
    if weights is not None and len(weights) != len(args.items):
        raise InputError(f"--weights has {len(weights)} numbers for {len(args.items)} items")
    if args.prior is not None:
        check_prior_name(args.prior)
    if len(read_options(args, [args.prior])) > 1:
        raise InputError("mix draws with one guidance scale: give one with --guidance")
    pictures = [item for item in args.items if os.path.isfile(item)]
    task = image_task(args, *pictures)
    bundle, images = task.sampler.bundle, iter(task.images)
    system, written = system_of(bundle), len(pictures) < len(args.items)
    prior = prior_of(bundle, args.prior) if written else args.prior or "none"
    (options,) = read_options(args, [prior] if written else [], system.draws)
    items = [next(images) if os.path.isfile(item) else item for item in args.items]
    drawn = mix(
        task.sampler, items, weights, count=args.count, prior=prior, seed=args.seed, options=options,
        progress=task.progress,
    )  # fmt: skip
    shown = [square(task.images, drawn.shape[1])] if task.images else []
    task.save(np.concatenate([*shown, drawn]), [*pictures, *["mixture"] * args.count])
