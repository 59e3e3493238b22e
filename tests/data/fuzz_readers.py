"""Fuzzes the readers of foreign files: `python -m tests.data.fuzz_readers -max_total_time=600`.

It needs atheris (`pip install atheris`) and takes libFuzzer's options and folders of inputs. The first byte
of an input chooses the reader. A reader may raise a `ValueError` of one line; another exception is a finding.
"""

import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_serialize

from tests.data.shards import png, write_tar
from unclip_jax.checkpoint import flax_file, torch_pickle
from unclip_jax.data import masks, ops, retrieval_index, tfrecord
from unclip_jax.data.record import Record, caption_texts, parse_captions, parse_metadata
from unclip_jax.data.sources import tfrecord as tfrecord_source
from unclip_jax.data.sources import webdataset


def frame(payload: bytes) -> bytes:
    """A record of a TFRecord file, with the right sums."""
    header = struct.pack("<Q", len(payload))
    sums = [struct.pack("<I", tfrecord.masked_crc32c(part)) for part in (header, payload)]
    return header + sums[0] + payload + sums[1]


def read_framing(data: bytes) -> None:
    """The framing of a TFRecord file, and that of one whose length has the right sum."""
    for file in (data, data[:8] + struct.pack("<I", tfrecord.masked_crc32c(data[:8])) + data[8:]):
        for check in (False, True):
            try:
                spans = tfrecord.index_records(io.BytesIO(file), check)
            except ValueError:
                continue
            assert all(0 < offset and 0 <= length <= len(file) - offset for offset, length in spans.tolist())


def read_example(data: bytes) -> None:
    """A `tf.train.Example`."""
    check_record(tfrecord_source.parse_tfrecord(data, "a.tfrecord"))


def read_tar(data: bytes) -> None:
    """The members of a tar, and every record of it."""
    spans = webdataset._find_records(io.BytesIO(data), len(data), "a.tar").tolist()
    for offset, length in spans:
        assert 0 <= offset and 0 < length <= len(data) - offset
        try:
            check_record(webdataset.parse_tar(data[offset : offset + length], "a.tar"))
        except ValueError:
            pass


def read_captions(data: bytes) -> None:
    """The JSON beside an image, and a text."""
    try:
        caption_texts(data)
    except ValueError:
        pass
    check_captions(parse_captions(parse_metadata(data), None))


def read_image(data: bytes) -> None:
    """A picture, and a mask."""
    if sum(data[:64]) % 8 == 0:  # decoding is slow
        masks.redrawn(data)
    elif len(data) < 4096:
        image = ops.decode_image(data)
        assert image.dtype == "uint8" and image.ndim == 3 and image.shape[2] == 3


def read_database(data: bytes) -> None:
    """A part of a published database of neighbours."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(data)
        file.flush()
        rows = retrieval_index._npz_rows(Path(file.name))
    assert rows.ndim == 2 and len(rows)


def read_module(data: bytes) -> None:
    """A pickled module of torch's."""
    path = Path("a.pkl")
    torch_pickle.tensors_in(torch_pickle.unpickle(io.BytesIO(data), path, ("a.", "torch.nn.")), path)


def read_flax(data: bytes) -> None:
    """Flax's weights."""
    with tempfile.NamedTemporaryFile(suffix=".msgpack") as file:
        file.write(data)
        file.flush()
        weights = flax_file.FlaxWeights(flax_file.read_arrays(Path(file.name)))
        assert all(weights[name].shape == weights.shape(name) for name in weights)


READERS = (
    *(read_framing, read_example, read_tar, read_captions, read_image, read_database, read_module),
    read_flax,
)


def check_record(record: Record) -> None:
    """A record that is read has bytes for an image, and captions that are texts."""
    assert isinstance(record.image, bytes) and isinstance(record.key, str) and isinstance(record.meta, dict)
    check_captions(record.captions)


def check_captions(captions: tuple) -> None:
    """Captions are texts that are not blank and that UTF-8 can hold."""
    assert isinstance(captions, tuple)
    assert all(type(caption) is str and caption.strip() and caption.encode() for caption in captions)


def fuzz_one(data: bytes) -> None:
    """Reads one input."""
    try:
        READERS[data[0] % len(READERS) if data else 0](data[1:])
    except ValueError as error:
        line = str(error)
        assert line and "\n" not in line.strip(), f"not one line: {line!r}"


def write_seeds(folder: Path) -> None:
    """Writes a good input for each reader."""
    example = tfrecord.encode_example({"png": png(1), "txt": "a fox", "width": 8, "score": 0.5})
    tar = folder / "a.tar"
    write_tar(tar, [("0.png", png(1)), ("0.txt", b"a fox"), ("0" * 150 + ".json", b"{}"), ("1.txt", None)])
    captions = json.dumps({"captions": ["a fox", None, {"id": 7}], "caption": "a cat"}).encode()
    database = io.BytesIO()
    np.savez(database, embedding=np.ones((2, 3)), img_id=np.arange(2), patch_coords=np.zeros((2, 4)))
    module = b"\x80\x02ca\nB\n)\x81}X\x08\x00\x00\x00_modules}sb."
    seeds = (frame(example) + frame(b""), example, tar.read_bytes(), captions, png(2), database.getvalue())
    seeds += (module, msgpack_serialize({"a": {"b": np.ones((2, 3), np.float32)}}))
    for number, seed in enumerate(seeds):
        (folder / f"seed{number}").write_bytes(bytes([number]) + seed)
    tar.unlink()


def main() -> None:
    """Fuzzes until an option of libFuzzer says stop, or until an input breaks a reader."""
    import atheris

    for module in (
        sys.modules[__name__],
        flax_file,
        masks,
        ops,
        retrieval_index,
        tfrecord,
        tfrecord_source,
        torch_pickle,
        webdataset,
    ):
        for function in vars(module).values():
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)  # in place
    for method in [*vars(tarfile.TarInfo).values(), *vars(tarfile.TarFile).values()]:
        function = getattr(method, "__func__", method)
        if isinstance(function, types.FunctionType):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        os.environ.setdefault("PYTHONFAULTHANDLER", "1")
        atheris.Setup([*sys.argv, folder], fuzz_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
