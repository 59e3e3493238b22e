"""`unclip sample "caption" ... --out grid.png`: draws pictures from captions, in a labelled grid.

With `--prompts` and `--layout` it writes a folder for the tools of a benchmark instead.
"""

from __future__ import annotations

import argparse
from typing import Any

from unclip_jax.cli.options import add_bundle_arguments, number
from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "captions",
        nargs="*",
        metavar="CAPTION",
        help="what to draw; for a bundle of classes their names or numbers, and nothing for one that draws "
        "without captions",
    )
    add_bundle_arguments(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (grid.png); with --prompts: the folder to write"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="draw these in place of captions: a text with a prompt a line, GenEval's JSON lines, "
        "DPG-Bench's folder of texts, or a source (name=...,KEY=...)",
    )
    parser.add_argument(
        "--layout",
        metavar="L",
        help="with --prompts, whose folder to write: geneval, dpg, t2i-compbench, or folder for plain "
        "pictures with their captions. The same command continues a stopped one and "
        "keeps the files that are there",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument(
        "--position",
        type=int,
        default=0,
        metavar="N",
        help="position of the first picture (0). A picture depends on its caption, seed and position: "
        "--position 2 draws the third picture of a longer call alone",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="pictures per caption (1; with --layout what the benchmark asks for: 4, 4, 10, 1)",
    )
    add_drawing_arguments(parser)


def add_drawing_arguments(parser: Any) -> None:
    """Adds the arguments that `read_options` reads, to a parser or to a group of one."""
    parser.add_argument(
        "--prior",
        metavar="P",
        help="where the image embedding z_i comes from. prior_diffusion, prior_ar: draw it with that prior; "
        "none: use the text embedding in its place; null: use no embedding, only the caption. "
        "Separate several with commas to get a row of the grid for each (prior_diffusion; a system without "
        "priors takes none)",
    )
    parser.add_argument(
        "--negative",
        metavar="TEXT",
        help="what the pictures should not show, in place of the empty caption (Stable Diffusion)",
    )
    parser.add_argument(
        "--no-filter",
        action="store_true",
        help="keep the pictures that a bundle's safety checker flags, and would make black",
    )
    parser.add_argument(
        "--guidance",
        metavar="S",
        help="the decoder's guidance scale; several (1,2,4) give a row of the grid, or of a "
        "sweep, each (the bundle's)",
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


def read_options(
    args: argparse.Namespace, priors: list[str | None], draws: str = "decoder"
) -> list[dict[str, dict]]:
    """The options of every row of the grid, one for each of the decoder's guidance scales.

    draws: the part that draws the image, whose options `--steps`, `--guidance` and `--negative` are.

    Raises:
      ValueError: with a message of one line.
    """
    from unclip_jax.cli.options import parse_numbers, part_options

    options = part_options([*([f"{draws}.steps={args.steps}"] if args.steps else []), *args.assignments])
    if args.negative is not None:
        if "negative" in options.get(draws, {}):
            raise InputError(f"--negative and --set {draws}.negative say the same thing: give one of them")
        options.setdefault(draws, {})["negative"] = args.negative
    if args.no_filter:
        options.setdefault(draws, {})["filter"] = False
    if args.prior_guidance is not None:
        drawn = [prior or "prior_diffusion" for prior in priors if (prior or "prior_").startswith("prior_")]
        if not drawn:
            raise InputError(f"--prior-guidance needs a prior that draws z_i, not --prior {args.prior}")
        for prior in drawn:
            _check_given_once(options, prior, "--prior-guidance")
            options.setdefault(prior, {})["guidance_scale"] = args.prior_guidance
    scales = parse_numbers("--guidance", args.guidance)
    if scales:
        _check_given_once(options, draws, "--guidance")
    drawn_with = options.get(draws, {})
    return [{**options, draws: {**drawn_with, "guidance_scale": scale}} for scale in scales] or [options]


def _check_given_once(options: dict[str, dict], part: str, argument: str) -> None:
    if "guidance_scale" in options.get(part, {}):
        raise InputError(f"{argument} and --set {part}.guidance_scale say the same thing: give one of them")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    if args.prompts is not None or args.layout is not None:
        _write_layout(args)
        return
    args.samples = 1 if args.samples is None else args.samples
    args.out = args.out if args.out is not None else "grid.png"
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
    from unclip_jax.sampling.text_to_image import prior_of, system_of, text_to_image
    from unclip_jax.sampling.unclip import check_prior_name

    priors = [None] if args.prior is None else args.prior.split(",")
    for prior in priors:
        if prior is not None:
            check_prior_name(prior)
    chosen = read_options(args, priors)
    captions = max(len(args.captions), 1)
    drawn = captions * args.samples
    check_range("--samples", args.samples, 1, MOST_PICTURES // (captions * len(priors) * len(chosen)))
    check_seed(args.seed)
    check_range("--position", args.position, 0, 2**32 - drawn)
    check_out(args.out)
    use_compilation_cache()
    sampler = Sampler(open_bundle(args))
    system = system_of(sampler.bundle)
    if not args.captions:
        if system.reads(sampler.bundle) != "nothing":
            raise InputError("say what to draw: captions, or --prompts FILE --layout L")
        args.captions = [""]
    priors = [prior_of(sampler.bundle, prior) for prior in priors]
    chosen = read_options(args, priors, system.draws)
    for options in chosen:
        sampler.options(options)
    used = {name for prior in priors for name in system.made_by(sampler.bundle, prior)}
    for part in chosen[0]:
        if part not in used:
            with_prior = f" with --prior {','.join(priors)}" if system.priors else ""
            raise InputError(f"{part} does not draw{with_prior}: leave its options out")
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
        settings += [f"guidance {options[system.draws]['guidance_scale']}"] if len(chosen) > 1 else []
        labels += [", ".join([*settings, caption]) for caption in captions]
    if len(images) > 1:
        columns = len(captions)
    else:
        columns = args.samples if args.samples > 1 else min(len(captions), 4)
    print(save_grid(args.out, np.concatenate(images), labels, columns=columns))


def _write_layout(args: argparse.Namespace) -> None:
    from unclip_jax.cli.options import (
        MOST_PICTURES,
        check_range,
        check_seed,
        open_bundle,
        progress_bar,
        source_options,
        use_compilation_cache,
    )
    from unclip_jax.evaluate import layouts
    from unclip_jax.evaluate.sets import Drawing
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import system_of
    from unclip_jax.sampling.unclip import check_prior_name

    for name, value in (("--prompts", args.prompts), ("--layout", args.layout), ("--out", args.out)):
        if not value:
            raise InputError(f"a folder of samples needs --prompts, --layout and --out: give {name}")
    if args.captions or args.position:
        raise InputError("--prompts takes the place of captions and --position: leave them out")
    if args.prior is not None:
        check_prior_name(args.prior)
    options = read_options(args, [args.prior])
    if len(options) > 1:
        raise InputError("a folder holds the samples of one guidance scale: give one with --guidance")
    check_range("--samples", args.samples, 1, MOST_PICTURES)
    check_seed(args.seed)
    prompts = layouts.read_prompts(args.layout, args.prompts, source_options, args.samples)
    layouts.check_folder(args.out)
    use_compilation_cache()
    sampler = Sampler(open_bundle(args))
    options = read_options(args, [args.prior], system_of(sampler.bundle).draws)
    kept = layouts.draw_prompts(
        sampler,
        args.layout,
        prompts,
        args.out,
        Drawing([], args.prior, args.seed, options[0]),
        samples=args.samples,
        progress=progress_bar("prompts"),
    )
    print(f"{args.out}: {len(prompts)} prompts in the layout of {args.layout}, {kept} of them drawn before")
