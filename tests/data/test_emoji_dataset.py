"""The embedded emoji dataset: its shards match the manifest, its splits their description."""

import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import unclip_jax.data.emoji
from unclip_jax.data import tfrecord
from unclip_jax.data.emoji import build, names, packages, selection

Image = pytest.importorskip("PIL.Image")

FOLDER = Path(unclip_jax.data.emoji.__file__).parent
TONE = re.compile(r" (?:with|and) ((?:light|medium-light|medium|medium-dark|dark) skin tone)$")

BAD_CAPTION = re.compile(
    # leftovers of CLDR's labels, doubled words
    r"  |[’“”]|: facing|\b(a|an|the) (a|an|the)\b|skin tone.*skin tone"
    # the wrong article
    r"|\ba (?!uni|euro|ewe|one[ -])[aeiou]|\ban (uni|euro|ewe|one[ -]|[bcdfgjklmnpqrstvwyz])"
)


@pytest.fixture(scope="module")
def manifest():
    return json.loads((FOLDER / "manifest.json").read_text())


@pytest.fixture(scope="module")
def rows(manifest):
    """All records in file order: the json field, with `txt` and `webp` beside it."""
    result = []
    for file in sorted(manifest["files"]):
        raw = (FOLDER / file).read_bytes()
        for offset, length in tfrecord.index_records(FOLDER / file):
            example = tfrecord.decode_example(raw[offset : offset + length])
            assert set(example) == {"key", "webp", "txt", "json"} and all(
                len(values) == 1 for values in example.values()
            )
            row = json.loads(example["json"][0])
            assert row["key"] == example["key"][0].decode() and file.startswith(row["split"] + "-")
            result.append(row | {"txt": example["txt"][0].decode(), "webp": example["webp"][0]})
    return result


@pytest.fixture(scope="module")
def by_split(rows):
    return {split: [row for row in rows if row["split"] == split] for split in build.SPLITS}


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def test_shards_are_those_of_the_manifest(manifest):
    assert {path.name for path in FOLDER.glob("*.tfrecord")} == set(manifest["files"])
    for name, entry in manifest["files"].items():
        data = (FOLDER / name).read_bytes()
        assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert len(tfrecord.index_records(FOLDER / name)) == entry["records"]
    digests = "".join(manifest["files"][name]["sha256"] for name in sorted(manifest["files"]))
    assert manifest["checksum"] == hashlib.sha256(digests.encode()).hexdigest()
    assert (
        manifest["packages"] == {name: version for name, version, _ in packages.PACKAGES.values()}
        and manifest["tools"] == build.TOOLS
    )


def test_payload_checksums(manifest):
    small = min(manifest["files"], key=lambda name: manifest["files"][name]["bytes"])
    tfrecord.index_records(FOLDER / small, check_payload=True)


def test_counts_and_sizes(manifest, by_split):
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12e6
    for split, rows in by_split.items():
        count = Counter(row["style"] for row in rows)
        assert dict(count) == {style: n for style, n in manifest["counts"][split].items() if n}
        assert len({row["name"] for row in rows}) == manifest["names"][split]
        assert len({row["base"] for row in rows}) == manifest["bases"][split]
    assert len(by_split["val"]) >= 350 and manifest["bases"]["val"] >= 120
    assert len(by_split["compose"]) >= 450 and manifest["names"]["compose"] >= 200
    assert len(by_split["train"]) >= 5000 and set(manifest["counts"]["train"]) == set(selection.STYLES)


def test_notice_names_every_source(manifest):
    notice = (FOLDER / "NOTICE.md").read_text()
    for name, version in manifest["packages"].items():
        assert name in notice and version in notice
    for text in (
        "Copyright (c) Microsoft Corporation",
        "Permission is hereby granted, free of charge",
        "Copyright 2013 Google, Inc.",
        "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
        "UNICODE LICENSE V3",
        *selection.STYLES,
    ):
        assert text in notice


