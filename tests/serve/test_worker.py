"""The queue without networks: joining, fairness, limits, errors, and programs that are forgotten."""

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest

from unclip_jax.errors import InputError, NumericalError
from unclip_jax.serve import worker as worker_module
from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.settings import Settings
from unclip_jax.serve.telemetry import Telemetry
from unclip_jax.serve.worker import Shown, Task, Worker


class FakeSampler:
    """A sampler of one device whose programs are named by the tasks' keys."""

    def __init__(self):
        devices = np.array([SimpleNamespace(platform="cpu")])
        self.mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1}, devices=devices)
        self.compiled, self.forgotten = [], []
        self.used = threading.local()

    def compiling(self, call):
        self.used.keys = set()
        call()
        used, self.used.keys = self.used.keys, None
        self.compiled.append(used)
        return used

    def forget(self, keys):
        self.forgotten += keys


class Drawn:
    """Tasks that note their batches. With a closed gate, a batch waits."""

    def __init__(self):
        self.sampler, self.batches, self.gate, self.drawing = (
            FakeSampler(),
            [],
            threading.Event(),
            threading.Event(),
        )
        self.gate.set()

    def task(self, rows, key="a", fail=()):
        def draw(rows):
            if getattr(self.sampler.used, "keys", None) is not None:
                self.sampler.used.keys.add(key)
                return rows
            self.drawing.set()
            assert self.gate.wait(30)
            self.batches.append(rows)
            for row in rows:
                if row in fail:
                    raise fail[row]
            return [f"{row}!" for row in rows]

        return Task(self.sampler, key, rows, draw)


@pytest.fixture
def drawn():
    return Drawn()


@pytest.fixture
def start(drawn):
    """Starts a worker whose announced task is of the key `a`, and waits until its sizes are compiled."""
    started = []

    def make(**settings):
        worker = Worker(
            Settings(**{"batch": 4, "wait": 0.0, **settings}), Telemetry(), [[drawn.task(["warm"])]]
        )
        started.append(worker)
        worker.start()
        while worker.compiling():
            time.sleep(0.001)
        return worker

    yield make
    drawn.gate.set()
    for worker in started:
        worker.stop(5)


def held(worker, drawn, row="held"):
    """Submits a job whose batch is being drawn and waits at the gate, so that others queue up behind it."""
    drawn.gate.clear(), drawn.drawing.clear()
    job = worker.submit(drawn.task([row]))
    assert drawn.drawing.wait(10)
    return job


def test_sizes_are_compiled_before_they_are_used(drawn, start):
    worker = start()
    assert worker.ready and worker.compiled_sizes("a") == [1, 2, 4]
    assert worker.submit(drawn.task(["x", "y", "z"])).future.result(10) == ["x!", "y!", "z!"]
    assert drawn.batches == [["x", "y", "z", "z"]]  # padded to a size that is compiled


def test_batches_are_split_over_the_devices(drawn):
    """With two devices, batches have an even number of rows, up to --batch on each device."""
    drawn.sampler.mesh.shape = {"data": 2, "fsdp": 1, "tensor": 1}
    worker = Worker(Settings(batch=4, wait=0.0), Telemetry(), [[drawn.task(["warm"])]])
    worker.start()
    while worker.compiling():
        time.sleep(0.001)
    assert worker.compiled_sizes("a") == [2, 4, 8]
    assert worker.submit(drawn.task(["x", "y", "z"])).future.result(10) == ["x!", "y!", "z!"]
    assert drawn.batches == [["x", "y", "z", "z"]]
    worker.stop(1)
    drawn.sampler.mesh.devices[0] = SimpleNamespace(platform="tpu")
    assert Worker(Settings(), Telemetry()).batch_sizes(drawn.sampler) == [2, 4, 8, 16, 32]


def test_waiting_requests_share_a_batch_in_turns(drawn, start):
    """A request of many pictures does not hold up one of a few."""
    worker = start()
    held(worker, drawn)
    long = worker.submit(drawn.task([f"l{i}" for i in range(5)]))
    short = worker.submit(drawn.task(["s0", "s1"]))
    drawn.gate.set()
    assert long.future.result(10) == [f"l{i}!" for i in range(5)]
    assert short.future.result(10) == ["s0!", "s1!"]
    assert drawn.batches[1] == ["l0", "l1", "s0", "s1"]
    assert drawn.batches[2] == ["l2", "l3", "l4", "l4"]
    assert worker.telemetry.rows._value.get() == 8 and worker.telemetry.slots._value.get() == 9


def test_other_programs_do_not_share_a_batch(drawn, start):
    """New settings are compiled beside the drawing; keys take turns."""
    worker = start()
    first = worker.submit(drawn.task(["x"], key="b"))
    assert first.future.result(10) == ["x!"]
    assert {"b"} in drawn.sampler.compiled
    held(worker, drawn)
    jobs = [worker.submit(drawn.task([f"{key}{i}"], key=key)) for i in range(2) for key in "ab"]
    drawn.gate.set()
    for job in jobs:
        job.future.result(10)
    assert {frozenset(row[0] for row in batch) for batch in drawn.batches[2:]} == {
        frozenset("a"),
        frozenset("b"),
    }


