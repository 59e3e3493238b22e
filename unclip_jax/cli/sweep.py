"""`unclip evaluate sweep | coco30k bundle=DIR`: figures of what a bundle draws at several guidance scales."""

from __future__ import annotations

import argparse
from typing import Any

from unclip_jax.cli import figure
from unclip_jax.errors import InputError

TASKS = {
    "sweep": "measure what a bundle draws at several guidance scales, as a table and a plot",
    "coco30k": "run the protocol of GLIDE, DALL-E 2 and Karlo: 30,000 captions of MS-COCO's val2014",
}
FIGURES = "fid,clip-score,prdc"
COCO_ROWS = 30_000  # as `protocols.COCO_ROWS`
PUBLISHED = ("karlo",)  # the tables of `protocols.EXPECTED`


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the arguments of a task to its parser."""
    parser.add_argument("bundle", metavar="bundle=DIR", help="the bundle that draws")
    if name == "sweep":
        parser.add_argument(
            "reference",
            metavar="REFERENCE",
            help="the set to compare the samples with, see `unclip evaluate fid`",
        )
        figure.add_captions_argument(parser)
        parser.add_argument(
            "--reference-rows",
            type=int,
            metavar="N",
            help="largest number of its images, chosen at random (all)",
        )
        parser.add_argument(
            "--made-by", metavar="TOOL", help="the tool that made REFERENCE, see `unclip evaluate fid`"
        )
        parser.add_argument(
            "--rows", type=int, metavar="N", help="number of captions, chosen at random (all)"
        )
        figure.add_preparation_arguments(parser)
    else:
        parser.add_argument(
            "--coco",
            required=True,
            metavar="DIR",
            help="MS-COCO of 2014: annotations/captions_val2014.json and the folder val2014",
        )
        parser.add_argument(
            "--rows",
            type=int,
            default=COCO_ROWS,
            metavar="N",
            help="number of captions, chosen at random; fewer need --partial (30000)",
        )
        parser.add_argument(
            "--expect",
            metavar="TABLE",
            help="measure what a paper published and fail if it is not reached: karlo (nothing)",
        )
    parser.add_argument(
        "--figures",
        default=FIGURES,
        metavar="F,...",
        help=f"figures to measure, those of `unclip evaluate` ({FIGURES})",
    )
    parser.add_argument(
        "--clip", metavar="DIR", help="the weights of CLIP, for clip-score (B/16 for Karlo's) and cmmd"
    )
    figure.add_drawing_arguments(parser)
    figure.add_feature_arguments(parser, any_network=False)
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON (nothing)")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw FID by guidance, FID against the CLIP score, and precision against recall (nothing)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs a task."""
    import unclip_jax
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.cli.options import check_range, check_seed, parse_numbers, progress_bar
    from unclip_jax.cli.sample import read_options
    from unclip_jax.evaluate import distance, plot, protocols, sets, streaming
    from unclip_jax.paths import write_json
    from unclip_jax.run import features
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import system_of

    # -------------------------------------------------------------------------------- the command line
    check_seed(args.seed)
    check_range("--rows", args.rows, 2, figure.MOST_ROWS)
    check_range("--reference-rows", getattr(args, "reference_rows", None), 2, figure.MOST_ROWS)
    check_range("--batch", args.batch, 1, figure.MOST_ROWS)
    figure.check_drawing(args, several=True)
    figures = args.figures.split(",")
    for name in figures:
        if name not in distance.FIGURES:
            raise InputError(f"unknown figure {name!r} in --figures: choose of {', '.join(distance.FIGURES)}")
    named = sets.bundle_of(args.bundle)
    if named is None:
        raise InputError(f"{args.bundle}: a sweep measures what a bundle draws: write bundle=DIR")
    coco, work = args.task == "coco30k", streaming.work_folder(args.work)
    preparation = protocols.COCO if coco else streaming.Preparation(args.crop, args.size, args.jpeg)
    published = getattr(args, "expect", None)
    if published is not None:
        _check_published(args, published)
    scales = parse_numbers("--guidance", args.guidance)
    figure.check_files(json=args.json, plot=args.plot)
    if args.plot is not None and len(scales) < 2:
        raise InputError("--plot draws a line through several scales: give them with --guidance 1,2,4")
    if args.plot is not None and not {"fid", "prdc"} & set(figures):
        raise InputError("--plot draws FID, or precision against recall: --figures must name fid or prdc")

    # -------------------------------------------------------------------------------- the sets
    mesh = figure.open_mesh(args, [args.bundle])
    if coco:
        captions = protocols.coco_captions(args.coco, args.rows, args.seed)
        reference = protocols.coco_reference(args.coco)
    else:
        reference, captions = _reference_and_captions(args)
    networks: dict[str, Any] = {}

    def open_network(name: str) -> Any:
        if name not in networks:
            weights = args.clip if name == "clip" else args.weights
            networks[name] = features.open_network(name, weights, mesh=mesh)
        return networks[name]

    sampler = Sampler(load_bundle(named, mesh=mesh))
    draws = system_of(sampler.bundle).draws
    shared = read_options(args, [args.prior], draws)[0]
    if scales:
        del shared[draws]["guidance_scale"]  # the variants have it
    variants = protocols.guidance_variants(scales, draws) or [protocols.Variant("its own", {})]
    if published is not None:
        variants = [row.variant for row in protocols.EXPECTED[published]]
    points = protocols.measure(
        sampler,
        sets.Drawing(captions, args.prior, args.seed, shared),
        variants,
        reference,
        figures,
        open_network,
        mesh,
        rows=protocols.COCO_ROWS if coco else None,
        partial=args.partial,
        preparation=preparation,
        progress=progress_bar,
        work=work,
        batch=args.batch,
        skip_bad=args.skip_bad,
    )

    # -------------------------------------------------------------------------------- the results
    if not figure.is_first_host():
        return
    print("\n".join(protocols.table(points, "decoder" if published else "guidance")), flush=True)
    if args.json is not None:
        measured = {"protocol": args.task, "version": unclip_jax.__version__, "seed": args.seed}
        write_json(args.json, measured | {"points": protocols.points_json(points)})
    if args.plot is not None:
        plot.save_panels(args.plot, protocols.panels(points))
        print(f"plot: {args.plot}")
    if published is not None:
        print("\n".join(protocols.check_expected(points, published)))


