"""Reads the arrays of a pickle that holds NumPy arrays in dictionaries, without executing anything from it.

A pickle may ask for any function. Here the three names that an array needs become inert stand-ins, and a
pickle that asks for any other name is refused by it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import InputError, one_line
from unclip_jax.typed import shown

DTYPES = {"f4": np.float32, "f8": np.float64, "f2": np.float16, "i4": np.int32, "i8": np.int64}
DEEPEST = 16  # dictionaries inside one another
_BROKEN = (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, OverflowError),
    MemoryError,
)


class _Refused(pickle.UnpicklingError):
    """Why a pickle is refused."""


class _Dtype:
    # numpy.dtype("f4", False, True), with the state (3, "<", ...).
    def __init__(self, name: Any = None, *_: Any):
        if not isinstance(name, str) or name not in DTYPES:
            raise _Refused(f"it holds values of the type {shown(name)}")
        self.dtype = np.dtype(DTYPES[name])

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise _Refused("its values are of another order of bytes")


class _Array:
    # An array's shape, type and bytes. It is made without arguments of the pickle.
    def __init__(self, *_: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        fits = isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)
        if not fits or not isinstance(state[4], bytes) or not isinstance(state[1], tuple):
            raise _Refused("an array is not described as NumPy does")
        _, shape, kind, transposed, data = state
        whole = all(type(size) is int and 0 <= size < 2**40 for size in shape) and len(shape) <= 16
        if not whole or math.prod(shape) * kind.dtype.itemsize != len(data):
            raise _Refused(f"an array of the shape {shown(shape)} has {len(data)} bytes")
        order = "F" if transposed else "C"
        self.value = np.frombuffer(data, kind.dtype.newbyteorder("<")).reshape(shape, order=order)


class _Ndarray:
    # The name of the class, which `_reconstruct` is given.
    pass


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_KNOWN = {
    **{
        (module, "_reconstruct"): _reconstruct
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(
                f"it asks for {shown(f'{module}.{name}')}; only arrays and dictionaries are read here"
            )
        return _KNOWN[module, name]

    def persistent_load(self, reference: Any) -> Any:
        raise _Refused("it refers to something outside the file")


class NumpyArrays(Mapping):
    """Arrays by name. It has the methods of `files.Weights`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = dict(arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of the array's values."""
        return self._arrays[name].dtype

    def release(self, name: str) -> None:
        """Nothing: the arrays stay until the last is read."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_numpy(path: Path) -> NumpyArrays:
    """The arrays of a pickle of nested dictionaries, by their paths: "VGG16_0.Conv_0.kernel".

    Raises:
      FileNotFoundError: when it is missing.
      ValueError: one line that names the file, when it is damaged, has no arrays, or asks for anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with open(path, "rb") as file:
            value = _Reader(file).load()
        arrays: dict[str, np.ndarray] = {}
        _walk(value, "", arrays, 0)
    except _Refused as error:
        raise InputError(f"{path}: its pickle is refused: {error}") from None
    except (*_BROKEN, pickle.UnpicklingError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged: its pickle ends early or is none ({one_line(error, 100)})"
        ) from None
    if not arrays:
        raise InputError(f"{path} holds no arrays")
    return NumpyArrays(arrays)


def _walk(value: Any, name: str, arrays: dict[str, np.ndarray], depth: int) -> None:
    if isinstance(value, _Array) and value.value is not None:
        arrays[name] = value.value
    elif isinstance(value, dict) and depth < DEEPEST and all(isinstance(key, str) for key in value):
        for key, inner in value.items():
            _walk(inner, f"{name}.{key}" if name else key, arrays, depth + 1)
    else:
        raise _Refused(f"{name or 'it'} is neither an array nor a dictionary of arrays")
