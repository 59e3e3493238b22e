"""Every source over small data written here, the filters, the index cache, and one clear line for each kind of bad input."""

import collections
import dataclasses
import gzip
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import ops, pipeline, sources, tfrecord
from unclip_jax.data.sources import make_source


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
                name = f"{i:05d}" + "-long" * (30 if i % 2 else 0)  # a name over 100 characters takes an extra header
                for field, data in (("png", png(i, 8 + i)), ("txt", b"caption %d" % i), ("json", json.dumps(meta(i)).encode())):
                    member = tarfile.TarInfo(f"./{name}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNCLIP_CACHE", str(folder))
    return folder / "index"


def numbers(source) -> list[int]:
    return [int(ops.decode_image(source.read(i).image)[0, 0, 0]) for i in range(len(source))]


# ---- each kind --------------------------------------------------------------------------------------------------------
def test_emoji_is_there_and_splits_do_not_meet():
    read = {split: make_source({"name": "emoji", "split": split}) for split in ("train", "val", "compose")}
    keys = {split: {source.read(i).key for i in range(len(source))} for split, source in read.items()}
    assert all(len(keys[split]) == len(read[split]) > 100 for split in read)
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["compose"]
    record = read["val"].read(0)
    assert ops.decode_image(record.image).shape == (64, 64, 3) and record.captions and all(record.captions)
    manifest = json.loads((sources.EMOJI_FOLDER / "manifest.json").read_text())
    assert read["train"].checksum == manifest["checksum"] and read["train"].n_filtered == 0
    few = make_source({"name": "emoji", "filters": {"max_caption_chars": 15}})
    assert 0 < len(few) < len(read["train"]) == len(few) + few.n_filtered and few.checksum != read["train"].checksum
    assert max(len(caption) for i in range(len(few)) for caption in few.read(i).captions) <= 15


@pytest.mark.parametrize("flat", [False, True])
def test_tfrecord(tmp_path, flat):
    source = make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path, flat=flat)})
    assert len(source) == 12 and numbers(source) == list(range(12))
    record = source.read(7)
    assert record.key == "00007" and record.captions == ("caption 7",) and record.shard.endswith("part-00001.tfrecord")
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
    tfrecord.write_records(tmp_path / "a.tfrecord", [tfrecord.encode_example({"jpg": b"x", **row}) for row in rows])
    source = make_source({"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord")})
    expected = [("one", "two"), ("four",), ("three",), ("one", "two"), ("three",), ()]
    assert [source.read(i).captions for i in range(6)] == expected


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset(tmp_path, format):
    source = make_source({"name": "webdataset", "pattern": write_tars(tmp_path, format=format)})
    assert len(source) == 12 and numbers(source) == list(range(12))
    record = source.read(3)
    assert record.key == "./00003" + "-long" * 30 and record.captions == ("caption 3",) and record.meta["width"] == 11
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


def test_many_threads_read_the_same(tmp_path, monkeypatch):
    pattern = write_tfrecords(tmp_path, count=60, shards=12)
    for limit in (256, 3):  # every shard open; most of them opened for each read
        monkeypatch.setattr(sources, "OPEN_FILES", limit)
        source = make_source({"name": "tfrecord", "pattern": pattern})
        order = np.random.default_rng(0).integers(0, 60, 2000)
        with ThreadPoolExecutor(16) as pool:
            read = [record.key for record in pool.map(source.read, order)]
        assert read == [f"{i:05d}" for i in order]


