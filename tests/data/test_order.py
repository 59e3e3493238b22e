"""The order of training: a seekable permutation for each epoch, and the randomness of each position."""

import numpy as np
import pytest

from unclip_jax.data.order import Order, example_rng, permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 4096])
def test_permutation_is_a_bijection(n):
    for seed in (0, 1, -5, 2**70):
        for epoch in (0, 1, 10**6):
            assert np.array_equal(np.sort(permutation(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permutation_is_seekable():
    """Any index is evaluated alone, and an array may mix epochs."""
    whole = permutation(np.arange(1000), 1000, 5, 2)
    alone = [int(permutation(np.array(i), 1000, 5, 2)) for i in (0, 17, 999)]
    assert alone == whole[[0, 17, 999]].tolist()
    epochs = np.arange(1000) % 3
    mixed = permutation(np.arange(1000), 1000, 5, epochs)
    for epoch in range(3):
        of_epoch = permutation(np.arange(1000), 1000, 5, epoch)
        np.testing.assert_array_equal(mixed[epochs == epoch], of_epoch[epochs == epoch])
    huge = 10**17 + 3
    far = permutation(np.array([0, huge // 2, huge - 1]), huge, 1)
    assert ((far >= 0) & (far < huge)).all() and len(set(far.tolist())) == 3


def test_permutation_differs_by_epoch_and_seed_and_is_uniform():
    n = 101
    orders = np.stack(
        [permutation(np.arange(n), n, seed, epoch) for seed in range(20) for epoch in range(50)]
    )
    assert len({row.tobytes() for row in orders}) == len(orders)
    for column in (
        0,
        1,
        n - 1,
    ):  # every position sees every record equally often: chi-squared, 100 degrees of freedom
        counts = np.bincount(orders[:, column], minlength=n)
        chi2 = ((counts - len(orders) / n) ** 2 / (len(orders) / n)).sum()
        assert 50 < chi2 < 165  # p is about 1e-5 at both ends
    steps = np.diff(orders, axis=1)
    assert 0.002 < (steps == 1).mean() < 0.02  # neighbours do not stay neighbours
    fixed = (orders == np.arange(n)).sum(axis=1)
    assert 0.9 < fixed.mean() < 1.1


def test_the_order_is_the_same_in_every_version():
    """Runs resume across versions, so the order and the randomness of a row may never change."""
    assert Order(37, 3).records(np.arange(40)).tolist() == [
        12,
        3,
        26,
        6,
        11,
        30,
        1,
        17,
        10,
        22,
        25,
        15,
        21,
        2,
        36,
        13,
        8,
        20,
        5,
        27,
        33,
        35,
        4,
        14,
        18,
        29,
        34,
        31,
        7,
        32,
        23,
        19,
        9,
        16,
        0,
        28,
        24,
        8,
        7,
        20,
    ]
    assert [Order(37, 3).replacement(5, attempt) for attempt in range(1, 6)] == [1, 31, 18, 7, 0]
    assert example_rng(3, 5).random() == 0.08910064623458391


def test_bad_permutations():
    with pytest.raises(ValueError, match="outside"):
        permutation(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="n=0"):
        permutation(np.array([], np.int64), 0, 0)


def test_every_epoch_has_every_record_once():
    n = 37
    records = Order(n, 0).records(np.arange(8 * n)).reshape(8, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in records.tolist())
    assert len({epoch.tobytes() for epoch in records}) == 8


def test_replacements_differ_by_position_and_attempt():
    order = Order(1000, 4)
    replacements = [
        [order.replacement(position, attempt) for attempt in range(1, 8)] for position in range(50)
    ]
    assert all(0 <= record < 1000 for row in replacements for record in row)
    assert len({record for row in replacements for record in row}) > 250  # 350 draws of 1000
    assert all(len(set(row)) >= 5 for row in replacements)


def test_example_rng_differs_by_each_argument():
    draws = {
        example_rng(seed, position, attempt).random()
        for seed in (0, 1, -1)
        for position in (0, 1, 2**40)
        for attempt in (0, 1)
    }
    assert len(draws) == 18
