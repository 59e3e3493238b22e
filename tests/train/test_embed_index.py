"""`unclip embed --index` and `--neighbours`: an index of pictures, and a training set's neighbours in it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests import runs
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import Bundle, save_bundle
from unclip_jax.cli.main import main
from unclip_jax.data import embeddings, ops, sources
from unclip_jax.data.retrieval_index import RetrievalIndex, open_index, picture_hash
from unclip_jax.run.frozen import clip_image_size, clip_network, images_of
from unclip_jax.train.embed import embed
from unclip_jax.train.embed_index import embed_index

COUNT = 20


def emoji(split, count=COUNT):
    return dataclasses.replace(sources.make_source({"name": "emoji", "split": split}), length=count)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    parts = runs.random_bundle().parts
    return str(save_bundle(Bundle({"clip": parts["clip"]}), tmp_path_factory.mktemp("clip") / "clip"))


def make(clip, out, split="val", **settings):
    settings = {"batch_size": 8, "shard_records": 12, "dtype": "float32"} | settings
    return embed_index(clip, emoji(split), out, sharding.make_mesh(), **settings)


@pytest.fixture(scope="module")
def index(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "val"
    make(clip, out, patches=3, patch_size=24)
    return out


def embedded(clip, out, index, split="compose", **settings):
    settings = {"batch_size": 8, "shard_records": 12, "dtype": "float32", "nearest": 2} | settings
    return embed(clip, emoji(split), out, sharding.make_mesh(), index=str(index), **settings)


def test_rows_are_what_clip_says_of_the_patches(index, clip):
    """Every row is CLIP's embedding of its patch, cut out at its corners, in half precision."""
    opened, source = open_index(str(index)), emoji("val")
    network = clip_network(clip, sharding.make_mesh(None, jax.devices()[:1]), "float32")
    assert len(opened) == 3 * COUNT and opened.clip == network.hash and opened.space == "raw"
    shards = [embeddings.shard_path(index, number) for number in range(2)]
    ids, corners = (
        np.concatenate([np.load(shard / f"{name}.npy") for shard in shards])
        for name in ("img_id", "patch_coords")
    )
    assert ids.tolist() == [i for i in range(COUNT) for _ in range(3)]
    assert len(np.unique(corners, axis=0)) > COUNT
    size, patches = clip_image_size(network), []
    for i, (x0, y0, x1, y1) in zip(ids, corners):
        assert (x1 - x0, y1 - y0) == (24, 24)
        image = ops.decode_image(source.read(i).image)
        patches.append(ops.to_float(ops.resize(image[y0:y1, x0:x1], size)))
    z = images_of(
        network,
        sharding.make_mesh(None, jax.devices()[:1]),
        network.params,
        {"clip_image": np.stack(patches)},
    )
    np.testing.assert_allclose(opened.rows(0, 60), z, rtol=2e-3, atol=2e-3)
    assert all(opened.holds(picture_hash(source.read(i).image)) for i in range(COUNT))
    assert not opened.holds(picture_hash(emoji("compose").read(0).image))


def test_cut_off_and_gone_on_with(index, clip, tmp_path):
    """A missing shard and the manifest are made again, with the same bytes; another plan is refused."""
    copy = shutil.copytree(index, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "00001")
    with pytest.raises(FileNotFoundError, match="did not finish"):
        open_index(str(copy))
    make(clip, copy, patches=3, patch_size=24)
    assert open_index(str(copy)).checksum == open_index(str(index)).checksum
    with pytest.raises(ValueError, match="patches was 3, is 2"):
        make(clip, copy, patches=2, patch_size=24)
    with pytest.raises(ValueError, match="kind was index, is None"):
        embed(clip, emoji("val"), copy, sharding.make_mesh(), batch_size=8, dtype="float32")
    with pytest.raises(ValueError, match="holds an index for retrieval, not embeddings"):
        sources.make_source({"name": "embeddings", "path": str(copy)})


def test_a_unit_index_of_whole_pictures(clip, tmp_path):
    manifest = make(clip, tmp_path / "unit", space="unit")
    opened = open_index(str(tmp_path / "unit"))
    assert manifest["rows"] == len(opened) == COUNT and opened.space == "unit"
    np.testing.assert_allclose(np.linalg.norm(opened.rows(0, COUNT), axis=1), 1, atol=2e-3)
    corners = np.load(tmp_path / "unit" / "00000" / "patch_coords.npy")
    assert (corners == [0, 0, 64, 64]).all()