def test_remote_paths_go_through_gfile(tmp_path, monkeypatch):
    """A '://' path is listed, sized and read by tf.io.gfile alone; here one that serves a local folder as store://."""
    pattern = write_tfrecords(tmp_path)
    write_tars(tmp_path)

    class Handle(io.FileIO):
        def __init__(self, path, mode):
            super().__init__(path.replace("store:/", str(tmp_path)), "r")

        def size(self):
            return os.fstat(self.fileno()).st_size

    class Gfile:
        GFile = Handle

        @staticmethod
        def glob(pattern):
            return [f"store://{path.name}" for path in tmp_path.glob(pattern.removeprefix("store://"))]

        @staticmethod
        def stat(path):
            status = os.stat(path.replace("store:/", str(tmp_path)))
            return type("Status", (), {"length": status.st_size, "mtime_nsec": status.st_mtime_ns})

    monkeypatch.setattr(sources, "_gfile", lambda: Gfile)
    remote = make_source({"name": "tfrecord", "pattern": "store://part-*.tfrecord"})
    assert numbers(remote) == list(range(12)) and remote.read(0).shard == "store://part-00000.tfrecord"
    assert remote.checksum == make_source({"name": "tfrecord", "pattern": pattern}).checksum
    assert numbers(make_source({"name": "webdataset", "pattern": "store://*.tar"})) == list(range(12))
    with pytest.raises(FileNotFoundError, match="store://nothing"):
        make_source({"name": "tfrecord", "pattern": "store://nothing*"})


def test_real_gfile_serves_its_own_schemes(tmp_path):
    """The same through TensorFlow's in-memory file system, so that the real gfile's calls are exercised."""
    tf = pytest.importorskip("tensorflow")
    write_tfrecords(tmp_path)
    for path in sorted(tmp_path.glob("part-*.tfrecord")):
        with tf.io.gfile.GFile(f"ram://{path.name}", "wb") as file:
            file.write(path.read_bytes())
    source = make_source({"name": "tfrecord", "pattern": "ram://part-*.tfrecord"})
    assert numbers(source) == list(range(12))


# ---- TFDS -------------------------------------------------------------------------------------------------------------
def test_tfds_mocked():
    tf, library = pytest.importorskip("tensorflow"), pytest.importorskip("tensorflow_datasets")
    with library.testing.mock_data(num_examples=5):
        names = library.builder("cifar10").info.features["label"].names
        labels = make_source({"name": "tfds", "builder": "cifar10", "split": "train", "caption_key": "label"})
        assert len(labels) == 5 and labels.read(3).key == "train/3" and set(labels.read(3).captions) <= set(names)
        again = make_source({"name": "tfds", "builder": "cifar10", "split": "train", "caption_key": "label"})
        assert again.checksum == labels.checksum and again.read(3).captions == labels.read(3).captions
        batches = pipeline.train_batches(
            labels, lambda record, rng: {"image": ops.decode_image(record.image)}, batch_size=4, seed=0, num_steps=2, backend="numpy"
        )
        assert [batch["image"].shape for batch in batches] == [(4, 32, 32, 3)] * 2
        with pytest.raises(ValueError, match=r"no feature 'labels': set caption_key to one of id, image, label"):
            make_source({"name": "tfds", "builder": "cifar10", "caption_key": "labels"})

    def pairs(self, *args, **kwargs):  # TFDS's own mock gives the lists of one caption unequal lengths, and then refuses them
        rows = [{"image": png(i), "captions": {"text": [f"caption {i}", f"other {i}"], "id": [1, 2]}} for i in range(3)]
        kinds = {"image": "string", "captions": {"text": "string", "id": "int64"}}
        return tf.data.Dataset.from_generator(lambda: rows, output_types=kinds)

    with library.testing.mock_data(as_dataset_fn=pairs):
        for key in ("captions/text", "captions.text"):
            source = make_source({"name": "tfds", "builder": "coco_captions", "split": "val", "caption_key": key})
            assert numbers(source) == [0, 1, 2] and source.read(2).captions == ("caption 2", "other 2")
        with pytest.raises(ValueError, match=r"no feature 'captions/txt'"):
            make_source({"name": "tfds", "builder": "coco_captions", "caption_key": "captions/txt"})
    with pytest.raises(ValueError, match="cannot open TFDS builder 'no_such_builder'") as error:
        make_source({"name": "tfds", "builder": "no_such_builder"})
    assert "\n" not in str(error.value)


