"""TFRecord files and `tf.train.Example` messages without TensorFlow.

A TFRecord file is a sequence of records, each framed as

    uint64 length | uint32 masked_crc32c(length) | payload (length bytes) | uint32 masked_crc32c(payload)

in little-endian order. The payload is, by convention, a serialised `tf.train.Example`:

    Example { Features features = 1 }      Features { map<string, Feature> feature = 1 }
    Feature { oneof { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3 } }
    BytesList { repeated bytes value = 1 } FloatList { repeated float value = 1 [packed] }
    Int64List { repeated int64 value = 1 [packed] }

Both formats are small enough to be written out here, so that machines without TensorFlow can read
them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from unclip_jax.errors import InputError

_HEADER_BYTES = 12  # the length and its crc
_FOOTER_BYTES = 4  # the crc of the payload
_MASK_DELTA = 0xA282EAD8


# ------------------------------------------------------------------------------------------------------------
# crc32c (Castagnoli), reflected polynomial 0x82F63B78
# ------------------------------------------------------------------------------------------------------------
def _make_crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE = _make_crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data` as an unsigned 32-bit integer. `crc32c(b"123456789") == 0xE3069283`."""
    table, crc = _CRC_TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The crc as TFRecord stores it: rotated and offset, because the data may hold crcs itself."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------------
