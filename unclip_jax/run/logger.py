"""What training stages share and what is not the method: run folders, logging, progress, clean stops."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib.util
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax.checkpoint.bundle import load_part
from unclip_jax.checkpoint.store import CheckpointStore, params_hash
from unclip_jax.data import ops, pipeline
from unclip_jax.data.embeddings import Embedded, is_embedded, open_embedded
from unclip_jax.data.sources import Source
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.generate import TextConditioning, build_model, encode_text
from unclip_jax.grid import save_grid
from unclip_jax.models.clip import CLIP
from unclip_jax.paths import absolute, is_remote, local_copy, put_folder, store_errors, user_path, write_whole
from unclip_jax.sharding import Mesh, compute_dtype, gather_rest, infer_shardings, make_gather, own_rows, path_name, shard_batch
from unclip_jax.train.hardware import CHIPS, flops
from unclip_jax.train.state import TrainState
from unclip_jax.train.trackers import Trackers

log = logging.getLogger("unclip_jax")

RESTART = 75  # exit status (EX_TEMPFAIL): nothing is wrong with the run itself, start the same command again
EMBEDDABLE = ("prior_diffusion", "prior_ar", "pca")  # stages that can train from embeddings alone
MAX_SKIPPED = 50  # updates skipped in a row that stop a run
COMPILE_TIMEOUT = 3600  # seconds that hosts wait for one another's compilers


def resolve(path: str, workdir: str | os.PathLike) -> str:
    """A path from a config: relative ones (./x, ../x) are relative to the run's folder, all others stand as given."""
    return absolute(user_path(workdir) / path) if path.startswith(".") else path


def hardware() -> str:
    """The machine in words: "2 x cpu (x86_64)" or "1 x NVIDIA H200"."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind}" + (f", {os.cpu_count()} cores, {platform.machine()}" if kind == "cpu" else "")


def new_provenance(data_checksum: str) -> dict:
    """Where and when a run started; the wall time is added as it goes."""
    return {
        "hardware": hardware(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "data_checksum": data_checksum,
        "jax": jax.__version__,
        "commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def config_json(config: ConfigDict) -> dict:
    """A config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def due(step: int, every: int, last: int) -> bool:
    """Whether something done `every` steps (0: never) is done after `step` steps; always at the end."""
    return every > 0 and (step % every == 0 or step == last)


def parse_profile(text: str | None) -> tuple[int, ...]:
    """"10:20" -> (10, 20), None -> (). Raises ValueError on anything else."""
    if text is None:
        return ()
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
        raise ValueError(f"profile must be FIRST:LAST, steps from 1, the first less than the last; got {text!r}")
    return int(first), int(last)


