"""3x3 convolutions of the decoder's sizes on CPU: `models/winograd.py`, XLA's own and torch's, on two images (guidance's halves).

python benchmarks/convolution.py --rounds 5                                  # torch: pip install "torch==2.13.0"
"""

from __future__ import annotations

import argparse
import functools
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.winograd import conv3x3

SIZES = ((64, 320), (64, 640), (32, 640), (16, 960), (8, 1280))  # side, channels in and out
NUMBERS = ("NHWC", "HWIO", "NHWC")


def milliseconds(run) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Times all of them in turn and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    rounds = parser.parse_args().rounds
    import torch

    rng = np.random.default_rng(0)
    for side, channels in SIZES:
        x = rng.normal(size=(2, side, side, channels)).astype(np.float32)
        kernel = (rng.normal(size=(3, 3, channels, channels)) / np.sqrt(9 * channels)).astype(np.float32)
        direct = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (1, 1))
        )
        ways = {}
        for name, convolve in (("XLA", direct), ("here", conv3x3)):
            program = jax.jit(functools.partial(convolve, dimension_numbers=NUMBERS))
            ways[name] = functools.partial(
                lambda program, *args: np.asarray(program(*args)),
                program,
                jnp.asarray(x),
                jnp.asarray(kernel),
            )
        image = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        ways["torch"] = functools.partial(torch.nn.functional.conv2d, image, weight, padding=1)
        apart = np.abs(ways["here"]() - np.moveaxis(ways["torch"]().numpy(), 1, -1)).max()
        taken = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                taken[name].append(milliseconds(run))
        told = "  ".join(f"{name} {np.median(times):6.1f} ms" for name, times in taken.items())
        print(
            f"{side:3} x {side:3} x {channels:4}   {told}   {apart:.0e} apart from torch, of outputs about 1",
            flush=True,
        )


if __name__ == "__main__":
    main()