def test_tfds_prepared(tmp_path):
    """A dataset prepared as TFRecord shards, which are indexed here, and in a random-access format."""
    library = pytest.importorskip("tensorflow_datasets")

    class TinyPairs(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            texts = library.features.Sequence({"text": library.features.Text(), "id": np.int64})
            features = {"image": library.features.Image(encoding_format="png"), "captions": texts, "score": np.float32}
            return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                texts = [{"text": f"caption {i}", "id": i}, {"text": f"other {i}", "id": i}]
                yield f"{i}", {"image": np.full((8, 8, 3), i, np.uint8), "captions": texts, "score": i / 10}

    contents = {}
    for file_format in ("tfrecord", "array_record"):
        folder = str(tmp_path / file_format)
        try:
            TinyPairs(data_dir=folder, file_format=file_format).download_and_prepare()
        except (ImportError, NotImplementedError):  # its writer is another package
            assert file_format != "tfrecord"
            continue
        config = {"name": "tfds", "builder": "tiny_pairs", "caption_key": "captions/text", "data_dir": folder}
        source = make_source({**config, "split": "train"})
        assert source.read(0).captions == tuple(f"{word} {numbers(source)[0]}" for word in ("caption", "other"))
        assert source.read(0).meta["score"] == pytest.approx(numbers(source)[0] / 10)
        contents[file_format] = numbers(source)
        assert sorted(contents[file_format]) == list(range(10))
        part = make_source({**config, "split": "train[20%:50%]"})
        assert numbers(part) == contents[file_format][2:5]
        ends = make_source({**config, "split": "train[:10%]+train[90%:]"})
        assert numbers(ends) == [contents[file_format][0], contents[file_format][9]]
        high = make_source({**config, "split": "train", "filters": {"scores": {"score": (0.65, None)}}})
        assert sorted(numbers(high)) == [7, 8, 9] and high.n_filtered == 7 and high.checksum != source.checksum
        with pytest.raises(ValueError, match=r"split 'test' .*it has train"):
            make_source({**config, "split": "test"})
    assert "tfrecord" in contents and len({tuple(content) for content in contents.values()}) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not prepared in .*tfds build tiny_pairs"):
        make_source({"name": "tfds", "builder": "tiny_pairs", "caption_key": None, "data_dir": str(tmp_path / "empty")})


# ---- filters ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "filters, expected",
    [
        ({}, range(12)),
        ({"min_side": 8}, range(12)),
        ({"max_aspect": 1.5}, range(5)),
        ({"scores": {"aesthetic": (2, None)}}, range(4, 12)),
        ({"scores": {"aesthetic": (1, 2.5)}}, range(2, 6)),
        ({"scores": {"aesthetic": (None, 1)}, "max_aspect": 1.2}, range(2)),
        ({"min_caption_chars": 10}, range(10, 12)),
        ({"max_caption_chars": 9, "min_side": None}, range(10)),
    ],
)
def test_filters(tmp_path, filters, expected):
    for name, pattern in (("tfrecord", write_tfrecords(tmp_path)), ("webdataset", write_tars(tmp_path))):
        source = make_source({"name": name, "pattern": pattern, "filters": filters})
        assert numbers(source) == list(expected) and source.n_filtered == 12 - len(source)


def test_size_comes_from_the_image_where_the_metadata_has_none(tmp_path):
    pattern = write_tfrecords(tmp_path, sized=False)
    assert numbers(make_source({"name": "tfrecord", "pattern": pattern, "filters": {"max_aspect": 1.5}})) == list(range(5))
    with pytest.raises(ValueError, match=r"filters \{'min_side': 9\} keep none of the 12 records"):
        make_source({"name": "tfrecord", "pattern": pattern, "filters": {"min_side": 9}})
    with pytest.raises(ValueError, match="check that the metadata has these fields"):
        make_source({"name": "tfrecord", "pattern": pattern, "filters": {"scores": {"aesthetic": (0, None)}}})


