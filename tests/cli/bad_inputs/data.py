"""Bad inputs of the verbs that read a dataset: sources, shards, folders, and the folder of embeddings."""

import bz2
import gzip
import json
import lzma
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from tests.cli.bad_inputs import Row
from tests.data.shards import png, write_tar, write_tfrecords
from unclip_jax.data import tfrecord

PLAN = {"format_version": 1, "clip": "0", "source": "1", "embed_dim": 2, "states": False, "tokenizer": {}}
MANIFEST = PLAN | {
    "image_embed": {"mean": [0.0, 0.0], "std": [1.0, 1.0]},
    "shards": [{"images": 1, "captions": 1, "sha256": {}}],
}
# What a manifest says in place of the above -> words of the message.
MANIFESTS = {
    "a manifest of another version": ({"format_version": 2}, "has format version 2; this version reads 1"),
    "a manifest with a number as CLIP": ({"clip": 7}, "has no 'clip' of type str"),
    "a manifest with a text as size": ({"embed_dim": "2"}, "has no 'embed_dim' of type int"),
    "a manifest with null as states": ({"states": None}, "has no 'states' of type bool"),
    "a manifest with a list as tokenizer": ({"tokenizer": []}, "has no 'tokenizer' of type dict"),
    "a manifest with shards as an object": ({"shards": {}}, "has no 'shards' of type list"),
    "a manifest without shards": ({"shards": []}, "lists no image"),
    "a manifest with a shard of texts": ({"shards": ["a"]}, "does not describe shard 0"),
    "a manifest with a short mean": ({"image_embed": {"mean": [0.0]}}, "'mean' must be 2 numbers"),
    "a manifest with a NaN": ({"image_embed": {"mean": [0, float("nan")]}}, "'mean' has a value that is no"),
}


def rows(box: Path) -> list[Row]:
    """Makes the files and returns the rows: every source by `embed` and `evaluate`, and their arguments."""
    every = [*_configurations(), *_folders(box), *_shards(box), *_embeddings(box)]
    embed = ["embed", "--clip", "emoji", "--out", "made"]
    data = lambda arguments: [part for argument in arguments for part in ("--data", argument)]
    by_embed = [Row(f"embed: {name}", [*embed, *data(given)], says) for name, given, says in every]
    by_evaluate = [
        Row(f"evaluate: {name}", ["evaluate", task, *data(given)], says)
        for (name, given, says), task in zip(every, ("retrieval", "zeroshot") * len(every))
    ]
    return [*by_embed, *by_evaluate, *_arguments(box), *_databases(box)]


def _configurations() -> list[tuple[str, list[str], str]]:
    return [
        ("an unknown source", ["name=imagenet"], "unknown data source 'imagenet'"),
        ("no equals sign", ["folder"], "'folder' is not KEY=VALUE"),
        ("no key", ["=folder"], "'=folder' is not KEY=VALUE"),
        ("a key with two values", ["name=folder", "path=a", "path=b"], "path is given twice: 'a' and 'b'"),
        ("half a group of filters", ["name=emoji", "filters={"], "filters must be a group or None, got '{'"),
        ("an unknown filter", ["name=emoji", "filters={'side': 3}"], "unknown filter 'side'"),
        ("a filter of text", ["name=emoji", "filters={'min_side': 'x'}"], "min_side='x': expected a number"),
        (
            "a score with three bounds",
            ["name=emoji", "filters={'scores': {'a': [1, 2, 3]}}"],
            "(lowest, highest)",
        ),
        ("a filter that keeps nothing", ["name=emoji", "filters={'min_side': 99999}"], "keep none of the"),
        ("a number as balance", ["name=emoji", "balance=5"], "balance must be a group, got '5'"),
        ("half a balance", ["name=emoji", "balance={'by': 'base'}"], "balance needs 'by' and 'power'"),
        ("a power above one", ["name=emoji", "balance={'by': 'base', 'power': 2}"], "balance.power must be"),
        ("an unknown split", ["name=emoji", "split=test"], "unknown split 'test' of the emoji data"),
        ("an unknown key", ["name=emoji", "spilt=val"], "unknown key 'spilt' for data source 'emoji'"),
        ("a folder without its path", ["name=folder"], "data source 'folder' needs 'path'"),
        ("an empty path", ["name=folder", "path="], "data source 'folder' needs 'path'"),
        ("a path that is not there", ["name=folder", "path=nowhere"], "no folder 'nowhere'"),
        ("a path with a NUL", ["name=folder", "path=a\0b"], "NUL characters"),
        (
            "a folder in S3",
            ["name=folder", "path=s3://bucket/a"],
            "s3://bucket/a: paths may begin with gs://",
        ),
        ("a folder on the web", ["name=folder", "path=https://a.b/c"], "paths may begin with gs://"),
        ("shards without a pattern", ["name=tfrecord"], "data source 'tfrecord' needs 'pattern'"),
        (
            "no shard",
            ["name=tfrecord", "pattern=nowhere/*.tfrecord"],
            "no shard matches 'nowhere/*.tfrecord'",
        ),
        ("no tar", ["name=webdataset", "pattern=nowhere/*.tar"], "no shard matches 'nowhere/*.tar'"),
        ("shards in S3", ["name=tfrecord", "pattern=s3://b/*.tfrecord"], "paths may begin with gs://"),
        ("tars in HDFS", ["name=webdataset", "pattern=hdfs://b/*.tar"], "paths may begin with gs://"),
        (
            "tars of a command",
            ["name=webdataset", "pattern=pipe:cat a.tar"],
            "no shard matches 'pipe:cat a.tar'",
        ),
    ]


