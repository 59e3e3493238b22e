"""Balancing: how often each concept and each record of a source is drawn."""

import collections

import pytest

from unclip_jax.data.sources import make_source


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_balance_draws_by_concept(power):
    """A record of a concept of n comes in proportion to n ** (power - 1), up to rounding, at least once."""
    source = make_source({"name": "emoji", "split": "val"})
    records = [source.read(i) for i in range(len(source))]
    sizes = collections.Counter(record.meta["base"] for record in records)
    assert len(set(sizes.values())) > 5  # the concepts differ, so that balancing changes something
    drawn = make_source({"name": "emoji", "split": "val", "balance": {"by": "base", "power": power}})
    copies = collections.Counter(drawn.read(i).key for i in range(len(drawn)))
    total = sum(size**power for size in sizes.values())
    for record in records:
        expected = len(drawn) * sizes[record.meta["base"]] ** (power - 1) / total
        assert copies[record.key] >= 1 and abs(copies[record.key] - expected) < 1.01
    assert (len(drawn) == len(source)) == (power == 1)
    assert drawn.checksum != source.checksum


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
