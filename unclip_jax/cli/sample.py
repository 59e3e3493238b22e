"""`unclip sample "caption" ... --out grid.png`: draws pictures from captions, in a labelled grid."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_bundle_arguments, number
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help="what to draw")
    add_bundle_arguments(parser)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="the file to write (grid.png)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument(
        "--position",
        type=int,
        default=0,
        metavar="N",
        help="position of the first picture (0). A picture depends on its caption, seed and position: "
        "--position 2 draws the third picture of a longer call alone",
    )
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
        "--prior-guidance", type=number, metavar="S", help="the prior's guidance scale (the bundle's)"
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


def read_options(args: argparse.Namespace, priors: list[str]) -> list[dict[str, dict]]:
    """The options of every row of the grid, one for each of the decoder's guidance scales.

    Raises:
      ValueError: with a message of one line.
    """
    from unclip_jax.cli.options import parse_numbers, part_options

    options = part_options([*([f"decoder.steps={args.steps}"] if args.steps else []), *args.assignments])
    if args.prior_guidance is not None:
        drawn = [prior for prior in priors if prior.startswith("prior_")]
        if not drawn:
            raise InputError(f"--prior-guidance needs a prior that draws z_i, not --prior {args.prior}")
        for prior in drawn:
            _check_given_once(options, prior, "--prior-guidance")
            options.setdefault(prior, {})["guidance_scale"] = args.prior_guidance
    scales = parse_numbers("--guidance", args.guidance)
    if scales:
        _check_given_once(options, "decoder", "--guidance")
    decoder = options.get("decoder", {})
    return [{**options, "decoder": {**decoder, "guidance_scale": scale}} for scale in scales] or [options]


def _check_given_once(options: dict[str, dict], part: str, argument: str) -> None:
    if "guidance_scale" in options.get(part, {}):
        raise InputError(f"{argument} and --set {part}.guidance_scale say the same thing: give one of them")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import itertools

    import numpy as np

    from unclip_jax.cli.options import (
        MOST_PICTURES,
        check_out,
        check_range,
        check_seed,
        open_bundle,
        progress_bar,
        use_compilation_cache,
    )
    from unclip_jax.grid import save_grid
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import text_to_image
    from unclip_jax.sampling.unclip import check_prior, check_prior_name, made_by

    priors = args.prior.split(",")
    for prior in priors:
        check_prior_name(prior)
    chosen = read_options(args, priors)
    drawn = len(args.captions) * args.samples
    check_range(
        "--samples", args.samples, 1, MOST_PICTURES // (len(args.captions) * len(priors) * len(chosen))
    )
    check_seed(args.seed)
    check_range("--position", args.position, 0, 2**32 - drawn)
    check_out(args.out)
    use_compilation_cache()
    sampler = Sampler(open_bundle(args))
    for prior in priors:
        check_prior(sampler.bundle, prior)
    for options in chosen:
        sampler.options(options)
    used = {name for prior in priors for name in made_by(sampler.bundle, prior)}
    for part in chosen[0]:
        if part not in used:
            raise InputError(f"{part} does not draw with --prior {args.prior}: leave its options out")
    captions = [caption for caption in args.captions for _ in range(args.samples)]
    images, labels = [], []
    for prior, options in itertools.product(priors, chosen):
        images.append(
            text_to_image(
                sampler,
                captions,
                seed=args.seed,
                prior=prior,
                positions=range(args.position, args.position + drawn),
                options=options,
                progress=progress_bar("sampling"),
            )
        )
        settings = [f"prior {prior}"] * (len(priors) > 1)
        settings += [f"guidance {options['decoder']['guidance_scale']}"] if len(chosen) > 1 else []
        labels += [", ".join([*settings, caption]) for caption in captions]
    if len(images) > 1:
        columns = len(captions)
    else:
        columns = args.samples if args.samples > 1 else min(len(captions), 4)
    print(save_grid(args.out, np.concatenate(images), labels, columns=columns))
