"""`Run`: the signals, checkpoints, figures and data of a training run. The stage's file has the loop itself:

with Run(config, workdir, stage, mesh, data, init_from) as run:
    update = run.update()
    for step, batch in run:
        run.state, metrics = update(run.state, frozen, batch)
        run.log(step, metrics)
        if run.saves(step):
            run.save(step)
        if run.evaluates(step):
            run.record(step, evaluate(run.state, step))
return run.figures
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.models.layers import without_remat
from unclip_jax.run import batches
from unclip_jax.run.hardware import CHIPS, flops
from unclip_jax.run.hosts import compiled_together, leave_if_stopped, print_once, stop_signals
from unclip_jax.run.logger import Logger, due
from unclip_jax.run.optim import make_optimizers
from unclip_jax.run.resume import (
    check_best,
    config_json,
    keep_best,
    new_provenance,
    restore_or_init,
    with_time,
)
from unclip_jax.run.stage import Stage
from unclip_jax.run.state import abstract_state, create_state, gradients_of, make_update
from unclip_jax.sharding import Mesh, replicate, shard_batch


class Run:
    """A training run in a folder. Making it restores or initialises the state.

    Enter it as a context manager. Iterating over it yields (step, batch on the mesh).

    Args:
      config: the run's configuration.
      workdir: the run's folder; a run in it is resumed.
      stage: the stage to train.
      mesh: the devices to train on.
      data: the run's sources.
      init_from: a bundle or run whose weights a new run starts from.
      load: function that reads those weights (`checkpoint.load.load_part`).

    Attributes:
      state: the `TrainState`; the loop replaces it after each step.
      part: the part's configuration, with the values that `stage.fit` measured.
      figures: the figures of the last evaluation.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | os.PathLike,
        stage: Stage,
        mesh: Mesh,
        data: batches.Data,
        init_from: str | None = None,
        load: Callable = load_part,
    ):
        self.config, self.workdir, self.stage, self.mesh, self.data = config, workdir, stage, mesh, data
        self.figures: dict[str, float] = {}
        batches.check_held_out(config, stage.example, data)
        self.store = CheckpointStore(workdir, config.keep)
        self.optimizers = make_optimizers(config, stage.players)
        self.shardings = abstract_state(stage, self.optimizers, mesh)[1]
        state = create_state(stage, self.optimizers, config.seed, self.shardings)
        meta = {
            "name": stage.name,
            "part": stage.part,
            "sampling": config_json(config.get("sampling", ConfigDict())),
            "config": config_json(config),
            "provenance": new_provenance(
                data.train.checksum, {name: source.checksum for name, source in data.held_out.items()}
            ),
        }
        if (self.store.latest() or config.steps) < config.steps:
            check_best(config, workdir, meta)
        self.start = restore_or_init(self.store, state, self.shardings, meta, init_from, load)
        self.state, self.meta = self.start.state, {**self.start.meta, "part": dict(stage.part)}
        self.stopping = False
        self._evaluation = contextlib.ExitStack()

    @property
    def part(self) -> dict:
        """The part's configuration, as checkpoints hold it."""
        return self.meta["part"]

    def fit(self) -> Any:
        """Measures the stage's fit, or keeps the fit that came with the weights.

        It keeps that fit if the weights were trained on the same frozen networks.

        Returns:
          The arrays that the objective finds in `frozen[stage.FITTED]`, on the mesh.
        """
        fit, old = self.stage.fit, self.start.part
        before, now = old.get("frozen", {}), self.part["frozen"]
        shared = before.keys() & now.keys()
        if (
            all(key in old for key in fit.keys)
            and shared
            and all(before[role] == now[role] for role in shared)
        ):
            self.part.update({key: old[key] for key in fit.keys})
        else:
            self.part.update(fit.measure(self))
        return replicate(fit.arrays(self.part), self.mesh)

    def measuring_batches(self, count: int) -> Iterator[dict[str, jax.Array]]:
        """Yields the first `count` training batches on the mesh, for measurements."""
        first = batches.train_batches(self.config, self.data.train, self.stage.example, self.mesh, 0, count)
        with contextlib.closing(first):
            for batch in first:
                yield shard_batch(batch, self.mesh)

    def update(self) -> Callable:
        """The stage's update step (`state.make_update`). Every host compiles it before any host runs it."""
        update = compiled_together(
            make_update(self.stage, self.optimizers, self.shardings, self.mesh, self.config)
        )
        counted = False

        def call(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
            nonlocal counted
            if not counted:
                self.logger.operations, counted = self._operations(state, frozen, batch), True
            return update(state, frozen, batch)

        return call

    def _operations(self, *arguments: Any) -> float:
        # The operations of a step's gradients on all devices, without those that remat repeats. 0 where the
        # devices' peak is not known, because nothing is compared with it then.
        if jax.devices()[0].device_kind not in CHIPS:
            return 0.0
        state, frozen, batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        return count_operations(self.stage, self.config.grad_accumulation, self.mesh, state, frozen, batch)

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            stack.callback(self.store.close)
            self.stop = stack.enter_context(stop_signals())
            first, last = self.start.step, self.config.steps
            self._batches = batches.train_batches(
                self.config, self.data.train, self.stage.example, self.mesh, first, last
            )
            stack.callback(self._batches.close)
            # The logger asks the trackers' servers first. A start that fails there has made no folder.
            self.logger = Logger(self.config, self.workdir, self.stage.name, first, self._batches.stats)
            stack.callback(self.logger.close)
            self.store.open()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._closing.__exit__(kind, error, trace)
        if kind is None:
            leave_if_stopped(self.stop)

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        for step in range(self.start.step + 1, self.config.steps + 1):
            yield step, shard_batch(next(self._batches), self.mesh)
            if self.stopping:
                return

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched, and checks whether the run must stop.

        Every host calls it once after each step.
        """
        self.logger.step(step, metrics)
        self.stopping = self.stop.after(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step. One is also due when the run stops here."""
        return self.stopping or due(step, self.config.checkpoint_every, self.config.steps)

    def save(self, step: int, **measured: Any) -> None:
        """Writes a checkpoint in the background, after adding `measured` to the part's configuration."""
        with self.logger.paused("checkpoint"):
            self.part.update(measured)
            self.store.save(step, self.state, with_time(self.meta, self.logger.seconds()))

    def replace_parameters(self, params: Any, step: int) -> None:
        """Replaces the state's parameters and averages by `params` (host arrays), and its step by `step`."""
        placed = jax.tree.map(jax.device_put, params, self.shardings.params)
        averages = jax.tree.map(lambda a: a + 0.0, placed)
        step_array = jax.device_put(self.state.step * 0 + step, self.shardings.step)
        self.state = self.state.replace(step=step_array, params=placed, ema_params=averages)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this step. If so, the step clock pauses until `record`."""
        if self.stopping or not due(step, self.config.eval_every, self.config.steps):
            return False
        self._evaluation.enter_context(self.logger.paused("evaluation"))
        return True

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Records and prints an evaluation's figures, and keeps the checkpoint if it is the best so far."""
        self.figures = figures
        self.logger.record(step, figures)
        meta = with_time(self.meta, self.logger.seconds())
        keep_best(self.config, self.workdir, step, self.state, meta, figures)
        print_once(f"{self.stage.name} step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        self._evaluation.close()


def count_operations(
    stage: Stage, grad_accumulation: int, mesh: Mesh, state: Any, frozen: Any, batch: Any
) -> float:
    """The number of operations in a step's gradients, on all devices together.

    Operations that remat computes twice count once. `state`, `frozen` and `batch` may be shapes.
    """

    def gradients(params, extra, frozen, batch, step):
        key = jax.random.key(0)
        gradients_of_players = []
        for player, gradient in zip(stage.players, gradients_of(stage, grad_accumulation, mesh), strict=True):
            chosen = {name: params[name] for name in player.parameters} if player.parameters else params
            fixed = {"fixed": params} if player.parameters else {}
            gradients_of_players.append(gradient(chosen, extra, key, batch, step, frozen=frozen, **fixed))
        return gradients_of_players

    with without_remat():
        return flops(jax.make_jaxpr(gradients)(state.params, state.extra, frozen, batch, state.step))
