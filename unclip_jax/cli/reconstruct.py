"""`unclip reconstruct IMAGE --out grid.png`: draws a picture from principal components of its embedding.

A system without image embeddings draws it from its latents, and from its noise x_T.
"""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments
from unclip_jax.errors import InputError


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
    parser.add_argument(
        "--caption",
        metavar="TEXT",
        help="of the picture, where the bundle has no image embeddings (Stable Diffusion): the picture is "
        'then decoded from its latents, and drawn from the noise that DDIM finds for the caption ("")',
    )
    add_image_arguments(parser, count=None)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.data.ops import to_float
    from unclip_jax.sampling.edits.inversion import psnr, square
    from unclip_jax.sampling.text_to_image import system_of

    task = image_task(args, args.image)
    (image,), system = task.images, system_of(task.sampler.bundle)
    if system.reconstruct is None:
        raise InputError(f"the system {task.sampler.bundle.system} cannot draw a picture from its latents")
    shared = {"steps": task.steps, "guidance_scale": args.guidance, "progress": task.progress}
    if system.coder:
        if args.caption is not None:
            raise InputError("--caption is for bundles without image embeddings: leave it out")
        given = {"dims": args.dims, "seed": args.seed}
    else:
        if args.dims is not None:
            raise InputError("--dims is for bundles with image embeddings: leave it out")
        given = {"caption": args.caption or ""}
    drawn, made_of = system.reconstruct(task.sampler, image, **given, **shared)
    shown = square([image], drawn.shape[1])
    if system.coder:
        labels = [f"{d} components" for d in made_of]
    else:
        figures = psnr(to_float(drawn), to_float(shown))
        labels = [f"{name}, {figure:.1f} dB" for name, figure in zip(made_of, figures)]
    task.save(np.concatenate([shown, drawn]), ["input", *labels])
