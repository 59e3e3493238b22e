"""Files that other people made: nothing becomes a caption that is none, and nothing is left out unsaid."""

import bz2
import gzip
import lzma
import os
import re
import struct
import zlib

import pytest

from tests.data.shards import png, read_all, write_tar
from unclip_jax.data import tfrecord
from unclip_jax.data.record import caption_texts, parse_captions, parse_metadata
from unclip_jax.data.sources import make_source
from unclip_jax.data.sources.tfds import _as_captions

pytestmark = pytest.mark.usefixtures("cache")
NAN = float("nan")
RED = {"caption": "a red square"}


# ------------------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, captions",
    [
        (None, ()),
        (NAN, ()),
        ("", ()),
        ([], ()),
        ([None, NAN, " \n", "a fox"], ("a fox",)),
        ("ein F\u00fcchslein".encode(), ("ein F\u00fcchslein",)),
        (b"\xef\xbb\xbfa fox", ("a fox",)),
        ([b"one", "two"], ("one", "two")),
        ("nan", ("nan",)),
    ],
)
def test_null_and_blank_are_no_captions(given, captions):
    assert caption_texts(given) == captions


@pytest.mark.parametrize(
    "given, words",
    [
        (7, r"an int \(7\)"),
        (1.5, r"a float \(1.5\)"),
        (True, r"a bool \(True\)"),
        ({"id": 7}, "a dict"),
        ([["a fox"]], "a list"),
        ([RED], "a dict"),
        ("F\u00fcchslein".encode("latin-1"), "not UTF-8 .byte 0xfc at position 1"),
        ("a fox".encode("utf-16"), "not UTF-8"),
        ("a fox".encode("utf-16-le"), "NUL character .is it UTF-16"),
        ("tr\ud83e", "surrogate"),
    ],
)
def test_what_is_no_text_is_no_caption_either(given, words):
    with pytest.raises(ValueError, match=words):
        caption_texts(given)
    with pytest.raises(ValueError, match=words):
        parse_captions({"captions": given}, None)


def test_the_list_goes_before_the_text_and_the_text_before_the_metadata():
    assert parse_captions({"captions": ["one"], **RED}, b"two") == ("one",)
    assert parse_captions({"captions": [None], **RED}, b"two") == ("two",)
    assert parse_captions({"captions": NAN, **RED}, b" ") == ("a red square",)
    assert parse_captions({"captions": None}, None) == ()


@pytest.mark.parametrize(
    "data, words",
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"caption": "a", "caption": "b"}', "the key 'caption' comes twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' comes twice"),
        (b"[1]", "a list, expected a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (3, r"an int \(3\), expected the bytes"),
    ],
)
def test_metadata_is_one_json_object(data, words):
    with pytest.raises(ValueError, match=words):
        parse_metadata(data)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"txt": 5}, r"a caption is an int \(5\)"),
        ({"captions": [1, 2]}, r"a caption is an int \(1\)"),
        ({"caption": 0.5}, r"a caption is a float"),
        ({"txt": b"\xff\xfea"}, "not UTF-8"),
        ({"caption": b"\xfcber"}, "not UTF-8"),
        ({"json": 5}, r"the metadata is an int \(5\)"),
        ({"json": ["{}", "{}"]}, "'json' has 2 values, expected one"),
        ({"png": [b"one", b"two"]}, "'png' has 2 values, expected one"),
        ({"png": 7}, r"'png' is an int \(7\), expected the bytes of an image"),
    ],
)
def test_features_of_a_wrong_type_are_bad_records(tmp_path, row, words):
    rows = [{"png": png(1), "key": "0", **row}, {"png": png(2), "key": 7, "txt": ["one", "two"]}]
    tfrecord.write_records(tmp_path / "a.tfrecord", map(tfrecord.encode_example, rows))
    source = make_source({"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord")})
    bad, good = read_all(source)
    assert re.search(words, bad) and good == ("one", "two") and source.read(1).key == "7"


