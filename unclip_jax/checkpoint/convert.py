"""Weights of other libraries: files read lazily, renamed and turned by a table of rules, and checked both ways.

A rule is (pattern, target, transform): the name of a tensor in the file, the path of the parameter here, and how the one becomes the
other. Conversion is that data (`rules/`) and this one engine. Every tensor of the file must be used once, every parameter filled once,
and every shape must fit, or all that does not is listed, before a single value is read. Nothing from a file is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

LISTED = 6  # names of each kind that an error lists


@dataclass(frozen=True)
class Rule:
    """pattern: regex of a tensor's whole name; target: path of the parameter ("a/b/kernel", with \\1 of the pattern), several when the
    tensor's first axis holds them one after the other, none when the tensor is no parameter; transform: one of TRANSFORMS."""

    pattern: str
    target: str | tuple[str, ...]
    transform: str = "same"


@dataclass(frozen=True)
class Transform:
    """shape: of the parameter and of the tensor -> whether they fit; forward: tensor, parameter's shape -> parameter; backward: parameter
    -> tensor."""

    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool]
    forward: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


def _conv(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else ()


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda ours, theirs: ours == theirs, lambda a, shape: a, lambda a: a),
    # torch's (out, in) -> (in, out); `heads` splits out into (heads, size), `merge` has in = (heads, size)
    "linear": Transform(lambda ours, theirs: ours == theirs[::-1], lambda a, shape: a.T, lambda a: a.T),
    "heads": Transform(
        lambda ours, theirs: len(ours) == 3 and len(theirs) == 2 and (ours[0], ours[1] * ours[2]) == theirs[::-1],
        lambda a, shape: a.T.reshape(shape),
        lambda a: a.reshape(a.shape[0], -1).T,
    ),
    "merge": Transform(
        lambda ours, theirs: len(ours) == 3 and len(theirs) == 2 and (ours[0] * ours[1], ours[2]) == theirs[::-1],
        lambda a, shape: a.T.reshape(shape),
        lambda a: a.reshape(-1, a.shape[-1]).T,
    ),
    "head_bias": Transform(
        lambda ours, theirs: len(theirs) == 1 and math.prod(ours) == theirs[0], lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1)
    ),
    # torch's (out, in, height, width) -> (height, width, in, out)
    "conv": Transform(
        lambda ours, theirs: ours == _conv(theirs), lambda a, shape: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
    ),
    "drop_ones": Transform(  # (1, N, W) -> (N, W), (1, 1, W) -> (W,)
        lambda ours, theirs: ours == tuple(theirs)[len(theirs) - len(ours) :] and math.prod(theirs) == math.prod(ours),
        lambda a, shape: a.reshape(shape),
        lambda a: a.reshape((1,) * (3 - a.ndim) + a.shape),
    ),
}


