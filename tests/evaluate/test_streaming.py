"""Features in a working folder: what is computed, kept, continued after a kill, and computed again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.fake import FakeNetwork
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate import sets, streaming
from unclip_jax.evaluate.sets import open_set
from unclip_jax.evaluate.streaming import Preparation, image_features

ROOT = Path(__file__).resolve().parents[2]


def write_images(folder, count, seed=0, size=None):
    """Random pictures of mixed sizes, unless a size is given."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = (size, size) if size else rng.integers(4, 20, 2)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


def opened(folder):
    return open_set(str(folder), lambda _: {}).images


def test_features_are_those_of_the_images(tmp_path):
    """Images of mixed sizes; a second call reads the folder and computes nothing."""
    images, network, seen = opened(write_images(tmp_path / "a", 11)), FakeNetwork(), []
    found = image_features(
        network, images, work=tmp_path / "w", batch=4, progress=lambda *at: seen.append(at)
    )
    expected = network([each.pixels for each in images.load(range(11))])
    for name, values in expected.items():
        assert isinstance(found.outputs[name], np.memmap)
        np.testing.assert_array_equal(found.outputs[name], values)
    assert seen == [(4, 11), (8, 11), (11, 11)] and network.calls == [4, 4, 3, 11]
    assert found.stored == ("png",) and found.bad == 0 and list(found.rows) == list(range(11))
    again = FakeNetwork()
    np.testing.assert_array_equal(
        image_features(again, images, work=tmp_path / "w", batch=3).outputs["pool"], found.outputs["pool"]
    )
    assert again.calls == []


def test_other_images_other_networks_and_other_preparation_are_computed(tmp_path):
    images, work = opened(write_images(tmp_path / "a", 3)), tmp_path / "w"
    image_features(FakeNetwork(), images, work=work)
    for network, preparation in (
        (FakeNetwork(hash="e" * 64), Preparation()),
        (FakeNetwork(config={"model": {"activation": "gelu"}}), Preparation()),
        (FakeNetwork(resize="bicubic 224"), Preparation()),
        (FakeNetwork(), Preparation("center")),
        (FakeNetwork(), Preparation("center", 8)),
        (FakeNetwork(), Preparation(jpeg=75)),
    ):
        image_features(network, images, preparation=preparation, work=work)
        assert network.calls == [3]


def test_images_that_change_under_their_names_are_computed_again(tmp_path):
    """In an array the sizes stay the same, and a file of statistics has no times."""
    pixels, network = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8), FakeNetwork()
    first = image_features(network, sets.array_set(pixels, "a", "same"), work=tmp_path, batch=2)
    before = np.array(first.outputs["pool"])
    after = image_features(network, sets.array_set(255 - pixels, "a", "same"), work=tmp_path, batch=2)
    assert sum(network.calls) == 12 and not np.allclose(before, after.outputs["pool"])


def test_bad_images_are_refused_or_left_out(tmp_path):
    folder = write_images(tmp_path / "a", 5)
    (folder / "0002.png").write_bytes((folder / "0002.png").read_bytes()[:30])
    with pytest.raises(ValueError, match="image 2 of .*cannot decode image.*--skip-bad"):
        image_features(FakeNetwork(), opened(folder), work=tmp_path / "w", batch=2)
    found = image_features(FakeNetwork(), opened(folder), work=tmp_path / "w", batch=2, skip_bad=True)
    assert list(found.rows) == [0, 1, 3, 4] and found.bad == 1 and len(found.outputs["pool"]) == 4
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 5 images"):
        image_features(FakeNetwork(), opened(folder), work=tmp_path / "w", skip_bad=True)


def test_preparation():
    """The crop, the size and the codec act on the pixels, in this order."""
    image = np.random.default_rng(0).integers(0, 256, (10, 16, 3), np.uint8)
    np.testing.assert_array_equal(Preparation("center")(image), image[:, 3:13])
    np.testing.assert_array_equal(Preparation("center", 5)(image), ops.resize(image[:, 3:13], 5))
    smooth = ops.resize(image[:2, :2], (24, 32))
    coded = Preparation(jpeg=90)(smooth)
    assert coded.shape == smooth.shape and 0 < np.abs(coded.astype(int) - smooth).mean() < 5
    assert Preparation("center", 5, 80).crop_words == "center 5 bicubic"
    for wrong in ({"crop": "random"}, {"size": 5}, {"crop": "center", "size": 0}, {"jpeg": 101}):
        with pytest.raises(ValueError, match="crop|size|quality"):
            Preparation(**wrong)


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from tests.evaluate.fake import FakeNetwork
from tests.evaluate.test_streaming import opened
from unclip_jax.evaluate.streaming import image_features

class Slow(FakeNetwork):
    def __call__(self, images):
        time.sleep(0.15)
        print("batch", flush=True)
        return super().__call__(images)

