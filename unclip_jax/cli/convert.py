"""`unclip convert FOLDER --out DIR`: converts public weights, or an older bundle, to a bundle."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_lora_argument

DTYPES = ("float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="a diffusers folder of Karlo, Stable Diffusion or StableUnCLIP, a single file of Stable "
        "Diffusion, a CLIP of transformers, open_clip or OpenAI, or any bundle",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the bundle's folder; replaces a bundle that is already there",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="type of the weights on disk (float16)"
    )

    add_lora_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.checkpoint.bundle import check_target, save_bundle
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.checkpoint.lora import merge_loras
    from unclip_jax.paths import total_bytes
    from unclip_jax.sampling.programs import stage_options

    check_target(args.out)
    bundle = merge_loras(load_bundle(args.folder), args.lora)
    stage_options(bundle)
    path = save_bundle(bundle, args.out, np.dtype(args.dtype))
    print(f"{path}: {', '.join(bundle.parts)}; {total_bytes(path) / 2**20:.1f} MiB")
