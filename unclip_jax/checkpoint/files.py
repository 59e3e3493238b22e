"""Folders of weights: JSON files, and safetensors whose tensors are read one by one. Nothing in them is
executed."""

from __future__ import annotations

import copy
import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unclip_jax.errors import InputError, one_line

LISTED = 6  # how many names of each kind an error lists
ALIGNMENT = 64  # bytes; an array in memory aligned like this is used by JAX on CPU without a copy

DTYPES = {
    **{
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "BOOL": np.bool_,
        "U8": np.uint8,
    },
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
}

PRECISIONS = ("fp16", "bf16", "fp32")  # variants of a file that hold the same weights in another precision

Place = Callable[[str, np.ndarray], Any]  # a parameter's path and its values -> the array to keep


def read_json(path: Path, whole: str = "folder", infinities: bool = False) -> dict:
    """The JSON object in a file.

    Args:
      whole: what the file is a part of, for errors: "folder" or "bundle".
      infinities: whether numbers may be infinite, as in some files of schedulers. They are no JSON.

    Raises:
      FileNotFoundError, ValueError: one line naming the file, and the `whole`.
    """
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_infinity if infinities else _no_number,
            parse_float=_finite_float,
            parse_int=_int64,
            object_pairs_hook=_each_once,
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the {whole} is incomplete") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}); copy the {whole} again") from None
    except (ValueError, RecursionError) as error:
        check_not_pointer(path)
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); copy the {whole} again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; copy the {whole} again")
    return value


