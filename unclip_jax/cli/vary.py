"""`unclip vary IMAGE --out grid.png`: variations of an image."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", metavar="IMAGE", help="the picture to vary")
    parser.add_argument(
        "--eta", type=float, default=1.0, metavar="E", help="0 reconstructs the picture, 1 changes most (1)"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="draw what CLIP sees from fresh noise, as the bundle samples; no --eta",
    )
    add_image_arguments(
        parser, count=7, guidance=None, steps=None, otherwise="50 steps at scale 1; with --fresh the bundle's"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task, read_image
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.edits.variations import fresh_variations, variations

    task = image_task(args)
    image = read_image(args.image)
    shared = {"count": args.count, "seed": args.seed, "progress": task.progress}
    settings = {
        k: v for k, v in {"steps": task.steps, "guidance_scale": args.guidance}.items() if v is not None
    }
    if args.fresh:
        drawn, label = (
            fresh_variations(task.sampler, [image], options={"decoder": settings}, **shared)[0],
            "fresh",
        )
    else:
        drawn, label = (
            variations(task.sampler, [image], eta=args.eta, **settings, **shared)[0],
            f"eta {args.eta:g}",
        )
    task.save(np.concatenate([square([image], drawn.shape[1]), drawn]), ["input", *[label] * args.count])
