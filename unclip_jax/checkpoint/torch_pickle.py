"""Pickles that torch wrote, as inert values. Nothing from them is executed.

A pickle is a program for a small machine, and usual readers of pickles let it call any function. The machine
here calls nothing: it knows tensors, numbers, text, lists and dictionaries. A TorchScript module becomes a
dictionary of its attributes; its code is not looked at. With `modules`, whole pickled modules of those
classes become dictionaries of their parameters, buffers and modules. With `inert`, objects of these classes
are kept as records. A file that asks for anything else is refused by the name of what it asks for.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unclip_jax.errors import InputError, one_line
from unclip_jax.typed import shown

DTYPES = {
    **{"Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16},
    **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8},
    "Bool": np.bool_,
}
MOST_VALUES, LONGEST_NAME = 10**6, 1000


class _Refused(ValueError):
    """Why a pickle is refused."""


# ------------------------------------------------------------------------------------------- values
@dataclass(frozen=True)
class _Global:
    # A name that a pickle asks for. It is never looked up.
    name: str


@dataclass(frozen=True)
class Storage:
    """The values of one or several tensors: where they lie in the file, and their type."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset, shape and strides are in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Module(dict):
    """The attributes of a TorchScript module, or the parameters, buffers and modules of a pickled one."""


@dataclass
class Inert:
    """An object of a class that the reader named, as its pickle describes it. Nothing of it is run.

    name: of the class. args: what it was made with. state: what was set behind that; None for nothing.
    """

    name: str
    args: tuple
    state: Any = None


_MARK = object()


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise _Refused(f"a tensor's {name} is {shown(value)}")
    return value


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 16:
        raise _Refused(f"a tensor's {name} is {shown(value)}")
    return tuple(_whole(size, name) for size in value)


def _storage(reference: Any) -> Storage | _Global:
    # ("storage", type, key, device, count), and in old files a view, which is None. Old files name the class
    # of a module here, too: ("module", class, file, source).
    if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
        return _expect(reference[1], _Global)
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        raise _Refused(f"it refers to {shown(reference)}")
    kind, key, count = reference[1], reference[2], reference[4]
    name = kind.name if isinstance(kind, _Global) else ""
    dtype = DTYPES.get(name.removeprefix("torch.").removesuffix("Storage"))
    if dtype is None or not isinstance(key, str):
        raise _Refused(f"it holds values of the type {shown(name or kind)}")
    if len(reference) == 6 and reference[5] is not None:
        raise _Refused(
            "it holds a view of other values, as torch before 0.4 wrote; save it with a newer torch"
        )
    return Storage(key, np.dtype(dtype), _whole(count, "count"))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise _Refused("a tensor has no values")
    offset, shape, strides = _whole(offset, "offset"), _sizes(shape, "shape"), _sizes(strides, "strides")
    if len(shape) != len(strides):
        raise _Refused(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if math.prod(shape) > storage.count or (math.prod(shape) > 0 and last >= storage.count):
        raise _Refused(f"a tensor {list(shape)} reaches beyond its {storage.count} values")
    return Tensor(storage, offset, shape, strides)


def _call(name: str, args: tuple) -> Any:
    # What a call in a pickle stands for. No other calls are known.
    if name == "collections.OrderedDict" and args == ():
        return {}
    if name == "collections.OrderedDict" and len(args) == 1 and isinstance(args[0], list):
        # Python 2 wrote the items here.
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in args[0]):
            raise _Refused("a dictionary has a key without a value")
        return dict(_pairs([value for pair in args[0] for value in pair]))
    if name == "torch._utils._rebuild_tensor_v2" and len(args) >= 4:
        return _tensor(*args[:4])
    if name in ("torch._utils._rebuild_parameter", "torch.jit._pickle.restore_type_tag") and args:
        return args[0]
    if name.startswith("torch.jit._pickle.build_") and len(args) == 1:
        return args[0]
    if name in _OF_MODULES:  # where tensors lie, and names of buffers: nothing that is needed
        return None
    raise _Refused(f"it calls {shown(name)} with arguments that are not known here")


_KNOWN_GLOBALS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.jit._pickle.restore_type_tag",
    *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
    *(f"torch.{kind}Storage" for kind in DTYPES),
)


_OF_MODULES = ("torch.device", "builtins.set", "__builtin__.set")


