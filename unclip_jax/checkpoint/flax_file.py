"""Reads Flax's msgpack files (`flax_model.msgpack`) without executing anything from them.

Such a file is a dictionary of dictionaries. An array in it is an extension of msgpack (type 1) that holds
msgpack again: its shape, the name of its type, its bytes. An array of more than 2^30 bytes is a dictionary
with its shape and flat pieces. Nothing else may lie in a file of weights, and all else is refused.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unclip_jax.checkpoint.files import check_not_pointer, list_names, read_json
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

FILE = "flax_model.msgpack"
INDEX = f"{FILE}.index.json"
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "uint8")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
CHUNKED = "__msgpack_chunked_array__"
DEEPEST = 32  # dictionaries inside one another
MOST = 2**20  # entries of one dictionary


class _Broken(ValueError):
    """What is wrong with a file."""


@dataclass(frozen=True)
class _Bytes:
    """Where the bytes of an array lie: ranges of mapped files, one after the other."""

    spans: tuple[tuple[mmap.mmap, int, int], ...]

    def __len__(self) -> int:
        return sum(last - first for _, first, last in self.spans)

    def cut(self, start: int, stop: int) -> _Bytes:
        """The bytes from `start` to `stop`."""
        kept, at = [], 0
        for data, first, last in self.spans:
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                kept.append((data, first + low, first + high))
            at += last - first
        return _Bytes(tuple(kept))


@dataclass(frozen=True)
class _Array:
    shape: tuple[int, ...]
    dtype: np.dtype
    bytes_: _Bytes


class _Reader:
    """Reads values of msgpack from a mapped file, from a place on."""

    def __init__(self, data: mmap.mmap, at: int = 0):
        self.data, self.at = data, at

    def skip(self, size: int) -> int:
        """Passes over so many bytes, and returns where they begin."""
        if size > len(self.data) - self.at:
            raise _Broken("it ends early")
        self.at += size
        return self.at - size

    def number(self, size: int, signed: bool = False) -> int:
        """A whole number of so many bytes."""
        first = self.skip(size)
        return int.from_bytes(self.data[first : first + size], "big", signed=signed)

    def text(self, size: int) -> str:
        """A text of so many bytes."""
        if size > 2**16:
            raise _Broken("it holds a text of more than 65,536 bytes")
        first = self.skip(size)
        try:
            return self.data[first : first + size].decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken("a name in it is no UTF-8") from None

    def value(self, depth: int = 0) -> Any:
        """The next value: a dictionary, a list, a text, a number, a truth value, None, `_Bytes`, `_Array`."""
        if depth > DEEPEST:
            raise _Broken(f"it has more than {DEEPEST} dictionaries inside one another")
        code = self.number(1)
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code < 0x90 or code in (0xDE, 0xDF):
            size = code - 0x80 if code < 0x90 else self.number(2 if code == 0xDE else 4)
            return self.dictionary(size, depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            size = code - 0x90 if code < 0xA0 else self.number(2 if code == 0xDC else 4)
            if size > MOST:
                raise _Broken(f"it holds a list of {size} entries")
            return [self.value(depth + 1) for _ in range(size)]
        if code < 0xC0 or 0xD9 <= code <= 0xDB:
            return self.text(code - 0xA0 if code < 0xC0 else self.number(1 << (code - 0xD9)))
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xC4 <= code <= 0xC6:
            size = self.number(1 << (code - 0xC4))
            first = self.skip(size)
            return _Bytes(((self.data, first, first + size),))
        if 0xCC <= code <= 0xD3:
            return self.number(1 << (code & 3), signed=code >= 0xD0)
        if 0xC7 <= code <= 0xC9 or 0xD4 <= code <= 0xD8:
            size = self.number(1 << (code - 0xC7)) if code <= 0xC9 else 1 << (code - 0xD4)
            return self.extension(size, depth)
        raise _Broken(f"it holds a value of the kind {code:#x}, which no array needs")

    def dictionary(self, size: int, depth: int) -> dict[str, Any]:
        """A dictionary of so many entries, whose keys are texts."""
        if size > MOST:
            raise _Broken(f"it holds a dictionary of {size} entries")
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise _Broken("a name in it is no text")
            if key in found:
                raise _Broken(f"{shown(key)} stands in it twice")
            found[key] = self.value(depth + 1)
        return found

    def extension(self, size: int, depth: int) -> _Array:
        """An array, whose description has so many bytes."""
        kind = self.number(1)
        last = self.skip(size) + size
        if kind != 1:
            raise _Broken("it holds values that are no arrays")
        inner = _Reader(self.data, last - size)
        found = inner.value(depth + 1)
        if not isinstance(found, list) or len(found) != 3 or inner.at != last:
            raise _Broken("an array in it is not described as Flax does")
        shape, name, values = found
        if not isinstance(values, _Bytes) or not isinstance(name, str) or name not in DTYPES:
            raise _Broken(f"an array in it has the type {shown(name)}")
        return _array(shape, DTYPES[name], values)


def _array(shape: Any, dtype: np.dtype, values: _Bytes) -> _Array:
    whole = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not whole or math.prod(shape) * dtype.itemsize != len(values):
        raise _Broken(f"an array of the shape {shown(shape)} has {len(values)} bytes")
    return _Array(tuple(shape), dtype, values)


def _joined(value: dict[str, Any]) -> _Array:
    # An array that lies in pieces.
    shape, chunks = value.get("shape"), value.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
        raise _Broken("an array in pieces is not described as Flax does")
    try:
        sizes = [shape[str(i)] for i in range(len(shape))]
        pieces = [chunks[str(i)] for i in range(len(chunks))]
    except KeyError as error:
        raise _Broken(f"an array in pieces lacks {error}") from None
    if not all(isinstance(piece, _Array) and piece.dtype == pieces[0].dtype for piece in pieces):
        raise _Broken("the pieces of an array have different types")
    spans = tuple(span for piece in pieces for span in piece.bytes_.spans)
    return _array(sizes, pieces[0].dtype, _Bytes(spans))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, _Array]:
    found: dict[str, _Array] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            found |= {name: _joined(inner)} if CHUNKED in inner else _flat(inner, f"{name}/")
        elif isinstance(inner, _Array):
            found[name] = inner
        else:
            raise _Broken(f"{shown(name)} in it is no array")
    return found


class FlaxWeights(Mapping):
    """The arrays of files by their paths ("model/encoder/embed_tokens/embedding").

    It has the methods of `files.Weights`: an array is a read-only view of its file, mapped into memory.
    """

    def __init__(self, arrays: Mapping[str, _Array]):
        self._arrays = dict(arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of the array's values."""
        return self._arrays[name].dtype

    def release(self, name: str) -> None:
        """Frees the pages that hold only this array. They are read again when the array is used again."""
        for data, first, last in self._arrays[name].bytes_.spans:
            first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first and hasattr(mmap, "MADV_DONTNEED"):
                data.madvise(mmap.MADV_DONTNEED, first, last - first)

    def unstacked(self, layers: Mapping[str, str]) -> FlaxWeights:
        """The arrays of each layer by themselves, where a file holds those of all layers in one.

        Args:
          layers: the part of a path under which arrays of several layers lie -> that of one layer, to which
            its number is added.

        Raises:
          ValueError: when such an array has no axis of layers.
        """
        found: dict[str, _Array] = {}
        for name, array in self._arrays.items():
            parts = name.split("/")
            stacked = next((i for i, part in enumerate(parts) if part in layers), None)
            if stacked is None:
                found[name] = array
                continue
            if not array.shape:
                raise InputError(f"{name} holds one number, and not that of each layer")
            size = len(array.bytes_) // max(array.shape[0], 1)
            for i in range(array.shape[0]):
                path = [*parts[:stacked], f"{layers[parts[stacked]]}{i}", *parts[stacked + 1 :]]
                piece = array.bytes_.cut(i * size, (i + 1) * size)
                found["/".join(path)] = _Array(array.shape[1:], array.dtype, piece)
        return FlaxWeights(found)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        views = [
            np.frombuffer(data, np.uint8, last - first, first) for data, first, last in array.bytes_.spans
        ]
        values = views[0] if len(views) == 1 else np.concatenate([*views, np.zeros(0, np.uint8)])
        return values.view(array.dtype).reshape(array.shape)

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def read_arrays(path: Path) -> dict[str, _Array]:
    """The arrays of one file.

    Raises:
      FileNotFoundError: when it is missing.
      ValueError: when it is damaged, or holds something else than arrays.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(data)
        value = reader.value()
        if not isinstance(value, dict):
            raise _Broken("it holds no dictionary")
        if reader.at != len(data):
            raise _Broken("something follows the weights")
        return _flat(value)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the folder is incomplete") from None
    except (_Broken, ValueError) as error:  # an empty file cannot be mapped
        check_not_pointer(path)
        reason = error if isinstance(error, _Broken) else "it is empty"
        raise InputError(
            f"{path} cannot be read as Flax's msgpack ({reason}); copy the folder again"
        ) from None


def open_flax(folder: Path) -> FlaxWeights:
    """The weights of a folder: `flax_model.msgpack`, or several files with an index
    (`flax_model.msgpack.index.json`).

    Raises:
      FileNotFoundError: when there are none.
      ValueError: when a file is damaged, lacks an array that the index lists, or holds one that another does.
    """
    if not (folder / INDEX).is_file():
        return FlaxWeights(read_arrays(folder / FILE))
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or any(Path(str(file)).name != file for file in listed.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of files beside it; copy the folder again")
    found: dict[str, _Array] = {}
    for file in sorted(set(listed.values())):
        arrays = read_arrays(folder / file)
        if found.keys() & arrays.keys():
            twice = list_names(list(found.keys() & arrays.keys()))
            raise InputError(f"{folder / file} holds {twice}, which another file of {folder} holds too")
        found |= arrays
    lost = [name for name in listed if name not in found]
    if lost:
        raise InputError(f"{folder} lacks {list_names(lost)}, which {INDEX} lists; copy the folder again")
    return FlaxWeights(found)
