"""The order of training data and what happens to bad records: the same on both backends, on any number of hosts, from any step."""

import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from unclip_jax.data import pipeline
from unclip_jax.data.pipeline import BadDataError, eval_batches, train_batches
from unclip_jax.data.record import Record, Source

BACKENDS = pipeline.BACKENDS


def memory(n: int, bad=(), error=None) -> Source:
    """n records whose image is their number; those in `bad` raise when read."""

    def fetch(i: int) -> Record:
        if i in bad:
            raise (error or ValueError("cannot decode image: truncated"))
        return Record(f"key{i}", np.full((2, 2, 3), i % 256, np.uint8), (f"caption {i}", f"other {i}"), {"i": i}, "memory-00000")

    return Source("memory", "0" * 64, 0, n, fetch)


def make_example(record: Record, rng: np.random.Generator) -> dict:
    caption = record.captions[pipeline.choose_caption(record, rng)]
    return {
        "id": np.int64(record.meta["i"]),
        "noise": rng.standard_normal(3).astype(np.float32),
        "image": record.image,
        "other": np.bool_(caption.startswith("other")),
    }


def take(count: int, *, n: int = 37, bad=(), source=None, **options) -> list[dict]:
    options = {"batch_size": 8, "seed": 3, "backend": "numpy", "num_workers": 3, "max_bad_fraction": 1.0, **options}
    batches = train_batches(source or memory(n, bad), make_example, num_steps=count, **options)
    return list(batches)


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            assert a[name].tobytes() == b[name].tobytes()


# ---- the permutation --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 4096])
@pytest.mark.parametrize("block", [None, 1, 7, 16, 5000])
def test_permutation_is_a_bijection(n, block):
    for seed in (0, 1, -5, 2**70):
        for epoch in (0, 1, 10**6):
            assert np.array_equal(np.sort(pipeline.permutation(np.arange(n), n, seed, epoch, block)), np.arange(n))


