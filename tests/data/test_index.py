"""The index: its cache, its checksum, and reading shards of this machine and of a store through it."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import unclip_jax.data.index
import unclip_jax.data.tensorflow
import unclip_jax.paths
from tests.data.shards import numbers, png, write_tars, write_tfrecords
from unclip_jax.data import tfrecord
from unclip_jax.data.sources import make_source

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built."""
    calls = []
    build = unclip_jax.data.index.build_index
    monkeypatch.setattr(unclip_jax.data.index, "build_index", lambda *args: calls.append(1) or build(*args))
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
    tfrecord.write_records(
        tmp_path / "part-00003.tfrecord", [tfrecord.encode_example({"png": png(12), "txt": "new"})]
    )
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
    config = {
        "name": "tfrecord",
        "pattern": write_tfrecords(tmp_path),
        "cache_dir": str(tmp_path / "file" / "below"),
    }
    assert len(make_source(config)) == 12
    assert "set UNCLIP_CACHE" in caplog.text


def test_the_checksum_knows_contents_not_places(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (
        make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path / name)})
        for name in ("one", "two")
    )
    assert one.checksum == two.checksum and len(one.checksum) == 64


def test_many_threads_read_the_same(tmp_path, monkeypatch):
    pattern = write_tfrecords(tmp_path, count=60, shards=12)
    for limit in (256, 3):  # every shard open; most of them opened for each read
        monkeypatch.setattr(unclip_jax.data.index, "OPEN_FILES", limit)
        source = make_source({"name": "tfrecord", "pattern": pattern})
        order = np.random.default_rng(0).integers(0, 60, 2000)
        with ThreadPoolExecutor(16) as pool:
            read = [record.key for record in pool.map(source.read, order)]
        assert read == [f"{i:05d}" for i in order]


def test_a_shard_that_shrank_is_a_bad_record(tmp_path):
    source = make_source({"name": "tfrecord", "pattern": write_tfrecords(tmp_path)})
    shard = tmp_path / "part-00002.tfrecord"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(ValueError, match="changed since it was indexed"):
        source.read(11)


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

    monkeypatch.setattr(unclip_jax.data.tensorflow, "gfile", lambda: Gfile)
    monkeypatch.setattr(unclip_jax.paths, "SCHEMES", ("store",))
    remote = make_source({"name": "tfrecord", "pattern": "store://part-*.tfrecord"})
    assert numbers(remote) == list(range(12)) and remote.read(0).shard == "store://part-00000.tfrecord"
    assert remote.checksum == make_source({"name": "tfrecord", "pattern": pattern}).checksum
    assert numbers(make_source({"name": "webdataset", "pattern": "store://*.tar"})) == list(range(12))
    with pytest.raises(FileNotFoundError, match="store://nothing"):
        make_source({"name": "tfrecord", "pattern": "store://nothing*"})


def test_real_gfile_serves_its_own_schemes(tmp_path, monkeypatch):
    """The same through TensorFlow's in-memory file system, so that the real gfile's calls are exercised."""
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(unclip_jax.paths, "SCHEMES", ("ram",))
    write_tfrecords(tmp_path)
    for path in sorted(tmp_path.glob("part-*.tfrecord")):
        with tf.io.gfile.GFile(f"ram://{path.name}", "wb") as file:
            file.write(path.read_bytes())
    source = make_source({"name": "tfrecord", "pattern": "ram://part-*.tfrecord"})
    assert numbers(source) == list(range(12))
