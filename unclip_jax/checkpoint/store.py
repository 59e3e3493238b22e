"""Training checkpoints: a thin layer over Orbax.

A run's folder holds `checkpoints/<step>/` with three items: `state` (step, params, optimizer), `ema_params` apart from it, so that a
frozen network is read without its optimizer, and `meta` (JSON: stage, configuration, frozen parts' hashes, embedding space).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unclip_jax.sharding import path_name

FOLDER = "checkpoints"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder; made if absent.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.manager = ocp.CheckpointManager(
            folder(workdir),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
            item_names=("state", "ema_params", "meta"),
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Writes a checkpoint in the background; a step already written is left alone. `state` is a TrainState."""
        if self.latest() == step:
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"step": state.step, "params": state.params, "opt_state": state.opt_state}),
                ema_params=ocp.args.StandardSave(state.ema_params),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def meta(self, step: int) -> dict:
        """The JSON of a checkpoint."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, state: Any, shardings: Any) -> Any:
        """Reads a checkpoint onto the mesh.

        Args:
          step: which.
          state: a TrainState (arrays or shapes) of the expected structure.
          shardings: its tree of shardings.

        Raises:
          ValueError: when the checkpoint holds another model.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        try:
            items = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore({"step": target.step, "params": target.params, "opt_state": target.opt_state}),
                    ema_params=ocp.args.StandardRestore(target.ema_params),
                ),
            )
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {step} in {self.manager.directory} does not fit this configuration ({reason}); use another workdir"
            ) from error
        return state.replace(**items["state"], ema_params=items["ema_params"])

    def close(self) -> None:
        """Waits for writes under way."""
        self.manager.wait_until_finished()
        self.manager.close()


def folder(workdir: str | os.PathLike) -> Path:
    """Where a run keeps its checkpoints, absolute."""
    return Path(workdir).expanduser().resolve() / FOLDER


def load_run(workdir: str | os.PathLike) -> tuple[dict, Any, int]:
    """The newest checkpoint of a run: its meta, its averaged parameters as NumPy arrays, and its step.

    Raises:
      FileNotFoundError: when the folder holds no checkpoint.
    """
    if not folder(workdir).is_dir():
        raise FileNotFoundError(f"no checkpoint in {workdir}; train that stage first, or name another folder")
    with ocp.CheckpointManager(folder(workdir), item_names=("state", "ema_params", "meta")) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint in {workdir}; train that stage first, or name another folder")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        shapes = manager.item_metadata(step)["ema_params"]
        target = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), getattr(shapes, "tree", shapes))
        items = manager.restore(step, args=ocp.args.Composite(ema_params=ocp.args.StandardRestore(target)))
    return meta, jax.tree.map(np.asarray, items["ema_params"]), step


class ParamsHash:
    """16 hex digits of the SHA-256 over parameters' paths, shapes and float16 values, in the order of their paths.

    Values are rounded to half precision, as in a release bundle, so that a network has one hash before and after release.
    """

    def __init__(self):
        self._digest = hashlib.sha256()

    def update(self, name: str, value: Any) -> None:
        """Adds the next parameter."""
        value = np.asarray(value, np.float16)
        self._digest.update(f"{name}{value.shape}".encode())
        self._digest.update(np.ascontiguousarray(value).data)

    def digest(self) -> str:
        """The hash of what was added."""
        return self._digest.hexdigest()[:16]


def params_hash(params: Any) -> str:
    """The `ParamsHash` of a tree."""
    made, leaves = ParamsHash(), jax.tree_util.tree_flatten_with_path(params)[0]
    for name, leaf in sorted(((path_name(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]):
        made.update(name, leaf)
    return made.digest()
