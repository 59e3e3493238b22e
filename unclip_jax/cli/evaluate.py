"""`unclip evaluate TASK`: measures a bundle's samples, its CLIP on a dataset, or any two sets of images.

The tasks `samples`, `retrieval`, `zeroshot` and `probe` measure a bundle. `cli.figure` has the tasks that
print the figures of papers, such as `fid`, and `cli.sweep` those that print them over guidance.
"""

from __future__ import annotations

import argparse

from unclip_jax.cli import figure, sweep
from unclip_jax.cli.options import add_bundle_arguments
from unclip_jax.errors import InputError

TASKS = {
    "samples": "measure what a bundle draws, on the embedded emoji, with another CLIP as the judge",
    "retrieval": "measure a bundle's CLIP on --data: recall of captions and images",
    "zeroshot": "measure a bundle's CLIP on --data: classification by captions",
    "probe": "measure a bundle's CLIP on --data: a linear classifier of image features",
}
SAMPLE_ROWS = 100
MOST_ROWS = 2**31 - 1
SHOWN_PAIRS = 12  # of each split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's tasks to its parser, each with its arguments."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, summary in (TASKS | figure.FIGURES | sweep.TASKS).items():
        task = tasks.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in TASKS:
            _add_task_arguments(task)
        elif name in figure.FIGURES:
            figure.add_arguments(task, name)
        else:
            sweep.add_arguments(task, name)


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="K=V",
        help="an argument of the source, e.g. name=folder, path=DIR (the held-out emoji); not for samples",
    )
    parser.add_argument(
        "--train",
        action="append",
        default=[],
        metavar="K=V",
        help="probe: an argument in which the training source differs from --data, e.g. split=train",
    )
    parser.add_argument(
        "--label",
        default="caption",
        metavar="L",
        help="zeroshot, probe: source of an image's class: caption, folder, or a metadata field (caption)",
    )
    parser.add_argument(
        "--templates",
        default="photo",
        metavar="T",
        help="zeroshot: the prompts: name, photo, emoji, emoji_style, imagenet, or a file (photo)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="largest number of records, chosen at random (all); samples: first N rows of each split (100)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of the choice of records, or of the samples (0)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records without a caption or label, or with a damaged image; not for samples "
        "(refuse them)",
    )
    parser.add_argument(
        "--prior",
        metavar="P",
        help="samples: where z_i comes from: prior_diffusion, prior_ar, none or null, see `unclip sample`. "
        "Separate several with commas: the command prints a table for each (prior_diffusion; a system "
        "without priors takes none)",
    )
    parser.add_argument(
        "--judge",
        metavar="BUNDLE",
        help="samples: a bundle whose CLIP judges; it must not guide the samples (the shipped `judge`)",
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="samples: save a picture of the samples nearest to a training picture, each beside it (nothing)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    if args.task not in TASKS:
        (figure if args.task in figure.FIGURES else sweep).run(args)
        return
    from unclip_jax.cli.options import check_range, check_seed, use_compilation_cache

    check_range("--rows", args.rows, 2, MOST_ROWS)
    check_seed(args.seed)
    use_compilation_cache()
    if args.task == "samples":
        _evaluate_samples(args)
    else:
        _evaluate_clip(args)


def _evaluate_samples(args: argparse.Namespace) -> None:
    from unclip_jax.cli.options import open_bundle, progress_bar
    from unclip_jax.evaluate import samples
    from unclip_jax.grid import save_grid
    from unclip_jax.paths import check_writable
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.unclip import check_prior_name

    if args.data or args.train or args.skip_bad:
        raise InputError(
            "samples are measured on the embedded emoji: leave out --data, --train and --skip-bad"
        )
    rows, priors = args.rows or SAMPLE_ROWS, [None] if args.prior is None else args.prior.split(",")
    samples.check_rows(rows)
    for prior in priors:
        if prior is not None:
            check_prior_name(prior)
    if args.pairs and len(priors) > 1:
        raise InputError("--pairs shows the samples of one prior: give one with --prior")
    if args.pairs:
        check_writable(args.pairs)
    sampler = Sampler(open_bundle(args))
    priors = [samples.check_draws(sampler.bundle, prior)[1] for prior in priors]
    judge = samples.open_judge(sampler, args.judge or samples.JUDGE)
    for prior in priors:
        progress = progress_bar("measuring" if prior is None else f"measuring, prior {prior}")
        measured = samples.measure(sampler, judge, rows=rows, seed=args.seed, prior=prior, progress=progress)
        print("\n".join(samples.describe(measured.figures)), flush=True)
        if args.pairs:
            shown = [pair for pairs in measured.pairs.values() for pair in pairs[:SHOWN_PAIRS]]
            save_grid(args.pairs, *samples.pair_grid(shown), columns=6)
            print(f"nearest pairs: {args.pairs}")


def _evaluate_clip(args: argparse.Namespace) -> None:
    from unclip_jax.cli.options import open_bundle, progress_bar, source_options
    from unclip_jax.data.sources import make_source
    from unclip_jax.evaluate import clip
    from unclip_jax.metrics.zeroshot import templates_of
    from unclip_jax.sampling.programs import Sampler

    if args.train and args.task != "probe":
        raise InputError(f"--train is for probe: leave it out of {args.task}")
    if args.judge or args.pairs:
        raise InputError(f"--judge and --pairs are for samples: leave them out of {args.task}")
    templates = templates_of(args.templates)
    source_args = {
        "name": "emoji",
        **({} if args.data else {"split": "val"}),
        **source_options(args.data, "emoji"),
    }
    source = make_source(source_args)
    if "balance" in source_args:
        raise InputError("balance repeats records, which only training wants: leave it out of --data")
    train = None
    if args.task == "probe":
        differs = source_options(args.train, source_args["name"]) or (
            {"split": "train"} if source_args["name"] == "emoji" else {}
        )
        if not differs:
            raise InputError(
                "a probe must not train on the records that it is tested on: "
                "name a training source with --train KEY=VALUE"
            )
        train = make_source(source_args | differs)
    sampler = Sampler(open_bundle(args))
    shared = {
        "rows": args.rows,
        "seed": args.seed,
        "skip_bad": args.skip_bad,
        "progress": progress_bar("embedding"),
    }
    count = min(args.rows or len(source), len(source))
    print(f"{args.task} on {count} of {len(source)} records of {source.name}")
    if args.task == "retrieval":
        for way, recall in clip.retrieval(sampler, source, **shared).items():
            print(
                f"{way.replace('_', ' '):16}"
                + "".join(f"  recall@{k} {value:.4f}" for k, value in recall.items())
            )
    elif args.task == "zeroshot":
        accuracy, classes = clip.zeroshot(sampler, source, templates, label=args.label, **shared)
        print(
            "".join(f"top-{k} {value:.4f}  " for k, value in accuracy.items())
            + f"of {classes} classes, {len(templates)} prompts each"
        )
    else:
        probe = clip.probe(sampler, train, source, label=args.label, **shared)
        print(
            f"accuracy {probe.accuracy:.4f}  "
            f"(C {probe.c:g}, chosen at {probe.validation_accuracy:.4f} on held-out training rows)"
        )
