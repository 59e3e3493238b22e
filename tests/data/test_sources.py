"""Every kind of source over small data written here, and one clear line for each kind of bad input."""

import gzip
import json
import tarfile

import pytest

from tests.data.shards import numbers, png, write_tars, write_tfrecords
from unclip_jax.data import ops, tfrecord
from unclip_jax.data.sources import make_source
from unclip_jax.data.sources.emoji import EMOJI_FOLDER

pytestmark = pytest.mark.usefixtures("cache")


def test_emoji_is_there_and_splits_do_not_meet():
    read = {split: make_source({"name": "emoji", "split": split}) for split in ("train", "val", "compose")}
    keys = {split: {source.read(i).key for i in range(len(source))} for split, source in read.items()}
    assert all(len(keys[split]) == len(read[split]) > 100 for split in read)
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["compose"]
    record = read["val"].read(0)
    assert ops.decode_image(record.image).shape == (64, 64, 3) and record.captions and all(record.captions)
    manifest = json.loads((EMOJI_FOLDER / "manifest.json").read_text())
    assert read["train"].checksum == manifest["checksum"] and read["train"].n_filtered == 0
    few = make_source({"name": "emoji", "filters": {"max_caption_chars": 15}})
    assert (
        0 < len(few) < len(read["train"]) == len(few) + few.n_filtered
        and few.checksum != read["train"].checksum
    )
    assert max(len(caption) for i in range(len(few)) for caption in few.read(i).captions) <= 15


@pytest.mark.parametrize("flat", [False, True])
def test_tfrecord(tmp_path, flat):
    source = make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path, flat=flat)})
    assert len(source) == 12 and numbers(source) == list(range(12))
    record = source.read(7)
    assert (
        record.key == "00007"
        and record.captions == ("caption 7",)
        and record.shard.endswith("part-00001.tfrecord")
    )
    assert record.meta["width"] == 15 and record.meta["aesthetic"] == 3.5
    with pytest.raises(IndexError, match="12 records"):
        source.read(12)


def test_captions_come_from_the_list_then_the_text_then_the_metadata(tmp_path):
    rows = [
        {"json": json.dumps({"captions": ["one", "two"], "caption": "three"}), "txt": "four"},
        {"json": json.dumps({"captions": [], "caption": "three"}), "txt": "four"},
        {"json": json.dumps({"caption": "three"})},
        {"captions": ["one", "two"], "txt": "four"},
        {"caption": "three"},
        {"width": 3},
    ]
    tfrecord.write_records(
        tmp_path / "a.tfrecord", [tfrecord.encode_example({"jpg": b"x", **row}) for row in rows]
    )
    source = make_source({"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord")})
    expected = [("one", "two"), ("four",), ("three",), ("one", "two"), ("three",), ()]
    assert [source.read(i).captions for i in range(6)] == expected


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset(tmp_path, format):
    source = make_source({"name": "webdataset", "pattern": write_tars(tmp_path, format=format)})
    assert len(source) == 12 and numbers(source) == list(range(12))
    record = source.read(3)
    assert (
        record.key == "./00003" + "-long" * 30
        and record.captions == ("caption 3",)
        and record.meta["width"] == 11
    )
    same = make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path)})
    assert [same.read(i).meta for i in range(12)] == [source.read(i).meta for i in range(12)]


def test_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(["b.png", "a.PNG", "sub/c.png", "none.png"]):
        (root / name).write_bytes(png(i))
    (root / "a.txt").write_text("a fox\n\n  a red fox  \n")
    (root / "b.txt").write_text("a cat")
    (root / "sub" / "c.txt").write_text("a dog")
    (root / "readme.md").write_text("not an image")
    source = make_source({"name": "folder", "path": str(root)})
    assert [source.read(i).key for i in range(4)] == ["a.PNG", "b.png", "none.png", "sub/c.png"]
    assert [source.read(i).captions for i in range(4)] == [("a fox", "a red fox"), ("a cat",), (), ("a dog",)]
    assert numbers(source) == [1, 0, 3, 2]
    captioned = make_source({"name": "folder", "path": str(root), "filters": {"min_caption_chars": 1}})
    assert len(captioned) == 3 and captioned.n_filtered == 1


