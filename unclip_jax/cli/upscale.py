"""`unclip upscale IMAGE ... --bundle DIR`: enlarges pictures with a bundle's upsamplers."""

from __future__ import annotations

import argparse
import os
from pathlib import PurePath

from unclip_jax.cli.options import add_bundle_arguments
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="the pictures, of any sizes")
    add_bundle_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="FILE|DIR",
        help="the PNG to write; for several pictures, the folder of PNGs to write (upscaled.png, upscaled)",
    )
    parser.add_argument(
        "--part",
        action="append",
        metavar="P",
        help="an upsampler to use; may be given again (the first whose small images are at least as large as "
        "the picture, and those after it; for larger pictures the last one)",
    )
    parser.add_argument(
        "--caption", metavar="TEXT", help="what the pictures show, for upsamplers that read captions"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PART.OPTION=VALUE",
        dest="assignments",
        help="set a sampling option of an upsampler, e.g. upsampler_256.steps=50",
    )


def _targets(args: argparse.Namespace) -> list[str]:
    # The file of each picture.
    from unclip_jax.cli.options import check_out
    from unclip_jax.paths import user_path

    if len(args.images) == 1:
        return [check_out(args.out if args.out is not None else "upscaled.png")]
    folder = args.out if args.out is not None else "upscaled"
    if PurePath(folder).suffix.lower() == ".png":
        raise InputError(f"--out {folder}: several pictures need a folder, not a file")
    targets = [os.path.join(folder, PurePath(image).stem + ".png") for image in args.images]
    for target, image in zip(targets, args.images):
        if targets.count(target) > 1:
            raise InputError(f"two pictures are called {PurePath(image).stem}: enlarge them one at a time")
        if user_path(target).exists():
            raise InputError(f"--out {folder}: {target} exists; name another folder")
        check_out(target)
    return targets


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import (
        check_seed,
        open_bundle,
        part_options,
        progress_bar,
        read_image,
        use_compilation_cache,
    )
    from unclip_jax.grid import save_picture
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import system_of

    check_seed(args.seed)
    options, targets = part_options(args.assignments), _targets(args)
    images = [read_image(path) for path in args.images]
    use_compilation_cache()
    sampler = Sampler(open_bundle(args))
    system = system_of(sampler.bundle)
    if system.upscale is None:
        raise InputError(f"the system {sampler.bundle.system} cannot enlarge pictures")
    captions = None if args.caption is None else [args.caption] * len(images)
    for i, enlarged in system.upscale(
        sampler, images, captions=captions, parts=args.part, seed=args.seed, options=options,
        progress=progress_bar("upscaling"),
    ):  # fmt: skip
        size = "x".join(str(side) for side in enlarged.shape[1::-1])
        print(f"{save_picture(targets[i], enlarged)}: {size}")