def test_a_request_waits_for_others(drawn, start):
    """Within `wait`, a second request joins the first one's batch."""
    worker = start(wait=0.5)
    jobs = [worker.submit(drawn.task([row])) for row in "xy"]
    assert [job.future.result(10) for job in jobs] == [["x!"], ["y!"]]
    assert drawn.batches == [["x", "y"]]


def test_the_queue_is_bounded(drawn, start):
    worker = start(queue=3)
    held(worker, drawn)
    worker.submit(drawn.task(["x", "y"]))
    with pytest.raises(ApiError, match="2 pictures wait already") as error:
        worker.submit(drawn.task(["z", "z"]))
    assert error.value.status == 429 and error.value.retry_after >= 1
    assert worker.submit(drawn.task(["z"])) is not None


def test_a_deadline_ends_a_request(drawn, start):
    worker = start(deadline=0.2)
    held(worker, drawn)
    late = worker.submit(drawn.task(["x"]))
    time.sleep(0.3)
    drawn.gate.set()
    with pytest.raises(ApiError) as error:
        late.future.result(10)
    assert error.value.status == 503 and error.value.retry_after
    assert ["x"] not in drawn.batches


def test_a_client_that_goes_frees_its_place(drawn, start):
    worker = start(queue=1)
    held(worker, drawn)
    gone = worker.submit(drawn.task(["gone"]))
    worker.cancel(gone)
    stays = worker.submit(drawn.task(["stays"]))
    drawn.gate.set()
    assert stays.future.result(10) == ["stays!"]
    assert ["gone"] not in drawn.batches


@pytest.mark.parametrize(
    ("error", "status"),
    [(InputError("bad"), 400), (NumericalError("NaN"), 400), (RuntimeError("secret"), 500)],
)
def test_an_error_hits_its_own_request_alone(drawn, start, error, status):
    """The others of the batch are drawn without it. What an unexpected error says stays in the log."""
    worker = start()
    held(worker, drawn)
    bad = worker.submit(drawn.task(["bad"], fail={"bad": error}))
    good = worker.submit(drawn.task(["good"]))
    drawn.gate.set()
    assert good.future.result(10) == ["good!"]
    with pytest.raises(ApiError) as found:
        bad.future.result(10)
    assert found.value.status == status and "secret" not in found.value.message
    assert worker.submit(drawn.task(["next"])).future.result(10) == ["next!"]


def test_a_program_that_does_not_compile(drawn, start):
    worker = start()

    def draw(rows):
        raise InputError("does not fit")

    job = worker.submit(Task(drawn.sampler, "c", ["x"], draw))
    with pytest.raises(ApiError, match="does not fit"):
        job.future.result(10)
    assert worker.submit(drawn.task(["next"])).future.result(10) == ["next!"]


def test_pictures_on_the_way(drawn, start):
    """What a batch shows reaches the job it belongs to; a batch whose clients have gone stops."""
    worker, seen, after = start(), [], []

    def draw(rows):
        yield Shown([f"{row}?" for row in rows])
        after.append(rows)
        yield [f"{row}!" for row in rows]

    task = Task(drawn.sampler, "s", ["x", "y"], draw)
    job = worker.submit(task, lambda i, shown: seen.append((i, shown)))
    assert job.future.result(10) == ["x!", "y!"] and seen == [(0, "x?"), (1, "y?")]
    after.clear()
    drop = worker.submit(task, lambda i, shown: worker.cancel(drop))
    with pytest.raises(CancelledError):
        drop.future.result(10)
    assert worker.submit(drawn.task(["next"])).future.result(10) == ["next!"]
    assert not after


def test_programs_of_old_settings_are_forgotten(drawn, start, monkeypatch):
    """Whoever asks for ever new settings does not fill the memory; announced programs stay."""
    monkeypatch.setattr(worker_module, "OTHERS", 2)
    worker = start()
    for key in "bcde":
        worker.submit(drawn.task(["x"], key=key)).future.result(10)
    assert drawn.sampler.forgotten == ["b", "c"]
    assert worker.compiled_sizes("b") == [] and worker.compiled_sizes("e") == [1]
    assert worker.compiled_sizes("a") == [1, 2, 4]
    assert worker.submit(drawn.task(["x"], key="b")).future.result(10) == ["x!"]  # compiled again


def test_a_stop_finishes_what_waits(drawn, start):
    worker = start()
    held(worker, drawn)
    job = worker.submit(drawn.task(["x"]))
    threading.Timer(0.05, drawn.gate.set).start()
    worker.stop(10)
    assert job.future.result(10) == ["x!"]
    with pytest.raises(ApiError, match="stops"):
        worker.submit(drawn.task(["x"]))
