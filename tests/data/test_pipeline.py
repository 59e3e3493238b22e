"""Batches: the same on both backends, on any number of hosts and from any step; and bad records."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from unclip_jax.data.examples import choose_caption
from unclip_jax.data.order import Order
from unclip_jax.data.pipeline import BACKENDS, BadDataError, Workers, eval_batches, train_batches
from unclip_jax.data.record import Record, Source


def memory(n: int, bad=(), error=None) -> Source:
    """n records whose image is their number; those in `bad` raise when read."""

    def fetch(i: int) -> Record:
        if i in bad:
            raise (error or ValueError("cannot decode image: truncated"))
        return Record(
            f"key{i}",
            np.full((2, 2, 3), i % 256, np.uint8),
            (f"caption {i}", f"other {i}"),
            {"i": i},
            "memory-00000",
        )

    return Source("memory", "0" * 64, 0, n, fetch)


def make_example(record: Record, rng: np.random.Generator) -> dict:
    caption = record.captions[choose_caption(record, rng)]
    return {
        "id": np.int64(record.meta["i"]),
        "noise": rng.standard_normal(3).astype(np.float32),
        "image": record.image,
        "other": np.bool_(caption.startswith("other")),
    }


def take(count: int, *, n: int = 37, bad=(), workers=None, **options) -> list[dict]:
    """The first `count` batches of 8 of an in-memory source."""
    options = {"batch_size": 8, "seed": 3, "max_bad_fraction": 1.0, **options}
    workers = workers or Workers("numpy", 3)
    return list(train_batches(memory(n, bad), make_example, num_steps=count, workers=workers, **options))


def record_at(position: int) -> int:
    """The record at a position of `take`'s order."""
    return int(Order(37, 3).records(np.array([position]))[0])


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            assert a[name].tobytes() == b[name].tobytes()


# ---- batches -----------------------------------------------------------------------------------------------
def test_backends_give_the_same_bytes():
    bad = {3, 30}
    assert_same(take(12, bad=bad), take(12, bad=bad, workers=Workers("tf", 3)))


