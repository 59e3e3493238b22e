"""The peak performance of chips, and the number of operations in a program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """The peak performance of one chip.

    name: short name.
    flops: bfloat16 operations per second.
    memory: size of its memory in bytes.
    bandwidth: bytes per second to and from its memory.
    links: bytes per second over all its links, in one direction.
    network: bytes per second of its share of the network between slices; None if the vendor states none.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float | None = None


# The vendors' specifications, by JAX's name of the device (`device_kind`).
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32e9, 1228e9, 300e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16e9, 819e9, 200e9, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95e9, 2765e9, 600e9, 6.25e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32e9, 1638e9, 400e9, 12.5e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100", 312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip("h200", 989e12, 141e9, 4800e9, 450e9),
}


def flops(jaxpr: Any) -> float:
    """The number of operations in the matrix products and convolutions of a traced program.

    A multiply-add counts as two operations. A loop's body counts as often as it runs.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        kind, parameters = equation.primitive.name, equation.params
        out = equation.outvars[0].aval if equation.outvars else None
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += (
                2
                * math.prod(out.shape)
                * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif kind == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
            each = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            # Zeros between the inputs (the gradient of a strided convolution) need no products.
            total += 2 * math.prod(out.shape) * each / math.prod(parameters["lhs_dilation"])
        times = parameters.get("length", 1) if kind == "scan" else 1
        inner = [flops(part) for value in parameters.values() for part in _programs(value)]
        total += times * (max(inner, default=0.0) if kind == "cond" else sum(inner))
    return total


def _programs(value: Any) -> Iterator[Any]:
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(getattr(part, "jaxpr", part), "eqns"):
            yield part
