"""Lowers a program for an NVIDIA GPU that is not here, and looks for what would be slow there.

`jax` lowers for another platform without its compiler: the result is the program that XLA for CUDA would
receive. It says three things before anybody rents a GPU:

- whether a product or a convolution of a bfloat16 program is in float32, outside the fast units;
- whether an array is transposed between convolutions, which costs a pass over memory;
- whether attention is cuDNN's fused kernel, which never writes its weights to memory.

What XLA then fuses, and which layouts it chooses, this does not say.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from unclip_jax.backend import lowered_for
from unclip_jax.compile import step
from unclip_jax.errors import InputError
from unclip_jax.sharding import make_mesh

CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}  # of the chips that a name may ask for
CUDNN = 91000  # the version that is assumed: 9.10
LARGE = 2**16  # elements; smaller arrays cost nothing to transpose
_PRODUCTS = ("stablehlo.dot_general", "stablehlo.convolution")
_SAME_SHAPE = {
    f"stablehlo.{name}"
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "logistic", "tanh")
} | {"stablehlo.exponential", "stablehlo.convert", "stablehlo.select", "func.call"}


@dataclass
class Findings:
    """What a lowered program does. A loop's body counts once.

    operations: multiply-adds of all products and convolutions, times two.
    float32: those of products and convolutions with a float32 operand.
    largest: the largest of these: (operations, shapes in words), in descending order.
    transposes: transposed arrays of at least `LARGE` elements next to a convolution, in words.
    fused: cuDNN's attention kernels, backward ones included.
    plain: products with at least two batch axes, as attention outside cuDNN has, in words.
    """

    operations: float = 0.0
    float32: float = 0.0
    largest: list[tuple[float, str]] = field(default_factory=list)
    transposes: list[str] = field(default_factory=list)
    fused: int = 0
    plain: list[str] = field(default_factory=list)

    @property
    def float32_share(self) -> float:
        """The share of the operations that are in float32."""
        return self.float32 / self.operations if self.operations else 0.0


def stage_program(config: Any, clip_config: Any, sample: bool, embedded: bool = False) -> tuple[Any, tuple]:
    """A stage's train step, or its sampler, on one GPU that is not here.

    Args:
      config, clip_config, embedded: as for `step.train_step`. `auto` dtypes are bfloat16.
      sample: whether it is the sampler.

    Returns:
      The jitted program, and its abstract arguments. Errors are those of `step.train_step`.
    """
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with lowered_for("gpu"):
        if sample:
            program, *arguments = step.sampler(config, clip_config, mesh)
            return program, tuple(arguments)
        made = step.train_step(config, clip_config, mesh, embedded)
    return made.update, (made.state, made.frozen, made.batch)


def lower(program: Any, arguments: tuple, chip: str) -> Any:
    """Lowers a jitted program for a chip of `CAPABILITIES`. The arguments may be abstract, on one device.

    The program must not have been traced before: jax would reuse the trace of another chip.

    Returns:
      The MLIR module, in StableHLO.
    """
    with lowered_for("gpu"), _cudnn(CAPABILITIES[chip]):
        return program.trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")


@contextlib.contextmanager
def _cudnn(capability: tuple[int, int]) -> Iterator[None]:
    # jax asks the GPU of this machine for its capability and for cuDNN's version. This answers in its place.
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    answers = {
        "cuda_versions": types.SimpleNamespace(cudnn_get_version=lambda: CUDNN),
        "check_compute_capability": lambda asked: capability >= tuple(map(int, asked.split("."))),
        "is_cuda_compute_capability_equal": lambda asked: capability == tuple(map(int, asked.split("."))),
    }
    missing = [name for name in answers if not hasattr(fused, name)]
    if missing:
        raise InputError(f"this version of jax asks for cuDNN in another way ({missing[0]} is not there)")
    before = {name: getattr(fused, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused, name, answer)
        yield
    finally:
        for name, value in before.items():
            setattr(fused, name, value)


def examine(module: Any) -> Findings:
    """Looks through a module in StableHLO, with all its functions and loops."""
    found = Findings()
    for op in _operations(module.operation):
        if op.name in _PRODUCTS:
            _product(op, found)
        elif op.name == "stablehlo.custom_call" and "cudnn$fmha" in str(op.attributes["call_target_name"]):
            found.fused += 1
        elif op.name == "stablehlo.transpose":
            shape = op.operands[0].type.shape
            if len(shape) == 4 and math.prod(shape) >= LARGE and _beside_convolution(op):
                order = list(op.attributes["permutation"])
                found.transposes.append(f"{_words(op.operands[0])} to {'x'.join(map(str, order))}")
    found.largest.sort(reverse=True)
    return found


def _operations(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _product(op: Any, found: Findings) -> None:
    left, right, out = op.operands[0], op.operands[1], op.results[0]
    if op.name == "stablehlo.dot_general":
        numbers = _dot_numbers(op)
        summed = math.prod(left.type.shape[axis] for axis in numbers.lhs_contracting_dimensions)
        if len(numbers.lhs_batching_dimensions) >= 2:
            found.plain.append(f"{_words(left)} with {_words(right)}")
    else:
        features = _convolution_numbers(op).kernel_output_feature_dimension
        summed = math.prod(right.type.shape) // right.type.shape[features]
    operations = 2.0 * math.prod(out.type.shape) * summed
    found.operations += operations
    if any(str(x.type.element_type) == "f32" for x in (left, right)):
        found.float32 += operations
        kind = "convolution" if op.name == "stablehlo.convolution" else "product"
        found.largest.append((operations, f"{kind} of {_words(left)} with {_words(right)}"))


def _dot_numbers(op: Any) -> Any:
    from jax._src.lib.mlir.dialects import hlo

    return hlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])


def _convolution_numbers(op: Any) -> Any:
    from jax._src.lib.mlir.dialects import hlo

    return hlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])


def _words(value: Any) -> str:
    return f"{value.type.element_type}[{','.join(map(str, value.type.shape))}]"


def _beside_convolution(op: Any) -> bool:
    # Whether a convolution makes the array that is transposed, or reads the result, but for operations that
    # work element by element. Calls count as such: activations are functions of their own.
    above, below = [op.operands[0]], [op.results[0]]
    seen: set[Any] = set()
    while above:
        owner = getattr(above.pop().owner, "opview", None)
        if owner is None:  # a block's argument
            continue
        maker = owner.operation
        if maker.name == "stablehlo.convolution":
            return True
        if maker.name in _SAME_SHAPE and maker not in seen:
            seen.add(maker)
            above += list(maker.operands)
    while below:
        for use in below.pop().uses:
            user = use.owner.operation
            if user.name == "stablehlo.convolution":
                return True
            if user.name in _SAME_SHAPE and user not in seen:
                seen.add(user)
                below += list(user.results)
    return False