def test_batches_follow_the_order():
    ids = np.concatenate([batch["id"] for batch in take(37)])
    np.testing.assert_array_equal(ids, Order(37, 3).records(np.arange(37 * 8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hosts_together_make_the_global_batch(backend):
    bad = {5, 6, 20}
    whole = take(7, bad=bad)
    for hosts in (1, 2, 4):
        rows = np.arange(8).reshape(hosts, -1)
        parts = [take(7, bad=bad, local_rows=rows[i], workers=Workers(backend, 3)) for i in range(hosts)]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)
    rows = [5, 0, 6]  # any rows, in any order
    some = take(7, bad=bad, local_rows=np.array(rows), workers=Workers(backend, 3))
    assert_same(some, [{name: array[rows] for name, array in batch.items()} for batch in whole])


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_late_equals_skipping(backend):
    bad = {1}
    assert_same(take(4, bad=bad, start_step=9, workers=Workers(backend, 3)), take(13, bad=bad)[9:])


def test_workers_and_prefetch_do_not_matter():
    assert_same(take(6, workers=Workers("numpy", 1, 1)), take(6, workers=Workers("numpy", 7, 5)))


def test_randomness_is_new_at_every_position_and_repeats_exactly():
    batches = take(20)
    noise = np.concatenate([batch["noise"] for batch in batches])
    # It is new also when a record comes again in another epoch.
    assert len({row.tobytes() for row in noise}) == len(noise)
    picks = np.concatenate([batch["other"] for batch in batches])
    assert 0.3 < picks.mean() < 0.7
    assert_same(batches, take(20))
    assert not np.array_equal(noise, np.concatenate([batch["noise"] for batch in take(20, seed=4)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_endless_iteration_and_close(backend):
    before = threading.active_count()
    batches = train_batches(memory(5), make_example, batch_size=4, seed=0, workers=Workers(backend, 2))
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
    program = """
import sys
sys.modules["tensorflow"] = None
import numpy as np
from unclip_jax.data.pipeline import Workers, train_batches
from unclip_jax.data.record import Record, Source
record = Record("k", np.zeros((2, 2, 3), np.uint8), ("c",), {}, "s")
source = Source("m", "", 0, 3, lambda i: record)
def batches(backend):
    make = lambda record, rng: {"image": record.image}
    return train_batches(source, make, batch_size=2, seed=0, num_steps=2, workers=Workers(backend))
assert [batch["image"].shape for batch in batches("numpy")] == [(2, 2, 2, 3)] * 2
try:
    next(batches("tf"))
except ImportError as error:
    assert "unlike 'numpy'" in str(error)
else:
    raise AssertionError("the tf backend ran without TensorFlow")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- bad records -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_record_is_replaced_in_its_own_slot(backend, caplog):
    clean, bad = take(10), {11, 12}
    batches = train_batches(
        memory(37, bad),
        make_example,
        batch_size=8,
        seed=3,
        num_steps=10,
        max_bad_fraction=1,
        workers=Workers(backend, 3),
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
        memory(1000, range(0, 1000, 5), error),
        make_example,
        batch_size=8,
        seed=0,
        max_bad_fraction=0.05,
        workers=Workers(backend, 2),
    )
    count = 0
    message = r"^11 of \d+ records cannot be used, more than max_bad_fraction=0.05.*raise max_bad_fraction$"
    with pytest.raises(BadDataError, match=message):
        for _ in batches:
            count += 1
    assert 2 <= count <= 20
    assert list(batches) == []


def test_the_run_stops_at_the_same_batch_every_time():
    def run(*workers) -> tuple[int, str]:
        source = memory(500, range(0, 500, 4))
        batches = train_batches(source, make_example, batch_size=8, seed=1, workers=Workers(*workers))
        count = 0
        try:
            for _ in batches:
                count += 1
        except BadDataError as error:
            return count, str(error)
        raise AssertionError("the run did not stop")

    assert len({run("numpy", 1), run("numpy", 6), run("tf", 4)}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_usable_is_one_line_naming_the_last_record(backend):
    message = r"8 records in a row of memory .* record \d+ of memory: cannot decode image"
    with pytest.raises(BadDataError, match=message) as error:
        next(
            train_batches(memory(50, range(50)), make_example, batch_size=4, seed=0, workers=Workers(backend))
        )
    assert "\n" not in str(error.value)


def test_a_few_bad_records_do_not_stop_a_young_run_unless_none_is_allowed():
    assert (
        len(take(4, n=32, bad={0, 1, 2}, max_bad_fraction=0.01)) == 4
    )  # 3 of 35 is far over 1 percent, but only 3
    with pytest.raises(BadDataError, match="max_bad_fraction=0"):
        take(4, n=32, bad={0}, max_bad_fraction=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mistake_in_the_program_is_raised_as_it_is(backend):
    def wrong(record, rng):
        return {"image": record.image + None}

    with pytest.raises(TypeError, match="unsupported operand"):
        next(train_batches(memory(10), wrong, batch_size=4, seed=0, workers=Workers(backend)))

    def text(record, rng):
        return {"text": record.captions[0]}

    with pytest.raises(TypeError, match="numbers and booleans"):
        next(train_batches(memory(10), text, batch_size=4, seed=0, workers=Workers(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_workers_arrive_as_they_are(backend):
    """Not only those of the first row, which is made before any worker starts."""
    fourth = record_at(3)

    def wrong(record, rng):
        if record.meta["i"] == fourth:
            raise TypeError("caption is None")
        return make_example(record, rng)

    with pytest.raises(TypeError, match="^caption is None$"):
        next(train_batches(memory(37), wrong, batch_size=8, seed=3, workers=Workers(backend)))

    gone = threading.Event()

    def fails_later(record, rng):
        if gone.is_set():
            raise OSError("disk gone")
        return make_example(record, rng)

    batches = train_batches(memory(37), fails_later, batch_size=8, seed=3, workers=Workers(backend, 2))
    next(batches)
    gone.set()
    message = r"^8 records in a row of memory cannot be used.*disk gone; mend the data"
    with pytest.raises(BadDataError, match=message) as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_later_batch_is_counted(backend):
    broken = record_at(3 * 8 + 2)

    def make(record, rng):
        if record.meta["i"] == broken:
            raise TypeError("caption is None")
        return make_example(record, rng)

    workers = Workers(backend, 1)
    batches = train_batches(
        memory(37), make, batch_size=8, seed=3, num_steps=5, max_bad_fraction=1, workers=workers
    )
    assert len(list(batches)) == 5 and batches.stats.bad == 1


def test_a_row_of_another_shape_is_a_bad_record():
    def make(record, rng):
        side = 3 if record.meta["i"] == 7 else 2
        return {"id": np.int64(record.meta["i"]), "image": np.zeros((side, side), np.float32)}

    workers = Workers("numpy")
    batches = train_batches(
        memory(37), make, batch_size=8, seed=3, num_steps=10, max_bad_fraction=1, workers=workers
    )
    assert 7 not in np.concatenate([batch["id"] for batch in batches]) and batches.stats.bad >= 1


@pytest.mark.parametrize(
    "words, options",
    [
        ("batch_size=0", {"batch_size": 0}),
        ("rows of a global batch of 8", {"local_rows": np.array([7, 8])}),
        ("rows of a global batch of 8", {"local_rows": np.array([], int)}),
        ("start_step=-1", {"start_step": -1}),
        ("max_bad_fraction=2", {"max_bad_fraction": 2}),
    ],
)
def test_arguments_that_do_not_fit(words, options):
    with pytest.raises(ValueError, match=words):
        train_batches(memory(9), make_example, **{"batch_size": 8, "seed": 0, **options})


def test_a_source_without_records_and_an_unknown_backend():
    with pytest.raises(ValueError, match="no records"):
        train_batches(memory(0), make_example, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="'torch': choose one of tf, numpy"):
        Workers("torch")


# ---- evaluation --------------------------------------------------------------------------------------------
def test_evaluation_is_one_ordered_pass():
    rows = list(eval_batches(memory(10), make_example, 4))
    assert [valid for _, valid in rows] == [4, 4, 2]
    assert all(batch["image"].shape == (4, 2, 2, 3) for batch, _ in rows)
    assert np.concatenate([batch["id"][:valid] for batch, valid in rows]).tolist() == list(range(10))
    assert rows[-1][0]["id"].tolist() == [8, 9, 8, 9]
    assert [valid for _, valid in eval_batches(memory(10), make_example, 4, limit=5)] == [4, 1]
    again = [batch for batch, _ in eval_batches(memory(10), make_example, 4, threads=1)]
    assert_same([batch for batch, _ in rows], again)
    assert list(eval_batches(memory(10), make_example, 4, limit=0)) == []


def test_evaluation_names_a_bad_record():
    with pytest.raises(
        ValueError, match=r"cannot evaluate on record 6 of memory: cannot decode image: truncated"
    ) as error:
        list(eval_batches(memory(10, {6}), make_example, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captions_that_fill_all_tokens_are_counted(backend):
    def example(record, rng):
        last = record.meta["i"] % 3 == 0
        return {
            "clip_token_mask": np.array([True, last]),
            "token_mask": np.array([True, record.meta["i"] == 1]),
        }

    batches = train_batches(memory(9), example, batch_size=3, seed=0, num_steps=3, workers=Workers(backend))
    counted = [batches.stats.full for _ in batches]
    assert counted[-1] == 4 and counted == sorted(counted)
