"""Small shards of 8-pixel images, written by the tests of sources."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from unclip_jax.data import ops, tfrecord


def png(i: int, width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), i, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def meta(i: int) -> dict:
    return {"key": f"{i:05d}", "width": 8 + i, "height": 8, "aesthetic": i / 2, "caption": f"caption {i}"}


def write_tfrecords(folder, count=12, shards=3, flat=False, sized=True) -> str:
    """img2dataset's schema, in both of its ways of keeping metadata. Returns the glob."""
    for shard in range(shards):
        rows = []
        for i in range(shard * count // shards, (shard + 1) * count // shards):
            fields = meta(i) if sized else {"key": f"{i:05d}"}
            extra = fields if flat else {"key": fields["key"], "json": json.dumps(fields)}
            rows.append(tfrecord.encode_example({**extra, "png": png(i, 8 + i, 8), "txt": f"caption {i}"}))
        tfrecord.write_records(folder / f"part-{shard:05d}.tfrecord", rows)
    return str(folder / "part-*.tfrecord")


def write_tars(folder, count=12, shards=3, format=tarfile.PAX_FORMAT) -> str:
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=format) as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                name = f"{i:05d}" + "-long" * (
                    30 if i % 2 else 0
                )  # a name over 100 characters takes an extra header
                for field, data in (
                    ("png", png(i, 8 + i)),
                    ("txt", b"caption %d" % i),
                    ("json", json.dumps(meta(i)).encode()),
                ):
                    member = tarfile.TarInfo(f"./{name}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


def write_tar(path, members) -> str:
    """A tar of (name, bytes) in the given order; bytes of None make a link to 0.txt. Returns the path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.LNKTYPE, "0.txt"
            member.size = len(data or b"")
            tar.addfile(member, io.BytesIO(data or b""))
    return str(path)


def read_all(source) -> list:
    """For each record its captions, or the error of a bad one."""
    read = []
    for i in range(len(source)):
        try:
            read.append(source.read(i).captions)
        except ValueError as error:
            assert "\n" not in str(error)
            read.append(str(error))
    return read


def numbers(source) -> list[int]:
    return [int(ops.decode_image(source.read(i).image)[0, 0, 0]) for i in range(len(source))]