class Weights(Mapping):
    """The tensors of a folder's files by name, each read when it is asked for. `shape(name)` reads no values."""

    def __init__(self, files: Mapping[str, Path]):
        self._files, self._open = dict(files), {}

    def _slice(self, name: str):
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "np")
        return self._open[path]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        return tuple(self._slice(name).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._slice(name).get_tensor(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_json(path: Path) -> dict:
    """A JSON file of a folder that another library wrote.

    Raises:
      FileNotFoundError, ValueError: one line naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the folder is incomplete") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object; download it again")
    return value


def open_weights(folder: Path, names: Iterable[str] = ("model", "diffusion_pytorch_model")) -> Weights:
    """The safetensors of a folder, one file or sharded with an index (`<name>.safetensors`, `<name>.safetensors.index.json`).

    Raises:
      FileNotFoundError: when there are none. ValueError: when a file is damaged, a shard lacks what the index promises, or the weights are
        pickled: a pickle runs what is in it, so it is refused.
    """
    for name in names:
        index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or any(Path(str(file)).name != file for file in listed.values()):
                raise ValueError(f"{index} has no weight_map of files beside it; download it again")
            files = {tensor: folder / file for tensor, file in listed.items()}
            held = {path: set(_names(path)) for path in set(files.values())}
            lost = [tensor for tensor, path in files.items() if tensor not in held[path]]
            if lost:
                raise ValueError(f"{files[lost[0]]} lacks {_some(lost)}, which {index.name} promises; download it again")
            extra = {tensor: path for path, tensors in held.items() for tensor in tensors}
            return Weights(extra)
        if single.is_file():
            return Weights({tensor: single for tensor in _names(single)})
    pickled = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}"))
    if pickled:
        raise ValueError(f"{folder / pickled[0]} is a pickle, which could run code: save it as safetensors where you trust it")
    raise FileNotFoundError(f"{folder} holds no weights: expected {' or '.join(f'{name}.safetensors' for name in names)}")


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the folder is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); download it again") from None


def _some(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def convert(weights: Weights | Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Any, name: str) -> dict:
    """Tensors of another library -> a parameter tree of ours.

    Args:
      weights: tensors by their names in the file.
      rules: the first whose pattern matches a whole name is the tensor's.
      shapes: the tree of our parameters' shapes (`jax.eval_shape`).
      name: of the network, for errors.

    Returns:
      The tree, float32 NumPy arrays.

    Raises:
      ValueError: listing tensors without use, parameters not filled or filled twice, and shapes that do not fit.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    shape_of = weights.shape if isinstance(weights, Weights) else lambda n: np.shape(weights[n])
    plan: dict[str, tuple[str, int, int, Transform]] = {}
    unused, twice, unfit = [], [], []
    for tensor in weights:
        rule, match = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, tensor))), (None, None))
        if rule is None:
            unused.append(tensor)
            continue
        targets = [match.expand(t) for t in ((rule.target,) if isinstance(rule.target, str) else rule.target)]
        shape = shape_of(tensor)
        for i, target in enumerate(targets):
            if target not in wanted:
                unused.append(tensor)
            elif target in plan:
                twice.append(target)
            else:
                part = (shape[0] // len(targets), *shape[1:]) if len(targets) > 1 else shape
                transform = TRANSFORMS[rule.transform]
                if not transform.fits(wanted[target], part):
                    unfit.append(f"{tensor} {list(shape)} for {target} {list(wanted[target])}")
                plan[target] = (tensor, i, len(targets), transform)
    missing = [path for path in wanted if path not in plan]
    problems = [
        f"{len(found)} {words}: {_some(found)}"
        for words, found in (
            ("tensors of the file have no use", sorted(set(unused))),
            ("parameters are missing in it", missing),
            ("parameters would be filled twice", twice),
            ("shapes do not fit", unfit),
        )
        if found
    ]
    if problems:
        raise ValueError(f"{name} does not fit these weights: {'; '.join(problems)}")
    flat = {}
    for target, (tensor, i, count, transform) in plan.items():
        value = np.asarray(weights[tensor])
        if count > 1:
            value = np.split(value, count)[i]
        flat[tuple(target.split("/"))] = np.array(transform.forward(value, wanted[target]), np.float32, order="C")
    return traverse_util.unflatten_dict(flat)


def _reversed(rule: Rule) -> tuple[str, str]:
    # (regex of our path, template of their name). Groups hold no groups, and an optional prefix is written.
    plain, groups = re.sub(r"\(\?:([^()]*)\)\?", r"\1", rule.pattern), []
    template = re.sub(r"\(([^()]*)\)", lambda m: f"{{g{groups.append(m[1]) or len(groups)}}}", plain).replace("\\.", ".")
    pieces = re.split(r"\\(\d)", rule.target)
    ours = "".join(re.escape(piece) if i % 2 == 0 else f"(?P<g{piece}>{groups[int(piece) - 1]})" for i, piece in enumerate(pieces))
    return ours, template


def export(params: Any, rules: Sequence[Rule], name: str) -> dict[str, np.ndarray]:
    """A parameter tree of ours -> tensors by the other library's names, `convert` read from right to left.

    Raises:
      ValueError: listing parameters for which no rule has a name.
    """
    known = [(*_reversed(rule), TRANSFORMS[rule.transform]) for rule in rules if isinstance(rule.target, str)]
    tensors, nameless = {}, []
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        found = next(((m, template, transform) for ours, template, transform in known if (m := re.fullmatch(ours, path))), None)
        if found is None:
            nameless.append(path)
            continue
        match, template, transform = found
        tensors[template.format(**match.groupdict())] = transform.backward(np.asarray(value))
    if nameless:
        raise ValueError(f"{name}: the other library has no name for {_some(nameless)}")
    return tensors


def shapes_of(init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The parameter shapes of a module's `init` on inputs of these shapes, without computing anything."""
    return jax.eval_shape(lambda key: init(key, *args, **kwargs), jax.random.key(0))["params"]


def expect(config: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Raises ValueError where a configuration says something else than what our network does; absent keys are the library's defaults,
    which are what is wanted."""
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise ValueError(f"{name}: {key} is {config[key]!r}, but the network here has {value!r}")