class Watchdog:
    """Ends the process, with every thread's stack and status RESTART, when nothing was heard for `patience` seconds: a device or another
    host that is alive but stuck is not noticed by jax. It sleeps until it first hears something; 0 seconds: it never wakes."""

    def __init__(self, patience: float):
        self.patience, self.heard, self.asleep = patience, time.monotonic(), True
        self.closed = threading.Event()
        if patience > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def hear(self) -> None:
        """Something went on."""
        self.heard, self.asleep = time.monotonic(), False

    def sleep(self) -> None:
        """What comes may take any time."""
        self.asleep = True

    def close(self) -> None:
        """Ends it."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(self.patience / 4, 5.0)):
            silent = time.monotonic() - self.heard
            if not self.asleep and silent > self.patience:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"host {jax.process_index()}: no step finished for {silent:.0f} s (config.watchdog {self.patience:g}): a device or "
                    "another host hangs. The newest checkpoint is whole; the same command goes on from it",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(RESTART)


class Logger:
    """Metrics of a run: `metrics.jsonl`, trackers, and a progress bar or plain lines on standard error.

    Args:
      workdir: the run's folder.
      start, total: first step and number of steps.
      batch_size: examples a step, for the rate.
      every: steps between two records.
      name: of the stage, on the progress bar.
      patience: seconds without a finished step after which the process ends (`Watchdog`); 0: never.
      profile: "10:20" traces these steps of this process, counted from its first, into `profile/`; None: none.
      trackers: where figures and pictures go too.
      stats: of the training batches.

    Besides what a step returns, a record holds: `step_time`, and of it `input_wait`, in which the host waited for the next batch (s/step);
    `examples_per_second`, also `_per_device`; `checkpoint_seconds` and `evaluation_seconds` since the last record; `host_memory_gib`, and
    `device_memory_gib` where devices tell, at their peaks; `bad_records` so far on this host; and `mfu`, the share of the chips' peak
    arithmetic that the model itself needs, where `operations` was set and the chip is known.

    Raises:
      ValueError: when `profile` is not two numbers, the first less than the second.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start: int,
        total: int,
        batch_size: int,
        every: int,
        name: str,
        patience: float = 0.0,
        profile: str | None = None,
        trackers: Trackers | None = None,
        stats: pipeline.Stats | None = None,
    ):
        self.start, self.total, self.batch_size, self.every, self.name = start, total, batch_size, every, name
        self.main = jax.process_index() == 0
        self.bar = None
        self.workdir, self.trackers, self.last = user_path(workdir), trackers, start
        self.stats, self.waited = stats, 0.0
        self.spent: dict[str, float] = {}
        self.operations = 0.0  # of a step, without what is computed twice
        self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self.heard = 0  # of them that are known to be done
        self.made = self.clock = time.perf_counter()
        self.clock_step = start
        self.profiled = parse_profile(profile)
        self.traces = tempfile.mkdtemp() if profile and is_remote(workdir) else str(self.workdir / "profile")
        self.tracing = False
        self.skipped, self.watchdog = 0, Watchdog(patience)
        if not self.main:
            return
        self.metrics = self.workdir / "metrics.jsonl"
        lines: list[str] = []
        with store_errors(self.metrics):
            self.workdir.mkdir(parents=True, exist_ok=True)
            if self.metrics.exists():  # a run that was cut off after its last checkpoint did these steps in vain: they come again
                lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        write_whole(self.metrics, "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start))
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched (`step` counts from 1); fetches them only when a record is due.

        Raises:
          FloatingPointError: when too many updates in a row were skipped; it names what was not finite.
        """
        self.pending.append((step, metrics))
        self.last = step
        if step - self.start in self.profiled:
            jax.block_until_ready(metrics)  # the trace begins and ends between steps
            if step - self.start == self.profiled[0]:
                jax.profiler.start_trace(self.traces)
                self.tracing = True
            else:
                self._end_trace()
        if self.bar is not None:
            self.bar.update(1)
        while self.heard < len(self.pending) and all(value.is_ready() for value in self.pending[self.heard][1].values()):
            self.heard += 1  # a step is done, though no record is due
            self.watchdog.hear()
        if not due(step, self.every, self.total):
            return
        values = jax.device_get([m for _, m in self.pending])
        self.pending.clear()
        self.heard = 0
        self.watchdog.hear()
        self._count_skipped(step, values)
        now = time.perf_counter()
        seconds = (now - self.clock) / max(step - self.clock_step, 1)
        self.clock, self.clock_step = now, step
        record = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
        record |= {"step_time": seconds, "examples_per_second": self.batch_size / seconds}
        record["examples_per_second_per_device"] = record["examples_per_second"] / jax.device_count()
        record |= self._resources(seconds, len(values))
        self.record(step, record)
        words = (f"loss {record['loss']:.4f}  " if "loss" in record else "") + f"{record['examples_per_second']:.1f} examples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(words)
        elif self.main:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.total - step)))
            log.info("%s step %d/%d  %s  left %s", self.name, step, self.total, words, left)

    def _end_trace(self) -> None:
        jax.profiler.stop_trace()
        self.tracing = False
        if is_remote(self.workdir):
            put_folder(Path(self.traces), self.workdir / "profile" / str(jax.process_index()))
            shutil.rmtree(self.traces)

    def _resources(self, seconds: float, steps: int) -> dict[str, float]:
        # What the machine did since the last record.
        found, chip = {f"{key}_seconds": value for key, value in self.spent.items()}, CHIPS.get(jax.devices()[0].device_kind)
        self.spent = {}
        if self.stats is not None:
            found |= {"input_wait": (self.stats.waited - self.waited) / steps, "bad_records": self.stats.bad}
            self.waited = self.stats.waited
        found["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["device_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        if self.operations and chip is not None:
            found["mfu"] = self.operations / seconds / jax.device_count() / chip.flops
        return found

    def _count_skipped(self, step: int, values: list[dict[str, np.ndarray]]) -> None:
        for value in values:
            self.skipped = self.skipped + 1 if value.get("skipped") else 0
            if self.skipped >= MAX_SKIPPED:
                bad = ", ".join(key for key, number in value.items() if not np.isfinite(number))
                raise FloatingPointError(
                    f"{self.name} step {step}: {self.skipped} updates in a row were skipped, their {bad} not finite; parameters are those "
                    "of before, and the last checkpoint is whole: lower the learning rate or look at the data, and run the command again"
                )

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Leaves what is done inside out of the step time; the next record tells it as `<what>_seconds`."""
        started, asleep = time.perf_counter(), self.watchdog.asleep
        self.watchdog.sleep()
        yield
        if not asleep:
            self.watchdog.hear()
        took = time.perf_counter() - started
        self.clock += took
        self.spent[what] = self.spent.get(what, 0.0) + took

    def seconds(self) -> float:
        """Wall time since the logger was made."""
        return time.perf_counter() - self.made

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values (floats) under their names, once to each file."""
        if not self.main:
            return
        with store_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:  # a store writes it anew
            file.write(json.dumps({"step": step, **{k: float(f"{v:.8g}") for k, v in values.items()}}) + "\n")
        if self.trackers is not None:
            self.trackers.scalars(step, values)

    def samples(self, step: int, images: jax.Array, captions: list[str], valid: int) -> None:
        """Writes `samples/<step>.png`, a labelled grid of the first `valid` of float images in [-1, 1], on the first host, and gives it to
        the trackers; every host must call it."""
        images = crossed(images)[:valid]
        if self.main:
            path = save_grid(self.workdir / "samples" / f"{step:07d}.png", ops.to_uint8(images), captions[:valid], cell=128)
            if self.trackers is not None:
                self.trackers.picture(step, local_copy(path))

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.tracing:  # the run ended before the last step to trace
            self._end_trace()
        for thing in (self.watchdog, self.bar):
            if thing is not None:
                thing.close()
        if self.trackers is not None:
            failed = sys.exc_info()[0] is not None
            self.trackers.close("failed" if failed else "finished" if self.last >= self.total else "stopped")


def make_logger(config: ConfigDict, workdir: str | os.PathLike, name: str, start: int, batches: pipeline.TrainBatches) -> Logger:
    """The logger of a stage's training loop, as its configuration says; trackers on the first host alone.

    Raises:
      ValueError: when `keep_best` is set and there are no evaluations; as `Logger` and `Trackers`.
    """
    if config.keep_best is not None and not config.eval_every:
        raise ValueError(f"keep_best={config.keep_best} needs evaluations; set eval_every")
    main = jax.process_index() == 0
    return Logger(
        workdir,
        start=start,
        total=config.steps,
        batch_size=config.batch_size,
        every=config.log_every,
        name=name,
        patience=config.watchdog,
        profile=config.profile,
        trackers=Trackers(workdir, name, config_json(config), config_json(config.track), start) if main else None,
        stats=batches.stats,
    )


def model_operations(
    build: Callable, gradient_of: Callable, config: ConfigDict, mesh: Mesh, clip: Any, arguments: tuple, *learned: Any
) -> float:
    """Operations of a step's gradient on all devices, each counted once where remat computes some twice; 0 where the devices' peak is not
    known, as nothing is compared with it.

    Args:
      build, gradient_of, config, mesh, clip, learned: the stage's.
      arguments: of the update step.
    """
    if jax.devices()[0].device_kind not in CHIPS:
        return 0.0
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.remat = "none"
    model = build(plain, mesh, clip)[0]
    state, frozen, batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    gradient = gradient_of(plain, mesh, model, clip, *learned)
    return flops(jax.make_jaxpr(gradient)(state.params, jax.random.key(0), frozen, batch))


class Stop:
    """Whether the run shall save and leave; `received` holds the signals."""

    def __init__(self):
        self.received: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.received)

    def after(self, step: int) -> bool:
        """Whether to leave after this step; every host calls it at every step, and all of them leave after the same one."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.received.append(signal.SIGTERM)
        return bool(self)


@contextlib.contextmanager
def stop_signals(alone: bool = False) -> Iterator[Stop]:
    """Notes SIGTERM (a maintenance notice too) and SIGINT: the loop then saves and leaves. A second one acts at once. With several hosts
    jax itself listens for SIGTERM, as all must leave after the same step, unless this one works `alone`."""
    stop, before = Stop(), {}

    def note(number, frame):
        stop.received.append(number)
        signal.signal(number, before[number])
        log.info("stopping after this step")

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if alone or jax.process_count() == 1 else ():
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay with whoever runs us
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compiled_together(update: Callable, *arguments: Any) -> Callable:
    """The update compiled on every host before any of them runs it: hosts that compile longer than a collective waits would break it."""
    if jax.process_count() == 1:
        return update
    compiled = update.lower(*arguments).compile()
    wait_for_hosts("update_compiled", COMPILE_TIMEOUT)
    return compiled


def wait_for_hosts(key: str, seconds: int = 24 * 3600) -> None:
    """Returns when every host has come to this call; `key` names it. An error after so many seconds."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        barrier = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        barrier(key=f"unclip_jax_{key}", timeout_ms=seconds * 1000)


def say(text: str) -> None:
    """A line for the person who watches, from the first host alone; it does not tear a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def keep_best(
    config: ConfigDict, workdir: str | os.PathLike, step: int, state: TrainState, meta: dict, figures: Mapping[str, float]
) -> None:
    """Where `config.keep_best` names a figure of the evaluation ("val_cosine"; "-eval_loss": the lower the better), keeps the checkpoint at
    which it was best in the run's folder `best/`, which may be named wherever a run's folder may.

    Raises:
      ValueError: when there is no such figure.
    """
    if config.keep_best is None:
        return
    name = config.keep_best.removeprefix("-")
    if name not in figures:
        raise ValueError(f"keep_best names {name!r}; the evaluation's figures are {', '.join(figures)}")
    value = -figures[name] if config.keep_best.startswith("-") else figures[name]
    if not np.isfinite(value):
        return
    store = CheckpointStore(user_path(workdir) / "best", keep=1)
    with closing(store):
        before = store.latest()
        if before is None or (before != step and value > store.meta(before)["best"]):
            if before is not None and before > step:  # of a run that was cut off later than it goes on from
                store.manager.delete(before)
            store.save(step, state, meta | {"best": value, "figures": dict(figures)})


def with_time(meta: dict, logger: Logger) -> dict:
    """The run's meta with the time spent so far, over all its restarts."""
    provenance = meta["provenance"]
    return {**meta, "provenance": {**provenance, "seconds": round(provenance["seconds"] + logger.seconds(), 1)}}


def restore_or_init(
    store: CheckpointStore, state: TrainState, shardings: Any, meta: dict, init_from: str | None, load: Callable = load_part
) -> tuple[TrainState, dict, int, dict]:
    """The run's newest checkpoint if it has one; else fresh weights, or those of `init_from` (a bundle or another run), read by `load`.

    Returns:
      state, meta (a resumed run keeps its own provenance), the number of steps already done, and the part configuration that came
      with the weights ({} for fresh ones).

    Raises:
      ValueError: when the weights found are of another model, or a resumed run was made with another frozen CLIP.
    """
    if store.latest() is not None:
        old = store.newest_meta()
        if old["part"].get("clip") != meta["part"].get("clip"):
            raise ValueError(
                f"this run was trained with CLIP {old['part'].get('clip')}, but {meta['part'].get('clip')} is given now; "
                "use another workdir, or the same CLIP"
            )
        state, step = store.restore(state, shardings)
        say(f"{meta['name']}: going on from step {step}" + _differences(old["config"], meta["config"]))
        return state, {**meta, "provenance": store.meta(step)["provenance"]}, step, old["part"]
    old_part: dict = {}
    if init_from is not None:
        part, old = load(init_from, meta["name"])
        theirs = {k: np.shape(v) for k, v in _leaves(part.params)}
        ours = {k: v.shape for k, v in _leaves(state.params)}
        if theirs != ours:
            differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
            raise ValueError(
                f"{init_from} holds another {meta['name']} than this configuration: {len(differing)} differ, {differing[0]} first"
            )
        say(f"{meta['name']}: starting from the weights of {init_from}")
        state = state.replace(
            params=jax.device_put(part.params, shardings.params), ema_params=jax.device_put(part.params, shardings.ema_params)
        )
        meta = {**meta, "provenance": {**meta["provenance"], "initialised_from": old["provenance"]}}
        old_part = part.config
    return state, meta, 0, old_part


def _differences(before: dict, now: dict) -> str:
    before, now = traverse_util.flatten_dict(before, sep="."), traverse_util.flatten_dict(now, sep=".")
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "".join(f"\n  {key} was {before.get(key)}, is {now.get(key)}" for key in keys)


TEXT_KEYS = ("text_embed", "text_states", "clip_token_mask", "tokens", "token_mask")  # a batch's, in the order of TextConditioning


@dataclasses.dataclass(frozen=True)
class FrozenClip:
    """The CLIP under a stage. `params` are a step argument, never closed over; `hash` names its embedding space. Where a batch holds
    embeddings they are taken as they are; `model` is None when there are but embeddings."""

    model: CLIP | None
    params: Any
    hash: str
    tokenizer: ClipTokenizer
    image_size: int
    embed_dim: int
    empty: dict[str, np.ndarray]  # the empty caption, one row of what a batch holds of embedded captions
    own: ClipTokenizer | None  # of the stage's own text encoder
    mesh: Mesh

    def text(self, params: Any, batch: Mapping[str, jax.Array]) -> TextConditioning:
        """A batch's captions -> conditioning; no gradient. CLIP's states are None for a stage with a text encoder of its own."""
        if "text_embed" in batch:
            text = TextConditioning(*map(batch.get, TEXT_KEYS))
        else:
            text = encode_text(self.model, gather_rest(params, self.mesh), batch)
        return jax.lax.stop_gradient(text if self.own is None else text._replace(states=None, mask=None))

    def embedded_empty(self) -> FrozenClip:
        """Itself, `empty` read by the text tower once, so that no step reads it again."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        text = jax.jit(self.text, out_shardings=whole)(self.params, self.empty)
        values = {k: np.asarray(v.addressable_data(0)) for k, v in zip(TEXT_KEYS, text, strict=True) if v is not None}
        return dataclasses.replace(self, empty=values)

    def zeros(self) -> TextConditioning:
        """Zeros in the shapes of one caption's conditioning, to initialise networks with."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(self.text, self.params, self.empty))

    def image(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """A batch's `clip_image` (B, Hc, Wc, 3) in [-1, 1] -> raw z_i (B, D); no gradient."""
        if "image_embed" in batch:
            return batch["image_embed"]
        params = gather_rest(params, self.mesh)
        return jax.lax.stop_gradient(self.model.apply({"params": params}, batch["clip_image"], method="encode_image"))


def own_tokenizer(config: ConfigDict) -> ClipTokenizer | None:
    """The tokenizer of the stage's own text encoder, None when the stage takes CLIP's text states.

    Raises:
      ValueError: when the configuration has one of `text_tokenizer` and `model.text`, but not the other.
    """
    if (config.text_tokenizer is None) != (config.model.text is None):
        raise ValueError("text_tokenizer and model.text belong together: give both for a text encoder of the stage's own, or neither")
    return None if config.text_tokenizer is None else ClipTokenizer(**config.text_tokenizer)


def tokenizer_of(own: ClipTokenizer | None) -> dict:
    """What a part's configuration says of its own text encoder's tokenizer: nothing when it has none."""
    return {} if own is None else {"text_tokenizer": own.config()}


def frozen_clip(
    path: str,
    workdir: str | os.PathLike,
    mesh: Mesh,
    dtype: str,
    own: ClipTokenizer | None = None,
    scan: bool = False,
    captions: bool = True,
) -> FrozenClip:
    """Loads the CLIP of a run or a bundle onto the mesh.

    Args:
      path: a bundle, a run's folder, or a path relative to this run's folder ("../clip"); a folder of embeddings stands for the CLIP that
        made them, where nothing is left to embed.
      dtype: that it computes in (`sharding.compute_dtype`).
      own: the tokenizer of the stage's own text encoder, if it has one.
      scan: its layers in one loop (`Transformer`).
      captions: whether the stage looks at captions; without, `empty` is.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line naming what is missing.
    """
    path = resolve(path, workdir)
    if is_embedded(path):
        embedded = open_embedded(path)
        tokenizer = ClipTokenizer.from_config(embedded.tokenizer)
        empty = _embedded_empty(embedded, tokenizer, own) if captions else {}
        return FrozenClip(None, {}, embedded.clip, tokenizer, 0, embedded.embed_dim, empty, own, mesh)
    part, meta = load_part(path, "clip")
    model = build_model(part.config, compute_dtype(dtype, mesh), scan=scan, gather=make_gather(mesh))
    tokenizer = ClipTokenizer.from_config(meta["tokenizer"])
    clip = FrozenClip(
        model=model,
        params=jax.device_put(part.params, infer_shardings(part.params, mesh)),
        hash=params_hash(part.params),
        tokenizer=tokenizer,
        image_size=model.image["image_size"],
        embed_dim=model.embed_dim,
        empty=caption_arrays([""], tokenizer, own),
        own=own,
        mesh=mesh,
    )
    return clip.embedded_empty() if captions else dataclasses.replace(clip, empty={})


def _embedded_empty(embedded: Embedded, tokenizer: ClipTokenizer, own: ClipTokenizer | None) -> dict[str, np.ndarray]:
    if own is not None:
        tokens = caption_arrays([""], tokenizer, own)
        return {"text_embed": embedded.empty["text_embed"], **{k: tokens[k] for k in ("tokens", "token_mask")}}
    if not embedded.states:
        raise ValueError(f"{embedded.path} holds no text states, which this stage needs: embed with --states, or give the CLIP itself")
    return {k: np.float32(v) if k == "text_states" else v for k, v in embedded.empty.items()}


def matched(clip: FrozenClip, train: Source, *others: Source, pictures: bool = False) -> FrozenClip:
    """The CLIP under a stage that reads these sources: where it trains on embeddings, what those say of the empty caption is used too.

    Raises:
      ValueError: when a source holds embeddings of another CLIP or, where `pictures` are needed, any; when it holds pictures and CLIP is
        not there to embed them.
    """
    for source in (train, *others):
        embedded = source.embedded
        if embedded is None and clip.model is None:
            raise ValueError(f"{source.name} holds pictures, and the CLIP given is a folder of embeddings: give the CLIP itself")
        if embedded is not None and pictures:
            raise ValueError(f"{source.name} holds no pictures, which this stage needs: give it the source that was embedded")
        if embedded is not None and embedded.clip != clip.hash:
            raise ValueError(
                f"{source.name} was made with CLIP {embedded.clip}, but the CLIP given is {clip.hash}: embed again, or give that CLIP"
            )
    if train.embedded is None or (clip.own is None and not train.embedded.states):
        return clip
    return dataclasses.replace(clip, empty=_embedded_empty(train.embedded, clip.tokenizer, clip.own))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def batches(
    config: ConfigDict, source: Source, make_example: pipeline.MakeExample, mesh: Mesh, start: int, stop: int | None = None
) -> pipeline.TrainBatches:
    """This host's training batches of the steps from `start` to `stop` (the run's last when None), as `config.data` says."""
    backend = config.data.backend
    if backend == "auto":
        backend = "tf" if importlib.util.find_spec("tensorflow") else "numpy"
    return pipeline.train_batches(
        source,
        make_example,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        num_steps=(config.steps if stop is None else stop) - start,
        local_rows=own_rows(mesh, config.batch_size),
        backend=backend,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def eval_batches(
    source: Source, make_example: pipeline.MakeExample, mesh: Mesh, batch_size: int, limit: int
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """`pipeline.eval_batches` of the first `limit` records, on the mesh: (batch, n_valid). A batch size that does not divide over the
    devices is rounded up to one that does."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for batch, valid in pipeline.eval_batches(source, make_example, -(-batch_size // ways) * ways, limit):
        yield shard_batch(batch, mesh, whole=True), valid


@contextlib.contextmanager
def closing(*things: Any) -> Iterator[None]:
    """Closes all of them on the way out, whatever happened: a checkpoint being written is finished even if the loop failed."""
    with contextlib.ExitStack() as stack:
        for thing in things:
            stack.callback(thing.close)
        yield


def leave_if_stopped(stop: Stop) -> None:
    """Leaves if a signal stopped the run; its work is saved. The status is 130 after SIGINT, and RESTART after SIGTERM, on which a launcher
    shall start the command again."""
    if stop:
        say("stopped; the same command goes on from here")
        raise SystemExit(130 if signal.SIGINT in stop.received else RESTART)


def crossed(array: jax.Array) -> np.ndarray:
    """A global array's value on every host (gathered where hosts hold pieces)."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))