def test_neighbours_of_a_training_set(index, clip, tmp_path):
    """Each record has the nearest rows, the nearest first; the manifest counts how often each row serves."""
    manifest = embedded(clip, tmp_path / "out", index)
    opened, source = (
        open_index(str(index)),
        sources.make_source({"name": "embeddings", "path": str(tmp_path / "out")}),
    )
    rows = np.float64(opened.rows(0, len(opened)))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    uses = np.zeros(len(opened), int)
    for i in range(COUNT):
        embeds = source.read(i).embeds
        order = np.argsort(-rows @ embeds["image_embed"], kind="stable")[:2]
        np.testing.assert_array_equal(embeds["neighbours"], opened.take(order))
        uses[order] += 1
    said = source.embedded.neighbours
    assert (said["index"], said["embedding_space"], said["count"]) == (opened.checksum, "raw", 2)
    assert said == manifest["neighbours"] and sum(said["uses"]) == 2 * COUNT
    assert said["uses"] == sorted(uses[uses > 0], reverse=True) == uses[said["rows"]].tolist()


def test_training_pictures_must_not_be_in_the_index(index, clip, tmp_path):
    """The same bytes are found by their hash; without hashes, the same embedding is found."""
    with pytest.raises(ValueError, match="record 0 of emoji/val is in the index .* must be disjoint"):
        embedded(clip, tmp_path / "out", index, split="val")
    assert not (tmp_path / "out").exists()
    make(clip, tmp_path / "whole")
    folder = published(tmp_path / "whole", tmp_path / "database")
    assert open_index(str(folder)).pictures is None
    with pytest.raises(ValueError, match="record 0 of emoji/val is in the index .*row 0 equals it"):
        embedded(clip, tmp_path / "out", folder, split="val")


def published(index, folder):
    """The index in the layout of the published databases: `.npz` files, one for each shard."""
    folder.mkdir()
    for number, shard in enumerate(sorted(index.glob("0*"))):
        names = ("embedding", "img_id", "patch_coords")
        arrays = {name: np.load(shard / f"{name}.npy") for name in names}
        np.savez(folder / f"{len(arrays['img_id'])}x16-part_{number + 9}.npz", **arrays)
    manifest = json.loads((index / "manifest.json").read_text())
    beside = {key: manifest[key] for key in ("clip", "embedding_space")}
    (folder / "index.json").write_text(json.dumps(beside))
    return folder


def test_the_published_layout(index, clip, tmp_path):
    """The parts are joined in the order of their numbers, and neighbours are the same as in our layout."""
    folder = published(index, tmp_path / "database")
    assert [path.name for path in sorted(folder.glob("*.npz"))] == ["24x16-part_10.npz", "36x16-part_9.npz"]
    ours, theirs = open_index(str(index)), open_index(str(folder))
    np.testing.assert_array_equal(theirs.rows(0, len(theirs)), ours.rows(0, len(ours)))
    embedded(clip, tmp_path / "a", index)
    embedded(clip, tmp_path / "b", folder)
    a, b = (np.load(tmp_path / name / "00001" / "neighbour_rows.npy") for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_an_index_of_another_clip_or_space(index, clip, tmp_path):
    copy = shutil.copytree(index, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    for change, says in (
        ({"embedding_space": "unit"}, "says that its rows are unit, but their norms are"),
        ({"embedding_space": "scaled"}, "unknown embedding space 'scaled'"),
        ({"rows": 7}, "does not describe the arrays"),
        ({"format_version": 2}, "has format version 2; this version reads 1"),
    ):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=says):
            open_index(str(copy))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"clip": "another"}))
    with pytest.raises(ValueError, match="was made with CLIP another, but the CLIP given is of"):
        embedded(clip, tmp_path / "out", copy)


def test_the_command(clip, tmp_path, capsys):
    """An index of one style, and the neighbours of a training set, by the command."""
    embeds = ["embed", "--clip", clip, "--batch", "64", "--dtype", "float32", "--data", "name=emoji"]
    index = [*embeds, "--data", "split=val", "--data", "style=blob", "--out", str(tmp_path / "blob")]
    assert main([*index, "--index"]) == 0
    assert "rows of" in capsys.readouterr().out
    of_style = sources.make_source({"name": "emoji", "split": "val", "style": "blob"})
    assert len(open_index(str(tmp_path / "blob"))) == len(of_style) == 95
    for more, says in (
        (["--patches", "2"], "--patches belongs to --index"),
        (["--nearest", "2"], "--nearest belongs to --neighbours"),
        (["--index", "--states"], "leave --states out"),
        (["--index", "--patches", "2"], "give --patch"),
        (["--neighbours", clip], "holds no index"),
        (["--neighbours", str(tmp_path / "blob"), "--search", "fast"], "unknown search 'fast'"),
    ):
        assert main([*embeds, "--out", str(tmp_path / "no"), *more]) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_rows_across_blocks():
    blocks = tuple(np.arange(n * 2, dtype=np.float16).reshape(n, 2) + 100 * n for n in (3, 1, 4))
    index, whole = RetrievalIndex("x", "c", "raw", "s", blocks), np.concatenate(blocks)
    for first, last in ((0, 8), (2, 5), (3, 4), (4, 8)):
        np.testing.assert_array_equal(index.rows(first, last), whole[first:last])
    numbers = np.array([[7, 0], [3, 2]])
    np.testing.assert_array_equal(index.take(numbers), whole[numbers])