# Record framing
# ------------------------------------------------------------------------------------------------------------
def write_records(path: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Writes records as one TFRecord file and returns how many there were.

    The file is written under a temporary name in the same folder and renamed when it is complete, so that
    `path` never holds half a shard.
    """
    path = os.fspath(path)
    partial, count = f"{path}.partial-{os.getpid()}", 0
    try:
        with open(partial, "wb") as file:
            for record in records:
                header = struct.pack("<Q", len(record))
                file.write(header + struct.pack("<I", masked_crc32c(header)))
                file.write(record)
                file.write(struct.pack("<I", masked_crc32c(record)))
                count += 1
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    return count


def index_records(path_or_fileobj: str | os.PathLike | BinaryIO, check_payload: bool = False) -> np.ndarray:
    """Where the payload of each record lies: int64 (N, 2), (offset, length) in bytes, in file order.

    Only the framing is read (16 bytes of each record), so that the cost does not depend on their size.

    Args:
      path_or_fileobj: a path, or an object with `seek` and `read`, read from its beginning and left open.
      check_payload: whether to read every payload and check its crc.

    Raises:
      ValueError: with one line that names the file and the byte offset of the record's header, if the file is
        truncated, or if the crc of a length or (with `check_payload`) of a payload is wrong.
      OSError: if the file cannot be opened.
    """
    if isinstance(path_or_fileobj, (str, os.PathLike)):
        with open(path_or_fileobj, "rb") as file:
            return _index_file(file, os.fspath(path_or_fileobj), check_payload)
    return _index_file(path_or_fileobj, str(getattr(path_or_fileobj, "name", "<file object>")), check_payload)


def _index_file(file: BinaryIO, name: str, check_payload: bool) -> np.ndarray:
    entries: list[tuple[int, int]] = []
    start = 0  # offset of the current record's header
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    while header:
        if len(header) < _HEADER_BYTES:
            found = f"{len(header)} of {_HEADER_BYTES} header bytes"
            raise InputError(f"{name}: truncated TFRecord: {found} at byte {start}")
        length, length_crc = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != length_crc:
            raise InputError(f"{name}: corrupt TFRecord: wrong crc of the record length at byte {start}")
        payload_start = start + _HEADER_BYTES
        if length > size - payload_start - _FOOTER_BYTES:
            record = f"the record of {length} bytes at byte {start}"
            raise InputError(f"{name}: truncated TFRecord: {record} runs past the end of the file")
        if check_payload:
            payload = file.read(length)
        else:
            file.seek(payload_start + length)
        # This record's footer and the next one's header in one read.
        tail = file.read(_FOOTER_BYTES + _HEADER_BYTES)
        if check_payload and masked_crc32c(payload) != struct.unpack("<I", tail[:_FOOTER_BYTES])[0]:
            raise InputError(
                f"{name}: corrupt TFRecord: wrong crc of the payload of the record at byte {start}"
            )
        entries.append((payload_start, length))
        start = payload_start + length + _FOOTER_BYTES
        header = tail[_FOOTER_BYTES:]
    return np.array(entries, np.int64).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------------------
# tf.train.Example: encoding
# ------------------------------------------------------------------------------------------------------------
_BYTES, _FLOAT, _INT64 = 1, 2, 3  # field numbers of Feature's oneof
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # a negative int64 is stored as its two's complement in 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | _DELIMITED) + _varint(len(payload)) + payload


def _encode_feature(name: str, value) -> bytes:
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = [item.item() if isinstance(item, np.generic) else item for item in values]
    if not values:
        return b""  # a Feature of no kind
    if all(isinstance(item, (bytes, str)) for item in values):
        items = [item.encode("utf-8") if isinstance(item, str) else item for item in values]
        return _delimited(_BYTES, b"".join(_delimited(1, item) for item in items))
    if all(isinstance(item, int) for item in values):  # bool is an int
        for item in values:
            if not -(2**63) <= item < 2**63:
                raise InputError(f"feature {name!r}: {item} does not fit int64")
        return _delimited(_INT64, _delimited(1, b"".join(map(_varint, values))))
    if all(isinstance(item, (int, float)) for item in values):
        return _delimited(_FLOAT, _delimited(1, struct.pack(f"<{len(values)}f", *values)))
    given = type(values[0]).__name__
    raise TypeError(
        f"feature {name!r}: expected bytes, str, int, float or a list of one of them, got {given}"
    )


def encode_example(features: dict[str, bytes | str | int | float | list]) -> bytes:
    """The serialised `tf.train.Example` of some features; equal features give equal bytes.

    | value                                   | becomes                   |
    |-----------------------------------------|---------------------------|
    | bytes, str (as UTF-8)                   | a bytes_list              |
    | integers and booleans                   | an int64_list             |
    | floats, or floats and integers together | a float_list of float32   |
    | a single value                          | a list of one             |
    | an empty list                           | a feature of no kind      |

    Raises:
      TypeError: naming the feature, for any other type and for mixed lists.
      ValueError: naming the feature, for an integer beyond int64.
    """
    entries = []
    for name in sorted(features):
        entry = _delimited(1, name.encode("utf-8")) + _delimited(2, _encode_feature(name, features[name]))
        entries.append(_delimited(1, entry))
    return _delimited(1, b"".join(entries))


# ------------------------------------------------------------------------------------------------------------
# tf.train.Example: decoding
# ------------------------------------------------------------------------------------------------------------
def _read_varint(buf: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if pos >= len(buf):
            raise InputError("malformed tf.train.Example: truncated varint")
        byte = buf[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, pos
        shift += 7
        if shift >= 70:
            raise InputError("malformed tf.train.Example: varint longer than 10 bytes")


def _fields(buf: bytes):
    """Yields (field number, wire type, value) of one message: ints for varints, else bytes."""
    pos = 0
    while pos < len(buf):
        tag, pos = _read_varint(buf, pos)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, pos = _read_varint(buf, pos)
        else:
            if wire == _DELIMITED:
                size, pos = _read_varint(buf, pos)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise InputError(f"malformed tf.train.Example: wire type {wire}")
            if pos + size > len(buf):
                where = f"field {field} of {size} bytes"
                raise InputError(f"malformed tf.train.Example: {where} runs past the end of its message")
            value, pos = buf[pos : pos + size], pos + size
        yield field, wire, value


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _decode_list(kind: int, buf: bytes) -> list:
    values: list = []
    for field, wire, value in _fields(buf):
        if field != 1:
            continue
        if kind == _BYTES and wire == _DELIMITED:
            values.append(value)
        elif kind == _FLOAT and wire in (_DELIMITED, _FIXED32):  # packed or not
            if len(value) % 4:
                raise InputError(
                    "malformed tf.train.Example: the size of a float_list is not a multiple of 4"
                )
            values.extend(struct.unpack(f"<{len(value) // 4}f", value))
        elif kind == _INT64 and wire == _VARINT:
            values.append(_signed(value))
        elif kind == _INT64 and wire == _DELIMITED:
            pos = 0
            while pos < len(value):
                item, pos = _read_varint(value, pos)
                values.append(_signed(item))
        else:
            raise InputError(f"malformed tf.train.Example: wire type {wire} in a list of kind {kind}")
    return values


def _decode_feature(buf: bytes) -> list:
    kind, values = None, []
    for field, wire, value in _fields(buf):
        if field in (_BYTES, _FLOAT, _INT64) and wire == _DELIMITED:
            if field != kind:  # the last kind in a oneof wins; parts of the same kind are merged
                kind, values = field, []
            values.extend(_decode_list(field, value))
    return values


def decode_example(buf: bytes) -> dict[str, list]:
    """The features of a serialised `tf.train.Example`: {name: list of bytes, floats (float32) or ints}.

    Like protobuf, it accepts packed and unpacked lists of numbers, and skips unknown fields. A feature
    without values is an empty list.

    Raises `ValueError` with one line if `buf` is malformed, or a feature comes twice.
    """
    features: dict[str, list] = {}
    for field, wire, value in _fields(bytes(buf)):
        if field != 1 or wire != _DELIMITED:
            continue
        for entry_field, entry_wire, entry in _fields(value):
            if entry_field != 1 or entry_wire != _DELIMITED:
                continue
            name, feature = b"", b""
            for item_field, item_wire, item in _fields(entry):
                if item_wire == _DELIMITED and item_field == 1:
                    name = item
                elif item_wire == _DELIMITED and item_field == 2:
                    feature = item
            name = name.decode("utf-8", "backslashreplace")
            if name in features:
                raise InputError(f"malformed tf.train.Example: the feature {name!r} comes twice")
            features[name] = _decode_feature(feature)
    return features
