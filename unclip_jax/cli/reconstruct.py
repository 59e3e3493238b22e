"""`unclip reconstruct IMAGE --out grid.png`: draws a picture from principal components of its embedding."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("image", metavar="IMAGE", help="the picture")
    parser.add_argument(
        "--dims",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of components, a picture for each (the paper's, and all)",
    )
    add_image_arguments(parser, count=None)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.edits.reconstruct import reconstruct

    task = image_task(args, args.image)
    (image,) = task.images
    drawn, dims = reconstruct(
        task.sampler,
        image,
        dims=args.dims,
        steps=task.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        progress=task.progress,
    )
    labels = ["input", *[f"{d} components" for d in dims]]
    task.save(np.concatenate([square([image], drawn.shape[1]), drawn]), labels)