def test_vocabulary():
    data = (build.VOCAB / packages.VOCAB_FILE).read_bytes()
    assert hashlib.sha256(data).hexdigest() == packages.VOCAB_PACKAGE[2]
    assert "Copyright (c) 2021 OpenAI" in (build.VOCAB / "LICENSE").read_text()


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------
def test_keys_and_pairs_are_unique(rows):
    assert len({row["key"] for row in rows}) == len(rows)
    assert len({(row["style"], row["name"]) for row in rows}) == len(rows)
    assert len({row["txt"] for row in rows}) == len(rows)
    for row in rows:
        assert row["key"] == f"{row['style']}/{row['codepoints']}"


def test_every_image_is_a_64_pixel_drawing_on_white(rows):
    digests = set()
    for row in rows:
        image = Image.open(io.BytesIO(row["webp"]))
        assert image.format == "WEBP" and image.mode == "RGB", row["key"]
        pixels = np.asarray(image)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert pixels.std() > 1, row["key"]
        digests.add((row["style"], hashlib.sha256(row["webp"]).hexdigest()))
    assert len(digests) == len(rows)  # no picture twice in a style
    corners = [
        np.asarray(Image.open(io.BytesIO(row["webp"])))[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
        for row in rows[::20]
    ]
    assert np.mean(np.array(corners) > 245) > 0.9


def test_captions_are_grammatical(rows):
    for row in rows:
        captions, style = row["captions"], row["style"]
        assert 4 <= len(captions) <= 6 and captions[0] == row["txt"] and len(set(captions)) == len(captions)
        assert captions[0].startswith(f"a {style} emoji of ") and captions[0].endswith(row["name"])
        assert captions[-1].startswith("an emoji of ") and captions[-1].endswith(row["name"])
        assert all(style in caption.split() for caption in captions[:-1])
        assert len(row["keywords"]) <= 6 and len(set(row["keywords"])) == len(row["keywords"])
        for caption in captions:
            assert caption == caption.strip() == caption.lower()
            assert not BAD_CAPTION.search(caption), caption


# ------------------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------------------
def test_val_ideas_are_unseen(by_split):
    val = {row["base"] for row in by_split["val"]}
    for split in ("train", "compose"):
        assert val.isdisjoint(row["base"] for row in by_split[split])
        assert {row["name"] for row in by_split["val"]}.isdisjoint(row["name"] for row in by_split[split])
    groups = {names.group_of(row["codepoints"]) for row in by_split["val"]}
    assert groups.isdisjoint(
        names.group_of(row["codepoints"]) for row in by_split["train"] + by_split["compose"]
    )


def test_compose_is_new_combinations_of_seen_parts(by_split):
    train = by_split["train"]
    pairs = {(row["style"], row["name"]) for row in train}
    seen_names, seen_styles = {row["name"] for row in train}, {row["style"] for row in train}
    seen_people = {(row["style"], TONE.sub("", row["name"])) for row in train}
    seen_tones = {(row["style"], TONE.search(row["name"])[1]) for row in train if TONE.search(row["name"])}
    kinds = Counter(row["holdout"] for row in by_split["compose"])
    assert set(kinds) == {"style", "tone"} and min(kinds.values()) >= 50
    for row in by_split["compose"]:
        assert (row["style"], row["name"]) not in pairs and row["style"] in seen_styles
        if row["holdout"] == "style":
            assert row["name"] in seen_names
        else:  # the person and the tone are known in this style, their combination in none
            assert row["name"] not in seen_names
            assert (row["style"], TONE.sub("", row["name"])) in seen_people
            assert (row["style"], TONE.search(row["name"])[1]) in seen_tones


def test_first_rows_of_val_and_compose_are_all_different(by_split):
    for split in ("val", "compose"):
        head = by_split[split][:100]
        assert (
            len({row["base"] for row in head})
            == len({row["name"] for row in head})
            == len({row["txt"] for row in head})
            == 100
        )
        assert len({row["style"] for row in head}) == len(selection.STYLES)


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "label, tone, expected",
    [
        ("fox", None, "a fox"),
        ("owl", None, "an owl"),
        ("unicorn", None, "a unicorn"),
        ("one-piece swimsuit", None, "a one-piece swimsuit"),
        ("OK hand", None, "an ok hand"),
        ("scissors", None, "scissors"),
        ("compass", None, "a compass"),
        ("octopus", None, "an octopus"),
        ("crossed swords", None, "crossed swords"),
        ("skull and crossbones", None, "a skull and crossbones"),
        ("face with rolling eyes", None, "a face with rolling eyes"),
        ("globe showing Americas", None, "a globe showing americas"),
        ("person lifting weights", None, "a person lifting weights"),
        ("bread", None, "bread"),
        ("Santa Claus", "1f3ff", "santa claus with dark skin tone"),
        ("Statue of Liberty", None, "the statue of liberty"),
        ("Aries", None, "an aries zodiac sign"),
        ("no smoking", None, "a no smoking sign"),
        ("eight o’clock", None, "a clock face showing eight o'clock"),
        ("two-thirty", None, "a clock face showing two-thirty"),
        ("man: beard", None, "a man with a beard"),
        ("woman: red hair", "1f3fb", "a woman with red hair and light skin tone"),
        ("person: bald", "1f3fd", "a bald person with medium skin tone"),
        ("woman firefighter", "1f3fd", "a woman firefighter with medium skin tone"),
        ("man walking: facing right", None, "a man walking facing right"),
    ],
)
def test_noun_phrases(label, tone, expected):
    assert names.noun_phrase(names.phrase(label), tone) == expected


