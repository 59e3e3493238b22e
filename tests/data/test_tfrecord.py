"""The hand-written TFRecord and tf.train.Example code against TensorFlow's own, in both directions."""

import io
import struct

import numpy as np
import pytest

from unclip_jax.data import tfrecord

FEATURES = {
    "key": "3d/1f98a",
    "webp": bytes(range(256)) * 3,
    "txt": "a piñata",
    "sizes": [64, 64, 0, -1, 2**63 - 1, -(2**63)],
    "scores": [0.0, -1.5, 3.25e-8, float("inf")],
    "names": [b"fox", b"", b"\xff\x00"],
    "one": 7,
    "half": 0.5,
}
DECODED = {
    "key": [b"3d/1f98a"],
    "webp": [bytes(range(256)) * 3],
    "txt": ["a piñata".encode()],
    "sizes": FEATURES["sizes"],
    "scores": [float(np.float32(x)) for x in FEATURES["scores"]],
    "names": FEATURES["names"],
    "one": [7],
    "half": [0.5],
}


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def payloads():
    rng = np.random.default_rng(0)
    return [rng.bytes(int(size)) for size in (0, 1, 7, 8, 300, 70_000)]


def tf_example(tf, features):
    def feature(values):
        if isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    return tf.train.Example(
        features=tf.train.Features(feature={name: feature(values) for name, values in features.items()})
    )


def test_crc32c_known_values():
    assert tfrecord.crc32c(b"") == 0
    assert tfrecord.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43


def test_tensorflow_reads_what_we_write(tf, tmp_path, payloads):
    path = tmp_path / "a.tfrecord"
    assert tfrecord.write_records(path, iter(payloads)) == len(payloads)
    assert [item.numpy() for item in tf.data.TFRecordDataset(str(path))] == payloads
    assert [item.name for item in tmp_path.iterdir()] == ["a.tfrecord"]


def test_index_of_what_tensorflow_writes(tf, tmp_path, payloads):
    path = tmp_path / "b.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)
    raw = path.read_bytes()
    with tf.io.gfile.GFile(str(path), "rb") as remote, open(path, "rb") as local:
        for source in (path, str(path), local, remote, io.BytesIO(raw)):
            index = tfrecord.index_records(source, check_payload=True)
            assert index.dtype == np.int64 and index.shape == (len(payloads), 2)
            assert [raw[offset : offset + length] for offset, length in index] == payloads
            np.testing.assert_array_equal(tfrecord.index_records(source), index)


def test_empty_file_has_an_empty_index(tmp_path):
    path = tmp_path / "empty.tfrecord"
    assert tfrecord.write_records(path, []) == 0
    assert tfrecord.index_records(path).shape == (0, 2)


def test_every_truncation_is_an_error_naming_file_and_offset(tmp_path, payloads):
    path, payloads = tmp_path / "cut.tfrecord", payloads[:5]
    tfrecord.write_records(path, payloads)
    raw = path.read_bytes()
    starts = [0, *np.cumsum([16 + len(payload) for payload in payloads]).tolist()]
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        if size in starts:  # a cut between records leaves a well-formed shorter file
            assert len(tfrecord.index_records(path)) == starts.index(size)
            continue
        offset = max(start for start in starts if start <= size)
        with pytest.raises(ValueError, match=rf"cut\.tfrecord: truncated .* byte {offset}\b") as error:
            tfrecord.index_records(path)
        assert "\n" not in str(error.value)


def test_corruption_is_an_error_naming_file_and_offset(tmp_path):
    path = tmp_path / "bad.tfrecord"
    tfrecord.write_records(path, [b"x" * 20, b"y" * 30])
    raw = path.read_bytes()
    for position in range(36, 36 + 12):  # the second record's length and its crc
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.tfrecord: corrupt .* byte 36$"):
            tfrecord.index_records(path)
    for position in range(48, len(raw)):  # its payload and the payload's crc
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert len(tfrecord.index_records(path)) == 2
        with pytest.raises(ValueError, match=r"bad\.tfrecord: corrupt .* payload .* byte 36$"):
            tfrecord.index_records(path, check_payload=True)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c.tfrecord"
    tfrecord.write_records(path, [b"old"])
    before = path.read_bytes()

    def failing():
        yield b"new"
        raise RuntimeError("out of images")

    with pytest.raises(RuntimeError, match="out of images"):
        tfrecord.write_records(path, failing())
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["c.tfrecord"]


def test_example_round_trip_is_deterministic():
    encoded = tfrecord.encode_example(FEATURES)
    assert tfrecord.decode_example(encoded) == DECODED
    assert encoded == tfrecord.encode_example(dict(reversed(FEATURES.items())))
    assert tfrecord.decode_example(tfrecord.encode_example({})) == {}
    assert tfrecord.decode_example(tfrecord.encode_example({"none": []})) == {"none": []}
    arrays = {"ids": np.arange(3), "x": np.float32(0.5), "mixed": [1, 2.5]}
    assert tfrecord.decode_example(tfrecord.encode_example(arrays)) == {
        "ids": [0, 1, 2],
        "x": [0.5],
        "mixed": [1.0, 2.5],
    }


def test_example_against_tensorflow(tf):
    reference = tf_example(tf, DECODED)
    ours = tfrecord.encode_example(FEATURES)
    assert tf.train.Example.FromString(ours) == reference
    assert ours == reference.SerializeToString(deterministic=True)
    assert tfrecord.decode_example(reference.SerializeToString()) == DECODED
    parsed = tf.io.parse_single_example(
        ours, {"sizes": tf.io.FixedLenFeature([6], tf.int64), "txt": tf.io.FixedLenFeature([], tf.string)}
    )
    assert (
        parsed["sizes"].numpy().tolist() == FEATURES["sizes"]
        and parsed["txt"].numpy().decode() == FEATURES["txt"]
    )


def delimited(field, payload):
    assert len(payload) < 128
    return bytes([field << 3 | 2, len(payload)]) + payload


def test_example_decodes_unpacked_lists_and_unknown_fields():
    ints = delimited(3, bytes([1 << 3, 5]) + bytes([1 << 3]) + b"\xff" * 9 + b"\x01")  # 5, -1
    floats = delimited(2, b"".join(bytes([1 << 3 | 5]) + struct.pack("<f", x) for x in (0.5, -2.0)))
    unknown = bytes([9 << 3, 1]) + bytes([10 << 3 | 1]) + bytes(8) + bytes([11 << 3 | 5]) + bytes(4)
    entries = [
        delimited(1, delimited(1, name) + delimited(2, value))
        for name, value in ((b"i", ints), (b"f", floats))
    ]
    assert tfrecord.decode_example(unknown + delimited(1, unknown + b"".join(entries))) == {
        "i": [5, -1],
        "f": [0.5, -2.0],
    }


def test_malformed_examples_are_value_errors():
    encoded = tfrecord.encode_example(FEATURES)
    for size in range(1, len(encoded)):
        with pytest.raises(ValueError, match="malformed"):
            tfrecord.decode_example(encoded[:size])
    for junk in (b"\xff" * 20, b"\x0b", b"\x0c", delimited(1, b"\x0a\x7f")):
        with pytest.raises(ValueError, match="malformed"):
            tfrecord.decode_example(junk)


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, "a"], [b"a", 0.5], [[1]]])
def test_unencodable_values_are_type_errors_naming_the_feature(value):
    with pytest.raises(TypeError, match="'thing'"):
        tfrecord.encode_example({"thing": value})
    with pytest.raises(ValueError, match="'thing'"):
        tfrecord.encode_example({"thing": 2**63})
