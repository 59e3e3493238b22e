"""`unclip vary IMAGE --out grid.png`: variations of an image."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", metavar="IMAGE", help="the picture to vary")
    parser.add_argument("--eta", type=float, default=1.0, metavar="E", help="0 reconstructs the picture, 1 changes most (1)")
    add_image_arguments(parser, count=7)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task, read_image
    from unclip_jax.sampling import latents
    from unclip_jax.sampling.variations import variations

    task = image_task(args)
    image = read_image(args.image)
    drawn = variations(
        task.bundle, [image], count=args.count, eta=args.eta, steps=task.steps, guidance_scale=args.guidance, seed=args.seed,
        progress=task.progress,
    )[0]  # fmt: skip
    task.save(np.concatenate([latents.square([image], drawn.shape[1]), drawn]), ["input", *[f"eta {args.eta:g}"] * args.count])
