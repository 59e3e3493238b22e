"""Where a run's figures and pictures go besides its `metrics.jsonl`: TensorBoard, MLflow, Weights & Biases, as `config.track` says.

    track.tensorboard = True                      the run's folder `tb/`
    track.mlflow = "http://host:5000"             a tracking server (or any tracking URI); needs the extra `mlflow`
    track.wandb = "project"                       needs the package wandb, logged in
    track.experiment = "unclip_jax"               MLflow's experiment

A run that is gone on with is the same run there; of a run that was killed, the steps since its last checkpoint come twice to MLflow, and
W&B keeps the first. Training does not stop because a tracker does: what it missed is in `metrics.jsonl`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flax import traverse_util

from unclip_jax.errors import MissingPackageError
from unclip_jax.paths import is_remote, user_path

log = logging.getLogger("unclip_jax")

MAX_FAILURES = 3  # calls in a row that fail before a tracker is left alone


class Tracker(Protocol):
    """What each of them does."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes figures by name."""

    def picture(self, step: int, path: Path) -> None:
        """Takes a PNG file."""

    def close(self, end: str) -> None:
        """Ends it: `finished` at the last step, `stopped` before it, or `failed`."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.name, self.writer = name, EventFileWriter(str(workdir / "tb"))
        if start:  # what an earlier process wrote of later steps is not to be shown
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
    """A run on a tracking server: settings as parameters and `config.json`, figures as metrics, sample grids as artifacts. Its id is kept
    in the run's folder, `mlflow_run`."""

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        try:
            import mlflow
        except ImportError:
            raise MissingPackageError('track.mlflow needs MLflow: pip install "unclip_jax[mlflow]"') from None
        # Its client tries for minutes by default, while the devices wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.entities, self.client = mlflow.entities, mlflow.MlflowClient(tracking_uri=settings["mlflow"])
        try:
            self.run = self._begin(workdir / "mlflow_run", name, config, settings["experiment"])
        except Exception as error:  # the server's and the network's are many
            reason = " ".join(str(error).split())[:300]
            raise OSError(
                f"MLflow at {settings['mlflow']} does not answer ({reason}); start it, or set track.mlflow=None"
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
            for first in range(0, len(settings), 100):  # the most that one request takes
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
    """A run of Weights & Biases. Its id is kept in the run's folder, `wandb_run`."""

    def __init__(self, workdir: Any, name: str, config: Mapping, settings: Mapping, start: int):
        try:
            import wandb
        except ImportError:
            raise MissingPackageError("track.wandb needs the package wandb: pip install wandb") from None
        file = workdir / "wandb_run"
        before = file.read_text(encoding="utf-8").strip() if file.is_file() else None
        self.wandb = wandb
        about = {"project": settings["wandb"], "name": f"{name} {workdir.name}", "config": dict(config)}
        about |= {} if is_remote(workdir) else {"dir": str(workdir)}
        try:
            self.run = wandb.init(id=before, resume="allow", **about)
        except Exception as error:  # its own and the network's are many
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


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Trackers:
    """Those that `settings` (config.track) ask for.

    Args:
      workdir: the run's folder; name: of the stage; config: all settings, JSON; settings: see the module's docstring; start: steps done.

    Raises:
      ImportError: when one is not installed; OSError: when a server does not answer.
    """

    def __init__(
        self, workdir: str | os.PathLike, name: str, config: Mapping, settings: Mapping, start: int = 0
    ):
        self.all: dict[str, Tracker] = {}
        self.failures = dict.fromkeys(TRACKERS, 0)
        for key, make in TRACKERS.items():
            if settings.get(key):
                try:
                    self.all[key] = make(user_path(workdir), name, config, settings, start)
                except ImportError:
                    if key != "tensorboard":  # which nobody asked for
                        raise
                    log.warning("tensorboard is not installed; metrics go to metrics.jsonl alone")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name, to all of them."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def picture(self, step: int, path: Path) -> None:
        """A PNG file, to all of them."""
        self._each(lambda tracker: tracker.picture(step, path))

    def close(self, end: str) -> None:
        """Ends them."""
        self._each(lambda tracker: tracker.close(end))

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        for key, tracker in list(self.all.items()):
            try:
                call(tracker)
                self.failures[key] = 0
            except Exception as error:  # theirs are many, and none is worth a run
                self.failures[key] += 1
                left = "; it is left alone from here on" if self.failures[key] == MAX_FAILURES else ""
                log.warning(
                    "%s failed (%s); metrics.jsonl has what it missed%s",
                    key,
                    " ".join(str(error).split())[:200],
                    left,
                )
                if left:
                    del self.all[key]