def _check_published(args: argparse.Namespace, published: str) -> None:
    if published not in PUBLISHED:
        raise InputError(f"no published table {published!r}: choose one of {', '.join(PUBLISHED)}")
    given = [args.guidance, args.prior_guidance, args.steps, args.negative]
    given += [args.assignments or None, args.no_filter or None]
    if any(value is not None for value in given) or args.rows != COCO_ROWS or args.partial:
        raise InputError("--expect sets the guidance, the steps and the rows itself: leave them out")
    if not {"fid", "clip-score"} <= set(args.figures.split(",")):
        raise InputError("--expect compares FID and the CLIP score: --figures must name fid and clip-score")


def _reference_and_captions(args: argparse.Namespace) -> tuple[Any, list[str]]:
    from unclip_jax.cli.options import source_options
    from unclip_jax.evaluate import sets

    if sets.bundle_of(args.reference) is not None:
        raise InputError("the reference of a sweep is no bundle: `unclip evaluate fid` compares two bundles")
    reference = sets.open_set(args.reference, source_options, args.made_by)
    captions = figure.captions_of(args.captions, [reference.images] if reference.images else [])
    if args.rows is not None:
        captions = [captions[i] for i in sets.chosen_rows(len(captions), args.rows, args.seed)]
    reference = figure.limited(reference, "--reference-rows", args.reference_rows, args.seed)
    return reference, captions