def check_not_pointer(path: Path) -> None:
    """Raises an InputError where a file is what Git LFS leaves in the place of one."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(24)
    if start == b"version https://git-lfs.":
        raise InputError(f"{path} is a pointer of Git LFS and not the data: run `git lfs pull`")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _infinity(text: str) -> float:
    return _no_number(text) if text == "NaN" else float(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of 64 bits")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:20]} is no whole number of 64 bits")
    return int(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!a} stands there twice")
    return value


class Weights(Mapping):
    """The tensors of a folder's files by name.

    A tensor is a read-only view of its file, mapped into memory: the machine reads only the pages that are
    used. `shape(name)` reads no values. `release(name)` frees the memory of a tensor that is no longer
    needed.
    """

    def __init__(self, files: Mapping[str, Path]):
        self._files, self._headers, self._maps = dict(files), {}, {}
        self._inner: dict[str, str] = {}  # of tensors that have another name in their file
        for path in set(self._files.values()):
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._maps[path][:8], "little")
            self._headers[path] = json.loads(self._maps[path][8 : 8 + length]) | {"start": 8 + length}

    def _entry(self, name: str) -> dict:
        return self._headers[self._files[name]][self._inner.get(name, name)]

    def _range(self, name: str) -> tuple[int, int]:
        start, (first, last) = self._headers[self._files[name]]["start"], self._entry(name)["data_offsets"]
        return start + first, start + last

    def release(self, name: str) -> None:
        """Frees the pages that hold only this tensor. They are read again when the tensor is used again."""
        first, last = self._range(name)
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[self._files[name]].madvise(mmap.MADV_DONTNEED, first, last - first)

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin with a prefix, by the rest of their names."""
        part = copy.copy(self)
        names = {name.removeprefix(prefix): name for name in self._files if name.startswith(prefix)}
        part._files = {short: self._files[name] for short, name in names.items()}
        part._inner = {short: self._inner.get(name, name) for short, name in names.items()}
        return part

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors, those of `names` by new names."""
        part = copy.copy(self)
        part._files = {names.get(name, name): file for name, file in self._files.items()}
        part._inner = {names.get(name, name): self._inner.get(name, name) for name in self._files}
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> np.dtype:
        """The type of the tensor's values, from the file's header."""
        return np.dtype(DTYPES[self._entry(name)["dtype"]])

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves beside the tensors."""
        return {k: v for header in self._headers.values() for k, v in header.get("__metadata__", {}).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        (first, last), path = self._range(name), self._files[name]
        dtype = self.dtype(name)
        return np.frombuffer(self._maps[path], dtype, (last - first) // dtype.itemsize, first).reshape(
            self.shape(name)
        )

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_weights(
    folder: Path, names: Iterable[str] = ("model", "diffusion_pytorch_model"), whole: str = "folder"
) -> Weights:
    """The safetensors of a folder: one file (`<name>.safetensors`), or several with an index
    (`<name>.safetensors.index.json`). Where there are none, those of the one precision in PRECISIONS that is
    there (`<name>.fp16.safetensors`).

    Args:
      names: of the file without its ending, in the order in which they are looked for.
      whole: see `read_json`.

    Raises:
      FileNotFoundError: when there are none.
      ValueError: when a file is damaged, when a file lacks a tensor that the index lists, when two files hold
        the same one, when only other variants are there, or several, or when the weights are pickled. A
        pickle can run code, so it is refused.
    """
    names = list(names)
    for reader in (_full, _variant):
        for name in names:
            found = reader(folder, name, whole)
            if found is not None:
                return found
    pickled = sorted(
        path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")
    )
    if pickled:
        raise InputError(
            f"{folder / pickled[0]} is a pickle, which could run code: "
            "save it as safetensors where you trust it"
        )
    expected = " or ".join(f"{name}.safetensors" for name in names)
    raise FileNotFoundError(
        f"{folder / expected} is missing, and with it the weights; the {whole} is incomplete"
    )


def open_file(path: Path) -> Weights:
    """The tensors of one safetensors file.

    Raises:
      FileNotFoundError, ValueError: when it is missing or damaged.
    """
    return Weights({tensor: path for tensor in _names(path, "file")})


def _full(folder: Path, name: str, whole: str) -> Weights | None:
    return _open(folder, name, "", whole)


def _variant(folder: Path, name: str, whole: str) -> Weights | None:
    # The weights of the folder's only variant, where it is a precision.
    single = re.compile(rf"{re.escape(name)}\.(\w+)\.safetensors")
    index = re.compile(rf"{re.escape(name)}\.safetensors\.index\.(\w+)\.json")
    files = sorted(path.name for path in folder.glob(f"{name}.*"))
    there = {m[1] for file in files if (m := single.fullmatch(file) or index.fullmatch(file))}
    if len(there) > 1 or there - set(PRECISIONS):
        raise InputError(
            f"{folder} holds {name}.safetensors only as {', '.join(sorted(there))}: keep one of "
            f"{', '.join(PRECISIONS)}, or save {name}.safetensors"
        )
    return _open(folder, name, f".{there.pop()}", whole) if there else None


def _open(folder: Path, name: str, variant: str, whole: str) -> Weights | None:
    # The weights of one variant; None where there are none.
    index, single = (
        folder / f"{name}.safetensors.index{variant}.json",
        folder / f"{name}{variant}.safetensors",
    )
    if not index.is_file():
        if not single.is_file():
            return None
        return Weights({tensor: single for tensor in _names(single, whole)})
    listed = read_json(index, whole).get("weight_map")
    if not isinstance(listed, dict) or any(Path(str(file)).name != file for file in listed.values()):
        raise InputError(f"{index} has no weight_map of files beside it; copy the {whole} again")
    files = {tensor: folder / file for tensor, file in listed.items()}
    found: dict[str, Path] = {}
    for path in sorted(set(files.values())):
        tensors = _names(path, whole)
        lost = [tensor for tensor, file in files.items() if file == path and tensor not in tensors]
        if lost:
            raise InputError(
                f"{path} lacks {list_names(lost)}, which {index.name} lists; copy the {whole} again"
            )
        twice = found.keys() & set(tensors)
        if twice:
            raise InputError(
                f"{path} holds {list_names(list(twice))}, which another file of {folder} holds too"
            )
        found |= dict.fromkeys(tensors, path)
    return Weights(found)


def _names(path: Path, whole: str) -> list[str]:
    try:
        with safe_open(path, "np") as file:  # it checks the whole header, and the file's length against it
            names = list(file.keys())
            other = sorted({file.get_slice(name).get_dtype() for name in names} - DTYPES.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the {whole} is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        check_not_pointer(path)
        raise InputError(f"{path} cannot be read as safetensors ({error}); copy the {whole} again") from None
    if other:
        raise InputError(f"{path} holds tensors of {', '.join(other)}; known here: {', '.join(DTYPES)}")
    return names


def check_floats(weights: Weights, names: Iterable[str], where: str) -> None:
    """Raises an InputError where a parameter's values are integers: they are of a quantised network."""
    others = [name for name in names if weights.dtype(name).kind in "iub"]
    if others:
        raise InputError(
            f"{where} holds integers for {list_names(others)}: quantised weights cannot be read; "
            "save them as float16 or float32"
        )


def list_names(names: Sequence[str]) -> str:
    """The first few of the sorted names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def aligned(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Uninitialised memory that JAX on CPU uses without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT - 1, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def finite(value: np.ndarray, name: str, where: str) -> np.ndarray:
    """Returns a parameter unchanged.

    Raises:
      ValueError: naming the file or part `where` and the parameter, when it holds NaN or infinity.
    """
    if not np.isfinite(np.sum(value, dtype=np.float64)):  # the sum of finite float32 values is finite
        raise InputError(
            f"{where}: {name} holds values that are not finite (NaN or infinity): the weights are damaged"
        )
    return value


def cast(value: Any, dtype: Any, name: str, where: str) -> np.ndarray:
    """A parameter as it is written, in a type that may be narrower. NaN and infinity are refused on load.

    Raises:
      ValueError: when it holds a value that is too large for the type.
    """
    value = np.asarray(value)
    with np.errstate(over="ignore"):
        stored = np.asarray(value, dtype, order="C")
    if np.any(np.isfinite(value) & ~np.isfinite(stored)):
        raise InputError(
            f"{where}: {name} reaches {np.abs(value).max():.3g}, too large for {np.dtype(dtype)}; "
            "write float32"
        )
    return stored


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict | None = None) -> None:
    """Writes a safetensors file that everyone may read.

    Raises:
      OSError: one line, when it cannot be written (a full disk).
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({one_line(error)})") from None
    path.chmod(0o644)  # safetensors lets only the owner read


def keep(name: str, value: np.ndarray) -> np.ndarray:
    """The `Place` of weights that stay on the host, in float32."""
    owned = (
        value.flags.writeable and value.flags.c_contiguous
    )  # a view of a file is not writeable; it must be copied
    if owned and value.dtype == np.float32 and value.ctypes.data % ALIGNMENT == 0:
        return value
    copy = aligned(value.shape)
    with np.errstate(over="ignore"):  # infinite values are found by `finite`
        copy[...] = value
    return copy
