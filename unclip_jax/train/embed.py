"""Embeds a whole source with CLIP, once, so that the priors and the codec can train from the embeddings.

With an autoencoder the same pass makes the latents of the images, so that latent diffusion trains from them.
With an index it finds the neighbours of the images, so that retrieval-augmented diffusion trains from them.
`data.embeddings` describes the folder. A shard is a run of records in the source's order. Every host embeds
its own shards on its own devices; hosts share only the folder. A shard's folder appears complete or not at
all, so that a run that was cut off can resume with the missing shards (`embed_shards`). The same pass
computes the sums for the mean, the standard deviation and the codec of the autoregressive prior (unCLIP
section 2.2).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.data import embeddings, ops
from unclip_jax.data.pipeline import DATA_ERRORS, BadDataError
from unclip_jax.data.record import Source, error_summary
from unclip_jax.data.retrieval_index import open_index, picture_hash
from unclip_jax.data.tokenizer import caption_arrays
from unclip_jax.errors import InputError
from unclip_jax.generate.neighbours import check_search
from unclip_jax.generate.networks import Network
from unclip_jax.metrics.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.paths import user_path, write_json
from unclip_jax.run.frozen import captions_of, clip_image_size, clip_network, clip_tokenizer, images_of
from unclip_jax.run.hosts import Stop, wait_for_hosts
from unclip_jax.sharding import BATCH, compute_dtype
from unclip_jax.train.codec import explained, principal_components
from unclip_jax.train.embed_index import Neighbours, neighbours_of
from unclip_jax.train.embed_latents import LatentEncoder, code_encoder, latent_encoder
from unclip_jax.train.embed_shards import (
    behind,
    check_finite_rows,
    check_folder,
    filled,
    make_shards,
    read_record,
    unusable,
)

log = logging.getLogger("unclip_jax")

CHECKED = 2048  # number of pairs in the alignment check
AGAIN = 8  # number of records that are embedded a second time and compared with the folder
TOLERANCE = 0.02  # largest relative difference; in bfloat16, other batch sizes round differently
REPORTED = (16, 64, 319, 512)  # numbers of dimensions whose share of the variance the manifest states
CHUNK = 4096  # embeddings per chunk in the second pass


@dataclasses.dataclass(frozen=True)
class _Towers:
    """CLIP's encoders on this host's devices.

    clip: the network.
    rows: number of pictures or captions in a batch.
    image: pictures (rows, Hc, Wc, 3) -> embeddings.
    text: captions, as many as `rows` -> embeddings, text states (float16, or None if they are not kept),
      masks.
    latents: makes latents or codes of larger pictures; None if they are not kept.
    neighbours: finds the images' neighbours in an index; None if they are not kept.
    """

    clip: Network
    rows: int
    image: Callable
    text: Callable
    latents: LatentEncoder | None
    neighbours: Neighbours | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of the pictures that each image is read as."""
        return (clip_image_size(self.clip), *([self.latents.size] if self.latents else []))

    def seen(self, pictures: list[tuple[np.ndarray, ...]]) -> tuple[Any, Any]:
        """Pictures of these sizes, as many as `rows` -> their embeddings and latents (or None)."""
        arrays = [ops.to_float(np.stack(column)) for column in zip(*pictures, strict=True)]
        return self.image(arrays[0]), self.latents.encode(arrays[1]) if self.latents else None


