"""Reads all captions of a source with T5, once, so that Imagen trains without T5's billions of parameters.

`data.text_states` describes the folder. A shard is a run of records in the source's order. Every host
encodes its own shards on its own devices; hosts share only the folder. A run that was cut off resumes with
the missing shards.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.data import embeddings
from unclip_jax.data.pipeline import DATA_ERRORS, BadDataError
from unclip_jax.data.record import Source, error_summary
from unclip_jax.data.text_states import FORMAT_VERSION, caption_hash
from unclip_jax.data.tokenizers import tokenizer_of
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.paths import check_store, store_errors, user_path, write_json
from unclip_jax.run.hosts import wait_for_hosts
from unclip_jax.run.t5 import t5_network
from unclip_jax.sharding import BATCH, compute_dtype

log = logging.getLogger("unclip_jax")
LARGEST = float(np.finfo(np.float16).max)


def embed_t5(
    t5: str,
    source: Source,
    out: str | os.PathLike,
    mesh: Mesh,
    *,
    batch_size: int = 256,
    shard_records: int = 8192,
    dtype: str = "auto",
    max_bad_fraction: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Encodes all captions, or resumes where an earlier call stopped.

    Args:
      t5: public weights or a bundle.
      source: records with captions; pictures are not decoded.
      out: the folder for the states.
      mesh: this host's own devices.
      batch_size: captions that this host encodes at a time.
      shard_records: records in a shard.
      dtype: dtype of the computation (`sharding.compute_dtype`).
      max_bad_fraction: largest fraction of records that cannot be read, or have no caption.
      progress: called with this host's (shards done, total of shards).

    Returns:
      The manifest, on every host.

    Raises:
      ValueError: when the folder holds other states, or the source holds embeddings.
      BadDataError: when too many records are bad.
      NumericalError: when a state leaves the range of float16.
      OSError: when the source or the folder cannot be reached.
    """
    if source.embedded is not None:
        raise InputError(f"{source.name} holds embeddings already")
    check_store(out)
    out, network = user_path(out), t5_network(t5, dtype, mesh)
    tokenizer = tokenizer_of(network.config["tokenizer"])
    ways, sharding = mesh.shape["data"] * mesh.shape["fsdp"], NamedSharding(mesh, BATCH)
    rows = -(-batch_size // ways) * ways
    run = jax.jit(lambda params, tokens, mask: network.with_params(params).apply(tokens, mask))
    plan = {
        "format_version": FORMAT_VERSION,
        "t5": network.hash,
        "source": source.checksum,
        "records": len(source),
        "shard_records": shard_records,
        "dtype": np.dtype(compute_dtype(dtype, mesh)).name,
    }
    _check_plan(out, plan)

    def encode(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # The states of the captions' own tokens (tokens, W), and how many each caption has.
        kept, counts = [], []
        for first in range(0, len(captions), rows):
            chunk = captions[first : first + rows]
            tokens, mask = tokenizer(chunk + [""] * (rows - len(chunk)))
            states = run(network.params, *jax.device_put((tokens, mask), sharding))
            states, mask = np.asarray(states)[: len(chunk)], mask[: len(chunk)]
            if not np.abs(states).max(initial=0) <= LARGEST:
                raise NumericalError("T5 made states that are not finite in float16: its weights are damaged")
            kept.append(states[mask].astype(np.float16))
            counts.append(mask.sum(axis=1))
        width = network.config["model"]["width"]
        return np.concatenate(kept or [np.zeros((0, width), np.float16)]), np.concatenate(counts or [[]])

    count = -(-len(source) // shard_records)
    own = range(jax.process_index(), count, jax.process_count())
    written = (out / "plan.json").is_file()
    for done, number in enumerate(own):
        folder = embeddings.shard_path(out, number)
        if embeddings.finished(folder) is None:
            records = range(number * shard_records, min((number + 1) * shard_records, len(source)))
            arrays, described = _shard(source, records, encode, tokenizer)
            if described["bad"] > max(max_bad_fraction * len(records), 8 * (max_bad_fraction > 0)):
                raise BadDataError(
                    f"{described['bad']} of {len(records)} records cannot be used, more than "
                    f"max_bad_fraction={max_bad_fraction}; the last is {described['last_bad']}; mend the "
                    "data, or leave them out with --skip-bad"
                )
            if not written:  # a start that fails leaves no folder
                write_json(out / "plan.json", plan)
                written = True
            embeddings.write_arrays(folder, arrays, described)
        if progress is not None:
            progress(done + 1, len(own))
    wait_for_hosts("encoded")
    if jax.process_index() == 0:
        embeddings.write_arrays(out / embeddings.EMPTY, {"states": encode([""])[0]}, {})
        shards = [embeddings.read_json(embeddings.shard_path(out, i) / "shard.json") for i in range(count)]
        sums = {key: sum(shard[key] for shard in shards) for key in ("captions", "bad", "cut")}
        about = {"width": network.config["model"]["width"], "tokenizer": tokenizer.config()}
        write_json(out / "manifest.json", plan | about | sums)
    wait_for_hosts("encoded_manifest")
    return embeddings.read_json(out / "manifest.json")


def _check_plan(out: Any, plan: dict) -> None:
    with store_errors(out):
        if not out.exists() or not any(out.iterdir()):
            return
        if not (out / "plan.json").is_file():
            raise InputError(f"{out} exists and holds no states; choose another folder")
    before = embeddings.read_json(out / "plan.json")
    differing = [key for key in plan if before.get(key) != plan[key]]
    if differing:
        raise InputError(
            f"{out} holds states made with other settings ({', '.join(differing)}); choose another folder"
        )


def _shard(source: Source, records: range, encode: Callable, tokenizer: Any) -> tuple[dict, dict]:
    captions, first, bad, last = [], [0], 0, ""
    for i in records:
        try:
            found = list(source.read(i).captions)
            problem = "" if found else f"record {i} of {source.name}: it has no caption"
        except DATA_ERRORS as error:
            if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                raise OSError(
                    f"record {i} of {source.name} cannot be reached: {error_summary(error)}"
                ) from None
            found, problem = [], f"record {i} of {source.name}: {error_summary(error)}"
        if problem:
            bad, last = bad + 1, problem
            log.warning("skipped %s", problem)
        captions += found
        first.append(len(captions))
    states, counts = encode(captions)
    arrays = {
        "states": states,
        "state_end": np.cumsum(counts).astype(np.int64),
        "first_caption": np.array(first, np.int64),
        "captions": np.array([caption_hash(caption) for caption in captions], np.uint64),
    }
    cut = sum(bool(tokenizer.lost(caption)) for caption in captions)
    return arrays, {"captions": len(captions), "bad": bad, "cut": cut, "last_bad": last}
