"""`unclip img2img IMAGE CAPTION --strength S`: draws a picture again for a caption, from its noised copy."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_bundle_arguments
from unclip_jax.cli.sample import add_drawing_arguments
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("image", metavar="IMAGE", help="the picture to draw again")
    parser.add_argument("caption", metavar="CAPTION", help="describes the result")
    parser.add_argument(
        "--strength",
        default="0.8",
        metavar="S",
        help="the share of the sampling steps that are made, in (0, 1]: a low one keeps the picture, 1 draws "
        "almost without it; several (0.4,0.6,0.8) give a row of the grid each (0.8)",
    )
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="pictures of each strength (6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_drawing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import MOST_PICTURES, image_task, parse_numbers
    from unclip_jax.cli.sample import read_options
    from unclip_jax.grid import save_grid
    from unclip_jax.sampling.edits.inversion import fitted
    from unclip_jax.sampling.text_to_image import prior_with_picture, system_of
    from unclip_jax.sampling.unclip import check_prior_name

    strengths = parse_numbers("--strength", args.strength)
    for strength in strengths:
        if not 0 < strength <= 1:
            raise InputError(f"--strength must be in (0, 1], got {strength:g}")
    if len(strengths) * args.count > MOST_PICTURES:
        raise InputError(f"one grid holds {MOST_PICTURES} pictures: lower --count")
    if args.prior is not None:
        check_prior_name(args.prior)
    if len(read_options(args, [args.prior])) > 1:
        raise InputError("img2img draws with one guidance scale: give one with --guidance")
    task = image_task(args, args.image)
    (image,), bundle = task.images, task.sampler.bundle
    system, prior = system_of(bundle), prior_with_picture(bundle, args.prior)
    if system.img2img is None:
        raise InputError(f"the system {bundle.system} cannot draw from a picture")
    (options,) = read_options(args, [prior], system.draws)
    task.sampler.options(options)
    used = system.made_by(bundle, prior)
    for part in options:
        if part not in used:
            raise InputError(f"{part} does not draw here: leave its options out")
    rows, given = range(args.count), {} if prior is None else {"prior": prior}
    drawn = [
        system.img2img(
            task.sampler, [image for _ in rows], [args.caption for _ in rows], strength=strength,
            seed=args.seed, options=options, progress=task.progress, **given,
        )
        for strength in strengths
    ]  # fmt: skip
    shown = fitted([image], drawn[0].shape[1:3])
    labels = []
    for strength in strengths:
        labels += ["input", *[f"strength {strength:g}, {args.caption}"] * args.count]
    pictures = np.concatenate([np.concatenate([shown, row]) for row in drawn])
    print(save_grid(args.out, pictures, labels, columns=args.count + 1))