def test_an_unreadable_row_stays_for_the_pipeline_to_count(tmp_path):
    rows = [
        {"png": png(1), "txt": "a"},
        {"png": b"broken", "txt": "b"},
        {"txt": "no image"},
        {"png": png(4, 4, 4), "txt": "small"},
    ]
    records = [tfrecord.encode_example(row) for row in rows] + [b"\xff\xff\xff"]
    tfrecord.write_records(tmp_path / "a.tfrecord", records)
    source = make_source(
        {"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord"), "filters": {"min_side": 8}}
    )
    assert len(source) == 4 and source.n_filtered == 1
    for i in (2, 3):
        with pytest.raises(ValueError, match=r"a\.tfrecord, byte \d+: .*(no image|malformed)") as error:
            source.read(i)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            {"name": "imagenet"},
            r"unknown data source 'imagenet': choose one of emoji, tfrecord, webdataset, tfds, folder",
        ),
        ({}, "unknown data source None"),
        (
            {"name": "emoji", "spilt": "val"},
            r"unknown key 'spilt' for data source 'emoji': allowed are split, filters",
        ),
        ({"name": "emoji", "split": "test"}, "choose one of train, val, compose"),
        ({"name": "tfrecord"}, "data source 'tfrecord' needs 'pattern'"),
        (
            {"name": "emoji", "filters": {"minside": 3}},
            r"unknown filter 'minside': allowed are min_side, max_aspect",
        ),
        ({"name": "emoji", "filters": {"min_side": "64"}}, "min_side='64': expected a number"),
        ({"name": "emoji", "filters": {"min_side": True}}, "min_side=True: expected a number"),
        ({"name": "emoji", "filters": {"max_aspect": float("nan")}}, "max_aspect=nan: expected a number"),
        ({"name": "emoji", "filters": "min_side=64"}, "filters must be fields and their values"),
        ({"name": "emoji", "filters": {"scores": [5]}}, r"scores=\[5\]: expected fields and their bounds"),
        ({"name": "emoji", "filters": {"scores": {"a": ("5", None)}}}, r"expected \(lowest, highest\)"),
        ({"name": "emoji", "balance": 5}, "balance needs 'by' and 'power' and no other key, got 5"),
        ({"name": "emoji", "balance": {"by": ["base"], "power": 0}}, r"balance.by must be .* got \['base'\]"),
        ({"name": "emoji", "balance": {"by": "base", "power": True}}, "balance.power must be between"),
        ({"name": ["emoji"]}, r"unknown data source \['emoji'\]"),
        ("emoji", "a data source is a name and its arguments, got 'emoji'"),
        ({"name": "emoji", "split": 5}, "split=5 of data source 'emoji': expected a text"),
        ({"name": "folder", "path": 2024}, "path=2024 of data source 'folder': expected a text"),
        ({"name": "tfrecord", "pattern": 5}, "pattern"),
        ({"name": "tfrecord", "pattern": []}, r"pattern must be a glob or a list of globs, got \[\]"),
        ({"name": "tfrecord", "pattern": ["a", 5]}, "pattern must be a glob or a list of globs"),
        ({"name": "webdataset", "pattern": "s3://b/*.tar"}, r"^s3://b/\*.tar: paths may begin with gs://"),
        ({"name": "tfrecord", "pattern": "https://a/*.tar"}, "paths may begin with gs:// or be local"),
        ({"name": "emoji", "embeddings": 5}, "embeddings=5 of data source 'emoji': expected a text"),
        ({"name": "folder", "path": "s3://bucket/photos"}, "^s3://bucket/photos: paths may begin with gs://"),
        ({"name": "embeddings", "path": "s3://bucket/made"}, "^s3://bucket/made: paths may begin with gs://"),
        ({"name": "emoji", "filters": {"scores": {"a": 5}}}, r"expected \(lowest, highest\)"),
        (
            {"name": "tfrecord", "pattern": "/nowhere/*.tfrecord"},
            r"no shard matches '/nowhere/\*\.tfrecord': check the path",
        ),
        ({"name": "folder", "path": "/nowhere"}, "no folder '/nowhere'"),
    ],
)
def test_bad_configs(config, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        make_source(config)
    assert "\n" not in str(error.value)


def test_broken_shards_are_named(tmp_path):
    write_tfrecords(tmp_path)
    write_tars(tmp_path)
    (tmp_path / "empty").mkdir()

    def fails(words, **config):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            make_source(config)
        assert "\n" not in str(error.value)

    shard = tmp_path / "part-00001.tfrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    fails(
        r"part-00001\.tfrecord: truncated TFRecord.*leave it out of the pattern",
        name="tfrecord",
        pattern=str(tmp_path / "part-*"),
    )
    shard.write_bytes(b"\x01" + whole[1:])
    fails(r"part-00001\.tfrecord: corrupt TFRecord", name="tfrecord", pattern=str(tmp_path / "part-*"))
    tar = tmp_path / "00002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000])
    fails(r"00002\.tar: .*(truncated tar|unexpected end)", name="webdataset", pattern=str(tmp_path / "*.tar"))
    tar.write_bytes(gzip.compress(whole))
    fails(
        r"00002\.tar is compressed with gzip, .*: unpack it$",
        name="webdataset",
        pattern=str(tmp_path / "*.tar"),
    )
    fails("no image in folder", name="folder", path=str(tmp_path / "empty"))
    (tmp_path / "none.tfrecord").write_bytes(b"")
    fails("holds no records", name="tfrecord", pattern=str(tmp_path / "none.tfrecord"))


def test_a_config_dict_works_like_a_dict(tmp_path):
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict(
        {
            "name": "tfrecord",
            "pattern": write_tfrecords(tmp_path),
            "filters": {"scores": {"aesthetic": (2, None)}},
        }
    )
    assert numbers(make_source(config)) == list(range(4, 12))
