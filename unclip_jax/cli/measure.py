"""`unclip measure`: the figures of merit of a bundle, on held-out rows of the embedded emoji."""

from __future__ import annotations

import argparse

from unclip_jax.cli.options import add_bundle_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_bundle_arguments(parser)
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="held-out rows per split (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    parser.add_argument("--prior", default="diffusion", metavar="P", help="as in `unclip sample`: diffusion, ar, none, null; or several")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import check_seed, open_bundle, progress_bar, use_compilation_cache
    from unclip_jax.sampling import figures, programs

    if args.rows < 2:
        raise ValueError(f"--rows must be at least 2, got {args.rows}")
    check_seed(args.seed)
    use_compilation_cache()
    bundle = open_bundle(args)
    priors = args.prior.split(",")
    for prior in priors:
        programs.check_prior(bundle, prior)
    for prior in priors:
        measured = figures.measure(bundle, rows=args.rows, seed=args.seed, prior=prior, progress=progress_bar(f"measuring, prior {prior}"))
        print("\n".join([f"prior {prior}", *figures.describe(measured)]), flush=True)
