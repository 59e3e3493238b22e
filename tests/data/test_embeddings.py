"""Folders of embeddings: what is written is read again by record, and what is damaged is named."""

import numpy as np
import pytest

from unclip_jax.data import embeddings
from unclip_jax.data.sources import make_source

CAPTIONS = [("one fox", "", "ein Füchslein"), (), ("two",), ("tr\ud83e", "four")]  # with a lone surrogate
D, L, W = 4, 3, 5


def write_folder(folder, shards=2, states=True):
    """`shards` shards of four images each, with the captions above."""
    rng = np.random.default_rng(0)
    described = []
    for number in range(shards):
        count = sum(map(len, CAPTIONS))
        arrays = {
            **embeddings.join_captions(CAPTIONS),
            "image_embed": rng.normal(size=(len(CAPTIONS), D)).astype(np.float32),
            "text_embed": rng.normal(size=(count, D)).astype(np.float32),
            "text_states": rng.normal(size=(count, L, W)).astype(np.float16),
        }
        path = embeddings.shard_path(folder, number)
        embeddings.write_arrays(path, arrays, {"images": len(CAPTIONS)})
        described.append(
            {"images": len(CAPTIONS), "sha256": embeddings.read_json(path / "shard.json")["sha256"]}
        )
    embeddings.write_arrays(folder / embeddings.EMPTY, {"text_embed": np.ones((1, D), np.float32)}, {})
    manifest = {
        "clip": "abc",
        "source": "def",
        "embed_dim": D,
        "states": states,
        "tokenizer": {"length": L},
        "shards": described,
    }
    moments = {"mean": [0.0] * D, "std": [1.0] * D}
    version = embeddings.FORMAT_VERSION
    embeddings.write_json(
        folder / "manifest.json", {**manifest, "format_version": version, "image_embed": moments}
    )
    return folder


def source_of(folder):
    return make_source({"name": "embeddings", "path": str(folder)})


@pytest.mark.parametrize("states", [True, False])
def test_records_across_shards(tmp_path, states):
    folder = write_folder(tmp_path / "e", states=states)
    source = source_of(folder)
    assert len(source) == 8 and source.embedded.clip == "abc" and source.embedded.states == states
    assert [source.read(i).captions for i in range(8)] == CAPTIONS * 2
    second = {file.stem: np.load(file) for file in (folder / "00001").glob("*.npy")}
    embeds = source.read(6).embeds  # the third image of the second shard, whose caption is the fourth
    assert set(embeds) == {"image_embed", "text_embed"} | ({"text_states"} if states else set())
    np.testing.assert_array_equal(embeds["image_embed"], second["image_embed"][2])
    np.testing.assert_array_equal(embeds["text_embed"], second["text_embed"][3:4])
    if states:
        np.testing.assert_array_equal(embeds["text_states"], second["text_states"][3:4])
    np.testing.assert_array_equal(source.embedded.empty["text_embed"], np.ones((1, D)))


def test_the_checksum_knows_contents_not_places(tmp_path):
    one, two = (source_of(write_folder(tmp_path / name)) for name in "ab")
    three = source_of(write_folder(tmp_path / "c", shards=3))
    assert one.checksum == two.checksum != three.checksum


def test_damage_is_named(tmp_path):
    folder = write_folder(tmp_path / "e")
    shard = folder / "00001"
    embeddings.check_hashes(shard)
    whole = (shard / "text_embed.npy").read_bytes()
    (shard / "text_embed.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"text_embed\.npy is damaged \(its hash differs\)"):
        embeddings.check_hashes(shard)
    (shard / "text_embed.npy").write_bytes(whole[:-7])
    with pytest.raises(
        ValueError, match=r"text_embed\.npy is damaged \(.*delete .*00001 and run `unclip embed`"
    ):
        embeddings.read_array(shard, "text_embed")
    (shard / "text_embed.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_embed\.npy is missing"):
        embeddings.check_hashes(shard)
    with pytest.raises(OSError, match=r"text_embed\.npy cannot be read"):
        source_of(folder).read(7)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="embeddings are made with `unclip embed`"):
        source_of(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "e")
    manifest = embeddings.read_json(folder / "manifest.json")
    embeddings.write_json(folder / "manifest.json", {**manifest, "format_version": 9})
    with pytest.raises(ValueError, match="format version 9; this version reads 1"):
        source_of(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        source_of(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing: `unclip embed` did not finish"):
        source_of(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"clip": None}, "has no 'clip' of type str"),
        ({"source": None}, "has no 'source' of type str"),
        ({"embed_dim": "4"}, "has no 'embed_dim' of type int"),
        ({"states": 1}, "has no 'states' of type bool"),
        ({"shards": {}}, "has no 'shards' of type list"),
        ({"shards": []}, "lists no image"),
        ({"shards": [{"images": 1}]}, "does not describe shard 0"),
        ({"shards": [{"images": -1, "captions": 0, "sha256": {}}]}, "does not describe shard 0"),
        ({"image_embed": {"mean": [0.0]}}, "'mean' must be 4 numbers"),
        ({"image_embed": {"mean": [0.0, 1.0, float("nan"), 1.0]}}, "'mean' has a value that is no finite"),
        ({"image_embed": {"mean": [0, 1, "2", 3]}}, "'mean' has a value that is no finite number"),
    ],
)
def test_a_manifest_of_other_types_is_refused(tmp_path, change, words):
    folder = write_folder(tmp_path / "e")
    manifest = embeddings.read_json(folder / "manifest.json")
    embeddings.write_json(folder / "manifest.json", {**manifest, **change})
    with pytest.raises(ValueError, match=words):
        source_of(folder)


def test_exchanged_and_missing_shards_are_refused(tmp_path):
    folder = write_folder(tmp_path / "e")
    described = embeddings.read_json(folder / "00001" / "shard.json")
    embeddings.write_json(folder / "00001" / "shard.json", {**described, "sha256": {}})
    with pytest.raises(ValueError, match=r"00001 is not the shard that .*manifest\.json describes"):
        source_of(folder)
    (folder / "00001" / "shard.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001/shard\.json is missing"):
        source_of(folder)


def test_a_begun_folder_is_recognised(tmp_path):
    assert not embeddings.is_embedded(tmp_path)
    embeddings.write_json(tmp_path / "plan.json", {})
    assert embeddings.is_embedded(tmp_path)
