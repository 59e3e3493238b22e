"""`unclip evaluate FIGURE SET REFERENCE`: the figures of papers, between any two sets of images."""

from __future__ import annotations

import argparse
from typing import Any

from unclip_jax.cli import sample
from unclip_jax.errors import InputError

# The figures, in the order of `evaluate.distance.FIGURES`.
FIGURES = {
    "fid": "print FID and sFID, the Frechet distances of Inception's features",
    "fd-dinov2": "print the Frechet distance of DINOv2's features",
    "kid": "print KID, the kernel distance of Inception's features",
    "cmmd": "print CMMD, the distance of CLIP's features that assumes no Gaussian",
    "prdc": "print precision, recall, density and coverage",
    "inception-score": "print the Inception score",
    "clip-score": "print the CLIP score, the mean cosine of images and their captions",
}
ALONE = ("inception-score", "clip-score")  # those without a reference
ANY_NETWORK = ("kid", "prdc")  # those that are defined for the features of any network
SETS = (
    "A set is a folder of images (DIR); statistics, or images in arr_0 (FILE.npz); a source of docs/data.md "
    "(name=tfrecord,pattern=...); or a bundle that draws --captions (bundle=DIR)"
)
MOST_ROWS = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the arguments of one figure to its parser."""
    parser.add_argument("images", metavar="SET", help=f"the images to measure. {SETS}")
    if name not in ALONE:
        parser.add_argument("reference", metavar="REFERENCE", help="the set to compare them with")
    add_captions_argument(parser)
    add_drawing_arguments(parser)
    parser.add_argument(
        "--rows", type=int, metavar="N", help="largest number of images of SET, chosen at random (all)"
    )
    if name not in ALONE:
        parser.add_argument("--reference-rows", type=int, metavar="N", help="the same for REFERENCE (all)")
    parser.add_argument(
        "--made-by",
        metavar="TOOL",
        help="the tool that made a statistics file that does not say it: adm, torch-fidelity, clean-fid, "
        "clean-fid-legacy-tensorflow or pytorch-fid (such a file is refused)",
    )
    add_preparation_arguments(parser)
    add_feature_arguments(parser, name in ANY_NETWORK)
    if name in ("fid", "fd-dinov2"):
        parser.add_argument(
            "--infinity",
            action="store_true",
            help="print the distance extrapolated to infinitely many images as well, with its standard error",
        )
    if name == "clip-score":
        parser.add_argument(
            "--hessel", action="store_true", help="print 2.5 max(cosine, 0) (Hessel et al. 2021)"
        )
    parser.add_argument("--save-statistics", metavar="FILE", help="write what describes SET to a .npz file")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON (nothing)")


def add_captions_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--captions`."""
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="what a bundle draws: a file with a caption a line, or a source (name=...,KEY=...), whose "
        "records give their first captions (the captions of REFERENCE)",
    )


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how `bundle=DIR` draws, those of `unclip sample`; `drawn_by` reads them."""
    sample.add_drawing_arguments(parser.add_argument_group("how a bundle draws"))
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of samples and of the images that are chosen (0)",
    )


def add_feature_arguments(parser: argparse.ArgumentParser, any_network: bool) -> None:
    """Adds the arguments that say how features are made and kept."""
    if any_network:
        parser.add_argument(
            "--network",
            metavar="NET",
            help="the network of the features: inception, dinov2 or clip (inception)",
        )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="the network's weights: a folder, or hf:owner/name@revision (for Inception, what "
        "`unclip fetch inception` wrote)",
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="folder for finished features, by which a stopped command continues (the package's cache)",
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out images that cannot be decoded (refuse them)"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="allow fewer images than the figure asks for; the result says so (refuse)",
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="devices, see `unclip sample` (all devices)")
    parser.add_argument(
        "--distributed", action="store_true", help="join the other hosts first (cloud TPU pods, SLURM)"
    )


def add_preparation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `streaming.Preparation`."""
    parser.add_argument(
        "--crop", default="none", metavar="C", help="cut out the largest central square first: center (none)"
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="bring that square to N px first, bicubic (its own size)"
    )
    parser.add_argument(
        "--jpeg", type=int, metavar="Q", help="encode every image as JPEG of this quality first (none)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs a figure."""
    from unclip_jax.cli.options import check_range, check_seed, progress_bar
    from unclip_jax.evaluate import distance, streaming
    from unclip_jax.evaluate.statistics import check_comparable, save_statistics
    from unclip_jax.paths import write_json
    from unclip_jax.run.features import open_network

    # -------------------------------------------------------------------------------- the command line
    name, figure = args.task, distance.FIGURES[args.task]
    check_seed(args.seed)
    check_range("--rows", args.rows, 2, MOST_ROWS)
    check_range("--reference-rows", getattr(args, "reference_rows", None), 2, MOST_ROWS)
    check_range("--batch", args.batch, 1, MOST_ROWS)
    preparation = streaming.Preparation(args.crop, args.size, args.jpeg)
    work = streaming.work_folder(args.work)
    check_files(statistics=args.save_statistics, json=args.json)

    # -------------------------------------------------------------------------------- the sets
    texts = [args.images, *([args.reference] if figure.reference else [])]
    mesh = open_mesh(args, texts)
    sides = open_sets(args, texts, mesh)
    for side, partial in zip(sides, (args.partial, True)):
        distance.check_set(side, name)
        distance.check_rows(name, count_of(side, name), partial, side.name)
    network = recipe = None
    if any(distance.needs_images(side, name) for side in sides):
        network = open_network(getattr(args, "network", None) or figure.network, args.weights, mesh=mesh)
        recipe = distance.recipe_of(network, preparation)
    if figure.reference:  # told before the work rather than after it
        check_comparable(*(distance.planned(side, name, recipe) for side in sides))

    # -------------------------------------------------------------------------------- the figure
    described, notes = [], []
    for side in sides:
        statistics, told = distance.describe(
            side,
            name,
            network,
            mesh,
            preparation=preparation,
            work=work,
            batch=args.batch,
            skip_bad=args.skip_bad,
            progress=progress_bar(f"features of {side.name}"),
        )
        described.append(statistics)
        notes += told
    settings = distance.Settings(getattr(args, "infinity", False), getattr(args, "hessel", False))
    result = distance.compare(
        name,
        described[0],
        described[1] if len(described) > 1 else None,
        settings=settings,
        partial=args.partial,
        notes=notes,
    )
    if is_first_host():
        if args.save_statistics is not None:
            save_statistics(args.save_statistics, described[0], features=bool(figure.needs))
        if args.json is not None:
            write_json(args.json, distance.as_json(result))
        print("\n".join(distance.describe_result(result)), flush=True)


def check_files(statistics: str | None = None, json: str | None = None, plot: str | None = None) -> None:
    """Tries the files that a command is going to write, where they are given.

    Raises:
      ValueError, OSError: if one has the wrong ending or cannot be written.
    """
    from unclip_jax.paths import check_writable

    named = {"--save-statistics": (statistics, ".npz"), "--json": (json, ""), "--plot": (plot, ".png")}
    for option, (path, ending) in named.items():
        if path is not None:
            if not path.endswith(ending):
                raise InputError(f"{option} {path}: end the name in {ending}")
            check_writable(path)


def is_first_host() -> bool:
    """Whether this host is the one that prints and writes."""
    import jax

    return jax.process_index() == 0


def open_mesh(args: argparse.Namespace, texts: list[str]) -> Any:
    """The devices of this host that `--mesh` names. Joins the other hosts first with `--distributed`.

    texts: the sets; a bundle among them may need several devices for its weights.
    """
    from unclip_jax.cli.options import join_hosts, parse_mesh, save_memory_on_cpu, use_compilation_cache

    shape = None if args.mesh is None else parse_mesh(args.mesh)
    save_memory_on_cpu()
    if args.distributed:
        join_hosts()
    use_compilation_cache()
    import jax

    from unclip_jax.checkpoint.load import stored_bytes
    from unclip_jax.evaluate.sets import bundle_of
    from unclip_jax.sharding import make_mesh, sampling_mesh

    if args.distributed:
        return make_mesh(shape, jax.local_devices())
    bundles = [bundle for text in texts if (bundle := bundle_of(text)) is not None]
    return sampling_mesh(shape, max(map(stored_bytes, bundles), default=0))


def count_of(opened: Any, name: str) -> int | None:
    """The number of images that a figure will read of a set; None if a file does not say it."""
    from unclip_jax.evaluate.distance import needs_images

    return opened.images.count if needs_images(opened, name) else opened.statistics.count


def open_sets(args: argparse.Namespace, names: list[str], mesh: Any) -> list[Any]:
    """Opens SET and, where the figure has one, REFERENCE (`sets.Opened`), with the rows that were asked for.

    Raises:
      ValueError, KeyError, OSError: with a message of one line.
    """
    from unclip_jax.cli.options import source_options
    from unclip_jax.evaluate import sets

    bundles = [sets.bundle_of(name) for name in names]
    given = {"captions": args.captions, "guidance": args.guidance, "prior-guidance": args.prior_guidance}
    given |= {"negative": args.negative, "prior": args.prior, "no-filter": args.no_filter or None}
    given |= {"steps": args.steps, "set": args.assignments or None}
    extra = [f"--{name}" for name, value in given.items() if value is not None]
    if extra and not any(bundles):
        raise InputError(f"{extra[0]} says how a bundle draws, and no set is a bundle (bundle=DIR)")
    opened = [
        None if bundle is not None else sets.open_set(name, source_options, args.made_by)
        for name, bundle in zip(names, bundles)
    ]
    if any(bundles):
        check_drawing(args)
        captions = captions_of(args.captions, [side.images for side in opened if side and side.images])
        opened = [
            side or sets.Opened(name, images=drawn_by(bundle, args, captions, mesh))
            for name, bundle, side in zip(names, bundles, opened)
        ]
    limits = {"--rows": args.rows, "--reference-rows": getattr(args, "reference_rows", None)}
    opened = [limited(side, *limit, args.seed) for side, limit in zip(opened, limits.items())]
    return opened


def limited(opened: Any, option: str, rows: int | None, seed: int) -> Any:
    """At most so many images of a set, chosen at random (`sets.Opened`); the set itself without a limit.

    Raises:
      ValueError: naming the option, if the set has no images.
    """
    import dataclasses

    from unclip_jax.evaluate import sets

    if rows is None:
        return opened
    if opened.images is None:
        raise InputError(f"{opened.name} holds statistics: {option} cannot choose among its images")
    # Statistics in the same file describe all images.
    return dataclasses.replace(opened, statistics=None, images=sets.some_of(opened.images, rows, seed))


def check_drawing(args: argparse.Namespace, several: bool = False) -> None:
    """Checks what says how a bundle draws, as far as that goes without the bundle.

    several: whether `--guidance` may name several scales.

    Raises:
      ValueError: with a message of one line.
    """
    from unclip_jax.sampling.unclip import check_prior_name

    if args.prior is not None:
        check_prior_name(args.prior)
    if len(sample.read_options(args, [args.prior])) > 1 and not several:
        raise InputError(
            "a figure is measured at one guidance scale: `unclip evaluate sweep` measures several"
        )


def captions_of(named: str | None, others: list[Any]) -> list[str]:
    """The captions of `--captions`, or those of the first set that has any (`sets.ImageSet`)."""
    from unclip_jax.cli.options import source_options
    from unclip_jax.evaluate import sets

    if named is not None:
        return sets.read_captions(named, source_options)
    known = [images for images in others if images.captions]
    if not known:
        raise InputError("say what the bundle draws: --captions FILE, or --captions name=...,KEY=...")
    print(f"captions: the first one of each record of {known[0].name}")
    return known[0].captions(range(known[0].count))


def drawn_by(bundle: str, args: argparse.Namespace, captions: list[str], mesh: Any) -> Any:
    """The set of what a bundle draws; loads it onto the mesh."""
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.evaluate.sets import Drawing, bundle_set
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import system_of

    sampler = Sampler(load_bundle(bundle, mesh=mesh))
    (options,) = sample.read_options(args, [args.prior], system_of(sampler.bundle).draws)
    return bundle_set(sampler, Drawing(captions, args.prior, args.seed, options))
