"""Reads the tensors of files that torch wrote, without torch, and without executing anything from them.

Three layouts are read: what `torch.save` writes (a zip archive since torch 1.6, a row of pickles before), and
TorchScript (`torch.jit.save`). `torch_pickle` reads the pickles in them.

Tensors are views of the file, mapped into memory. They are named by their path: "net.layers.conv.weight".
"""

from __future__ import annotations

import io
import mmap
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.torch_pickle import Storage, Tensor, tensors_in, unpickle
from unclip_jax.errors import InputError, one_line
from unclip_jax.typed import shown

LEGACY = 0x1950A86A20F9469CFC6C  # the number with which files of torch before 1.6 begin
LARGEST_PICKLE = 2**27  # bytes; those of networks are below 1 MB


# ------------------------------------------------------------------------------------------- files
class TorchTensors(Mapping):
    """The tensors of a file by name: read-only views. It has the methods of `files.Weights`.

    value: the whole value of the file's pickle, inert, for what stands beside the tensors.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], find: Callable[[Storage], memoryview], value: Any = None
    ):
        self._tensors, self._find, self.value = dict(tensors), find, value

    def under(self, prefix: str) -> TorchTensors:
        """The tensors whose names begin with a prefix, without it."""
        found = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        return TorchTensors(found, self._find)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. It reads no values."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of the tensor's values."""
        return self._tensors[name].storage.dtype

    def release(self, name: str) -> None:
        """Nothing: the system takes the pages of a mapped file when it needs them."""

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, dtype)
        values = np.frombuffer(self._find(tensor.storage), dtype, tensor.storage.count)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(
            values[tensor.offset :], tensor.shape, strides, writeable=False
        )

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_torch(path: Path, modules: tuple[str, ...] = (), inert: tuple[str, ...] = ()) -> TorchTensors:
    """The tensors of a file that `torch.save` or `torch.jit.save` wrote. Values that are no tensors (numbers,
    text) are passed over.

    Args:
      path: the file.
      modules: how the names of classes begin that a whole pickled module may consist of, such as "dall_e.".
        Their objects become dictionaries of their parameters, buffers and modules. No class is looked up.
      inert: the names of classes whose objects may lie beside the tensors; they are read as
        `torch_pickle.Inert`.

    Raises:
      FileNotFoundError: when it is missing.
      ValueError: one line that names the file, when it is damaged, is of another kind, holds no tensors, or
        asks for anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; copy it again")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    value, find = (_zipped if data[:4] == b"PK\x03\x04" else _legacy)(path, data, modules, inert)
    tensors = tensors_in(value, path)
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return TorchTensors(tensors, find, value)


def _zipped(
    path: Path, data: mmap.mmap, modules: tuple[str, ...], inert: tuple[str, ...]
) -> tuple[Any, Callable[[Storage], memoryview]]:
    # A zip archive "<name>/data.pkl", "<name>/data/<key>", ..., whose entries are not compressed.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError) as error:
        raise InputError(
            f"{path} is damaged: it is no whole zip archive ({one_line(error, 100)}); copy it again"
        ) from None
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path} is a zip archive, but none that torch wrote: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    checked: set[str] = set()

    def entry(name: str) -> memoryview:
        if name not in entries:
            raise InputError(f"{path} is damaged: it lacks {name}; copy it again")
        info = entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(f"{path}: {name} is compressed or encrypted, which torch does not write")
        start = info.header_offset
        header = data[start : start + 30]
        first = start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        found = memoryview(data)[first : first + info.file_size]
        if header[:4] != b"PK\x03\x04" or len(found) != info.file_size:
            raise InputError(f"{path} is damaged: {name} is cut off; copy it again")
        if name not in checked and zlib.crc32(found) != info.CRC:
            raise InputError(f"{path} is damaged: the checksum of {name} differs; copy it again")
        checked.add(name)
        return found

    order = f"{root}byteorder"
    if order in entries and bytes(entry(order)) != b"little":
        raise InputError(f"{path} was written by a machine with another order of bytes; save it again")
    if entries[pickles[0]].file_size > LARGEST_PICKLE:
        raise InputError(f"{path}: its pickle is larger than that of any network")
    value = unpickle(io.BytesIO(entry(pickles[0])), path, modules, inert)

    def find(storage: Storage) -> memoryview:
        found = entry(f"{root}data/{storage.key}")
        if len(found) != storage.count * storage.dtype.itemsize:
            raise InputError(
                f"{path} is damaged: values {shown(storage.key)} have {len(found)} bytes in place of "
                f"{storage.count * storage.dtype.itemsize}; copy it again"
            )
        return found

    return value, find


def _legacy(
    path: Path, data: mmap.mmap, modules: tuple[str, ...], inert: tuple[str, ...]
) -> tuple[Any, Callable[[Storage], memoryview]]:
    # Pickles of a magic number, a version, the machine's sizes, the value and the keys of the storages; then
    # for each key the number of values in 8 bytes, and the values.
    head = data[:64]
    if head[:1] != b"\x80" or LEGACY.to_bytes(10, "little") not in head:
        raise InputError(
            f"{path} was not written by torch: it is neither a zip archive nor torch's older format"
        )
    unpickle(data, path)
    version, machine = unpickle(data, path), unpickle(data, path)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise InputError(f"{path} is of a version of torch's older format that is not known here")
    value, keys = unpickle(data, path, modules, inert), unpickle(data, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path} is damaged: it does not list its values")
    kinds = {tensor.storage.key: tensor.storage.dtype for tensor in tensors_in(value, path).values()}
    position, places = data.tell(), {}
    for key in keys:
        count = int.from_bytes(data[position : position + 8], "little")
        if key not in kinds:
            raise InputError(f"{path}: values {shown(key)} belong to no tensor, so their type is not known")
        size = count * kinds[key].itemsize
        if position + 8 + size > len(data):
            raise InputError(f"{path} is damaged: it ends early; copy it again")
        places[key] = (position + 8, size)
        position += 8 + size

    def find(storage: Storage) -> memoryview:
        first, size = places.get(storage.key, (0, -1))
        if size != storage.count * storage.dtype.itemsize:
            raise InputError(f"{path} is damaged: values {shown(storage.key)} are missing; copy it again")
        return memoryview(data)[first : first + size]

    return value, find
