"""Training checkpoints: a thin layer over Orbax.

A run's folder holds `checkpoints/<step>/` with three items:

- `state`: step, params, opt_state, and `extra` where the stage has state without gradients;
- `ema_params`: apart from the state, so that a frozen network is read without its optimizer;
- `meta`: JSON: {"name", "part", "sampling", "config", "provenance"}, where `part` is the configuration of the
  part that the run trains (see `bundle`). Runs made before are converted when their meta is read
  (`format1.upgrade_run_meta`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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

from unclip_jax.checkpoint.files import finite
from unclip_jax.checkpoint.format1 import upgrade_run_meta
from unclip_jax.errors import InputError
from unclip_jax.paths import absolute, check_writable, is_store_error, user_path
from unclip_jax.sharding import path_name
from unclip_jax.typed import check_value

FOLDER = "checkpoints"
META = {"name": str, "part": dict, "sampling": dict | None, "config": dict, "provenance": dict}
log = logging.getLogger("unclip_jax")


class CheckpointStore:
    """The checkpoints of one run. Its folder is made by `open`, or by the first checkpoint.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay.

    Raises:
      ValueError: when `keep` is less than 1, or the folder has no name.
      OSError: when the folder cannot be written, or the store that holds it is out of reach.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        if not os.fspath(workdir):
            raise InputError("the run's folder must have a name, got ''")
        if keep < 1:
            raise InputError(f"at least one checkpoint must be kept, got keep={keep}")
        check_writable(folder(workdir) / "checkpoint")
        self.workdir, self.keep = workdir, keep

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager of the folder. The first access makes the folder if it is absent."""
        _finish_loops()
        return ocp.CheckpointManager(
            folder(self.workdir),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, create=True, enable_async_checkpointing=True
            ),
            item_names=("state", "ema_params", "meta"),
        )

    def open(self) -> None:
        """Makes the run's folder if it is absent."""
        _ = self.manager

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        if "manager" not in vars(self) and not folder(self.workdir).is_dir():
            return None
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Writes a checkpoint in the background. A step that is already written is left alone.

        Args:
          step: of the state.
          state: a TrainState. `state.extra` is written only when it holds arrays.
          meta: of the run, JSON values.

        Raises:
          OSError: when this checkpoint or the one before could not be written, naming the newest that is
            whole.
        """
        self.write(step, {"state": _stored(state), "ema_params": state.ema_params}, meta)

    def write(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """As `save`, from the checkpoint's items, trees of arrays. `ema_params` alone is a run to read from,
        and not one to resume."""
        if self.latest() == step:
            return
        sums = {name: _checksum(tree) for name, tree in items.items()}
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._writing():
            self.manager.save(
                step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta | {"checksums": sums}), **saved)
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (isinstance(error, (ValueError, OSError)) or is_store_error(error)):
                raise
            cause = re.search(r"OS error \d+: \w+ ([^\]]*)", str(error))
            whole = self.manager.all_steps(read=True)
            why = cause[1] if cause else _line(error)
            newest = "there is none yet"
            if whole:
                newest = f"{max(whole)} is the newest whole one, and the same command continues from it"
            raise OSError(
                f"a checkpoint could not be written in {self.manager.directory}: {why}; {newest}"
            ) from error

    def newest_meta(self) -> dict:
        """The meta of the newest checkpoint whose meta can be read. Raises ValueError when it is damaged in
        all of them."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            with contextlib.suppress(ValueError, KeyError, FileNotFoundError):
                return self.meta(step)
        raise InputError(f"every checkpoint in {self.manager.directory} is damaged; use another workdir")

    def meta(self, step: int) -> dict:
        """The meta of a checkpoint, in format 2."""
        return _read_meta(self.manager, step)

    def restore(self, state: Any, shardings: Any) -> tuple[Any, int]:
        """Reads the newest whole checkpoint onto the mesh. Newer ones that are damaged are then removed.

        Args:
          state: a TrainState (arrays or shapes) of the expected structure.
          shardings: its tree of shardings.

        Returns:
          The state and its step.

        Raises:
          ValueError: when no checkpoint can be read, because they hold another model or are damaged.
          OSError: when one is out of reach for now, which does not tell whether it is damaged.
        """
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(_stored(target)),
            ema_params=ocp.args.StandardRestore(target.ema_params),
        )
        failed: dict[int, Exception] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                items = self.manager.restore(step, args=wanted)
                _check(self.meta(step), {name: items[name] for name in ("state", "ema_params")})
            except (ValueError, KeyError, OSError) as error:
                if _out_of_reach(error):
                    raise OSError(
                        f"checkpoint {step} in {self.manager.directory} cannot be reached ({_line(error)})"
                    ) from error
                failed[step] = error
                continue
            # An older checkpoint has the same shapes, so the newer files must be at fault.
            for damaged, error in failed.items():
                message = "checkpoint %d in %s is damaged (%s); going back to %d"
                log.warning(message, damaged, self.manager.directory, _line(error), step)
                self.manager.delete(damaged)
            return state.replace(**items["state"], ema_params=items["ema_params"]), step
        newest, error = next(iter(failed.items()))
        raise InputError(
            f"checkpoint {newest} in {self.manager.directory} does not fit this configuration "
            f"({_line(error)}); use another workdir"
        ) from error

    def close(self) -> None:
        """Waits until all checkpoints are written. Raises OSError, as `save`."""
        if "manager" not in vars(self):
            return
        with self._writing():
            self.manager.wait_until_finished()
        self.manager.close()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes, and drops what comes after that."""

    def close(self) -> None:
        """Closes the loop. Tasks that still run finish first; their exceptions are dropped."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        """As for any loop. Once the loop is closed, nobody waits for the callback, and it is dropped."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
        return None


