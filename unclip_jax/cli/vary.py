"""`unclip vary IMAGE --out grid.png`: draws variations of a picture."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("image", metavar="IMAGE", help="the picture to vary")
    parser.add_argument(
        "--eta",
        type=number,
        default=1.0,
        metavar="E",
        help="0 reconstructs the picture; 1 changes it most (1)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="decode the picture's embedding from fresh noise, with the bundle's own sampler; ignores --eta",
    )
    add_image_arguments(
        parser, count=7, guidance=None, steps=None, otherwise="50 steps at scale 1; with --fresh the bundle's"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.edits.variations import fresh_variations, variations
    from unclip_jax.sampling.text_to_image import system_of

    task = image_task(args, args.image)
    (image,) = task.images
    shared = {"count": args.count, "seed": args.seed, "progress": task.progress}
    settings = {
        k: v for k, v in {"steps": task.steps, "guidance_scale": args.guidance}.items() if v is not None
    }
    if args.fresh:
        draws = system_of(task.sampler.bundle).draws
        drawn, label = (
            fresh_variations(task.sampler, [image], options={draws: settings}, **shared),
            "fresh",
        )
    else:
        drawn, label = (
            variations(task.sampler, [image], eta=args.eta, **settings, **shared),
            f"eta {args.eta:g}",
        )
    drawn = drawn[0]
    task.save(np.concatenate([square([image], drawn.shape[1]), drawn]), ["input", *[label] * args.count])
