"""The index that retrieval-augmented diffusion draws neighbours from, for `unclip embed --index`, and the
neighbours of a training set in it, for `unclip embed --neighbours` (Blattmann et al. 2022, section 3.1).

`data.retrieval_index` describes the folder of an index. Its patches are random squares of each image; every
run gives a record the same ones. Training pictures must not be in the index: the network would learn to
copy the first neighbour.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.data import embeddings, ops
from unclip_jax.data.pipeline import DATA_ERRORS, BadDataError
from unclip_jax.data.record import Source, error_summary
from unclip_jax.data.retrieval_index import (
    FORMAT_VERSION,
    KIND,
    SPACES,
    RetrievalIndex,
    check_convention,
    open_index,
    picture_hash,
)
from unclip_jax.diffusion.embedding_space import EmbeddingSpace, normalize
from unclip_jax.errors import InputError
from unclip_jax.generate.neighbours import SAMPLED, Found, Searcher, recall, searcher
from unclip_jax.generate.networks import Network
from unclip_jax.metrics.retrieval import unit
from unclip_jax.paths import user_path, write_json
from unclip_jax.run.frozen import clip_image_size, clip_network, images_of
from unclip_jax.run.hosts import Stop, wait_for_hosts
from unclip_jax.sharding import BATCH, compute_dtype
from unclip_jax.train.embed_shards import (
    behind,
    check_finite_rows,
    check_folder,
    filled,
    make_shards,
    read_record,
    unusable,
)

POPULAR = 4096  # the rows that serve training most often; the manifest lists so many
SAME = 1e-3  # a first neighbour whose direction differs by less is the training picture itself


def embed_index(
    clip: str,
    source: Source,
    out: str | os.PathLike,
    mesh: Mesh,
    *,
    patches: int = 1,
    patch_size: int | None = None,
    space: str = "raw",
    batch_size: int = 256,
    shard_records: int = 8192,
    dtype: str = "auto",
    max_bad_fraction: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Makes an index of a source, or resumes where an earlier call stopped.

    Args:
      clip: a run, a bundle or public weights.
      source: pictures; captions are not read.
      out: the folder for the index.
      mesh: this host's own devices.
      patches: of each image.
      patch_size: the side in pixels of the random patches, at most the shorter side of an image; None for the
        centred square, which is then the only patch.
      space: `raw`, or `unit` to store rows of norm 1.
      batch_size: number of patches that this host embeds at a time.
      shard_records, dtype, max_bad_fraction, progress: as in `embed.embed`.

    Returns:
      The manifest, on every host.

    Raises:
      ValueError: when an argument is out of range, the folder holds something else, or the source holds no
        pictures.
      BadDataError: when too many records are bad.
      OSError: when the source or the folder cannot be reached.
    """
    if not source.pictures:
        raise InputError(f"{source.name} holds no pictures: an index is made of pictures")
    if space not in SPACES:
        raise InputError(f"unknown space {space!r} of an index; choose one of {', '.join(SPACES)}")
    for name, value in (("patches", patches), ("patch_size", patch_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if patch_size is None and patches > 1:
        raise InputError(f"{patches} patches of an image need their size in pixels: give patch_size")
    check_folder(out)
    out, network = user_path(out), clip_network(clip, mesh, dtype)
    plan = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "clip": network.hash,
        "source": source.checksum,
        "records": len(source),
        "shard_records": shard_records,
        "patches": patches,
        "patch_size": patch_size,
        "embedding_space": space,
        "dtype": np.dtype(compute_dtype(dtype, mesh)).name,
    }
    sharding = NamedSharding(mesh, BATCH)

    @jax.jit
    def encode(params: Any, pictures: jax.Array) -> jax.Array:
        z = images_of(network, mesh, params, {"clip_image": pictures})
        return normalize(EmbeddingSpace(space), z).astype(np.float16)

    step = max(batch_size // patches, 1)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    tower = _Tower(
        network.config["model"]["embed_dim"],
        step,
        -(-step * patches // ways) * ways,
        lambda pictures: encode(network.params, jax.device_put(pictures, sharding)),
    )
    load = functools.partial(_patches, source, clip_image_size(network), patches, patch_size)
    make = functools.partial(_index_shard, tower, source, load)
    count = make_shards(
        out,
        plan,
        source,
        make,
        shard_records=shard_records,
        max_bad_fraction=max_bad_fraction,
        progress=progress,
    )
    if jax.process_index() == 0:
        described = [embeddings.read_json(embeddings.shard_path(out, n) / "shard.json") for n in range(count)]
        images, bad, rows = (sum(shard[name] for shard in described) for name in ("images", "bad", "rows"))
        if images == 0:
            raise BadDataError(f"none of the {len(source)} records of {source.name} can be used")
        made = {"images": images, "bad": bad, "rows": rows, "source_name": source.name}
        made["embed_dim"] = network.config["model"]["embed_dim"]
        shards = [{"rows": shard["rows"], "sha256": shard["sha256"]} for shard in described]
        write_json(out / "manifest.json", plan | made | {"shards": shards})
    wait_for_hosts("embedded_manifest")
    open_index(str(out))
    return embeddings.read_json(out / "manifest.json")


def _patches(
    source: Source, size: int, count: int, side: int | None, i: int
) -> tuple[list[np.ndarray], list[tuple[int, ...]], int] | str:
    # The patches (size, size, 3) uint8 of record i, their corners, and the hash of its picture; or the reason
    # why the record is unusable.
    record = read_record(source, i)
    if isinstance(record, str):
        return record
    try:
        image = ops.decode_image(record.image)
        height, width = image.shape[:2]
        rng, pictures, corners = np.random.default_rng([i, count]), [], []
        for _ in range(count):
            here = min(height, width, side or max(height, width))
            if side is None:
                x, y = (width - here) // 2, (height - here) // 2
                pictures.append(ops.resize_then_crop(image, size))
            else:
                x, y = (int(rng.integers(length - here + 1)) for length in (width, height))
                pictures.append(ops.resize(image[y : y + here, x : x + here], size))
            corners.append((x, y, x + here, y + here))
    except DATA_ERRORS as error:
        return unusable(source, i, error_summary(error))
    return pictures, corners, picture_hash(record.image)


@dataclasses.dataclass(frozen=True)
class _Tower:
    # CLIP's image tower. dim: D. images: of a batch. rows: patches of a batch, with padding.
    # encode: (rows, Hc, Wc, 3) -> float16 (rows, D).
    dim: int
    images: int
    rows: int
    encode: Callable[[np.ndarray], jax.Array]


def _index_shard(
    tower: _Tower,
    source: Source,
    load: Callable[[int], Any],
    records: range,
    allowed: float,
    pool: ThreadPoolExecutor,
    stop: Stop,
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
    # As `make_shards` asks.
    chunks = [records[i : i + tower.images] for i in range(0, len(records), tower.images)]
    ahead = collections.deque(pool.map(load, chunk) for chunk in chunks[:2])  # decoded while the devices work
    kept, corners, hashes, bad = [], [], [], []

    def images() -> Iterator[tuple[Any, int]]:
        for n, chunk in enumerate(chunks):
            loaded = list(zip(chunk, ahead.popleft()))
            if n + 2 < len(chunks):
                ahead.append(pool.map(load, chunks[n + 2]))
            bad.extend(row for _, row in loaded if isinstance(row, str))
            rows = [(i, *row) for i, row in loaded if not isinstance(row, str)]
            kept.extend(i for i, of_image, _, _ in rows for _ in of_image)
            corners.extend(corner for _, _, of_image, _ in rows for corner in of_image)
            hashes.extend(digest for _, _, _, digest in rows)
            if len(bad) > allowed:
                return
            pictures = [picture for _, of_image, _, _ in rows for picture in of_image]
            if pictures and not stop:
                batch = ops.to_float(np.stack(filled(pictures, tower.rows)))
                yield tower.encode(batch), len(pictures)

    rows = np.concatenate([np.zeros((0, tower.dim), np.float16), *behind(images())])
    arrays = {
        "embedding": rows,
        "img_id": np.asarray(kept, np.int64),
        "patch_coords": np.asarray(corners, np.int32).reshape(-1, 4),
        "picture": np.asarray(hashes, np.uint64),
    }
    check_finite_rows({"embedding": rows}, source, records)
    described = {
        "first_record": records.start,
        "records": len(records),
        "images": len(hashes),
        "rows": len(rows),
        "bad": len(bad),
    }
    return arrays, described | {"last_bad": bad[-1] if bad else ""}, bad


# ------------------------------------------------------------------------------------------ neighbours
@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Finds the neighbours of training pictures.

    index: where they are found. count: how many of each picture. exact: the exact search. search: the search
    that is used.
    """

    index: RetrievalIndex
    count: int
    exact: Searcher
    search: Callable[[np.ndarray, int], Found]
    described: dict

    def arrays(self, z: np.ndarray, source: Source, records: list[int]) -> dict[str, np.ndarray]:
        """What a shard keeps of the images of these records with embeddings (n, D).

        Raises:
          ValueError: naming a record that is in the index itself.
        """
        numbers, _ = self.search(z, self.count)
        itself = np.flatnonzero(
            np.linalg.norm(unit(z) - unit(self.index.take(numbers[:, 0])), axis=-1) < SAME
        )
        if len(itself):
            raise self.not_disjoint(source, records[itself[0]], f"row {numbers[itself[0], 0]} equals it")
        rows = self.index.take(numbers).astype(np.float16)
        return {"neighbours": rows, "neighbour_rows": numbers}

    def not_disjoint(self, source: Source, record: int, why: str) -> InputError:
        """The error about a training picture that is in the index."""
        return InputError(
            f"record {record} of {source.name} is in the index {self.index.name} ({why}): neighbours must be "
            "disjoint from the training pictures; make the index of other pictures"
        )

    def figures(self, shards: list[embeddings.Shard]) -> dict:
        """How often the most used rows serve, from all shards, and the recall of an approximate search."""
        uses = np.zeros(len(self.index), np.int64)
        for shard in shards:
            uses += np.bincount(np.ravel(shard.array("neighbour_rows")), minlength=len(uses))
        order = np.argsort(-uses, kind="stable")[:POPULAR]
        order = order[uses[order] > 0]
        made = {"rows": order.tolist(), "uses": uses[order].tolist()}
        if self.search is not self.exact:
            z = next(np.asarray(s.array("image_embed")[:SAMPLED]) for s in shards if len(s.array("record")))
            wanted = self.exact(z, self.count)[0]
            made["recall"] = recall(self.search(z, self.count)[0], wanted)
        return made


def neighbours_of(index: RetrievalIndex, count: int, clip: Network, mesh: Mesh, search: str) -> Neighbours:
    """The search for `count` neighbours in an index.

    Raises:
      ValueError: when the index is of another CLIP, or has fewer than `count` rows; as `searcher`.
      MissingPackageError: as `searcher`.
    """
    check_convention(index, clip.hash, "the CLIP given")
    if not 1 <= count <= len(index):
        raise InputError(
            f"{index.name} has {len(index)} rows, so the neighbours must be 1 to that, got {count}"
        )
    exact = Searcher(index, mesh)
    used = exact if search == "exact" else searcher(index, mesh, count, search)
    described = {"index": index.checksum, "embedding_space": index.space, "count": count, "search": search}
    return Neighbours(index, count, exact, used, described)