@pytest.mark.parametrize(
    "codepoints, label, kept",
    [
        ("1f98a", "fox", True),
        ("2764", "red heart", True),
        ("1f469-1f3fd-200d-1f692", "woman firefighter", True),
        ("1f1eb-1f1f7", "flag: France", False),
        ("31-20e3", "keycap: 1", False),
        ("1f192", "COOL button", False),
        ("1f3fd", "medium skin tone", False),
        ("1f469-1f3fd-200d-1f91d-200d-1f469-1f3fb", "women holding hands", False),
        ("1f468-200d-1f468-200d-1f466", "family: man, man, boy", False),
    ],
)
def test_what_is_depictable(codepoints, label, kept):
    assert names.is_depictable(codepoints, label) is kept


def test_groups_join_tone_gender_and_direction():
    firefighter = {
        names.group_of(code) for code in ("1f9d1-200d-1f692", "1f468-1f3fe-200d-1f692", "1f469-200d-1f692")
    }
    running = {
        names.group_of(code)
        for code in ("1f3c3", "1f3c3-1f3fb-200d-2640", "1f3c3-200d-2642-200d-27a1", "1f3c3-200d-27a1")
    }
    assert len(firefighter) == len(running) == 1 and firefighter != running
    assert names.normalise("0031-FE0F-20E3") == "31-20e3"


def test_captions_of_one_image():
    assert names.captions("fox", None, "3d", []) == [
        "a 3d emoji of a fox",
        "a fox emoji in 3d style",
        "3d fox",
        "an emoji of a fox",
    ]
    full = names.captions("grapes", None, "noto", ["fruit", "vine", "wine"])
    assert full[1] == "an emoji of grapes in noto style" and len(full) == 6
    assert all(caption.startswith("a noto emoji of grapes") for caption in full[3:5])


# ------------------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------------------
def test_a_wrong_archive_is_one_line_and_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "check_tools", lambda: None)
    (tmp_path / "misskey-dev-emoji-assets-17.0.3.tgz").write_bytes(b"not an archive")
    assert build.main(["--out", str(tmp_path / "out"), "--packages", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "@misskey-dev/emoji-assets 17.0.3" in error
        and not (tmp_path / "out").exists()
    )


@pytest.mark.slow
def test_rebuild_is_byte_for_byte(capsys):
    """Needs the network, npm and the pinned pillow and resvg-py; about two minutes."""
    pytest.importorskip("resvg_py")
    assert build.main(["--check"]) == 0, capsys.readouterr().err


def test_all_splits_together():
    """The split "all" has every record once, and a checksum of its own."""
    from unclip_jax.data.sources.emoji import SPLITS, emoji_source

    splits = [emoji_source(split) for split in SPLITS]
    together = emoji_source("all")
    keys = [source.read(i).key for source in splits for i in range(len(source))]
    assert [together.read(i).key for i in range(len(together))] == keys and len(set(keys)) == len(keys)
    assert len({source.checksum for source in (*splits, together)}) == 4
