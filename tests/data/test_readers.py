"""The readers of foreign files on generated input: what is written is read, and no input breaks a reader."""

import io
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fuzz_readers import READERS, frame
from unclip_jax.data import tfrecord
from unclip_jax.data.record import parse_captions
from unclip_jax.data.sources import webdataset

ROOT = Path(__file__).resolve().parents[2]
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

KEYS = st.sampled_from(["0", "1", "2", "a/0", "0" * 120, "._0", "__MACOSX/0"])
FIELDS = st.sampled_from(["png", "PNG", "jpg", "jpeg", "txt", "json", "cls"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=6,
)
FEATURES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(st.binary(max_size=20), max_size=3)
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)
    | st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    max_size=4,
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@quick
@given(data=st.binary(max_size=600))
def test_no_bytes_break_a_reader(reader, data):
    try:
        reader(data)
    except ValueError as error:
        assert str(error) and "\n" not in str(error).strip()


@quick
@given(
    payloads=st.lists(st.binary(max_size=40), max_size=5), cut=st.integers(0, 300), flip=st.integers(0, 300)
)
def test_framing(payloads, cut, flip):
    """All records are found. A file that is cut or changed gives those before the place, or an error."""
    whole = b"".join(map(frame, payloads))
    spans = tfrecord.index_records(io.BytesIO(whole), check_payload=True).tolist()
    assert [whole[offset : offset + length] for offset, length in spans] == payloads
    ends = [0, *(offset + length + 4 for offset, length in spans)]
    for damaged, place in ((whole[:cut], cut), (bytearray(whole), flip)):
        if place >= len(whole):
            continue
        if isinstance(damaged, bytearray):
            damaged[place] ^= 1
        try:
            found = tfrecord.index_records(io.BytesIO(damaged), check_payload=True).tolist()
        except ValueError:
            continue
        assert place in ends and found == [span for span in spans if span[0] < place]


@quick
@given(features=FEATURES)
def test_features(features):
    assert tfrecord.decode_example(tfrecord.encode_example(features)) == features


@quick
@given(members=st.lists(st.tuples(KEYS, FIELDS, st.booleans()), max_size=9))
def test_no_tar_gives_an_image_the_caption_of_another(members):
    """A record that is read has one image and one text of its key, each of them the only one in the tar."""
    buffer, contents = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, (key, field, linked) in enumerate(members):
            member, data = tarfile.TarInfo(f"{key}.{field}"), b"" if linked else b"%d" % number
            data = b"{}" if field == "json" and not linked else data
            member.size, member.type = len(data), tarfile.SYMTYPE if linked else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(data))
            name = (key, {"jpeg": "jpg"}.get(field.lower(), field.lower()))
            contents.setdefault(name, []).append(None if linked else data)
    whole, read = buffer.getvalue(), []
    for offset, length in webdataset._find_records(io.BytesIO(whole), len(whole), "a.tar").tolist():
        try:
            read.append(webdataset.parse_tar(whole[offset : offset + length], "a.tar"))
        except ValueError:
            continue
        record = read[-1]
        images = [contents.get((record.key, kind), []) for kind in ("jpg", "png")]
        assert [record.image] in images and "_" not in record.key
        texts = contents.get((record.key, "txt"), [])
        assert [caption.encode() for caption in record.captions] == texts
    assert len({record.key for record in read}) == len(read)


@quick
@given(
    meta=st.dictionaries(st.sampled_from(["captions", "caption", "n"]), JSON),
    text=st.none() | st.binary(max_size=8),
)
def test_captions_are_texts_of_the_file(meta, text):
    """Every caption is a text that the file holds. A value that is no text and not null gives an error."""
    try:
        captions = parse_captions(meta, text)
    except ValueError:
        return
    found = []
    for value in (meta.get("captions"), meta.get("caption")):
        found += value if isinstance(value, list) else [value]
    assert all(type(caption) is str and caption.strip() for caption in captions)
    assert all(caption in found or caption.encode() in (text or b"") for caption in captions)
    for value in meta.get("captions") if isinstance(meta.get("captions"), list) else [meta.get("captions")]:
        assert value is None or isinstance(value, str) or math.isnan(value)


@pytest.mark.slow
def test_ten_minutes_of_fuzzing(tmp_path):
    """libFuzzer finds no input that breaks a reader."""
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.data.fuzz_readers", "-max_total_time=600", "-rss_limit_mb=4096"]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