class _LoopPolicy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop


def _finish_loops() -> None:
    # When one read or write of a checkpoint fails, Orbax closes its event loop while others still run. They
    # then print "Event loop is closed". New loops of this process wait for them, or drop their callbacks. A
    # policy that the caller has chosen stays.
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        asyncio.set_event_loop_policy(_LoopPolicy())


def _stored(state: Any) -> dict:
    # The item `state`. Without arrays in `extra` it is the item that every checkpoint had before `extra`
    # came.
    item = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return item | ({"extra": state.extra} if jax.tree.leaves(state.extra) else {})


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    with _damaged(step, manager.directory):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    where = f"the description of checkpoint {step} in {manager.directory}"
    check_value(meta, dict, where)
    for key, kind in META.items():
        if key in meta:
            check_value(meta[key], kind, f"{where}: {key}")
    return upgrade_run_meta(meta)


@contextlib.contextmanager
def _damaged(step: int, directory: Any) -> Iterator[None]:
    # What Orbax raises about the files of a checkpoint, as a ValueError of one line.
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        if _out_of_reach(error):
            raise
        raise InputError(f"checkpoint {step} in {directory} is damaged ({_line(error)})") from error


def _checksum(tree: Any) -> int:
    # The sum of all leaves' bits read as integers, modulo 2^32. It does not depend on how the leaves are
    # sharded, and it changes when a byte does. There is one program for each shape: one program for all
    # leaves would take long to compile.
    sums = jax.device_get([_bits(leaf) for leaf in jax.tree.leaves(tree)])
    return sum((2 * i + 1) * int(bits) for i, bits in enumerate(sums)) % 2**32


@jax.jit
def _bits(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(
        leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    )
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _check(meta: dict, items: dict[str, Any]) -> None:
    for name, tree in items.items():
        if meta.get("checksums", {}).get(name, expected := _checksum(tree)) != expected:
            raise InputError(f"the values of {name} are not those that were written")


def _out_of_reach(error: Exception) -> bool:
    # Whether the disk or the store failed, which may pass, and not the checkpoint.
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    codes = (
        "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED"
    )
    return re.search(rf"\b({codes})\b", str(error)) is not None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def folder(workdir: str | os.PathLike) -> Any:
    """The absolute path of a run's checkpoints, a `paths.user_path`."""
    return user_path(absolute(workdir)) / FOLDER


def load_run(workdir: str | os.PathLike) -> tuple[dict, Any, int]:
    """The newest checkpoint of a run: its meta in format 2, its averaged parameters as NumPy arrays, and its
    step. Raises as `read_items`, and ValueError where the parameters are not finite."""
    meta, items, step = read_items(workdir, ("ema_params",))
    check = lambda path, value: finite(value, path_name(path), f"step {step} of {workdir}")
    return meta, jax.tree_util.tree_map_with_path(check, items["ema_params"]), step


def read_items(workdir: str | os.PathLike, names: tuple[str, ...]) -> tuple[dict, dict[str, Any], int]:
    """The newest checkpoint of a run: its meta in format 2, its items of these names, and its step.

    The items are trees of dicts and lists with NumPy arrays, whatever devices wrote them. None stands for a
    node without arrays.

    Raises:
      FileNotFoundError: when the folder holds no checkpoint.
      ValueError: when the newest one is damaged.
    """
    if not folder(workdir).is_dir():
        raise FileNotFoundError(f"no checkpoint in {workdir}; train that stage first, or name another folder")
    _finish_loops()
    with ocp.CheckpointManager(folder(workdir), item_names=("state", "ema_params", "meta")) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"no complete checkpoint in {workdir}; train that stage first, or name another folder"
            )
        meta = _read_meta(manager, step)
    # The devices that wrote it need not be here: it is read onto the host.
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    items = {}
    with ocp.StandardCheckpointer() as reader, _damaged(step, folder(workdir)):
        for name in names:
            path = folder(workdir) / str(step) / name
            shapes = reader.metadata(path)
            shapes = getattr(shapes, "item_metadata", shapes)
            target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=host), shapes)
            items[name] = reader.restore(path, getattr(target, "tree", target))
        _check(meta, items)
    return meta, jax.tree.map(np.asarray, items), step


class ParamsHash:
    """16 hex digits of the SHA-256 over parameters' paths, shapes and float16 values, in the order of their
    paths.

    Values are rounded to half precision, as in a release bundle: a network has the same hash before and after
    release.
    """

    def __init__(self):
        self._digest = hashlib.sha256()

    def update(self, name: str, value: Any) -> None:
        """Adds the next parameter."""
        with np.errstate(over="ignore"):
            value = np.asarray(value, np.float16)
        self._digest.update(f"{name}{value.shape}".encode())
        self._digest.update(np.ascontiguousarray(value).data)

    def digest(self) -> str:
        """The hash of all parameters added so far."""
        return self._digest.hexdigest()[:16]


def params_hash(params: Any) -> str:
    """The `ParamsHash` of a tree."""
    computed, leaves = ParamsHash(), jax.tree_util.tree_flatten_with_path(params)[0]
    for name, leaf in sorted(((path_name(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]):
        computed.update(name, leaf)
    return computed.digest()
