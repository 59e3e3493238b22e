"""`unclip embed --clip BUNDLE --data K=V --out DIR`: embeds a dataset with CLIP, for the priors, and with an
autoencoder, for latent diffusion. With `--index` it makes the index that retrieval-augmented diffusion draws
neighbours from, and with `--neighbours` it finds the dataset's neighbours there."""

from __future__ import annotations

import argparse

from unclip_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument("--clip", metavar="DIR", help="the CLIP: a bundle, public weights, or a training run")
    parser.add_argument(
        "--t5",
        metavar="DIR",
        help="in place of --clip: store the states of all captions that this T5 reads, for Imagen",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="K=V",
        help="an argument of the source, e.g. name=tfrecord, pattern='DIR/*.tfrecord'",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the folder to write; continues an unfinished one with the same arguments",
    )
    parser.add_argument(
        "--states",
        action="store_true",
        help="store CLIP's text states too, for priors that read them (those of Karlo and of the emoji)",
    )
    parser.add_argument(
        "--latents",
        metavar="DIR",
        help="store the images' latents too: the autoencoder, a run, a bundle or public weights",
    )
    parser.add_argument(
        "--codes",
        metavar="DIR",
        help="store the images' codes too, of a VQ-VAE or a discrete VAE: a run, a bundle or public weights",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help="with --latents or --codes: the side of the images that are encoded",
    )
    parser.add_argument(
        "--index",
        action="store_true",
        help="make an index of the pictures, to draw neighbours from; captions are not read",
    )
    parser.add_argument(
        "--patches", type=int, metavar="N", help="with --index: random patches of each image (1)"
    )
    parser.add_argument(
        "--patch", type=int, metavar="PX", help="with --index: their side (one patch: the centred square)"
    )
    parser.add_argument(
        "--space",
        metavar="S",
        help="with --index: raw keeps CLIP's embeddings as they are, unit divides them by their norms (raw)",
    )
    parser.add_argument(
        "--neighbours",
        metavar="INDEX",
        help="store the images' neighbours too: an index of other pictures, or a published database of .npz "
        "files",
    )
    parser.add_argument(
        "--nearest", type=int, metavar="K", help="with --neighbours: how many of each image (4)"
    )
    parser.add_argument(
        "--search",
        metavar="S",
        help="with --neighbours: exact compares all rows; scann (a package) finds most, faster (exact)",
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="images per batch on each host (256)"
    )
    parser.add_argument(
        "--shard",
        type=int,
        default=8192,
        metavar="N",
        help="records per shard; a host keeps a whole shard in memory, and loses it if it is killed (8192)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="T",
        help="type that the networks compute in: float32, bfloat16 or auto (auto)",
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        metavar="F",
        help="largest allowed fraction of records without a caption, or with a damaged image; eight are "
        "always allowed, unless it is 0 (0.01)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out such records, however many there are"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="join the other hosts first (cloud TPU pods, SLURM)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import join_hosts, progress_bar, source_options, use_compilation_cache
    from unclip_jax.data.sources import make_source

    if (args.clip is None) == (args.t5 is None):
        raise InputError("say what embeds: --clip DIR, or --t5 DIR for the captions alone")
    only_clip = ("states", "latents", "size", "index", "neighbours")
    if args.t5 is not None and any(getattr(args, name) for name in only_clip):
        raise InputError(f"--t5 reads captions alone: leave out --{', --'.join(only_clip)}")
    if not args.data:
        raise InputError("say what to embed: --data name=folder --data path=DIR, or --data name=emoji")
    if args.max_bad is not None and args.skip_bad:
        raise InputError("--skip-bad leaves out every bad record: drop --max-bad")
    max_bad = 1.0 if args.skip_bad else 0.01 if args.max_bad is None else args.max_bad
    if not 0 <= max_bad <= 1:
        raise InputError(f"--max-bad must be in [0, 1], got {args.max_bad}")
    if args.latents is not None and args.codes is not None:
        raise InputError("--latents and --codes make two folders: give one of them")
    if (args.latents is None and args.codes is None) != (args.size is None):
        given = "--latents" if args.codes is None else "--codes"
        what = "autoencoder" if args.codes is None else "VQ-VAE or discrete VAE"
        raise InputError(f"{given} and --size go together: name the {what}, and the side of the images")
    _check_together(args)
    for name in ("batch", "shard", "patches", "patch", "nearest"):
        name, value = f"--{name}", getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    source = make_source(source_options(args.data))
    if args.distributed:
        join_hosts()
    use_compilation_cache()
    import jax

    from unclip_jax.sharding import make_mesh
    from unclip_jax.train.embed import embed
    from unclip_jax.train.embed_index import embed_index

    mesh = make_mesh(devices=jax.local_devices())
    shared = {
        "batch_size": args.batch,
        "shard_records": args.shard,
        "dtype": args.dtype,
        "max_bad_fraction": max_bad,
        "progress": progress_bar("shards"),
    }
    if args.t5 is not None:
        from unclip_jax.train.embed_t5 import embed_t5

        manifest = embed_t5(args.t5, source, args.out, mesh, **shared)
        print(
            f"states of {manifest['captions']} captions in {args.out}; {manifest['bad']} records could not "
            f"be used, {manifest['cut']} captions were cut to T5's tokens"
        )
        return
    if args.index:
        chosen = {"patches": args.patches or 1, "patch_size": args.patch, "space": args.space or "raw"}
        manifest = embed_index(args.clip, source, args.out, mesh, **chosen, **shared)
        print(
            f"{manifest['rows']} rows of {manifest['images']} images in the index {args.out}; "
            f"{manifest['bad']} records could not be used"
        )
        return
    manifest = embed(
        args.clip,
        source,
        args.out,
        mesh,
        states=args.states,
        autoencoder=args.latents,
        latent_image_size=args.size,
        coder=args.codes,
        index=args.neighbours,
        nearest=args.nearest or 4,
        search=args.search or "exact",
        **shared,
    )
    print(
        f"{manifest['images']} images and {manifest['captions']} captions in {args.out}; "
        f"{manifest['bad']} records could not be used, {manifest['cut']} captions were cut to CLIP's tokens"
    )
    print(
        "alignment: "
        + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in manifest["alignment"].items())
    )
    if "recall" in manifest.get("neighbours", {}):
        print(f"recall of {args.search}: {manifest['neighbours']['recall']:.4g} of the exact neighbours")


def _check_together(args: argparse.Namespace) -> None:
    # Arguments that mean nothing beside others are refused.
    only = {
        "--index": ("patches", "patch", "space"),
        "--neighbours": ("nearest", "search"),
    }
    for needed, names in only.items():
        given = [f"--{name}" for name in names if getattr(args, name) is not None]
        if given and not getattr(args, needed.strip("-")):
            raise InputError(f"{given[0]} belongs to {needed}: give that too, or leave it out")
    if args.index:
        given = [f"--{name}" for name in ("neighbours", "latents", "codes", "states") if getattr(args, name)]
        if given:
            raise InputError(f"--index makes an index alone: leave {given[0]} out")
        if (args.patches or 1) > 1 and args.patch is None:
            raise InputError(f"{args.patches} patches of an image need their side in pixels: give --patch")
