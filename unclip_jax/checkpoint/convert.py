"""Converts weights of other libraries to our parameter trees, and back, by a table of rules.

A rule is (pattern, target, transform): the name of a tensor in the file, the path of the parameter here, and
how the tensor becomes the parameter. The tables stand in `providers/`; this is the engine that applies them.
Every tensor of the file must be used, every parameter must be filled once, and every shape must fit.
Otherwise an error lists all that does not fit, before any value is read. Nothing from a file is executed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from unclip_jax.checkpoint.files import Place, Weights, aligned, check_floats, finite, keep, list_names
from unclip_jax.errors import InputError

THREADS = min(8, os.cpu_count() or 1)  # tensors converted at a time
ROWS = 16  # of a tensor transposed at a time, so that the rows stay in the processor's cache


@dataclass(frozen=True)
class Rule:
    """How the tensors whose names match become parameters.

    pattern: regex of a tensor's whole name.
    target: the parameter's path ("a/b/kernel"; \\1 is the pattern's first group). Several paths when the
      tensor's first axis holds several parameters one after the other; () when the tensor is not a parameter.
    transform: one of TRANSFORMS.
    by_head: whether several parameters (of the transforms `heads` and `head_bias`) alternate head by head,
      each with the part that belongs to the head.
    """

    pattern: str
    target: str | tuple[str, ...]
    transform: str = "same"
    by_head: bool = False


@dataclass(frozen=True)
class Transform:
    """fits: the parameter's and the tensor's shape -> whether they fit. forward: tensor, the parameter's
    shape -> parameter. backward: parameter -> tensor."""

    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool]
    forward: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


def _conv(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else ()


def _transposed(a: np.ndarray, *axes: int) -> np.ndarray:
    # The axes in another order, in float32. The first axis must come last.
    out = aligned([a.shape[axis] for axis in axes])
    for row in range(0, len(a), ROWS):
        out[..., row : row + ROWS] = a[row : row + ROWS].transpose(axes)
    return out


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda ours, theirs: ours == theirs, lambda a, shape: a, lambda a: a),
    # torch's (out, in) -> (in, out); `heads` splits `out` into (heads, size), `merge` splits `in` into
    # (heads, size)
    "linear": Transform(
        lambda ours, theirs: ours == theirs[::-1], lambda a, shape: _transposed(a, 1, 0), lambda a: a.T
    ),
    # A 1x1 convolution over a sequence (out, in, 1) is a linear layer.
    "heads": Transform(
        lambda ours, theirs: (
            len(ours) == 3 and (ours[0], ours[1] * ours[2]) == theirs[1::-1] and theirs[2:] in ((), (1,))
        ),
        lambda a, shape: _transposed(a.reshape(a.shape[:2]), 1, 0).reshape(shape),
        lambda a: a.reshape(a.shape[0], -1).T,
    ),
    "merge": Transform(
        lambda ours, theirs: (
            len(ours) == 3 and (ours[0] * ours[1], ours[2]) == theirs[1::-1] and theirs[2:] in ((), (1,))
        ),
        lambda a, shape: _transposed(a.reshape(a.shape[:2]), 1, 0).reshape(shape),
        lambda a: a.reshape(-1, a.shape[-1]).T,
    ),
    "head_bias": Transform(
        lambda ours, theirs: len(theirs) == 1 and math.prod(ours) == theirs[0],
        lambda a, shape: a.reshape(shape),
        lambda a: a.reshape(-1),
    ),
    # Flax's (in, out) -> (in, out) with `out` or `in` split into (heads, size)
    "split_out": Transform(
        lambda ours, theirs: len(ours) == 3 and (ours[0], ours[1] * ours[2]) == theirs,
        lambda a, shape: a.reshape(shape),
        lambda a: a.reshape(len(a), -1),
    ),
    "split_in": Transform(
        lambda ours, theirs: len(ours) == 3 and (ours[0] * ours[1], ours[2]) == theirs,
        lambda a, shape: a.reshape(shape),
        lambda a: a.reshape(-1, a.shape[-1]),
    ),
    # torch's (out, in, height, width) -> (height, width, in, out)
    "conv": Transform(
        lambda ours, theirs: ours == _conv(theirs),
        lambda a, shape: _transposed(a, 2, 3, 1, 0),
        lambda a: a.transpose(3, 2, 0, 1),
    ),
    # torch's (in, out, height, width) of a transposed convolution, whose kernel torch turns by half a circle
    # -> (height, width, in, out)
    "transposed_conv": Transform(
        lambda ours, theirs: len(theirs) == 4 and ours == (*theirs[2:], *theirs[:2]),
        lambda a, shape: keep("", a.transpose(2, 3, 0, 1)[::-1, ::-1]),
        lambda a: a[::-1, ::-1].transpose(2, 3, 0, 1),
    ),
    # torch's (out, in), or (out, in, 1, 1) of a 1x1 convolution -> (in, out); written back as a convolution
    "pointwise": Transform(
        lambda ours, theirs: ours == tuple(theirs[1::-1]) and math.prod(theirs[2:]) == 1,
        lambda a, shape: _transposed(a.reshape(a.shape[:2]), 1, 0),
        lambda a: a.T[:, :, None, None],
    ),
    # (1, C, 1, 1) of torch or (1, 1, C, 1) -> (C,)
    "vector": Transform(
        lambda ours, theirs: ours == tuple(size for size in theirs if size != 1),
        lambda a, shape: a.reshape(shape),
        lambda a: a,
    ),
    "drop_ones": Transform(  # (1, N, W) -> (N, W), (1, 1, W) -> (W,), Flax's (1, 1, in, out) -> (in, out)
        lambda ours, theirs: (
            ours == tuple(theirs)[len(theirs) - len(ours) :] and math.prod(theirs) == math.prod(ours)
        ),
        lambda a, shape: a.reshape(shape),
        lambda a: a.reshape((1,) * (3 - a.ndim) + a.shape),
    ),
}


def linear(theirs: str, ours: str, transform: str = "linear") -> tuple[Rule, Rule]:
    """Rules of a layer's weight and bias; `transform` is the weight's: linear, heads, merge, conv, ..."""
    bias = "head_bias" if transform == "heads" else "same"
    return Rule(rf"{theirs}\.weight", f"{ours}/kernel", transform), Rule(
        rf"{theirs}\.bias", f"{ours}/bias", bias
    )


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Rules of a normalisation's scale and bias."""
    return Rule(rf"{theirs}\.weight", f"{ours}/scale"), Rule(rf"{theirs}\.bias", f"{ours}/bias")