def test_only_fitting_captions_are_used(tmp_path):
    row = {"png": png(0), "json": json.dumps({"captions": ["short", "a caption that is long", ""]})}
    tfrecord.write_records(tmp_path / "a.tfrecord", [tfrecord.encode_example(row)])
    config = {"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord")}
    assert make_source({**config, "filters": {"min_caption_chars": 1, "max_caption_chars": 8}}).read(0).captions == ("short",)
    assert len(make_source(config).read(0).captions) == 3


def test_an_unreadable_row_stays_for_the_pipeline_to_count(tmp_path):
    rows = [{"png": png(1), "txt": "a"}, {"png": b"broken", "txt": "b"}, {"txt": "no image"}, {"png": png(4, 4, 4), "txt": "small"}]
    records = [tfrecord.encode_example(row) for row in rows] + [b"\xff\xff\xff"]
    tfrecord.write_records(tmp_path / "a.tfrecord", records)
    source = make_source({"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord"), "filters": {"min_side": 8}})
    assert len(source) == 4 and source.n_filtered == 1
    for i in (2, 3):
        with pytest.raises(ValueError, match=r"a\.tfrecord, byte \d+: .*(no image|malformed)") as error:
            source.read(i)
        assert "\n" not in str(error.value)


# ---- the index cache --------------------------------------------------------------------------------------------------
@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built."""
    calls = []
    build = sources._build_index
    monkeypatch.setattr(sources, "_build_index", lambda *args: calls.append(1) or build(*args))
    return calls


def test_the_index_is_reused_until_something_changes(tmp_path, cache, builds):
    pattern = write_tfrecords(tmp_path)
    config = {"name": "tfrecord", "pattern": pattern}
    first = make_source(config)
    again = make_source(config)
    assert len(builds) == 1 and again.checksum == first.checksum and numbers(again) == numbers(first)
    assert sorted(path.suffix for path in cache.iterdir()) == [".npz", ".sha256"]
    few = make_source({**config, "filters": {"max_aspect": 1.5}})
    assert len(builds) == 2 and len(few) == 5 and few.checksum != first.checksum
    assert make_source({**config, "filters": {"max_aspect": 1.5}}).n_filtered == 7 and len(builds) == 2
    tfrecord.write_records(tmp_path / "part-00003.tfrecord", [tfrecord.encode_example({"png": png(12), "txt": "new"})])
    more = make_source(config)
    assert len(builds) == 3 and len(more) == 13 and more.checksum != first.checksum
    os.utime(tmp_path / "part-00000.tfrecord", ns=(1, 1))  # written again with the same size
    assert make_source(config).checksum == more.checksum and len(builds) == 4


def test_a_damaged_index_is_built_again(tmp_path, cache, builds):
    config = {"name": "tfrecord", "pattern": write_tfrecords(tmp_path)}
    first = make_source(config)
    npz, digest = sorted(cache.iterdir())
    whole = npz.read_bytes()
    for damage in (
        lambda: npz.write_bytes(whole[:-20]),
        lambda: digest.write_text("0" * 64),
        lambda: digest.unlink(),
        lambda: npz.unlink(),
    ):
        before = len(builds)
        damage()
        assert make_source(config).checksum == first.checksum and len(builds) == before + 1
        assert make_source(config).checksum == first.checksum and len(builds) == before + 1
    assert npz.read_bytes() == whole and not list(cache.glob("*.partial*"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = {"name": "tfrecord", "pattern": write_tfrecords(tmp_path), "cache_dir": str(tmp_path / "file" / "below")}
    assert len(make_source(config)) == 12
    assert "set UNCLIP_CACHE" in caplog.text


def test_the_checksum_knows_contents_not_places(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path / name)}) for name in ("one", "two"))
    assert one.checksum == two.checksum and len(one.checksum) == 64
    assert dataclasses.replace(one, name="").checksum == one.checksum


# ---- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config, words",
    [
        ({"name": "imagenet"}, r"unknown data source 'imagenet': choose one of emoji, tfrecord, webdataset, tfds, folder"),
        ({}, "unknown data source None"),
        ({"name": "emoji", "spilt": "val"}, r"unknown key 'spilt' for data source 'emoji': allowed are split, filters"),
        ({"name": "emoji", "split": "test"}, "choose one of train, val, compose"),
        ({"name": "tfrecord"}, "data source 'tfrecord' needs 'pattern'"),
        ({"name": "emoji", "filters": {"minside": 3}}, r"unknown filter 'minside': allowed are min_side, max_aspect"),
        ({"name": "emoji", "filters": {"min_side": "64"}}, "min_side='64': expected a number"),
        ({"name": "emoji", "filters": {"scores": {"a": 5}}}, r"expected \(lowest, highest\)"),
        ({"name": "tfrecord", "pattern": "/nowhere/*.tfrecord"}, r"no shard matches '/nowhere/\*\.tfrecord': check the path"),
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
    fails(r"part-00001\.tfrecord: truncated TFRecord.*leave it out of the pattern", name="tfrecord", pattern=str(tmp_path / "part-*"))
    shard.write_bytes(b"\x01" + whole[1:])
    fails(r"part-00001\.tfrecord: corrupt TFRecord", name="tfrecord", pattern=str(tmp_path / "part-*"))
    tar = tmp_path / "00002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000])
    fails(r"00002\.tar: .*(truncated tar|unexpected end)", name="webdataset", pattern=str(tmp_path / "*.tar"))
    tar.write_bytes(gzip.compress(whole))
    fails(r"00002\.tar: not an uncompressed tar", name="webdataset", pattern=str(tmp_path / "*.tar"))
    fails("no image in folder", name="folder", path=str(tmp_path / "empty"))
    (tmp_path / "none.tfrecord").write_bytes(b"")
    fails("holds no records", name="tfrecord", pattern=str(tmp_path / "none.tfrecord"))


def test_a_shard_that_shrank_is_a_bad_record(tmp_path):
    source = make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path)})
    shard = tmp_path / "part-00002.tfrecord"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(ValueError, match="changed since it was indexed"):
        source.read(11)


def test_a_config_dict_works_like_a_dict(tmp_path):
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict(
        {"name": "tfrecord", "pattern": write_tfrecords(tmp_path), "filters": {"scores": {"aesthetic": (2, None)}}}
    )
    assert numbers(make_source(config)) == list(range(4, 12))


def test_balance_draws_by_concept():
    """Positions of a balanced source in proportion to n ** power, and no record is left out."""
    source = make_source({"name": "emoji", "split": "val"})
    bases = [source.read(i).meta["base"] for i in range(len(source))]
    sizes = collections.Counter(bases)
    for power in (0.0, 0.5, 1.0):
        drawn = make_source({"name": "emoji", "split": "val", "balance": {"by": "base", "power": power}})
        records = [drawn.read(i) for i in range(len(drawn))]
        assert {record.key for record in records} == {source.read(i).key for i in range(len(source))}
        shares = collections.Counter(record.meta["base"] for record in records)
        total = sum(size**power for size in sizes.values())
        for base, size in sizes.items():
            assert abs(shares[base] - len(drawn) * size**power / total) < 1.01, (power, base)
        copies = collections.Counter(record.key for record in records)
        assert len(drawn) == len(source) if power == 1 else max(copies.values()) > 1
        assert (drawn.checksum == source.checksum) is False


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"by": "base", "power": 2}, "between 0"),
        ({"by": "colour", "power": 0.5}, "has no such field; it has base"),
        ({"by": "base"}, "needs 'by' and 'power'"),
    ],
)
def test_balance_refuses(balance, message):
    with pytest.raises(ValueError, match=message):
        make_source({"name": "emoji", "split": "val", "balance": balance})
