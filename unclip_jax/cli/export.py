"""`unclip export BUNDLE --out DIR`: writes a bundle in the folder layout of another library."""

from __future__ import annotations

import argparse

from unclip_jax.errors import InputError

FORMATS = ("diffusers",)  # the formats of `checkpoint.providers.PROVIDERS`, which is slow to import
DTYPES = ("float32", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle's folder, or the name of a shipped one (emoji)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="diffusers: the folder layout of its pipelines for the bundle's system (diffusers)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights on disk (float32)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import numpy as np

    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.checkpoint.providers import PROVIDERS

    writers = [provider for provider in PROVIDERS.values() if provider.format == args.format]
    writers[0].check_target(args.out)
    bundle = load_bundle(args.bundle)
    provider = next((one for one in writers if one.system == bundle.system), None)
    if provider is None:
        raise InputError(f"a bundle of the system {bundle.system} cannot be written for {args.format}")
    print(provider.write(bundle, args.out, np.dtype(args.dtype)))
