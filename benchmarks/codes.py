"""Time the drawing of a grid of codes with PixelSNAIL: with caches, and with the whole network for each code.

With caches, a step computes one position of every layer. Without, every code needs the whole network, as in
the public code. Public code also leaves out the rows below the one that is drawn, which halves its time; the
second ratio takes that into account.

    python benchmarks/codes.py --channels 64
    python benchmarks/codes.py --channels 256 --forwards 2        # the public size, 84,873,280 parameters
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import TokenSamplingOptions
from unclip_jax.generate.tokens import sample_grid
from unclip_jax.models.pixelsnail import PixelSNAIL


def seconds(run) -> float:
    """The duration of one call in seconds."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def main() -> None:
    """Times both ways and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, metavar="N", help="of the grid (32)")
    parser.add_argument("--channels", type=int, default=64, metavar="N", help="of the network (64)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="grids at a time (1)")
    parser.add_argument("--forwards", type=int, default=5, metavar="N", help="of the whole network (5)")
    args = parser.parse_args()
    model = PixelSNAIL(args.side, 512, args.channels, res_channels=args.channels)
    codes = jnp.zeros((args.batch, args.side, args.side), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), codes)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    keys = jax.random.split(jax.random.key(1), args.batch)
    draw = jax.jit(
        lambda params, keys: sample_grid(Network(model, params, {}), keys, TokenSamplingOptions())[0]
    )
    whole = jax.jit(lambda params, codes: model.apply({"params": params}, codes))
    draw(params, keys), whole(params, codes)  # compiles
    cached = seconds(lambda: draw(params, keys))
    forward = float(np.median([seconds(lambda: whole(params, codes)) for _ in range(args.forwards)]))
    uncached = forward * args.side**2
    print(
        f"{args.batch} of {args.side} x {args.side} codes, {count:,} parameters: {cached:.1f} s with caches; "
        f"{uncached:.0f} s without ({args.side**2} times {forward:.3f} s): {uncached / cached:.0f} times; "
        f"{uncached / cached / 2:.0f} times where rows below are left out"
    )


if __name__ == "__main__":
    main()