def test_permutation_is_seekable():
    whole = pipeline.permutation(np.arange(1000), 1000, 5, 2)
    assert [int(pipeline.permutation(np.array(i), 1000, 5, 2)) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()
    epochs = np.arange(1000) % 3
    mixed = pipeline.permutation(np.arange(1000), 1000, 5, epochs, block=64)
    for epoch in range(3):
        alone = pipeline.permutation(np.arange(1000), 1000, 5, epoch, block=64)
        np.testing.assert_array_equal(mixed[epochs == epoch], alone[epochs == epoch])
    huge = 10**17 + 3
    far = pipeline.permutation(np.array([0, huge // 2, huge - 1]), huge, 1)
    assert ((far >= 0) & (far < huge)).all()


def test_permutation_differs_by_epoch_and_seed_and_is_uniform():
    n = 101
    orders = np.stack([pipeline.permutation(np.arange(n), n, seed, epoch) for seed in range(20) for epoch in range(50)])
    assert len({row.tobytes() for row in orders}) == len(orders)
    for column in (0, 1, n - 1):  # a position sees every record equally often: chi-squared with 100 degrees of freedom
        counts = np.bincount(orders[:, column], minlength=n)
        chi2 = ((counts - len(orders) / n) ** 2 / (len(orders) / n)).sum()
        assert 50 < chi2 < 165  # p about 1e-5 at both ends
    steps = np.diff(orders, axis=1)
    assert 0.002 < (steps == 1).mean() < 0.02  # neighbours do not stay neighbours
    fixed = (orders == np.arange(n)).sum(axis=1)
    assert 0.9 < fixed.mean() < 1.1


def test_blocks_stay_together():
    order = pipeline.permutation(np.arange(100), 100, 0, 0, block=16)
    blocks = order // 16
    assert (np.diff(blocks) != 0).sum() == 6  # seven runs, one of them the short one
    assert list(blocks[np.r_[True, np.diff(blocks) != 0]]) != list(range(7))
    assert not np.array_equal(order, np.sort(order))
    places = {int(np.flatnonzero(pipeline.permutation(np.arange(100), 100, seed, 0, block=16) // 16 == 6)[0]) for seed in range(200)}
    assert places == {0, 16, 32, 48, 64, 80, 96}  # the short block comes anywhere


def test_bad_permutations():
    with pytest.raises(ValueError, match="outside"):
        pipeline.permutation(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="n=0"):
        pipeline.permutation(np.array([], np.int64), 0, 0)


@pytest.mark.parametrize("block", [None, 5])
def test_every_epoch_has_every_record_once(block):
    n, batch_size = 37, 8
    ids, epochs = map(np.concatenate, zip(*(pipeline.global_indices(s, batch_size, n, 0, block) for s in range(37)), strict=True))
    for epoch in range(8):
        assert sorted(ids[epochs == epoch]) == list(range(n))
    seen = np.concatenate([batch["id"] for batch in take(37, seed=0, block=block)])
    np.testing.assert_array_equal(seen, ids)


# ---- batches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [None, 5])
def test_backends_give_the_same_bytes(block):
    bad = {3, 30}
    assert_same(take(12, bad=bad, block=block), take(12, bad=bad, block=block, backend="tf"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hosts_together_make_the_global_batch(backend):
    bad = {5, 6, 20}
    whole = take(7, bad=bad)
    for hosts in (1, 2, 4):
        parts = [take(7, bad=bad, process_index=i, process_count=hosts, backend=backend) for i in range(hosts)]
        joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)]
        assert_same(joined, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_late_equals_skipping(backend):
    bad = {1}
    assert_same(take(4, bad=bad, start_step=9, backend=backend), take(13, bad=bad)[9:])


def test_workers_and_prefetch_do_not_matter():
    assert_same(take(6, num_workers=1, prefetch=1), take(6, num_workers=7, prefetch=5))


def test_randomness_is_new_at_every_position_and_repeats_exactly():
    batches = take(20)
    noise = np.concatenate([batch["noise"] for batch in batches])
    assert len({row.tobytes() for row in noise}) == len(noise)  # also when a record comes again in another epoch
    picks = np.concatenate([batch["other"] for batch in batches])
    assert 0.3 < picks.mean() < 0.7
    assert_same(batches, take(20))
    assert not np.array_equal(noise, np.concatenate([batch["noise"] for batch in take(20, seed=4)]))
    assert pipeline.example_rng(1, 2).random() != pipeline.example_rng(2, 1).random()


@pytest.mark.parametrize("backend", BACKENDS)
def test_endless_iteration_and_close(backend):
    before = threading.active_count()
    batches = train_batches(memory(5), make_example, batch_size=4, seed=0, backend=backend, num_workers=2)
    for _, batch in zip(range(10), batches, strict=False):
        assert batch["image"].shape == (4, 2, 2, 3)
    batches.close()
    batches.close()
    assert list(batches) == []
    if backend == "numpy":
        deadline = time.time() + 5
        while threading.active_count() > before and time.time() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before
    assert take(0) == []


def test_numpy_backend_needs_no_tensorflow():
    program = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "import numpy as np\n"
        "from unclip_jax.data import pipeline, sources\n"
        "record = sources.Record('k', np.zeros((2, 2, 3), np.uint8), ('c',), {}, 's')\n"
        "source = sources.Source('m', '', 0, 3, lambda i: record)\n"
        "make = lambda record, rng: {'image': record.image}\n"
        "batches = pipeline.train_batches(source, make, batch_size=2, seed=0, backend='numpy', num_steps=2)\n"
        "assert [b['image'].shape for b in batches] == [(2, 2, 2, 3)] * 2\n"
        "try:\n    next(pipeline.train_batches(source, make, batch_size=2, seed=0, backend='tf'))\n"
        "except ImportError as error:\n    assert 'numpy' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_blank_captions_are_never_chosen():
    record = memory(1).read(0)
    rng = np.random.default_rng(0)
    some = dataclasses.replace(record, captions=("", "one", "  ", "two"))
    assert {some.captions[pipeline.choose_caption(some, rng)] for _ in range(50)} == {"one", "two"}
    for captions in ((), ("", " \n")):
        with pytest.raises(ValueError, match="no caption"):
            pipeline.choose_caption(dataclasses.replace(record, captions=captions), rng)


# ---- bad records ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_record_is_replaced_in_its_own_slot(backend, caplog):
    clean, bad = take(10), {11, 12}
    batches = train_batches(
        memory(37, bad), make_example, batch_size=8, seed=3, backend=backend, num_steps=10, num_workers=3, max_bad_fraction=1
    )
    replaced = 0
    for before, after in zip(clean, batches, strict=True):
        for slot in range(8):
            if before["id"][slot] in bad:
                replaced += 1
                assert after["id"][slot] not in bad
            else:
                assert all(before[name][slot].tobytes() == after[name][slot].tobytes() for name in before)
    assert replaced >= 3
    assert batches.stats.bad >= replaced and batches.stats.seen == 80 + batches.stats.bad
    assert "skipped record 1" in caplog.text and "cannot decode image: truncated" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [ValueError("bad pixel"), OSError("disk gone"), KeyError("jpg")])
def test_too_many_bad_records_stop_the_run(backend, error):
    batches = train_batches(
        memory(1000, range(0, 1000, 5), error), make_example, batch_size=8, seed=0, backend=backend, max_bad_fraction=0.05, num_workers=2
    )
    count = 0
    with pytest.raises(BadDataError, match=r"^11 of \d+ records cannot be used, more than max_bad_fraction=0.05.*raise max_bad_fraction$"):
        for _ in batches:
            count += 1
    assert 2 <= count <= 20
    assert list(batches) == []


def test_the_run_stops_at_the_same_batch_every_time():
    def run(**options) -> tuple[int, str]:
        batches = train_batches(memory(500, range(0, 500, 4)), make_example, batch_size=8, seed=1, **options)
        count = 0
        try:
            for _ in batches:
                count += 1
        except BadDataError as error:
            return count, str(error)

    assert len({run(backend="numpy", num_workers=1), run(backend="numpy", num_workers=6), run(backend="tf", num_workers=4)}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_usable_is_one_line_naming_the_last_record(backend):
    with pytest.raises(BadDataError, match=r"8 records in a row of memory .* record \d+ of memory: cannot decode image") as error:
        next(train_batches(memory(50, range(50)), make_example, batch_size=4, seed=0, backend=backend))
    assert "\n" not in str(error.value)


def test_a_few_bad_records_do_not_stop_a_young_run_unless_none_is_allowed():
    assert len(take(4, n=32, bad={0, 1, 2}, max_bad_fraction=0.01)) == 4  # 3 of 35 is far over 1 percent, but only 3
    with pytest.raises(BadDataError, match="max_bad_fraction=0"):
        take(4, n=32, bad={0}, max_bad_fraction=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mistake_in_the_program_is_raised_as_it_is(backend):
    def wrong(record, rng):
        return {"image": record.image + None}

    with pytest.raises(TypeError, match="unsupported operand"):
        next(train_batches(memory(10), wrong, batch_size=4, seed=0, backend=backend))
    with pytest.raises(TypeError, match="numbers and booleans"):
        next(train_batches(memory(10), lambda record, rng: {"text": record.captions[0]}, batch_size=4, seed=0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_workers_arrive_as_they_are(backend):
    """Not only those of the first row, which is made before any worker starts."""
    fourth = int(pipeline.global_indices(0, 8, 37, 3)[0][3])

    def wrong(record, rng):
        if record.meta["i"] == fourth:
            raise TypeError("caption is None")
        return make_example(record, rng)

    with pytest.raises(TypeError, match="^caption is None$"):
        next(train_batches(memory(37), wrong, batch_size=8, seed=3, backend=backend))

    gone = threading.Event()

    def fails_later(record, rng):
        if gone.is_set():
            raise OSError("disk gone")
        return make_example(record, rng)

    batches = train_batches(memory(37), fails_later, batch_size=8, seed=3, backend=backend, num_workers=2)
    next(batches)
    gone.set()
    with pytest.raises(BadDataError, match=r"^8 records in a row of memory cannot be used.*disk gone; mend the data") as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_later_batch_is_counted(backend):
    broken = int(pipeline.global_indices(3, 8, 37, 3)[0][2])

    def make(record, rng):
        if record.meta["i"] == broken:
            raise TypeError("caption is None")
        return make_example(record, rng)

    batches = train_batches(memory(37), make, batch_size=8, seed=3, num_steps=5, backend=backend, max_bad_fraction=1, num_workers=1)
    assert len(list(batches)) == 5 and batches.stats.bad >= 1


def test_a_row_of_another_shape_is_a_bad_record():
    def make(record, rng):
        side = 3 if record.meta["i"] == 7 else 2
        return {"id": np.int64(record.meta["i"]), "image": np.zeros((side, side), np.float32)}

    batches = train_batches(memory(37), make, batch_size=8, seed=3, num_steps=10, backend="numpy", max_bad_fraction=1)
    assert 7 not in np.concatenate([batch["id"] for batch in batches]) and batches.stats.bad >= 1


@pytest.mark.parametrize(
    "words, options",
    [
        ("batch_size=8 cannot be shared equally by 3 host", {"process_count": 3}),
        ("process_index=2", {"process_index": 2, "process_count": 2}),
        ("tf, numpy", {"backend": "torch"}),
        ("start_step=-1", {"start_step": -1}),
        ("max_bad_fraction=2", {"max_bad_fraction": 2}),
    ],
)
def test_arguments_that_do_not_fit(words, options):
    with pytest.raises(ValueError, match=words):
        train_batches(memory(9), make_example, **{"batch_size": 8, "seed": 0, "backend": "numpy", **options})
    with pytest.raises(ValueError, match="no records"):
        train_batches(memory(0), make_example, batch_size=8, seed=0, backend="numpy")


# ---- evaluation -------------------------------------------------------------------------------------------------------
def test_evaluation_is_one_ordered_pass():
    rows = list(eval_batches(memory(10), make_example, 4))
    assert [valid for _, valid in rows] == [4, 4, 2]
    assert all(batch["image"].shape == (4, 2, 2, 3) for batch, _ in rows)
    assert np.concatenate([batch["id"][:valid] for batch, valid in rows]).tolist() == list(range(10))
    assert rows[-1][0]["id"].tolist() == [8, 9, 8, 9]
    assert [valid for _, valid in eval_batches(memory(10), make_example, 4, limit=5)] == [4, 1]
    again = [batch for batch, _ in eval_batches(memory(10), make_example, 4, num_workers=1)]
    assert_same([batch for batch, _ in rows], again)
    assert list(eval_batches(memory(10), make_example, 4, limit=0)) == []


def test_evaluation_names_a_bad_record():
    with pytest.raises(ValueError, match=r"cannot evaluate on record 6 of memory: cannot decode image: truncated") as error:
        list(eval_batches(memory(10, {6}), make_example, 4))
    assert "\n" not in str(error.value)