def _folders(box: Path) -> list[tuple[str, list[str], str]]:
    (box / "empty").mkdir()
    (box / "texts").mkdir()
    (box / "texts" / "0.txt").write_text("a fox")
    (box / "hidden" / "__MACOSX").mkdir(parents=True)
    (box / "hidden" / "__MACOSX" / "0.png").write_bytes(png(0))
    (box / "hidden" / "._0.png").write_bytes(png(0))
    (box / "circle").mkdir()
    (box / "circle" / "again").symlink_to(box / "circle")
    (box / "picture.png").write_bytes(png(0))
    given = {
        "empty": "no image in folder 'empty'",
        "texts": "no image in folder 'texts'",
        "hidden": "no image in folder 'hidden'",
        "circle": "no image in folder 'circle'",
        "picture.png": "no folder 'picture.png'",
    }
    return [(f"the folder {name}", ["name=folder", f"path={name}"], says) for name, says in given.items()]


def _shards(box: Path) -> list[tuple[str, list[str], str]]:
    made = box / "shards"
    made.mkdir()
    write_tfrecords(made, shards=1)
    record = (made / "part-00000.tfrecord").read_bytes()
    tar = Path(write_tar(made / "whole.tar", [("0.png", png(0)), ("0.txt", b"a fox")])).read_bytes()
    hidden = Path(write_tar(made / "hidden.tar", [("._0.png", png(0)), (".DS_Store", b"x")])).read_bytes()
    header = struct.pack("<Q", 2**62)
    contents = {
        "truncated.tfrecord": (record[:-10], "truncated TFRecord: the record of"),
        "cut.tfrecord": (record[:7], "truncated TFRecord: 7 of 12 header bytes"),
        "changed.tfrecord": (b"\x01" + record[1:], "corrupt TFRecord: wrong crc"),
        "endless.tfrecord": (header + struct.pack("<I", tfrecord.masked_crc32c(header)), "runs past the end"),
        "empty.tfrecord": (b"", "holds no records"),
        "words.tfrecord": (b"no records at all", "corrupt TFRecord: wrong crc"),
        "gzip.tfrecord": (gzip.compress(record), "is compressed with gzip"),
        "zlib.tfrecord": (zlib.compress(record), "is compressed with zlib"),
        "tar.tfrecord": (tar, "corrupt TFRecord: wrong crc"),
        "pointer.tfrecord": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        "page.tfrecord": (b"<!DOCTYPE html><html>404</html>", "is a page of HTML and not the data"),
        "truncated.tar": (tar[:1000], "(unexpected end of data); write this shard again or leave it out"),
        "words.tar": (b"no members at all" * 100, "not an uncompressed tar"),
        "zeros.tar": (bytes(10240), "holds no records"),
        "empty.tar": (b"", "not an uncompressed tar that can be read (empty file)"),
        "hidden.tar": (hidden, "holds no records"),
        "gzip.tar": (gzip.compress(tar), "is compressed with gzip"),
        "bzip2.tar": (bz2.compress(tar), "is compressed with bzip2"),
        "xz.tar": (lzma.compress(tar), "is compressed with xz"),
        "zstd.tar": (b"\x28\xb5\x2f\xfd" + tar, "is compressed with zstd"),
        "zip.tar": (b"PK\x03\x04" + tar, "is compressed with zip"),
        "record.tar": (record, "not an uncompressed tar"),
    }
    for name, (data, _) in contents.items():
        (made / name).write_bytes(data)
    (made / "folder.tar").mkdir()
    os.mkfifo(made / "pipe.tfrecord")
    (made / "dead.tar").symlink_to("nowhere.tar")
    says = {name: words for name, (_, words) in contents.items()} | {
        "folder.tar": "shards/folder.tar is not a file",
        "pipe.tfrecord": "shards/pipe.tfrecord is not a file",
        "dead.tar": "shards/dead.tar",
    }
    kind = lambda name: "webdataset" if name.endswith(".tar") else "tfrecord"
    return [
        (f"the shard {name}", [f"name={kind(name)}", f"pattern=shards/{name}"], words)
        for name, words in says.items()
    ]


