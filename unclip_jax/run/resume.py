"""Starts and resumes runs: provenance, newest checkpoint, initial weights, best checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.paths import absolute, user_path
from unclip_jax.run.hosts import print_once
from unclip_jax.run.state import TrainState
from unclip_jax.sharding import path_name

# The settings of a noise schedule.
SCHEDULE = ("schedule", "num_steps", "beta_ends", "zero_snr", "continuous")
CHECKSUMS = ("data_checksum", "eval_checksums")  # of a run's data, in its provenance


def resolve(path: str, workdir: str | os.PathLike) -> str:
    """A path from a configuration. Paths that begin with "." are relative to the run's folder."""
    return absolute(user_path(workdir) / path) if path.startswith(".") else path


def hardware() -> str:
    """The machine in words: "2 x cpu (x86_64)" or "1 x NVIDIA H200"."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind}" + (
        f", {os.cpu_count()} cores, {platform.machine()}" if kind == "cpu" else ""
    )


def new_provenance(data_checksum: str, eval_checksums: Mapping[str, str]) -> dict:
    """The provenance of a run that starts now: where, when and with what. `with_time` adds wall time.

    Args:
      data_checksum: of the training data.
      eval_checksums: of the evaluation data, by name.
    """
    return {
        "hardware": hardware(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "data_checksum": data_checksum,
        "eval_checksums": dict(eval_checksums),
        "jax": jax.__version__,
        "commit": _git_commit(),
    }


def resumed_provenance(before: dict, now: dict, step: int) -> dict:
    """The provenance of a run that goes on after `step` steps.

    It is that of its start. When data has changed, `data_checksum` and `eval_checksums` are those of the data
    from now on, and `earlier_data` gains the old ones that differ and the step up to which they hold.
    """
    held = {key: before[key] for key in CHECKSUMS if before.get(key) and key in now}
    changed = {key: old for key, old in held.items() if old != now[key]}
    if not changed:
        return before
    earlier = [*before.get("earlier_data", ()), {"until_step": step, **changed}]
    return {**before, **{key: now[key] for key in changed}, "earlier_data": earlier}


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def with_time(meta: dict, seconds: float) -> dict:
    """The run's meta, with the wall time of this process added to that of the run's earlier processes."""
    provenance = meta["provenance"]
    return {**meta, "provenance": {**provenance, "seconds": round(provenance["seconds"] + seconds, 1)}}


def config_json(config: ConfigDict) -> dict:
    """A configuration as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def keep_best(
    config: ConfigDict,
    workdir: str | os.PathLike,
    step: int,
    state: TrainState,
    meta: dict,
    figures: Mapping[str, float],
) -> None:
    """Keeps the best checkpoint so far in `best/` of the run's folder. `best/` is itself a run's folder.

    `config.keep_best` names the figure of the evaluation that decides, such as "val_cosine". With a minus
    sign, as in "-eval_loss", the lowest value is the best. With None, the function does nothing.

    Raises:
      ValueError: when the evaluation has no such figure.
    """
    if config.keep_best is None:
        return
    name = config.keep_best.removeprefix("-")
    if name not in figures:
        raise InputError(f"keep_best names {name!r}; the evaluation's figures are {', '.join(figures)}")
    value = -figures[name] if config.keep_best.startswith("-") else figures[name]
    if not np.isfinite(value):
        return
    store = CheckpointStore(user_path(workdir) / "best", keep=1)
    with contextlib.closing(store):
        before = store.latest()
        if before is None or (before != step and value > store.meta(before)["best"]):
            if (
                before is not None and before > step
            ):  # an earlier process was cut off after this step, and the run resumed before it
                store.manager.delete(before)
            store.save(step, state, meta | {"best": value, "figures": dict(figures)})


def check_best(config: ConfigDict, workdir: str | os.PathLike, meta: dict) -> None:
    """Checks that the figure of the best checkpoint so far can be compared with those to come.

    Raises:
      ValueError: when `best/` was chosen by another figure, or by an evaluation of other data or settings.
    """
    store = CheckpointStore(user_path(workdir) / "best", keep=1)
    with contextlib.closing(store):
        if config.keep_best is None or store.latest() is None:
            return
        before = store.newest_meta()
    was, now = _measured(before), _measured(meta)
    differing = [name for name in was if was[name] is not None and was[name] != now[name]]
    if differing:
        raise InputError(
            f"{workdir}/best was chosen with another {differing[0]}, so its figure cannot be compared: move "
            "it to another folder to go on"
        )