image_features(Slow(), opened({folder!r}), work=__import__("pathlib").Path({work!r}), batch=4)
"""


def test_a_killed_process_loses_at_most_a_batch(tmp_path):
    """kill -9 in the middle: what was written is whole, and the next call computes only the rest."""
    folder, work = write_images(tmp_path / "a", 40), tmp_path / "w"
    code = KILLED.format(root=str(ROOT), folder=str(folder), work=str(work))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    started = 0
    while started < 4:
        assert process.stdout.readline().strip() == "batch"
        started += 1
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    started += len(process.stdout.read().split())
    assert process.wait() == -signal.SIGKILL
    kept = len(list(work.rglob("blocks-4/*.npz")))
    assert started - 1 <= kept <= started < 10
    network = FakeNetwork()
    found = image_features(network, opened(folder), work=work, batch=4)
    assert sum(network.calls) == 40 - 4 * kept
    np.testing.assert_array_equal(
        found.outputs["pool"], FakeNetwork()([p.pixels for p in opened(folder).load(range(40))])["pool"]
    )
    assert not list(work.rglob("blocks-4/*")) and not list(work.rglob("*.partial*"))


def test_a_damaged_batch_and_damaged_results_are_computed_again(tmp_path, monkeypatch):
    images, work, network = opened(write_images(tmp_path / "a", 8)), tmp_path / "w", FakeNetwork()

    def stop(*_):  # before the batches are joined
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_join", stop)
    with pytest.raises(KeyboardInterrupt):
        image_features(network, images, work=work, batch=2)
    monkeypatch.undo()
    blocks = sorted(work.rglob("blocks-2/*.npz"))
    data = bytearray(blocks[1].read_bytes())
    data[-200] ^= 1
    data[150] ^= 1
    blocks[1].write_bytes(bytes(data))
    blocks[2].write_bytes(blocks[2].read_bytes()[:90])
    (blocks[0].parent.with_name("blocks-3")).mkdir()  # of a call with other batches
    whole = np.array(image_features(network, images, work=work, batch=2).outputs["pool"])
    assert network.calls == [2] * 6 and not list(work.rglob("blocks-*"))
    (next(work.rglob("pool.npy"))).write_bytes(b"x")
    np.testing.assert_array_equal(image_features(network, images, work=work).outputs["pool"], whole)
    assert network.calls == [2] * 6 + [8]


@pytest.mark.parametrize("count, batch, hosts", [(10, 3, 1), (10, 3, 2), (100, 7, 3), (2, 4, 4)])
def test_hosts_share_the_batches(count, batch, hosts):
    """Every image belongs to one host, and no host has two batches more than another."""
    own = [streaming._own_batches(count, batch, host, hosts) for host in range(hosts)]
    assert sorted(i for batches in own for rows in batches for i in rows) == list(range(count))
    assert max(map(len, own)) - min(map(len, own)) <= 1


TWO_HOSTS = """
import sys
sys.path.insert(0, {root!r})
import jax, numpy, pathlib
jax.distributed.initialize("127.0.0.1:{port}", 2, {host})
from tests.evaluate.fake import FakeNetwork
from tests.evaluate.test_streaming import opened
from unclip_jax.evaluate.streaming import image_features

network = FakeNetwork()
found = image_features(network, opened({folder!r}), work=pathlib.Path({work!r}), batch=4, skip_bad=True)
numpy.savez({out!r}, calls=network.calls, rows=found.rows, bad=found.bad, pool=found.outputs["pool"])
"""


def test_two_hosts_compute_their_own_images_and_gather_all(tmp_path):
    """Two processes on this machine. 23 images, one of which is damaged, in 6 batches."""
    folder = write_images(tmp_path / "a", 23)
    (folder / "0005.png").write_bytes(b"nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"root": str(ROOT), "port": port, "folder": str(folder), "work": str(tmp_path / "w")}
    codes = [TWO_HOSTS.format(host=i, out=str(tmp_path / f"{i}.npz"), **given) for i in range(2)]
    hosts = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for code in codes]
    assert [host.wait(300) for host in hosts] == [0, 0]
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    assert sorted(first["calls"]) == [4, 4, 4] and sorted(second["calls"]) == [3, 3, 4]
    loaded = [each.pixels for i, each in enumerate(opened(folder).load(range(23))) if i != 5]
    for found in (first, second):
        assert found["bad"] == 1 and list(found["rows"]) == [i for i in range(23) if i != 5]
        np.testing.assert_array_equal(found["pool"], FakeNetwork()(loaded)["pool"])


def test_a_source_without_images(tmp_path):
    source = make_source({"name": "emoji", "split": "val"})
    assert sets.source_set(source, "emoji").count == len(source)
    embedded = source.__class__("e", "c", 0, 3, lambda i: None, None, False)
    with pytest.raises(ValueError, match="holds embeddings and no images"):
        sets.source_set(embedded, "e")
