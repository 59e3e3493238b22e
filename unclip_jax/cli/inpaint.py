"""`unclip inpaint IMAGE MASK CAPTION`: draws part of an image anew."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_image_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", metavar="IMAGE", help="the picture")
    parser.add_argument("mask", metavar="MASK", help="a picture of the same size: white is kept, black is drawn anew")
    parser.add_argument("caption", metavar="CAPTION", help="of the whole picture")
    parser.add_argument("--method", metavar="M", help="trained: the decoder that inpaints (default, if there is one); resample: any")
    parser.add_argument("--resamples", type=int, default=5, metavar="N", help="passes per step of --method resample (5)")
    add_image_arguments(parser, count=6, guidance=None, steps=None)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task, read_image
    from unclip_jax.sampling.edits.inpaint import METHODS, inpaint
    from unclip_jax.sampling.edits.inversion import square

    task = image_task(args)
    image, mask = read_image(args.image), read_image(args.mask)
    if mask.shape != image.shape:
        raise ValueError(f"{args.mask} is {mask.shape[1]}x{mask.shape[0]}, but {args.image} is {image.shape[1]}x{image.shape[0]}")
    settings = {k: v for k, v in {"guidance_scale": args.guidance, "steps": task.steps}.items() if v is not None}
    drawn = inpaint(
        task.sampler, image, mask.mean(axis=2) >= 128, args.caption,
        count=args.count, method=args.method, resamples=args.resamples, seed=args.seed,
        options={part: settings for part in METHODS.values() if part in task.sampler.bundle.parts}, progress=task.progress,
    )  # fmt: skip
    shown = square([image, mask], drawn.shape[1])
    task.save(np.concatenate([shown, drawn]), ["input", "mask", *[args.caption] * args.count])