def convert(weights: Weights, rules: Sequence[Rule], shapes: Any, name: str, place: Place = keep) -> dict:
    """Tensors of another library -> a parameter tree of ours. Beside the tree, at most a few tensors are in
    memory at a time.

    Args:
      weights: tensors by their names in the file.
      rules: the first rule whose pattern matches a tensor's whole name applies to it.
      shapes: the tree of our parameters' shapes (`shapes_of`).
      name: of the network, for errors.
      place: where each parameter goes as soon as it is read; by default it stays on the host.

    Returns:
      The tree of what `place` returned, float32 NumPy arrays by default.

    Raises:
      ValueError: listing unused tensors, parameters that are missing or filled twice, and shapes that do not
        fit; or naming a tensor of integers, or one whose values are not finite.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    plan: dict[
        str, list[tuple[str, Transform]]
    ] = {}  # of a tensor: the parameters that it holds one after the other
    by_head: set[str] = set()  # the tensors in which they alternate
    filled: set[str] = set()
    unused, twice, unfit = [], [], []
    for tensor in weights:
        rule, match = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, tensor))), (None, None))
        if rule is None:
            unused.append(tensor)
            continue
        targets = [match.expand(t) for t in ((rule.target,) if isinstance(rule.target, str) else rule.target)]
        shape, transform = weights.shape(tensor), TRANSFORMS[rule.transform]
        for target in targets:
            if target not in wanted:
                unused.append(tensor)
                continue
            if target in filled:
                twice.append(target)
            part = (shape[0] // len(targets), *shape[1:]) if len(targets) > 1 else shape
            if not transform.fits(wanted[target], part):
                unfit.append(f"{tensor} {list(shape)} for {target} {list(wanted[target])}")
            filled.add(target)
            if rule.by_head:
                by_head.add(tensor)
            plan.setdefault(tensor, []).append((target, transform))
    problems = [
        f"{len(found)} {words}: {list_names(found)}"
        for words, found in (
            ("tensors of the file have no use", sorted(set(unused))),
            ("parameters are missing in it", [path for path in wanted if path not in filled]),
            ("parameters would be filled twice", twice),
            ("shapes do not fit", unfit),
        )
        if found
    ]
    if problems:
        raise InputError(f"{name} does not fit these weights: {'; '.join(problems)}")
    check_floats(weights, plan, name)

    def read(tensor: str) -> list[tuple[tuple[str, ...], Any]]:
        parameters, values = plan[tensor], weights[tensor]
        if tensor in by_head:
            heads = wanted[parameters[0][0]][-2]
            split = values.reshape(heads, len(parameters), -1, *values.shape[1:])
            values = split.swapaxes(0, 1).reshape(values.shape)
        pieces = np.split(values, len(parameters)) if len(parameters) > 1 else [values]
        placed = []
        for (target, transform), piece in zip(parameters, pieces):
            value = finite(keep(target, transform.forward(piece, wanted[target])), tensor, name)
            placed.append((tuple(target.split("/")), place(target, value)))
        weights.release(tensor)
        return placed

    with ThreadPoolExecutor(THREADS) as pool:
        return traverse_util.unflatten_dict(dict(pair for pairs in pool.map(read, plan) for pair in pairs))


def _reversed(rule: Rule) -> tuple[str, str]:
    # (regex of our path, template of their name). A group may not contain another; an optional prefix is
    # always written.
    plain, groups = re.sub(r"\(\?:([^()]*)\)\?", r"\1", rule.pattern), []
    template = re.sub(r"\(([^()]*)\)", lambda m: f"{{g{groups.append(m[1]) or len(groups)}}}", plain).replace(
        "\\.", "."
    )
    pieces = re.split(r"\\(\d)", rule.target)
    ours = "".join(
        re.escape(piece) if i % 2 == 0 else f"(?P<g{piece}>{groups[int(piece) - 1]})"
        for i, piece in enumerate(pieces)
    )
    return ours, template


def names_of(paths: Iterable[str], rules: Sequence[Rule], name: str) -> dict[str, tuple[str, str]]:
    """Paths of our parameters -> their names in the other library, and the transforms of their rules.

    Raises:
      ValueError: listing parameters for which no rule has a name.
    """
    known = [(*_reversed(rule), rule.transform) for rule in rules if isinstance(rule.target, str)]
    named, nameless = {}, []
    for path in paths:
        found = next(
            (
                (m, template, transform)
                for ours, template, transform in known
                if (m := re.fullmatch(ours, path))
            ),
            None,
        )
        if found is None:
            nameless.append(path)
            continue
        match, template, transform = found
        named[path] = template.format(**match.groupdict()), transform
    if nameless:
        raise InputError(f"{name}: the other library has no name for {list_names(nameless)}")
    return named


def export(params: Any, rules: Sequence[Rule], name: str) -> dict[str, np.ndarray]:
    """A parameter tree of ours -> tensors by the other library's names: the inverse of `convert`, by the same
    rules.

    Raises:
      ValueError: listing parameters for which no rule has a name.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    named = names_of(flat, rules, name)
    return {
        theirs: TRANSFORMS[transform].backward(np.asarray(flat[path]))
        for path, (theirs, transform) in named.items()
    }


def shapes_of(init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The parameter shapes of a module's `init` on inputs of these shapes (`array`), without computing
    anything."""
    return jax.eval_shape(lambda a, k: init(jax.random.key(0), *a, **k), args, kwargs)["params"]


def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """The shape and type of an array, in place of one."""
    return jax.ShapeDtypeStruct(shape, dtype)
