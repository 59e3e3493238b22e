"""`unclip convert FOLDER --out DIR`: writes public weights, or a bundle, as a bundle of the newest format."""

from __future__ import annotations

import argparse

DTYPES = ("float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="diffusers' folder of Karlo, CLIP of transformers or of OpenAI, or a bundle of any format",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the bundle's folder; a bundle found there is replaced"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights on disk (float16)")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.checkpoint.bundle import save_bundle
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.paths import total_bytes

    bundle = load_bundle(args.folder)
    path = save_bundle(bundle, args.out, np.dtype(args.dtype))
    print(f"{path}: {', '.join(bundle.parts)}; {total_bytes(path) / 2**20:.1f} MiB")