def _measured(meta: dict) -> dict:
    # What a figure of an evaluation depends on, beside the weights.
    config = meta["config"]
    values = {name: config.get(name) for name in ("keep_best", "eval", "sampling", "diffusion", "seed")}
    return values | {"evaluation data": meta["provenance"].get("eval_checksums")}


class Start(NamedTuple):
    """Where a run starts.

    state: the state.
    meta: the run's meta; a resumed run keeps its provenance.
    step: number of steps already done.
    part: the part configuration that came with the weights; {} for fresh weights.
    """

    state: TrainState
    meta: dict
    step: int
    part: dict


def restore_or_init(
    store: CheckpointStore,
    state: TrainState,
    shardings: Any,
    meta: dict,
    init_from: str | None,
    load: Callable = load_part,
) -> Start:
    """Restores the run's newest checkpoint if there is one, and otherwise starts a new run.

    A new run starts from the weights of `init_from` (a bundle or another run), which `load` reads, or from
    the fresh weights in `state`.

    Raises:
      ValueError: when the weights belong to another model, or the run was trained with other frozen networks.
    """
    if store.latest() is not None:
        old = store.newest_meta()
        name, steps, done = meta["name"], meta["config"]["steps"], store.latest()
        if old.get("name", name) != name:
            raise InputError(f"{store.workdir} is a run of {old['name']}, not of {name}; use another workdir")
        _check_frozen(old["part"].get("frozen", {}), meta["part"]["frozen"])
        if done > steps:
            raise InputError(
                f"{name}: {done} steps are done already, more than steps={steps}; "
                "set steps higher to go on, or use another workdir"
            )
        state, step = store.restore(state, shardings)
        before, now = store.meta(step)["provenance"], meta["provenance"]
        provenance = resumed_provenance(before, now, step)
        words = f"resuming from step {step}" if step < steps else f"all {steps} steps are done already"
        if provenance.get("data_checksum") != before.get("data_checksum"):
            checksums = f"was {before['data_checksum'][:12]}, is {now['data_checksum'][:12]}"
            words += f"\n  the training data has changed since then: its checksum {checksums}"
        if provenance.get("eval_checksums") != before.get("eval_checksums"):
            words += "\n  the evaluation data has changed since then: figures from now on are of other data"
        print_once(f"{name}: {words}" + _differences(old["config"], meta["config"]))
        return Start(state, {**meta, "provenance": provenance}, step, old["part"])
    if init_from is None:
        return Start(state, meta, 0, {})
    part, old = load(init_from, meta["name"])
    given = {k: np.shape(v) for k, v in _leaves(part.params)}
    expected = {k: v.shape for k, v in _leaves(state.ema_params)}
    if given != expected:
        differing = sorted(k for k in given.keys() | expected.keys() if given.get(k) != expected.get(k))
        raise InputError(
            f"{init_from} holds another {meta['name']} than this configuration: "
            f"{len(differing)} parameters differ, {differing[0]} first"
        )
    changes = start_changes(part.config, meta["part"])
    lines = [f"{meta['name']}: starting from the weights of {init_from}", *changes]
    print_once("\n  but ".join(lines))
    placed = jax.device_put(part.params, shardings.ema_params)
    averages = jax.tree.map(lambda a: a + 0.0, placed)
    # With several players, what the others train (a discriminator) starts fresh.
    state = state.replace(params={**state.params, **placed}, ema_params=averages)
    provenance = meta["provenance"] | {"initialised_from": old["provenance"]}
    meta = {**meta, "provenance": provenance | ({"start_changes": changes} if changes else {})}
    return Start(state, meta, 0, part.config)


