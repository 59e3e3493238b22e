"""Reads the tensors of files that torch wrote, without torch, and without executing anything from them.

Three layouts are read: what `torch.save` writes (a zip archive since torch 1.6, a row of pickles before), and
TorchScript (`torch.jit.save`). A pickle is a program for a small machine, and usual readers of pickles let it
call any function. The machine here calls nothing: it knows tensors, numbers, text, lists and dictionaries. A
TorchScript module becomes a dictionary of its attributes; its code is not looked at. A file that asks for
anything else is refused by the name of what it asks for.

Tensors are views of the file, mapped into memory. They are named by their path: "net.layers.conv.weight".
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
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
LEGACY = 0x1950A86A20F9469CFC6C  # the number with which files of torch before 1.6 begin
LARGEST_PICKLE = 2**27  # bytes; those of networks are below 1 MB
MOST_VALUES, LONGEST_NAME = 10**6, 1000


class _Refused(ValueError):
    """Why a pickle is refused."""


# ------------------------------------------------------------------------------------------- values
@dataclass(frozen=True)
class _Global:
    # A name that a pickle asks for. It is never looked up.
    name: str


@dataclass(frozen=True)
class _Storage:
    # The values of one or several tensors: where they lie in the file, and their type.
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    # offset, shape and strides are in values.
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Module(dict):
    """The attributes of a TorchScript module."""


_MARK = object()


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise _Refused(f"a tensor's {name} is {shown(value)}")
    return value


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 16:
        raise _Refused(f"a tensor's {name} is {shown(value)}")
    return tuple(_whole(size, name) for size in value)


def _storage(reference: Any) -> _Storage:
    # ("storage", type, key, device, count), and in old files a view, which is None.
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
    return _Storage(key, np.dtype(dtype), _whole(count, "count"))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor has no values")
    offset, shape, strides = _whole(offset, "offset"), _sizes(shape, "shape"), _sizes(strides, "strides")
    if len(shape) != len(strides):
        raise _Refused(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if math.prod(shape) > storage.count or (math.prod(shape) > 0 and last >= storage.count):
        raise _Refused(f"a tensor {list(shape)} reaches beyond its {storage.count} values")
    return _Tensor(storage, offset, shape, strides)


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
    raise _Refused(f"it calls {shown(name)} with arguments that are not known here")


_KNOWN_GLOBALS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.jit._pickle.restore_type_tag",
    *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
    *(f"torch.{kind}Storage" for kind in DTYPES),
)


def _global(name: str) -> _Global:
    if name not in _KNOWN_GLOBALS and not name.startswith("__torch__."):
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
        if not isinstance(key, (str, int)):
            raise _Refused(f"a dictionary has the key {shown(key)}")
        yield key, value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused("its instructions do not fit their values")
    return value


class _Machine:
    """Runs a pickle's instructions on a stack of inert values."""

    def __init__(self):
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
            stack.append(_global(".".join(arg.split(" ", 1))))
        elif name == "STACK_GLOBAL":
            attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
            stack.append(_global(f"{module}.{attribute}"))
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
            stack.append(_call(called.name, args))
        elif name == "NEWOBJ":
            args, made = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
            if args or not made.name.startswith("__torch__."):
                raise _Refused(f"it makes a {shown(made.name)}")
            stack.append(_Module())
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Module):
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


def _unpickle(stream: io.BufferedIOBase, path: Path) -> Any:
    # One pickle's value, of inert values alone.
    try:
        return _Machine().run(stream)
    except _Refused as error:
        raise InputError(f"{path}: its pickle is refused: {error}") from None
    except _BROKEN as error:
        raise InputError(
            f"{path} is damaged: its pickle ends early or is none ({one_line(error, 100)})"
        ) from None


def _tensors(value: Any, path: Path) -> dict[str, _Tensor]:
    # The tensors inside dictionaries, modules and lists, by their paths. A value may lie in itself, or many
    # times in others, so what is walked through is bounded.
    found: dict[str, _Tensor] = {}
    waiting, seen = [("", value)], 0
    while waiting:
        name, value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or len(name) > LONGEST_NAME:
            raise InputError(f"{path}: its pickle is refused: its values lie too deep inside one another")
        if isinstance(value, _Tensor):
            found[name] = value
        elif isinstance(value, (dict, list, tuple)):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(items)]
    return found


# ------------------------------------------------------------------------------------------- files
class TorchTensors(Mapping):
    """The tensors of a file by name: read-only views. It has the methods of `files.Weights`."""

    def __init__(self, tensors: Mapping[str, _Tensor], find: Callable[[_Storage], memoryview]):
        self._tensors, self._find = dict(tensors), find

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


def open_torch(path: Path) -> TorchTensors:
    """The tensors of a file that `torch.save` or `torch.jit.save` wrote. Values that are no tensors (numbers,
    text) are passed over.

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
    value, find = (_zipped if data[:4] == b"PK\x03\x04" else _legacy)(path, data)
    tensors = _tensors(value, path)
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return TorchTensors(tensors, find)


def _zipped(path: Path, data: mmap.mmap) -> tuple[Any, Callable[[_Storage], memoryview]]:
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
    value = _unpickle(io.BytesIO(entry(pickles[0])), path)

    def find(storage: _Storage) -> memoryview:
        found = entry(f"{root}data/{storage.key}")
        if len(found) != storage.count * storage.dtype.itemsize:
            raise InputError(
                f"{path} is damaged: values {shown(storage.key)} have {len(found)} bytes in place of "
                f"{storage.count * storage.dtype.itemsize}; copy it again"
            )
        return found

    return value, find


def _legacy(path: Path, data: mmap.mmap) -> tuple[Any, Callable[[_Storage], memoryview]]:
    # Pickles of a magic number, a version, the machine's sizes, the value and the keys of the storages; then
    # for each key the number of values in 8 bytes, and the values.
    head = data[:64]
    if head[:1] != b"\x80" or LEGACY.to_bytes(10, "little") not in head:
        raise InputError(
            f"{path} was not written by torch: it is neither a zip archive nor torch's older format"
        )
    _unpickle(data, path)
    version, machine = _unpickle(data, path), _unpickle(data, path)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise InputError(f"{path} is of a version of torch's older format that is not known here")
    value, keys = _unpickle(data, path), _unpickle(data, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path} is damaged: it does not list its values")
    kinds = {tensor.storage.key: tensor.storage.dtype for tensor in _tensors(value, path).values()}
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

    def find(storage: _Storage) -> memoryview:
        first, size = places.get(storage.key, (0, -1))
        if size != storage.count * storage.dtype.itemsize:
            raise InputError(f"{path} is damaged: values {shown(storage.key)} are missing; copy it again")
        return memoryview(data)[first : first + size]

    return value, find