def _embeddings(box: Path) -> list[tuple[str, list[str], str]]:
    def write(name: str, manifest: str) -> str:
        folder = box / "embeddings" / name.replace(" ", "_")
        (folder / "00000").mkdir(parents=True)
        (folder / "manifest.json").write_text(manifest)
        (folder / "00000" / "shard.json").write_text('{"sha256": {"a": "b"}}')
        return f"path=embeddings/{folder.name}"

    given = [("embeddings that are not there", "path=nowhere", "no folder nowhere")]
    given += [("no embeddings", "path=empty", "manifest.json is missing")]
    given += [("embeddings in S3", "path=s3://a/b", "s3://a/b: paths may begin with gs://")]
    for name, (change, says) in MANIFESTS.items():
        given.append((name, write(name, json.dumps(MANIFEST | change)), says))
    for name, text, says in (
        ("half a manifest", "{", "is not valid JSON"),
        ("a list as manifest", "[1]", "is no JSON object"),
        ("a deep manifest", "[" * 100_000, "is not valid JSON"),
        ("another shard", json.dumps(MANIFEST), "is not the shard that"),
    ):
        given.append((name, write(name, text), says))
    return [(name, ["name=embeddings", path], says) for name, path, says in given]


def _databases(box: Path) -> list[Row]:
    # Indices to draw neighbours from.
    good = {
        "embedding": np.ones((3, 2), np.float16),
        "img_id": np.arange(3),
        "patch_coords": np.zeros((3, 4)),
    }
    said = {"clip": "0", "embedding_space": "raw"}
    databases = {  # name -> arrays (or bytes), what the file beside says, words of the message
        "a database that says nothing": (good, None, "does not say which CLIP made its rows"),
        "a database of no CLIP": (good, {"embedding_space": "raw"}, "lacks 'clip'"),
        "a database of a number as CLIP": (good, said | {"clip": 7}, "clip must be text"),
        "a database of another space": (good, said | {"embedding_space": "unit"}, "their norms are 1.41"),
        "a database of no space": (good, said | {"embedding_space": "x"}, "unknown embedding space 'x'"),
        "a database of no patches": ({"embedding": good["embedding"]}, said, "has no array 'img_id'"),
        "a database of fewer images": (good | {"img_id": np.arange(2)}, said, "do not fit together"),
        "a database of objects": (good | {"embedding": np.array([{}] * 3)}, said, "is damaged"),
        "a database of zeros": (good | {"embedding": np.zeros((3, 2))}, said, "rows that are zero"),
        "a cut database": (b"PK\x03\x04 and no more", said, "is damaged"),
        "a database of another CLIP": (good, said, "was made with CLIP 0, but the CLIP given is"),
    }
    manifests = {  # in place of an index -> words of the message
        "an index of another version": ({"format_version": 2}, "has format version 2"),
        "an index of no shards": ({"shards": []}, "does not describe the arrays"),
        "an index of a number": ({"shards": [7]}, "shards"),
        "an index of a text": ({"rows": "3"}, "rows must be an integer"),
        "embeddings as an index": ({"kind": None}, "holds embeddings and no index"),
    }
    rows = []
    for number, (name, (arrays, beside, says)) in enumerate(databases.items()):
        folder = box / f"database{number}"
        folder.mkdir()
        if isinstance(arrays, bytes):
            (folder / "3x2-part_1.npz").write_bytes(arrays)
        else:
            np.savez(folder / "3x2-part_1.npz", **arrays)
        if beside is not None:
            (folder / "index.json").write_text(json.dumps(beside))
        rows.append((name, folder.name, says))
    index = {"kind": "index", "format_version": 1, "clip": "0", "embed_dim": 2, "embedding_space": "raw"}
    for number, (name, (change, says)) in enumerate(manifests.items()):
        folder = box / f"index{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(index | {"rows": 0, "shards": []} | change))
        rows.append((name, folder.name, says))
    embed = ["embed", "--clip", "emoji", "--data", "name=emoji", "--out", "made"]
    return [
        *(Row(name, [*embed, "--neighbours", folder], says) for name, folder, says in rows),
        Row("no index", [*embed, "--neighbours", "nowhere"], "no folder nowhere"),
        Row("an unknown space", [*embed, "--index", "--space", "scaled"], "unknown space 'scaled'"),
        Row("an unknown search", [*embed, "--neighbours", "database10", "--search=x"], "unknown search 'x'"),
        Row("patches of none", [*embed, "--index", "--patches", "0"], "--patches must be at least 1"),
        Row("an unknown style", [*embed, "--index", "--data", "style=x"], "unknown style 'x'"),
    ]