def _global(name: str, modules: tuple[str, ...], inert: tuple[str, ...]) -> _Global:
    known = name in _KNOWN_GLOBALS or name in inert or name.startswith("__torch__.")
    if modules and not known:
        known = name in _OF_MODULES or name.startswith(modules)
    if not known:
        raise _Refused(
            f"it asks for {shown(name)}; only tensors, and the dictionaries and modules that hold them, are "
            "read here"
        )
    return _Global(name)


# ------------------------------------------------------------------------------------------- the machine
def _pairs(items: list) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise _Refused("a dictionary has a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        key = key.name if isinstance(key, _Global) else key  # of a class, its name
        if not isinstance(key, (str, int)):
            raise _Refused(f"a dictionary has the key {shown(key)}")
        yield key, value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused("its instructions do not fit their values")
    return value


class _Machine:
    """Runs a pickle's instructions on a stack of inert values.

    Args:
      modules: how the names of classes begin whose objects are read as `_Module`s.
      inert: the names of classes whose objects are read as `Inert`.
    """

    def __init__(self, modules: tuple[str, ...] = (), inert: tuple[str, ...] = ()):
        self.modules, self.inert = modules, inert
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def pop_to_mark(self) -> list:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise _Refused("its instructions do not fit their values")

    def run(self, stream: io.BufferedIOBase) -> Any:
        """The value of the pickle at the stream's position. The stream then stands behind it."""
        for code, arg, _ in pickletools.genops(stream):
            if code.name == "STOP":
                return self.stack.pop()
            self.step(code.name, arg)
        raise _Refused("it has no end")

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(arg)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(arg)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(arg)])
        elif name == "GLOBAL":
            stack.append(_global(".".join(arg.split(" ", 1)), self.modules, self.inert))
        elif name == "STACK_GLOBAL":
            attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
            stack.append(_global(f"{module}.{attribute}", self.modules, self.inert))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "LIST":
            stack.append(self.pop_to_mark())
        elif name == "DICT":
            stack.append(dict(_pairs(self.pop_to_mark())))
        elif name == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = self.pop_to_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _expect(stack[-1], dict).update(_pairs([key, value]))
        elif name == "SETITEMS":
            items = self.pop_to_mark()
            _expect(stack[-1], dict).update(_pairs(items))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            args, called = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
            known = called.name not in self.inert
            stack.append(_call(called.name, args) if known else Inert(called.name, args))
        elif name == "NEWOBJ":
            args, made = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
            if made.name in self.inert:
                stack.append(Inert(made.name, args))
            elif args or not made.name.startswith(("__torch__.", *self.modules)):
                raise _Refused(f"it makes a {shown(made.name)}")
            else:
                stack.append(_Module())
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
            elif isinstance(stack[-1], _Module) and self.modules:
                for kind in ("_parameters", "_buffers", "_modules"):
                    stack[-1].update(_expect(_expect(state, dict).get(kind, {}), dict))
            elif isinstance(stack[-1], _Module):
                stack[-1].update(_pairs([x for pair in _expect(state, dict).items() for x in pair]))
            else:  # the attribute `_metadata` of a dictionary, which holds versions of layers
                _expect(stack[-1], dict)
        elif name == "POP":
            stack.pop()
        else:
            raise _Refused(f"it has the instruction {name}, which files of tensors do not need")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
}
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, UnicodeError)


def unpickle(
    stream: io.BufferedIOBase, path: Path, modules: tuple[str, ...] = (), inert: tuple[str, ...] = ()
) -> Any:
    """The value of the pickle at a stream's position, of inert values alone.

    Args:
      stream: with the pickle; it then stands behind it.
      path: of the file, for errors.
      modules: how the names of classes begin whose objects are read as modules.
      inert: the names of classes whose objects are read as `Inert`.

    Raises:
      ValueError: one line, when it is damaged or asks for anything else.
    """
    try:
        return _Machine(modules, inert).run(stream)
    except _Refused as error:
        raise InputError(f"{path}: its pickle is refused: {error}") from None
    except _BROKEN as error:
        raise InputError(
            f"{path} is damaged: its pickle ends early or is none ({one_line(error, 100)})"
        ) from None


def tensors_in(value: Any, path: Path) -> dict[str, Tensor]:
    """The tensors inside dictionaries, modules and lists, by their paths.

    Raises:
      ValueError: when too much lies inside one another.
    """
    # A value may lie in itself, or many times in others, so what is walked through is bounded.
    found: dict[str, Tensor] = {}
    waiting, seen = [("", value)], 0
    while waiting:
        name, value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or len(name) > LONGEST_NAME:
            raise InputError(f"{path}: its pickle is refused: its values lie too deep inside one another")
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (dict, list, tuple)):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(items)]
    return found
