"""`unclip interpolate A B --out grid.png`: draws pictures between two pictures."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("first", metavar="A", help="the first picture")
    parser.add_argument("second", metavar="B", help="the last picture")
    parser.add_argument(
        "--noise",
        default="slerp",
        choices=("slerp", "fixed"),
        help="the decoder's noise: slerp turns it from A's to B's; fixed draws one for all pictures (slerp)",
    )
    add_image_arguments(parser, count=8)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.sampling.edits.interpolation import interpolate
    from unclip_jax.sampling.edits.inversion import square

    task = image_task(args, args.first, args.second, least=2)
    ends = task.images
    drawn = interpolate(
        task.sampler, *ends, count=args.count, noise=args.noise, steps=task.steps,
        guidance_scale=args.guidance, seed=args.seed, progress=task.progress,
    )  # fmt: skip
    shown = square(ends, drawn.shape[1])
    labels = ["A", *[f"theta {theta:.2f}" for theta in np.linspace(0, 1, args.count)], "B"]
    task.save(np.concatenate([shown[:1], drawn, shown[1:]]), labels)
