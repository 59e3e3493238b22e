"""`unclip complete IMAGE CAPTION --rows S`: keeps the upper rows of a picture and draws the rest (DALL-E)."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_bundle_arguments, number
from unclip_jax.cli.sample import add_drawing_arguments
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("image", metavar="IMAGE", help="the picture whose upper rows are kept")
    parser.add_argument("caption", metavar="CAPTION", help="describes the whole picture")
    parser.add_argument(
        "--rows",
        type=number,
        default=0.5,
        metavar="S",
        help="the share of the picture's rows that are kept, from the top, in (0, 1) (0.5)",
    )
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of pictures to draw (6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_drawing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.cli.sample import read_options
    from unclip_jax.data import ops
    from unclip_jax.sampling.edits.complete import check_share
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.text_to_image import prior_of, system_of

    check_share(args.rows)
    if len(read_options(args, [args.prior])) > 1:
        raise InputError("complete draws with one guidance scale: give one with --guidance")
    task = image_task(args, args.image)
    (image,), bundle = task.images, task.sampler.bundle
    system = system_of(bundle)
    if system.complete is None:
        raise InputError(f"the system {bundle.system} cannot complete a picture from its upper rows")
    prior_of(bundle, args.prior)
    (options,) = read_options(args, [args.prior], system.draws)
    task.sampler.options(options)
    for part in options:
        if part not in system.made_by(bundle, None):
            raise InputError(f"{part} does not draw here: leave its options out")
    count = range(args.count)
    stages = system.complete(
        task.sampler, [image for _ in count], [args.caption for _ in count], rows=args.rows,
        seed=args.seed, options=options, progress=task.progress,
    )  # fmt: skip
    drawn = ops.to_uint8(stages.images[-1])
    pictures = np.concatenate([square([image], drawn.shape[1]), drawn])
    task.save(pictures, ["input", *[args.caption] * args.count])