def embed(
    clip: str,
    source: Source,
    out: str | os.PathLike,
    mesh: Mesh,
    *,
    batch_size: int = 256,
    shard_records: int = 8192,
    states: bool = False,
    autoencoder: str | None = None,
    latent_image_size: int | None = None,
    coder: str | None = None,
    index: str | None = None,
    nearest: int = 4,
    search: str = "exact",
    dtype: str = "auto",
    max_bad_fraction: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Embeds images and all their captions, or resumes where an earlier call stopped.

    Images are scaled and cropped to the centre. A record without a caption is as bad as one whose image is
    damaged: it is counted and left out.

    Args:
      clip: a run, a bundle or public weights.
      source: pictures with captions.
      out: the folder for the embeddings.
      mesh: this host's own devices.
      batch_size: number of images, and of captions, that this host embeds at a time.
      shard_records: number of the source's records in a shard.
      states: whether to keep the text states (L, W) of every caption as well, in float16. Priors that see
        CLIP's states need them (Karlo's).
      autoencoder: a run, a bundle or public weights; None for no latents. Of a KL autoencoder the mean is
        kept. Latents are stored as float16, and not scaled.
      latent_image_size: the side in pixels of the images of which latents or codes are made.
      coder: a VQ-VAE or a discrete VAE, in place of an autoencoder: its codes are kept.
      index: an index (`data.retrieval_index`) of other pictures; None for no neighbours.
      nearest: number of neighbours that are kept of each image, in the index's space, the nearest first.
      search: one of `generate.neighbours.SEARCHES`.
      dtype: dtype of the computation (`sharding.compute_dtype`).
      max_bad_fraction: largest fraction of records that may be bad.
      progress: function that is called with this host's (shards done, total of shards).

    Returns:
      The manifest, on every host.

    Raises:
      ValueError: when the folder holds other embeddings, the source holds embeddings, or the embeddings in
        the folder differ from CLIP's output for the source's records; when the index is of another CLIP, or
        holds one of the source's pictures.
      BadDataError: when too many records are bad.
      OSError: when the source or the folder cannot be reached.
    """
    if source.embedded is not None:
        raise InputError(f"{source.name} holds embeddings already")
    if batch_size < 1 or shard_records < 1:
        raise InputError(f"batch_size {batch_size} and shard_records {shard_records} must be at least 1")
    check_folder(out)
    opened = None if index is None else open_index(index)
    check_search(search)
    if coder is None:
        encoder = latent_encoder(autoencoder, latent_image_size, mesh, dtype)
    else:
        encoder = code_encoder(coder, latent_image_size, mesh, dtype)
    out, towers = user_path(out), _towers(clip, mesh, dtype, batch_size, states, encoder)
    near = None if opened is None else neighbours_of(opened, nearest, towers.clip, mesh, search)
    towers = dataclasses.replace(towers, neighbours=near)
    plan = {
        "format_version": embeddings.FORMAT_VERSION,
        "clip": towers.clip.hash,
        "source": source.checksum,
        "records": len(source),
        "shard_records": shard_records,
        "states": states,
        "dtype": np.dtype(compute_dtype(dtype, mesh)).name,
    } | ({} if encoder is None else {encoder.name: encoder.described})
    plan |= {} if near is None else {"neighbours": near.described}
    make = functools.partial(_embed_shard, towers, source)
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
        _finish(out, plan, towers, source, count)
    wait_for_hosts("embedded_manifest")
    return embeddings.read_json(out / "manifest.json")


# ------------------------------------------------------------------------------------------ one shard
def _towers(
    path: str, mesh: Mesh, dtype: str, batch_size: int, states: bool, encoder: LatentEncoder | None
) -> _Towers:
    if embeddings.is_embedded(path):
        raise InputError(f"{path} holds embeddings, not the CLIP that makes them")
    clip = clip_network(path, mesh, dtype)
    ways, sharding = mesh.shape["data"] * mesh.shape["fsdp"], NamedSharding(mesh, BATCH)
    image, tokenizer = jax.jit(functools.partial(images_of, clip, mesh)), clip_tokenizer(clip)

    @jax.jit
    def text(params, batch):
        encoded = captions_of(clip, mesh, True, params, batch)
        return encoded.embed, encoded.states.astype(np.float16) if states else None, encoded.mask

    return _Towers(
        clip,
        -(-batch_size // ways) * ways,
        lambda pictures: image(clip.params, jax.device_put({"clip_image": pictures}, sharding)),
        lambda captions: text(clip.params, jax.device_put(caption_arrays(captions, tokenizer), sharding)),
        encoder,
    )


def _load(
    source: Source, sizes: tuple[int, ...], i: int
) -> tuple[tuple[np.ndarray, ...], tuple[str, ...], int] | str:
    # The picture (uint8) in each of the sizes, its captions, and the hash of its bytes; or the reason why the
    # record is unusable.
    record = read_record(source, i)
    if isinstance(record, str):
        return record
    if not record.captions:
        return unusable(source, i, f"{record.key or 'it'} has no caption")
    try:
        image = ops.decode_image(record.image)
        pictures = tuple(ops.resize_then_crop(image, size) for size in sizes)
    except DATA_ERRORS as error:
        return unusable(source, i, error_summary(error))
    return pictures, record.captions, picture_hash(record.image)


def _embed_shard(
    towers: _Towers,
    source: Source,
    records: range,
    allowed: float,
    pool: ThreadPoolExecutor,
    stop: Stop,
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
    # The arrays of one shard, the content of its shard.json, and why records were skipped. They are not valid
    # if `stop` interrupted it, and hold a part only if more records than `allowed` are bad.
    kept, captions, bad, size, dim = [], [], [], towers.rows, towers.clip.config["model"]["embed_dim"]
    chunks = [records[i : i + size] for i in range(0, len(records), size)]
    load = functools.partial(_load, source, towers.sizes)
    ahead = collections.deque(pool.map(load, chunk) for chunk in chunks[:2])  # decoded while the devices work

    def images() -> Iterator[tuple[Any, int]]:
        for n, chunk in enumerate(chunks):
            loaded = list(zip(chunk, ahead.popleft()))
            if n + 2 < len(chunks):
                ahead.append(pool.map(load, chunks[n + 2]))
            rows = [(i, *row) for i, row in loaded if not isinstance(row, str)]
            bad.extend(row for _, row in loaded if isinstance(row, str))
            kept.extend(i for i, *_ in rows)
            captions.extend(record_captions for _, _, record_captions, _ in rows)
            if towers.neighbours is not None and towers.neighbours.index.pictures is not None:
                for i, _, _, digest in rows:
                    if towers.neighbours.index.holds(digest):
                        raise towers.neighbours.not_disjoint(source, i, "a picture of the same bytes")
            if len(bad) > allowed:
                return
            if rows and not stop:
                yield towers.seen(filled([pictures for _, pictures, *_ in rows], size)), len(rows)

    seen = list(behind(images()))
    z = np.concatenate([np.zeros((0, dim), np.float32), *(np.float32(each) for each, _ in seen)])
    useless = stop or len(bad) > allowed
    texts = [] if useless else [caption for record_captions in captions for caption in record_captions]
    batches = (texts[i : i + size] for i in range(0, len(texts), size))
    encoded = list(behind((towers.text(filled(batch, size)), len(batch)) for batch in batches))
    full = np.concatenate([np.zeros(0, bool), *(mask[:, -1] for _, _, mask in encoded)])
    tokenizer = clip_tokenizer(towers.clip)
    cut = sum(bool(tokenizer.lost(text)) for text, fills in zip(texts, full) if fills)
    arrays = {
        "image_embed": z,
        "text_embed": np.concatenate(
            [np.zeros((0, dim), np.float32), *(np.float32(embed) for embed, _, _ in encoded)]
        ),
        "record": np.asarray(kept, np.int64),
        "sum": z.sum(axis=0, dtype=np.float64),
        "outer": z.astype(np.float64).T @ z.astype(np.float64),
        **embeddings.join_captions(captions),
    }
    if encoded and encoded[0][1] is not None:
        arrays["text_states"] = np.concatenate([kept_states for _, kept_states, _ in encoded])
    if towers.latents is not None:
        kind = np.int32 if towers.latents.name == "codes" else np.float16
        empty = np.zeros((0, *towers.latents.described["shape"]), kind)
        arrays[towers.latents.name] = np.concatenate([empty, *(latents for _, latents in seen)])
    computed = [name for name in ("image_embed", "text_embed", "text_states", "latents") if name in arrays]
    check_finite_rows({name: arrays[name] for name in computed}, source, records)
    if towers.neighbours is not None and not useless:
        arrays |= towers.neighbours.arrays(z, source, kept)
    described = {
        "first_record": records.start,
        "records": len(records),
        "images": len(kept),
        "captions": len(texts),
        "bad": len(bad),
        "cut": cut,
    }
    return arrays, described | {"last_bad": bad[-1] if bad else ""}, bad


# ------------------------------------------------------------------------------------------ the folder
def _finish(out: Any, plan: dict, towers: _Towers, source: Source, count: int) -> None:
    # Writes the manifest, the empty caption and the codec, from the shards of all hosts.
    keeps = plan["states"], *(name in plan for name in ("latents", "neighbours", "codes"))
    shards = [embeddings.Shard(embeddings.shard_path(out, number), *keeps) for number in range(count)]
    described = [embeddings.read_json(shard.folder / "shard.json") for shard in shards]
    images = sum(shard["images"] for shard in described)
    if images == 0:
        raise BadDataError(f"none of the {len(source)} records of {source.name} can be used")
    total, outer = (sum(np.asarray(shard.array(name)) for shard in shards) for name in ("sum", "outer"))
    mean, eigenvalues, components = principal_components(images, total, outer)
    std = np.sqrt(np.maximum(np.diag(outer) / images - np.square(mean), 1e-12))
    low, high = np.full(len(mean), np.inf), np.full(len(mean), -np.inf)
    for shard in shards:
        for first in range(0, len(shard.array("image_embed")), CHUNK):
            projected = (shard.array("image_embed")[first : first + CHUNK] - mean) @ components.T
            low, high = np.minimum(low, projected.min(axis=0)), np.maximum(high, projected.max(axis=0))

    embed, kept_states, mask = towers.text([""] * towers.rows)
    arrays = {"text_embed": np.asarray(embed, np.float32)[:1]}
    if plan["states"]:
        arrays |= {"text_states": np.asarray(kept_states)[:1], "clip_token_mask": np.asarray(mask)[:1]}
    embeddings.write_arrays(out / embeddings.EMPTY, arrays, {})
    codec = {"mean": mean, "components": components, "eigenvalues": eigenvalues, "low": low, "high": high}
    config = {"kind": "codec", "embed_dim": len(mean), "dims": len(mean), "frozen": {"clip": plan["clip"]}}
    part = Part(config, {name: np.asarray(value, np.float32) for name, value in codec.items()})
    save_bundle(
        Bundle({"codec": part}, provenance={"embedded": source.name, "images": images}), out / "codec"
    )
    near = {"neighbours": plan["neighbours"] | towers.neighbours.figures(shards)} if towers.neighbours else {}
    write_json(
        out / "manifest.json",
        plan
        | near
        | {
            "images": images,
            "captions": sum(shard["captions"] for shard in described),
            "bad": sum(shard["bad"] for shard in described),
            "cut": sum(shard.get("cut", 0) for shard in described),
            "embed_dim": len(mean),
            "tokenizer": towers.clip.config["tokenizer"],
            "source_name": source.name,
            "image_embed": {"mean": mean.tolist(), "std": std.tolist()},
            "explained_variance": {
                str(k): explained(eigenvalues, k) for k in sorted({k for k in REPORTED if k < len(mean)})
            },
            "alignment": _alignment(shards, described, towers, source),
            "shards": [
                {"images": shard["images"], "captions": shard["captions"], "sha256": shard["sha256"]}
                for shard in described
            ],
        },
    )


def _alignment(
    shards: list[embeddings.Shard], described: list[dict], towers: _Towers, source: Source
) -> dict[str, float]:
    # Compares matching pairs of image and caption with mismatched ones, and embeds some records a second time
    # to check the folder.
    z_image, z_text, rechecked = [], [], []
    for shard, about in zip(shards, described):
        first = np.asarray(shard.array("first_caption"))
        with_captions = np.flatnonzero(np.diff(first) > 0)[: -(-CHECKED // len(shards))]
        z_image.append(np.asarray(shard.array("image_embed")[with_captions]))
        z_text.append(np.asarray(shard.array("text_embed")[first[with_captions]]))
        rechecked += [(shard, int(i)) for i in ([0, about["images"] - 1] if about["images"] else [])]
    rechecked = [
        rechecked[i] for i in np.linspace(0, len(rechecked) - 1, min(AGAIN, len(rechecked))).astype(int)
    ]
    for shard, i in rechecked:
        record = int(shard.array("record")[i])
        loaded = _load(source, towers.sizes, record)
        if isinstance(loaded, str):
            raise OSError(f"{loaded}, but it was read before; run the same command again")
        pictures, captions, _ = loaded
        embed, latents = towers.seen([pictures] * towers.rows)
        pairs = [(shard.array("image_embed")[i], embed[0])]
        if latents is not None:
            pairs.append((np.float32(shard.array(towers.latents.name)[i]), np.float32(latents[0])))
        if captions:
            pairs.append((shard.row(i)["text_embed"][0], towers.text([captions[0]] * towers.rows)[0][0]))
        for stored, embedded in pairs:
            close = np.linalg.norm(stored - embedded) <= TOLERANCE * np.linalg.norm(embedded)
            if not close or captions != shard.captions(i):
                raise InputError(
                    f"{shard.folder} does not hold what the networks say of record {record}; "
                    "delete it and run the command again"
                )
    z_image, z_text = np.concatenate(z_image), np.concatenate(z_text)
    if len(z_image) < 2:
        return {"pairs": len(z_image)}
    matching, mismatched = mean_cosine(z_image, z_text), mean_cosine(z_image, np.roll(z_text, 1, axis=0))
    if matching <= mismatched:
        log.warning(
            "captions fit their own images (mean cosine %.4f) no better than other images (%.4f): "
            "is this CLIP trained?",
            matching,
            mismatched,
        )
    figures = {"pairs": len(z_image), "cosine": matching, "cosine_of_others": mismatched}
    return figures | ({"retrieval_at_1": retrieval_at_1(z_image, z_text)} if len(z_image) >= 100 else {})