def start_changes(before: Mapping, now: Mapping) -> list[str]:
    """What a run asks of weights that they were not trained for, in words; the run's first steps unlearn it.

    Changes are allowed, since published networks were made so: Stable Diffusion 2.0-768 (v) started from
    2.0-base (eps), and fine-tuning to zero terminal SNR changes the schedule. They are printed, and kept in
    the run's provenance.

    Args:
      before: the configuration of the part that the weights came with.
      now: the part's configuration in the new run.

    Returns:
      A sentence for the prediction, for the noise schedule, and for each other network that stands frozen
      under the part.
    """
    changes = []
    if "diffusion" in before and "diffusion" in now:
        was, here = before["diffusion"], now["diffusion"]
        if was["prediction"] != here["prediction"]:
            changes.append(f"they predict {was['prediction']}, and this run trains {here['prediction']}")
        tables = [schedule_of(diffusion).alphas_cumprod for diffusion in (was, here)]
        if tables[0].shape != tables[1].shape or not np.allclose(*tables, rtol=1e-5, atol=1e-12):
            words = [", ".join(f"{key}={one[key]}" for key in SCHEDULE if key in one) for one in (was, here)]
            changes.append(f"their noise schedule is {words[0]}, and this run's {words[1]}")
    frozen, given = before.get("frozen") or {}, now.get("frozen") or {}
    for role in sorted(frozen.keys() & given.keys()):
        if frozen[role] and frozen[role] != given[role]:
            changes.append(
                f"they were trained with the {role} {frozen[role]}, and this run has {given[role]}"
            )
    return changes


def _check_frozen(before: dict, now: dict) -> None:
    for role in sorted(before.keys() & now.keys()):
        if before[role] != now[role]:
            name = "CLIP" if role == "clip" else role
            raise InputError(
                f"this run was trained with {name} {before[role]}, but {now[role]} is given now; "
                f"use another workdir, or the same {name}"
            )


def _differences(before: dict, now: dict) -> str:
    before, now = traverse_util.flatten_dict(before, sep="."), traverse_util.flatten_dict(now, sep=".")
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "".join(f"\n  {key} was {before.get(key)}, is {now.get(key)}" for key in keys)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def load_widened(path: str, name: str) -> tuple[Part, dict]:
    """`load_part` for a network that draws pixels and inpaints: `decoder_inpaint` and the like.

    If there is none, the ordinary network takes its place, with zero weights for the four channels of the
    known part, which follow those of the image.
    """
    try:
        return load_part(path, name)
    except KeyError:
        part, meta = load_part(path, name.removesuffix("_inpaint"))
    unet = _widened(part.params["unet"], 4, 3)
    return Part(part.config, part.params | {"unet": unet}), meta


def load_widened_latent(path: str, name: str) -> tuple[Part, dict]:
    """`load_part` for a latent U-Net or a decoder of Kandinsky that inpaints.

    If there is none, the ordinary one takes its place, with zero weights for the channels of the mask and of
    the known part.
    """
    try:
        return load_part(path, name)
    except KeyError:
        part, meta = load_part(path, "latent")
    model, unet = part.config["model"], part.params.get("unet", part.params)
    wanted = 2 * model.get("latent_channels", model.get("out_channels")) + 1
    widened = _widened(unet, max(wanted - np.shape(unet["conv_in"]["kernel"])[2], 0))
    return Part(part.config, part.params | {"unet": widened} if "unet" in part.params else widened), meta


def load_with_vector(path: str, name: str, *, vector_dim: int) -> tuple[Part, dict]:
    """`load_part` for a latent U-Net that sees a vector of `vector_dim`.

    An ordinary one gets the two layers of the vector. The second one has zero weights, so that the network
    computes what it did.
    """
    part, meta = load_part(path, name)
    if "vector_fc1" in part.params:
        return part, meta
    width = np.shape(part.params["time"]["fc2"]["bias"])[0]
    first = np.random.default_rng(0).normal(0.0, vector_dim**-0.5, (vector_dim, width))
    layers = {
        "vector_fc1": {"kernel": np.float32(first), "bias": np.zeros(width, np.float32)},
        "vector_fc2": {"kernel": np.zeros((width, width), np.float32), "bias": np.zeros(width, np.float32)},
    }
    return Part(part.config, part.params | layers), meta


def _widened(unet: dict, channels: int, at: int | None = None) -> dict:
    # A U-Net with more input channels, of zero weight, from the channel `at` on, or after all.
    conv = unet["conv_in"]
    before, after = np.split(conv["kernel"], [conv["kernel"].shape[2] if at is None else at], axis=2)
    zeros = np.zeros((*before.shape[:2], channels, before.shape[3]), before.dtype)
    kernel = np.concatenate([before, zeros, after], axis=2)
    return unet | {"conv_in": conv | {"kernel": kernel}}