def test_classes_of_tfds_are_captions_and_other_numbers_are_not():
    class Label:
        def int2str(self, number):
            return ("red_fox", "hare")[number]

    assert _as_captions(0, Label()) == ("red fox",) and _as_captions([1, 0], Label()) == ("hare", "red fox")
    assert _as_captions(b"a fox", None) == ("a fox",)
    with pytest.raises(ValueError, match=r"an int \(3\)"):
        _as_captions(3, None)
    with pytest.raises(ValueError, match="not UTF-8"):
        _as_captions(b"\xff", None)


# ------------------------------------------------------------------------------------------------------------
# Tar shards
# ------------------------------------------------------------------------------------------------------------
def tar_source(folder, members):
    return make_source({"name": "webdataset", "pattern": write_tar(folder / "a.tar", members)})


@pytest.mark.parametrize("second", ["0.png", "0.PNG"])
def test_a_key_that_comes_twice_is_bad(tmp_path, second):
    members = [("0.png", png(1)), ("0.txt", b"red"), (second, png(2)), ("1.png", png(3)), ("1.txt", b"blue")]
    bad, good = read_all(tar_source(tmp_path, members))
    assert "record '0' has the member 'png' twice" in bad and good == ("blue",)


def test_jpg_and_jpeg_are_one_field(tmp_path):
    (bad,) = read_all(tar_source(tmp_path, [("0.jpg", png(1)), ("0.jpeg", png(2)), ("0.txt", b"red")]))
    assert "record '0' has the member 'jpg' twice" in bad


@pytest.mark.parametrize("long", ["", "-long" * 40])
def test_a_key_that_comes_again_elsewhere_is_bad_in_both_places(tmp_path, long):
    key = "0" + long
    members = [(f"{key}.png", png(1)), (f"{key}.txt", b"red"), ("1.png", png(2)), ("1.txt", b"blue")]
    first, good, second = read_all(tar_source(tmp_path, [*members, (f"{key}.png", png(3))]))
    assert good == ("blue",) and first.split(": ")[1] == second.split(": ")[1]
    assert f"the key '{key}' comes again elsewhere in this tar" in first


def test_a_tar_sorted_by_suffix_is_bad_throughout(tmp_path):
    members = [("0.png", png(0)), ("1.png", png(1)), ("0.txt", b"red"), ("1.txt", b"blue")]
    assert all("must lie together" in read for read in read_all(tar_source(tmp_path, members)))


def test_hidden_and_system_files_of_a_tar_do_not_cut_records(tmp_path):
    members = [
        ("__MACOSX/0.png", b"x"),
        (".DS_Store", b"x"),
        ("./a/._0.png", b"x"),
        ("./a/0.png", png(0)),
        ("./a/._0.txt", b"x"),
        ("./a/0.txt", b"red"),
        ("./a/.ipynb_checkpoints/0.txt", b"x"),
        ("./a/0.json", b"{}"),
    ]
    assert read_all(tar_source(tmp_path, members)) == [("red",)]


def test_a_link_in_a_tar_is_a_bad_record(tmp_path):
    members = [("0.png", png(0)), ("0.txt", b"red"), ("1.png", png(1)), ("1.txt", None)]
    good, bad = read_all(tar_source(tmp_path, members))
    assert good == ("red",) and "member '1.txt' is a link" in bad


