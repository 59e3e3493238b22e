"""Filters: which records and captions they keep, by each of their fields."""

import json

import pytest

from tests.data.shards import numbers, png, write_tars, write_tfrecords
from unclip_jax.data import tfrecord
from unclip_jax.data.sources import make_source

pytestmark = pytest.mark.usefixtures("cache")


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
    assert numbers(
        make_source({"name": "tfrecord", "pattern": pattern, "filters": {"max_aspect": 1.5}})
    ) == list(range(5))
    with pytest.raises(ValueError, match=r"filters \{'min_side': 9\} keep none of the 12 records"):
        make_source({"name": "tfrecord", "pattern": pattern, "filters": {"min_side": 9}})
    with pytest.raises(ValueError, match="check that the metadata has these fields"):
        make_source({"name": "tfrecord", "pattern": pattern, "filters": {"scores": {"aesthetic": (0, None)}}})


def test_only_fitting_captions_are_used(tmp_path):
    row = {"png": png(0), "json": json.dumps({"captions": ["short", "a caption that is long", ""]})}
    tfrecord.write_records(tmp_path / "a.tfrecord", [tfrecord.encode_example(row)])
    config = {"name": "tfrecord", "pattern": str(tmp_path / "a.tfrecord")}
    assert make_source({**config, "filters": {"min_caption_chars": 1, "max_caption_chars": 8}}).read(
        0
    ).captions == ("short",)
    assert len(make_source(config).read(0).captions) == 2  # a blank text is no caption
