"""Sends a run's figures and pictures to TensorBoard, MLflow or Weights & Biases, as `config.track` says.

    track.tensorboard = True                      event files in the run's folder `tb/`
    track.mlflow = "http://host:5000"             a server or other tracking URI; needs the extra `mlflow`
    track.wandb = "project"                       a W&B project; needs the package wandb and a login
    track.experiment = "unclip_jax"               MLflow's experiment

A resumed run continues the same run in the tracker. If a run was killed, it repeats the steps after its last
checkpoint: MLflow then has them twice, and W&B keeps the first values. A tracker that fails does not stop the
training. All figures are in `metrics.jsonl`, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flax import traverse_util

from unclip_jax.errors import MissingPackageError
from unclip_jax.paths import is_remote, new_folders, user_path

log = logging.getLogger("unclip_jax")

MAX_FAILURES = 3  # a tracker is disabled after so many failed calls in a row


class Tracker(Protocol):
    """The methods of a tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records figures by name."""

    def picture(self, step: int, path: Path) -> None:
        """Records a PNG file."""

    def close(self, end: str) -> None:
        """Ends the record. `end`: `finished` (at the last step), `stopped` (before it) or `failed`."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.name, self.writer = name, EventFileWriter(str(workdir / "tb"))
        if start:  # hides what an earlier process wrote for later steps
            session = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(step=start + 1, wall_time=time.time(), session_log=session))

    def _add(self, step: int, values: list) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(
            step,
            [Summary.Value(tag=f"{self.name}/{key}", simple_value=value) for key, value in values.items()],
        )

    def picture(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(
            step,
            [
                Summary.Value(
                    tag=f"{self.name}/samples", image=Summary.Image(encoded_image_string=path.read_bytes())
                )
            ],
        )

    def close(self, end: str) -> None:
        """See `Tracker`."""
        self.writer.close()


class MLflow:
    """A run on an MLflow tracking server.

    Settings are its parameters and the artifact `config.json`, figures its metrics, and sample grids its
    artifacts. The file `mlflow_run` in the run's folder holds its id.
    """

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        try:
            import mlflow
        except ImportError:
            raise MissingPackageError('track.mlflow needs MLflow: pip install "unclip_jax[mlflow]"') from None
        # By default MLflow's client retries for minutes while the devices wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.entities, self.client = mlflow.entities, mlflow.MlflowClient(tracking_uri=settings["mlflow"])
        try:
            self.run = self._begin(workdir / "mlflow_run", name, config, settings["experiment"])
        except Exception as error:  # the server and the network raise errors of many types
            reason = " ".join(str(error).split())[:300]
            raise OSError(
                f"MLflow at {settings['mlflow']} does not answer ({reason}); "
                "start it, or set track.mlflow=None"
            ) from None

    def _begin(self, file: Any, name: str, config: Mapping, experiment: str) -> str:
        if file.is_file():
            run = file.read_text(encoding="utf-8").strip()
            self.client.update_run(run, status="RUNNING")
        else:
            known = self.client.get_experiment_by_name(experiment)
            place = known.experiment_id if known else self.client.create_experiment(experiment)
            run = self.client.create_run(place, run_name=f"{name} {file.parent.name}").info.run_id
            flat = traverse_util.flatten_dict(dict(config), sep=".")
            settings = [self.entities.Param(key, str(value)[:500]) for key, value in flat.items()]
            for first in range(0, len(settings), 100):  # the limit of one request
                self.client.log_batch(run, params=settings[first : first + 100])
            file.write_text(run + "\n", encoding="utf-8")
        self.client.log_dict(run, dict(config), "config.json")
        return run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(1000 * time.time())
        self.client.log_batch(
            self.run, metrics=[self.entities.Metric(key, value, now, step) for key, value in values.items()]
        )

    def picture(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        self.client.log_artifact(self.run, str(path), "samples")

    def close(self, end: str) -> None:
        """See `Tracker`."""
        self.client.set_terminated(
            self.run, status={"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
        )


class WandB:
    """A run of Weights & Biases. The file `wandb_run` in the run's folder holds its id."""

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        try:
            import wandb
        except ImportError:
            raise MissingPackageError("track.wandb needs the package wandb: pip install wandb") from None
        file = workdir / "wandb_run"
        previous_id = file.read_text(encoding="utf-8").strip() if file.is_file() else None
        self.wandb = wandb
        arguments = {"project": settings["wandb"], "name": f"{name} {workdir.name}", "config": dict(config)}
        arguments |= {} if is_remote(workdir) else {"dir": str(workdir)}
        try:
            self.run = wandb.init(id=previous_id, resume="allow", **arguments)
        except Exception as error:  # wandb and the network raise errors of many types
            reason = " ".join(str(error).split())[:300]
            raise OSError(
                f"Weights & Biases cannot be used ({reason}); log in, or set track.wandb=None"
            ) from None
        file.write_text(self.run.id + "\n", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self, end: str) -> None:
        """See `Tracker`."""
        self.run.finish(exit_code=int(end == "failed"))


# TensorBoard comes last: it makes files, and the others may refuse.
TRACKERS: dict[str, type] = {"mlflow": MLflow, "wandb": WandB, "tensorboard": TensorBoard}


class Trackers:
    """All trackers that `config.track` asks for.

    Args:
      workdir: the run's folder.
      name: the stage's name.
      config: the run's configuration as JSON values.
      settings: `config.track`; see the module's docstring.
      start: number of steps already done.

    Raises:
      ImportError: when a tracker's package is not installed.
      OSError: when a server does not answer.
    """

    def __init__(
        self, workdir: str | os.PathLike, name: str, config: Mapping, settings: Mapping, start: int = 0
    ):
        self.all: dict[str, Tracker] = {}
        self.failures = dict.fromkeys(TRACKERS, 0)
        place = user_path(workdir)
        # A tracker that refuses leaves no folder behind.
        with contextlib.nullcontext() if is_remote(workdir) else new_folders(place):
            for key, make in TRACKERS.items():
                if settings.get(key):
                    try:
                        self.all[key] = make(place, name, config, settings, start)
                    except ImportError:
                        if key != "tensorboard":  # TensorBoard is on by default
                            raise
                        log.warning("tensorboard is not installed; metrics go to metrics.jsonl only")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends figures by name to all trackers."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def picture(self, step: int, path: Path) -> None:
        """Sends a PNG file to all trackers."""
        self._each(lambda tracker: tracker.picture(step, path))

    def close(self, end: str) -> None:
        """Ends all trackers. `end` is as in `Tracker.close`."""
        self._each(lambda tracker: tracker.close(end))

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        for key, tracker in list(self.all.items()):
            try:
                call(tracker)
                self.failures[key] = 0
            except Exception as error:  # trackers raise many types, and none may stop the run
                self.failures[key] += 1
                disabled = "; it is disabled from here on" if self.failures[key] == MAX_FAILURES else ""
                log.warning(
                    "%s failed (%s); the figures that it missed are in metrics.jsonl%s",
                    key,
                    " ".join(str(error).split())[:200],
                    disabled,
                )
                if disabled:
                    del self.all[key]