@pytest.mark.parametrize("kind", ["joined", "damaged", "junk", "no end", "cut"])
def test_what_follows_the_last_member_is_not_lost_in_silence(tmp_path, kind):
    one = write_tar(tmp_path / "1.tar", [("0.png", png(0)), ("0.txt", b"red"), ("1.png", png(1))])
    data = (tmp_path / "1.tar").read_bytes()
    changed = {
        "joined": data + data,
        "damaged": data[:2048] + b"x" + data[2049:],  # in the header of 1.png
        "junk": data + b"x",
        "no end": data[: 6 * 512],
        "cut": data[: 4 * 512],
    }
    (tmp_path / "1.tar").write_bytes(changed[kind])
    words = r"1\.tar: no member and no end of the tar at byte \d+: it is truncated or damaged, or"
    with pytest.raises(ValueError, match=words):
        make_source({"name": "webdataset", "pattern": one})


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------
def fill(folder, **files):
    """Writes files: a number becomes an image, a text its bytes. An underscore stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = png(content) if isinstance(content, int) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def folder_source(folder, **more):
    return make_source({"name": "folder", "path": str(folder), **more})


def test_linked_folders_are_followed_once(tmp_path, caplog):
    data, elsewhere = fill(tmp_path / "data" / "cats", a_png=1, a_txt="a cat").parent, tmp_path / "elsewhere"
    fill(elsewhere, b_png=2, b_txt="a dog")
    (data / "dogs").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(data)  # a circle
    (data / "again").symlink_to(data / "cats")
    source = folder_source(data)
    assert [source.read(i).key for i in range(len(source))] == ["cats/a.png", "dogs/b.png"]
    assert read_all(source) == [("a cat",), ("a dog",)]
    assert caplog.messages == [
        f"folder {data} has 2 images; passed over: 2 links to a folder that is there already"
    ]


@pytest.mark.parametrize("filters", [{}, {"filters": {"min_caption_chars": 1}}])
def test_dead_links_are_bad_records(tmp_path, filters):
    fill(tmp_path / "data", a_png=1, a_txt="a cat", c_png=3)
    (tmp_path / "data" / "b.png").symlink_to("nowhere.png")
    (tmp_path / "data" / "c.txt").symlink_to("nowhere.txt")
    (tmp_path / "data" / "d.png").symlink_to("d.png")  # to itself
    good, first, second, third = read_all(folder_source(tmp_path / "data", **filters))
    assert good == ("a cat",) and "b.png is a link that leads nowhere" in first
    assert "the text c.txt is a link that leads nowhere" in second and "d.png is a link" in third


def test_a_caption_that_keeps_its_length_changes_the_checksum(tmp_path):
    """Embeddings of the folder are then those of other data, and so is a run that reads it."""
    before = folder_source(fill(tmp_path / "data", a_png=1, a_txt="a cat")).checksum
    assert folder_source(fill(tmp_path / "data", a_txt="a dog")).checksum != before
    assert folder_source(fill(tmp_path / "data", a_txt="a cat")).checksum == before


def test_texts_in_other_spellings_are_found(tmp_path):
    fill(
        tmp_path / "data", a_png=1, a_TXT="one", b_png=2, b_png_txt="two", c_PNG=3, c_PNG_txt="three", d_gif=4
    )
    assert read_all(folder_source(tmp_path / "data")) == [("one",), ("two",), ("three",), ()]


def test_only_ends_of_lines_part_captions(tmp_path):
    fill(tmp_path / "data", a_png=1, a_txt="\ufeffone\r\ntwo\rthree\u2028and more\x0b\n\n four\n")
    assert read_all(folder_source(tmp_path / "data")) == [("one", "two", "three\u2028and more", "four")]


def test_a_text_that_may_be_of_two_images_is_of_neither(tmp_path):
    fill(
        tmp_path / "data", a_png=1, a_PNG=2, a_txt="one", b_png=3, b_jpg=4, b_png_txt="two", b_jpg_txt="three"
    )
    fill(tmp_path / "data", c_png=5, c_txt="four", c_TXT="five")
    *bad, third, fourth, last = read_all(folder_source(tmp_path / "data"))
    assert [re.search(r"the text a.txt may describe any of a.PNG, a.png", read) is None for read in bad] == [
        False
    ] * 2
    assert (third, fourth) == (("three",), ("two",)) and "several texts, c.TXT and c.txt: keep one" in last


def test_hidden_files_are_skipped_and_other_ones_counted_once(tmp_path, caplog):
    hidden = fill(
        tmp_path / ".data", a_png=1, a_txt="one", a_heic="x", b_heic="x", lonely_txt="x", README="x"
    )
    (hidden / "._a.png").write_bytes(b"x")
    (hidden / ".DS_Store").write_bytes(b"x")
    fill(hidden / "__MACOSX", c_png=1)
    fill(hidden / ".ipynb_checkpoints", c_png=1)
    os.mkfifo(hidden / "pipe.png")
    assert read_all(folder_source(hidden)) == [("one",)]
    passed = "2 .heic, 1 files without a suffix, 1 texts without an image, 1 that are no files"
    assert caplog.messages == [f"folder {hidden} has 1 images; passed over: {passed}"]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    data, scandir = fill(tmp_path / "data", a_png=1), os.scandir
    fill(data / "closed", b_png=2)

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="closed"):
        folder_source(data)


# ------------------------------------------------------------------------------------------------------------
# Shards that are something else
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tfrecord", "webdataset"])
@pytest.mark.parametrize(
    "head, words",
    [
        (gzip.compress(b"x" * 600, mtime=0), "compressed with gzip, .*: unpack it"),
        (zlib.compress(b"x" * 600), "compressed with zlib"),
        (bz2.compress(b"x" * 600), "compressed with bzip2"),
        (lzma.compress(b"x" * 600), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 600, "compressed with zstd"),
        (b"PK\x03\x04" + b"x" * 600, "compressed with zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS .*: run `git lfs pull`"),
        (b"\n<!DOCTYPE html>" + b"x" * 600, "a page of HTML and not the data: download it again"),
    ],
)
def test_a_shard_of_another_kind_is_named_as_such(tmp_path, name, head, words):
    (tmp_path / "a.shard").write_bytes(head)
    with pytest.raises(ValueError, match=rf"a\.shard is {words}") as error:
        make_source({"name": name, "pattern": str(tmp_path / "*.shard")})
    assert "write this shard again" not in str(error.value)


def test_a_shard_in_two_spellings_is_read_once(tmp_path):
    one = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"red")])
    patterns = [one, str(tmp_path / "." / "*.tar"), f"{tmp_path}/./a.tar"]
    assert len(make_source({"name": "webdataset", "pattern": patterns})) == 1


def test_hidden_shards_are_skipped_unless_they_are_named(tmp_path):
    (tmp_path / ".kept").mkdir()
    write_tar(tmp_path / ".kept" / "a.tar", [("0.png", png(0)), ("0.txt", b"red")])
    (tmp_path / ".kept" / "__MACOSX").mkdir()
    write_tar(tmp_path / ".kept" / "__MACOSX" / "a.tar", [("0.png", png(0))])
    source = make_source({"name": "webdataset", "pattern": str(tmp_path / ".kept" / "**" / "*.tar")})
    assert read_all(source) == [("red",)]
    (tmp_path / ".a.tar").write_bytes((tmp_path / ".kept" / "a.tar").read_bytes())
    assert len(make_source({"name": "webdataset", "pattern": str(tmp_path / ".a.tar")})) == 1


def test_what_is_no_file_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name}.tar is not a file"):
            make_source({"name": "webdataset", "pattern": str(tmp_path / f"{name}*")})


def test_a_record_longer_than_its_file_is_refused(tmp_path):
    header = struct.pack("<Q", 2**63)
    (tmp_path / "a.tfrecord").write_bytes(header + struct.pack("<I", tfrecord.masked_crc32c(header)))
    for check in (False, True):
        with pytest.raises(ValueError, match="runs past the end of the file"):
            tfrecord.index_records(tmp_path / "a.tfrecord", check)


def test_a_feature_that_comes_twice_is_a_bad_record():
    one, two = (tfrecord.encode_example({"txt": text}) for text in ("one", "two"))
    payload = one[2:] + two[2:]  # behind the tag and the length of `features`
    with pytest.raises(ValueError, match="the feature 'txt' comes twice"):
        tfrecord.decode_example(b"\x0a" + bytes([len(payload)]) + payload)
