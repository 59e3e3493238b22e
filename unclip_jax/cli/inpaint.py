"""`unclip inpaint IMAGE [MASK] CAPTION`: draws part of a picture anew."""

from __future__ import annotations

import argparse
import os

from unclip_jax.cli.options import add_image_arguments
from unclip_jax.errors import InputError

WORDS = (
    "MASK (optional): a picture of the same size as IMAGE. If any of its pixels is transparent, only its "
    "alpha counts: the command draws pixels with alpha below 128 anew. Otherwise it draws white pixels "
    "(128 or more) anew and keeps black ones. Without MASK, the alpha of IMAGE decides. "
    "CAPTION: describes the whole picture. Do not put an option between MASK and CAPTION"
)


class MaskAndCaption(argparse.Action):
    """Assigns the words after the image to `mask` (None if there is only one word) and `caption`."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            more = f"{len(values) - 2} more (a caption of several words needs quotes)"
            parser.error(f"expected IMAGE [MASK] CAPTION, got {more}")
        namespace.mask, namespace.caption = (None, *values)[-2:]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    # argparse cannot say which word is missing if an optional argument stands between two required ones.
    parser.usage = f"{parser.prog} [options] IMAGE [MASK] CAPTION"
    parser.add_argument("image", metavar="IMAGE", help="the picture to change")
    parser.add_argument("words", metavar="[MASK] CAPTION", nargs="+", action=MaskAndCaption, help=WORDS)
    parser.add_argument(
        "--method",
        metavar="M",
        help="trained: use decoder_inpaint; resample: use the decoder (trained, if the bundle has it)",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        metavar="N",
        help="passes per sampling step of --method resample (5)",
    )
    add_image_arguments(parser, count=6, guidance=None, steps=None)


def read_redrawn(image: str, mask: str | None):
    """Reads which pixels to draw anew.

    Args:
      image: the picture's file. Its alpha channel decides if there is no mask.
      mask: the mask's file, or None.

    Returns:
      bool (H, W), True where the picture is drawn anew.

    Raises:
      InputError, OSError: one line that names the file.
    """
    from unclip_jax.cli.options import read_picture
    from unclip_jax.data import masks

    path, read = (image, masks.redrawn_by_alpha) if mask is None else (mask, masks.redrawn)
    data = read_picture(path)
    try:
        return read(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.cli.options import image_task, read_image
    from unclip_jax.data.ops import center_crop_square
    from unclip_jax.sampling.edits.inversion import square
    from unclip_jax.sampling.text_to_image import drawing_parts, system_of

    if args.mask is None and os.path.isfile(args.caption):
        raise InputError(f"{args.caption} is a file, and no caption; give the caption after it")
    image, redrawn = read_image(args.image), read_redrawn(args.image, args.mask)
    if redrawn.shape != image.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (redrawn.shape, image.shape[:2])]
        raise InputError(f"{args.mask} is {sizes[0]}, but {args.image} is {sizes[1]}")
    if not center_crop_square(redrawn[..., None]).any():
        raise InputError(f"{args.mask or args.image}: nothing is to be drawn anew in the centred square")
    task = image_task(args)
    settings = {
        k: v for k, v in {"guidance_scale": args.guidance, "steps": task.steps}.items() if v is not None
    }
    bundle = task.sampler.bundle
    system = system_of(bundle)
    if system.inpaint is None:
        raise InputError(f"the system {bundle.system} cannot draw a part of a picture anew")
    count = range(args.count)
    drawn = system.inpaint(
        task.sampler, [image for _ in count], [~redrawn for _ in count], [args.caption for _ in count],
        method=args.method, resamples=args.resamples, seed=args.seed,
        options={name: settings for name in drawing_parts(bundle)},
        progress=task.progress,
    )  # fmt: skip
    white = np.repeat(redrawn[..., None], 3, axis=2).astype(np.uint8) * 255
    shown = square([image, white], drawn.shape[1])
    task.save(np.concatenate([shown, drawn]), ["input", "mask", *[args.caption] * args.count])