def _arguments(box: Path) -> list[Row]:
    (box / "full").mkdir()
    (box / "full" / "file").touch()
    (box / "bare").mkdir()
    (box / "broken").mkdir()
    for i in range(3):
        (box / "bare" / f"{i}.png").write_bytes(png(i))
        (box / "broken" / f"{i}.png").write_bytes(png(i)[:40])
        (box / "broken" / f"{i}.txt").write_text("a fox")
    (box / "bare" / "0.txt").write_text("a fox")
    embed = lambda *more: ["embed", "--clip", "emoji", "--data", "name=emoji", *more]
    folder = lambda path: ["--data", "name=folder", "--data", f"path={path}"]
    probe = ["evaluate", "probe", *folder("bare")]
    return [
        Row("nothing to embed", ["embed", "--clip", "emoji", "--out", "made"], "say what to embed"),
        Row("too large a fraction", embed("--out", "made", "--max-bad", "2"), "--max-bad must be in [0, 1]"),
        Row("a negative fraction", embed("--out", "made", "--max-bad", "-1"), "--max-bad must be in [0, 1]"),
        Row("NaN as a fraction", embed("--out", "made", "--max-bad", "nan"), "--max-bad must be in [0, 1]"),
        Row("two limits", embed("--out", "made", "--max-bad", "0", "--skip-bad"), "drop --max-bad"),
        Row("batches of none", embed("--out", "made", "--batch", "0"), "--batch must be at least 1, got 0"),
        Row("shards of none", embed("--out", "made", "--shard", "-3"), "--shard must be at least 1, got -3"),
        Row("an output in S3", embed("--out", "s3://a/b"), "s3://a/b: paths may begin with gs://"),
        Row("a full output", embed("--out", "full"), "full exists and holds no embeddings"),
        Row("a file as output", embed("--out", "picture.png"), "picture.png exists and holds no embeddings"),
        Row(
            "an output in a file",
            embed("--out", "picture.png/made"),
            "picture.png/made/plan.json cannot be written",
        ),
        Row("an output in /proc", embed("--out", "/proc/made"), "/proc/made/plan.json cannot be written"),
        Row("no CLIP", ["embed", "--clip", "nowhere", "--data", "name=emoji", "--out", "made"], "nowhere"),
        Row(
            "embed bare images",
            ["embed", "--clip", "emoji", *folder("bare"), "--out", "made", "--max-bad", "0"],
            "2 of 3 records cannot be used",
        ),
        Row(
            "embed broken images",
            ["embed", "--clip", "emoji", *folder("broken"), "--out", "made"],
            "none of the 3 records can be used",
        ),
        Row(
            "evaluate bare images",
            ["evaluate", "retrieval", *folder("bare")],
            "2 of 3 records of folder:bare cannot be used; the first is record 1: 1.png has no caption",
        ),
        Row("evaluate broken images", ["evaluate", "zeroshot", *folder("broken")], "has 1 class by caption"),
        Row("a probe of its own data", probe, "name a training source with --train"),
        Row(
            "a probe of the same data",
            [*probe, "--train", "path=./bare/", "--skip-bad"],
            "hold the same data: a probe must not train on the records that it is tested on",
        ),
        Row(
            "retrieval of one record",
            ["evaluate", "retrieval", *folder("bare"), "--skip-bad", "--bundle", "emoji"],
            "has 1 record to rank; retrieval needs two",
        ),
        Row(
            "retrieval of repeated records",
            ["evaluate", "retrieval", "--data", "split=val", "--data", "balance={'by': 'base', 'power': 0}"],
            "balance repeats records",
        ),
        Row("a probe of no data", [*probe, "--train", "path=nowhere"], "no folder 'nowhere'"),
        Row("judge of a CLIP", ["evaluate", "retrieval", "--judge", "judge"], "leave them out of retrieval"),
        Row(
            "pairs of two priors",
            ["evaluate", "samples", "--pairs", "p.png", "--prior", "none,null"],
            "--pairs shows the samples of one prior",
        ),
        Row("samples of data", ["evaluate", "samples", "--data", "name=emoji"], "leave out --data, --train"),
        Row(
            "samples without bad ones",
            ["evaluate", "samples", "--skip-bad"],
            "leave out --data, --train and --skip-bad",
        ),
    ]
