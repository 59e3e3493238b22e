"""`unclip edit IMAGE --from "..." --to "..."`: changes an image by a text diff."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments, number
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("image", metavar="IMAGE", help="the picture to change")
    parser.add_argument(
        "--from",
        dest="source",
        default="",
        metavar="CAPTION",
        help='a caption of the picture as it is; "a photo" works too ("")',
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        metavar="CAPTION",
        help="a caption of the picture as it should become",
    )
    parser.add_argument(
        "--theta",
        type=number,
        metavar="T",
        help="how far to turn the embedding in the last picture, in (0, 1] (0.5; without an image embedding, "
        "as in Stable Diffusion, the text states go from one caption to the other: 1)",
    )
    add_image_arguments(parser, count=7)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.text_to_image import system_of

    task = image_task(args, args.image, least=2)
    (image,) = task.images
    system = system_of(task.sampler.bundle)
    if system.text_diff is None:
        raise InputError(f"the system {task.sampler.bundle.system} cannot change a picture by its caption")
    theta = (0.5 if system.coder else 1.0) if args.theta is None else args.theta
    drawn = system.text_diff(
        task.sampler, image, args.source, args.target, count=args.count, max_theta=theta,
        steps=task.steps, guidance_scale=args.guidance, seed=args.seed, progress=task.progress,
    )  # fmt: skip
    labels = ["input", *[f"theta {theta:.2f}" for theta in np.linspace(0, theta, args.count)]]
    task.save(np.concatenate([square([image], drawn.shape[1]), drawn]), labels)
