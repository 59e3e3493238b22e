"""`unclip export BUNDLE --out DIR`: a bundle of a public topology in that library's folder layout."""

from __future__ import annotations

import argparse

FORMATS = ("diffusers",)
DTYPES = ("float32", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or the name of a shipped one (emoji)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="diffusers: the layout of its UnCLIPPipeline")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights on disk (float32)")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.checkpoint.bundle import load_bundle
    from unclip_jax.checkpoint.export import export_diffusers

    print(export_diffusers(load_bundle(args.bundle), args.out, np.dtype(args.dtype)))
