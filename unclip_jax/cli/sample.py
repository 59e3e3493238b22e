"""`unclip sample "caption" ... --out grid.png`: draws pictures from captions, in a labelled grid."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_bundle_arguments
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help="what to draw")
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="pictures per caption (1)")
    parser.add_argument(
        "--prior",
        default="prior_diffusion",
        metavar="P",
        help="where the image embedding z_i comes from. prior_diffusion, prior_ar: draw it with that prior; "
        "none: use the text embedding in its place; null: use no embedding, only the caption. "
        "Separate several with commas to get a row of the grid for each (prior_diffusion)",
    )
    parser.add_argument(
        "--guidance",
        metavar="S",
        help="the decoder's guidance scale; several (1,2,4) give a row of the grid each (the bundle's)",
    )
    parser.add_argument(
        "--prior-guidance", type=float, metavar="S", help="the prior's guidance scale (the bundle's)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        help="the decoder's sampling steps: a number, segments such as 10,10,3,2,2, or fast27 (the bundle's)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PART.OPTION=VALUE",
        dest="assignments",
        help="set any sampling option, e.g. prior_diffusion.steps=64",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import itertools

    import numpy as np

    from unclip_jax.cli.options import (
        check_out,
        check_seed,
        open_bundle,
        parse_numbers,
        part_options,
        progress_bar,
        use_compilation_cache,
    )
    from unclip_jax.grid import save_grid
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import text_to_image
    from unclip_jax.sampling.unclip import check_prior

    if args.samples < 1:
        raise InputError(f"--samples must be at least 1, got {args.samples}")
    check_seed(args.seed)
    check_out(args.out)
    priors, scales = args.prior.split(","), parse_numbers("--guidance", args.guidance)
    options = part_options([*([f"decoder.steps={args.steps}"] if args.steps else []), *args.assignments])
    if args.prior_guidance is not None:
        for prior in priors:
            if prior in ("prior_diffusion", "prior_ar"):
                options.setdefault(prior, {})["guidance_scale"] = args.prior_guidance
    use_compilation_cache()
    sampler = Sampler(open_bundle(args))
    for prior in priors:
        check_prior(sampler.bundle, prior)
    captions = [caption for caption in args.captions for _ in range(args.samples)]
    images, labels = [], []
    for prior, scale in itertools.product(priors, scales or [None]):
        chosen = (
            options
            if scale is None
            else {**options, "decoder": {**options.get("decoder", {}), "guidance_scale": scale}}
        )
        images.append(
            text_to_image(
                sampler,
                captions,
                seed=args.seed,
                prior=prior,
                options=chosen,
                progress=progress_bar("sampling"),
            )
        )
        settings = [f"prior {prior}"] * (len(priors) > 1) + [f"guidance {scale}"] * (len(scales) > 1)
        labels += [", ".join([*settings, caption]) for caption in captions]
    if len(images) > 1:
        columns = len(captions)
    else:
        columns = args.samples if args.samples > 1 else min(len(captions), 4)
    print(save_grid(args.out, np.concatenate(images), labels, columns=columns))
