"""Carries training runs between machines that give little back: all runs of a folder in a few small files.

`pack` writes a tar archive, cut into pieces of at most `PIECE` bytes. For every run it holds `meta.json` and
`arrays.safetensors`:

| run        | what is kept                                                                               |
|------------|--------------------------------------------------------------------------------------------|
| finished   | the averaged weights in float16, the precision of a release bundle                         |
| unfinished | the parameters in float32; averages and moments of the optimizer in bfloat16 (not float16, |
|            | in which second moments become zero)                                                       |

`unpack` writes checkpoints from it, from which `unclip train` resumes. This is the one exception to bitwise
resume: averages and moments are rounded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

from unclip_jax.checkpoint.store import CheckpointStore, folder, read_items
from unclip_jax.errors import InputError
from unclip_jax.paths import write_whole
from unclip_jax.sharding import path_name

PIECE, PIECES, TOTAL = 16 * 2**20, 8, 60 * 2**20
_NAME = re.compile(r"carried-\d\d-of-\d\d")


def pack(runs: str | os.PathLike, out: str | os.PathLike, steps: Mapping[str, int]) -> list[Path]:
    """Writes the newest checkpoints of all runs in a folder into pieces, in place of the pieces in `out`.

    Args:
      runs: a folder of run folders; those without a checkpoint are left out.
      out: the folder of the pieces.
      steps: how many steps each run has; a run that has reached them is finished.

    Returns:
      The pieces.

    Raises:
      ValueError: if they are more than `PIECES` or hold more than `TOTAL` bytes.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(Path(runs).iterdir()):
            if folder(path).is_dir() and path.name in steps:
                for name, data in _packed(path, steps[path.name]).items():
                    info = tarfile.TarInfo(f"{path.name}/{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    data = archive.getvalue()
    count = -(-len(data) // PIECE)
    if count > PIECES or len(data) > TOTAL:
        raise InputError(
            f"the runs in {runs} take {len(data) / 2**20:.1f} MiB in {count} pieces; "
            f"at most {TOTAL / 2**20:.0f} MiB in {PIECES} pieces can be carried"
        )
    pieces = [Path(out) / f"carried-{i:02d}-of-{count:02d}" for i in range(count)]
    for old in _pieces(out):
        old.unlink()
    for i, piece in enumerate(pieces):
        write_whole(piece, data[i * PIECE : (i + 1) * PIECE])
    return pieces


def unpack(carried: str | os.PathLike, runs: str | os.PathLike) -> dict[str, int]:
    """Writes the checkpoints that `pack` packed into the run folders of `runs`, where they have none as new.

    Returns:
      The step of each run that was written.

    Raises:
      ValueError: if a piece is missing.
    """
    pieces = _pieces(carried)
    if not pieces:
        return {}
    count = int(pieces[0].name[-2:])
    if [piece.name for piece in pieces] != [f"carried-{i:02d}-of-{count:02d}" for i in range(count)]:
        raise InputError(f"{carried} lacks pieces: it has {', '.join(piece.name for piece in pieces)}")
    written = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        for member in tar.getmembers():
            name, file = member.name.split("/")
            if file != "meta.json":
                continue
            meta = json.load(tar.extractfile(member))
            arrays = load(tar.extractfile(f"{name}/arrays.safetensors").read())
            if _unpacked(Path(runs) / name, meta, arrays):
                written[name] = meta["step"]
    return written


def _pieces(path: str | os.PathLike) -> list[Path]:
    return sorted(p for p in Path(path).glob("carried-*") if _NAME.fullmatch(p.name))


def _packed(path: Path, steps: int) -> dict[str, bytes]:
    # The files of a run in the archive. `trees` in the meta has the name of an array in place of each array.
    meta, items, step = read_items(path, ("ema_params",))
    if step >= steps:
        dtypes = {"ema_params": np.float16}
    else:
        items |= read_items(path, ("state",))[1]
        items["params"] = items["state"].pop("params")
        dtypes = {"params": np.float32, "state": ml_dtypes.bfloat16, "ema_params": ml_dtypes.bfloat16}
    arrays, trees = {}, {}
    for item, tree in items.items():
        named = [(f"{item}/{path_name(where)}", leaf) for where, leaf in jax.tree.leaves_with_path(tree)]
        arrays |= {name: _cast(leaf, dtypes[item]) for name, leaf in named}
        trees[item] = jax.tree.unflatten(jax.tree.structure(tree), [name for name, _ in named])
    about = {"step": step, "meta": meta, "trees": trees}
    return {"meta.json": json.dumps(about).encode(), "arrays.safetensors": save(arrays)}


def _cast(leaf: np.ndarray, dtype: Any) -> np.ndarray:
    # Floating-point arrays in `dtype`, others as they are. The bits of bfloat16 go into uint16, because not
    # every version of safetensors reads bfloat16 into NumPy.
    leaf = np.array(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None, order="C")
    return leaf.view(np.uint16) if leaf.dtype == ml_dtypes.bfloat16 else leaf


def _float32(leaf: np.ndarray) -> np.ndarray:
    # The inverse of `_cast`, up to rounding.
    leaf = leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf
    return leaf if np.issubdtype(leaf.dtype, np.integer) else leaf.astype(np.float32)


def _unpacked(path: Path, about: dict, arrays: Mapping[str, np.ndarray]) -> bool:
    # Writes a checkpoint, unless the run has one that is as new.
    with contextlib.closing(CheckpointStore(path)) as store:
        newest = store.latest()
        if newest is not None and newest >= about["step"]:
            return False
        items = jax.tree.map(lambda name: jnp.asarray(_float32(arrays[name])), about["trees"])
        if "params" in items:
            items["state"]["params"] = items.pop("params")
        store.write(about["step"], items, about["meta"])
    return True
