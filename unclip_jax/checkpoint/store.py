"""Training checkpoints: a thin layer over Orbax.

A run's folder holds `checkpoints/<step>/` with three items: `state` (step, params, optimizer), `ema_params` apart from it, so that a
frozen network is read without its optimizer, and `meta` (JSON: stage, configuration, frozen parts' hashes, embedding space).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from unclip_jax.paths import absolute, check_store, is_store_error, user_path
from unclip_jax.sharding import path_name

FOLDER = "checkpoints"
log = logging.getLogger("unclip_jax")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder; made if absent.
      keep: how many of the newest checkpoints stay.

    Raises:
      OSError: when its store is out of reach.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        check_store(workdir)
        self.manager = ocp.CheckpointManager(
            folder(workdir),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
            item_names=("state", "ema_params", "meta"),
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Writes a checkpoint in the background; a step already written is left alone. `state` is a TrainState.

        Raises:
          OSError: when this or the one before could not be written, naming the newest that is whole.
        """
        if self.latest() == step:
            return
        items = {"state": {"step": state.step, "params": state.params, "opt_state": state.opt_state}, "ema_params": state.ema_params}
        sums = {name: _checksum(tree) for name, tree in items.items()}
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._writing():
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta | {"checksums": sums}), **saved))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (isinstance(error, (ValueError, OSError)) or is_store_error(error)):
                raise
            found, whole = re.search(r"OS error \d+: \w+ ([^\]]*)", str(error)), self.manager.all_steps(read=True)
            why = found[1] if found else _line(error)
            newest = f"{max(whole)} is the newest whole one, and the same command goes on from it" if whole else "there is none yet"
            raise OSError(f"a checkpoint could not be written in {self.manager.directory}: {why}; {newest}") from error

    def newest_meta(self) -> dict:
        """The JSON of the newest checkpoint where it can be read. Raises ValueError when it is damaged in all of them."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            with contextlib.suppress(ValueError, KeyError, FileNotFoundError):
                return self.meta(step)
        raise ValueError(f"every checkpoint in {self.manager.directory} is damaged; use another workdir")

    def meta(self, step: int) -> dict:
        """The JSON of a checkpoint."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, state: Any, shardings: Any) -> tuple[Any, int]:
        """Reads the newest whole checkpoint onto the mesh; newer ones that are damaged are then removed.

        Args:
          state: a TrainState (arrays or shapes) of the expected structure.
          shardings: its tree of shardings.

        Returns:
          The state and its step.

        Raises:
          ValueError: when no checkpoint can be read, as they hold another model, or are damaged; OSError: when one is out of reach for now,
            which says nothing of what it holds.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore({"step": target.step, "params": target.params, "opt_state": target.opt_state}),
            ema_params=ocp.args.StandardRestore(target.ema_params),
        )
        failed: dict[int, Exception] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                items = self.manager.restore(step, args=wanted)
                _check(self.meta(step), {name: items[name] for name in ("state", "ema_params")})
            except (ValueError, KeyError, OSError) as error:
                if _out_of_reach(error):
                    raise OSError(f"checkpoint {step} in {self.manager.directory} cannot be reached ({_line(error)})") from error
                failed[step] = error
                continue
            for damaged, error in failed.items():  # the older one has the same shapes, so it is the file
                log.warning("checkpoint %d in %s is damaged (%s); going back to %d", damaged, self.manager.directory, _line(error), step)
                self.manager.delete(damaged)
            return state.replace(**items["state"], ema_params=items["ema_params"]), step
        newest, error = next(iter(failed.items()))
        raise ValueError(
            f"checkpoint {newest} in {self.manager.directory} does not fit this configuration ({_line(error)}); use another workdir"
        ) from error

    def close(self) -> None:
        """Waits for writes under way. Raises OSError, as `save`."""
        with self._writing():
            self.manager.wait_until_finished()
        self.manager.close()


def _checksum(tree: Any) -> int:
    # The sum of all bits read as integers, modulo 2^32: the same however they are spread, another when a byte is.
    sums = jax.device_get([_bits(leaf) for leaf in jax.tree.leaves(tree)])  # a program a shape: one of them all takes long to compile
    return sum((2 * i + 1) * int(bits) for i, bits in enumerate(sums)) % 2**32


@jax.jit
def _bits(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _check(meta: dict, items: dict[str, Any]) -> None:
    for name, tree in items.items():
        if meta.get("checksums", {}).get(name, expected := _checksum(tree)) != expected:
            raise ValueError(f"the values of {name} are not those that were written")


def _out_of_reach(error: Exception) -> bool:
    # The disk's or the store's trouble, which may pass, and not the checkpoint's.
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    codes = r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b"
    return re.search(codes, str(error)) is not None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def folder(workdir: str | os.PathLike) -> Any:
    """Where a run keeps its checkpoints, absolute: a `paths.user_path`."""
    return user_path(absolute(workdir)) / FOLDER


def load_run(workdir: str | os.PathLike) -> tuple[dict, Any, int]:
    """The newest checkpoint of a run: its meta, its averaged parameters as NumPy arrays, and its step.

    Raises:
      FileNotFoundError: when the folder holds no checkpoint; ValueError: when it is damaged.
    """
    if not folder(workdir).is_dir():
        raise FileNotFoundError(f"no checkpoint in {workdir}; train that stage first, or name another folder")
    with ocp.CheckpointManager(folder(workdir), item_names=("state", "ema_params", "meta")) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint in {workdir}; train that stage first, or name another folder")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    with ocp.StandardCheckpointer() as reader:
        path = folder(workdir) / str(step) / "ema_params"
        shapes = reader.metadata(path)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])  # those that wrote it need not be here
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), getattr(shapes, "item_metadata", shapes))
        params = reader.restore(path, getattr(target, "tree", target))
    _check(meta, {"ema_params": params})
    return meta, jax.tree.map(np.asarray, params), step


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
