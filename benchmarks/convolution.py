"""Time 3x3 convolutions of the decoder's sizes on CPU in `models/winograd.py`, XLA and torch.

Each convolution runs on a batch of two images, one for each half of guidance. The columns are XLA's own
convolution, the one of `models/winograd.py` (here), and torch's.

    pip install "torch==2.13.0" && python benchmarks/convolution.py --rounds 5
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

# Each pair is a side in pixels and the number of channels of both input and output.
SIZES = ((64, 320), (64, 640), (32, 640), (16, 960), (8, 1280))
DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def milliseconds(run) -> float:
    """Returns the duration of one call in milliseconds."""
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Times the three convolutions in turn and prints the median of each."""
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
        convolutions = {}
        for name, convolve in (("XLA", direct), ("here", conv3x3)):
            program = jax.jit(functools.partial(convolve, dimension_numbers=DIMENSION_NUMBERS))
            convolutions[name] = functools.partial(
                lambda program, *args: np.asarray(program(*args)),
                program,
                jnp.asarray(x),
                jnp.asarray(kernel),
            )
        image = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        convolutions["torch"] = functools.partial(torch.nn.functional.conv2d, image, weight, padding=1)
        convolutions["XLA"]()  # compiles; the two calls below do so for the others
        expected = np.moveaxis(convolutions["torch"]().numpy(), 1, -1)
        difference = np.abs(convolutions["here"]() - expected).max()
        durations = {name: [] for name in convolutions}
        for _ in range(rounds):
            for name, run in convolutions.items():
                durations[name].append(milliseconds(run))
        medians = "  ".join(f"{name} {np.median(times):6.1f} ms" for name, times in durations.items())
        print(
            f"{side:3} x {side:3} x {channels:4}   {medians}   "
            f"here and torch differ by at most {difference:.0e}, for outputs of about 1",
            flush=True,
        )


if __name__ == "__main__":
    main()
