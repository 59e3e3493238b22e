"""CLIP embeddings of a source on disk: `unclip embed` writes them, and the priors train from them.

    manifest.json     which CLIP and source, counts and hashes of all shards, alignment check; written last
    plan.json         what decides the contents: a folder can be continued only with the same plan
    empty/            the empty caption: text_embed, text_states, clip_token_mask, of one row each
    00000/ 00001/     one shard each, with n consecutive images of the source and their m captions:
        image_embed   float32 (n, D), not normalised
        text_embed    float32 (m, D), not normalised, of every caption of every image
        first_caption (n + 1,): the captions of image i are first_caption[i] ... first_caption[i + 1] - 1
        captions_utf8 the texts of all captions, one after the other
        caption_end   (m,): where each text ends in captions_utf8
        record        (n,): the number of each image's record in the source
        text_states   float16 (m, L, W), if they were asked for
        latents       float16 (n, h, w, Z), not scaled, if an autoencoder was given
        codes         int32 (n, N), if a VQ-VAE or a discrete VAE was given
        neighbours    float16 (n, K, D), the nearest rows of an index, in its space, if one was given
        neighbour_rows int64 (n, K), the numbers of these rows
        sum, outer    float64 (D,), (D, D): the sums of z and of z z^T over the image embeddings z
        shard.json    the range of records, counts, records that could not be read, sha256 of every file
    codec/            a bundle whose one part, `codec`, is the codec of the autoregressive prior

Arrays are `.npy` files, read through memory maps. The folder of a shard appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import InputError, one_line
from unclip_jax.paths import local_copy, store_errors, user_path, whole_folder, write_json
from unclip_jax.typed import check_fields

FORMAT_VERSION = 1
EMPTY = "empty"
LATENTS = {
    "autoencoder": (str, True),
    "size": (int, True),
    "shape": (tuple[int, ...], True),
    "scale_factor": (float, True),
}
CODES = {"coder": (str, True), "size": (int, True), "shape": (tuple[int, ...], True)}
NEIGHBOURS = {
    "index": (str, True),
    "embedding_space": (str, True),
    "count": (int, True),
    "search": (str, True),
    "rows": (tuple[int, ...], True),
    "uses": (tuple[int, ...], True),
    "recall": (float, False),
}
log = logging.getLogger("unclip_jax")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The description of a folder of embeddings.

    Attributes:
      path: the folder.
      clip: the hash of the CLIP that made the embeddings.
      source: the checksum of the source of pictures that was embedded.
      embed_dim: their size D.
      states: whether text states are stored.
      tokenizer: the config of CLIP's tokenizer.
      mean, std: float64 (D,), of the image embeddings.
      empty: the arrays of the empty caption, one row each.
      shards: how many images and captions each shard holds, and the hashes of its files.
      latents: what the autoencoder's latents are (`train.embed_latents`); None without them.
      neighbours: what the neighbours are (`train.embed_index`): the index's checksum and space, how many of
        each image, and the rows that serve most often with their numbers of uses; None without them.
      codes: what the codes are (`train.embed_latents`); None without them.
    """

    path: str
    clip: str
    source: str
    embed_dim: int
    states: bool
    tokenizer: dict
    mean: np.ndarray = dataclasses.field(repr=False, compare=False)
    std: np.ndarray = dataclasses.field(repr=False, compare=False)
    empty: Mapping[str, np.ndarray] = dataclasses.field(repr=False, compare=False)
    shards: tuple[dict, ...] = dataclasses.field(repr=False)
    latents: dict | None = None
    neighbours: dict | None = None
    codes: dict | None = None


def shard_path(folder: str | os.PathLike, number: int) -> Any:
    """The folder of a shard: a `paths.user_path`."""
    return user_path(folder) / f"{number:05d}"


def read_json(path: Any) -> dict:
    """A JSON object. Raises `ValueError` naming a damaged file, `FileNotFoundError` naming a missing one."""
    try:
        with store_errors(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = "`unclip embed` did not finish; run it again with the same arguments"
        raise FileNotFoundError(f"{path} is missing: {advice}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); copy the embeddings again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object; copy the embeddings again")
    return value


def write_arrays(folder: Any, arrays: Mapping[str, np.ndarray], described: Mapping) -> None:
    """Writes a folder of `.npy` files and `shard.json`, which holds `described` and the hashes of the files.

    The folder appears whole or not at all.
    """
    with whole_folder(folder, "shard.json") as made:
        for name, array in arrays.items():
            np.save(made / f"{name}.npy", array, allow_pickle=False)
        hashes = {name: file_hash(made / f"{name}.npy") for name in sorted(arrays)}
        write_json(made / "shard.json", {**described, "sha256": hashes})


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Any) -> None:
    """Compares the files of a shard with their hashes.

    Raises:
      ValueError: naming a file whose bytes are not those that were written.
      FileNotFoundError: naming a missing file.
    """
    for name, expected in read_json(folder / "shard.json")["sha256"].items():
        file = folder / f"{name}.npy"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; delete {folder} and run `unclip embed` again")
        if file_hash(local_copy(file)) != expected:
            raise InputError(
                f"{file} is damaged (its hash differs); delete {folder} and run `unclip embed` again"
            )


def finished(folder: Any) -> dict | None:
    """The content of `shard.json` if the shard is complete and undamaged, None otherwise."""
    with store_errors(folder):
        if not (folder / "shard.json").is_file():
            return None
    try:
        check_hashes(folder)
    except (ValueError, OSError) as error:
        log.warning("%s: embedding this shard again", one_line(error))
        return None
    return read_json(folder / "shard.json")


def read_array(folder: Any, name: str) -> np.ndarray:
    """An array of a shard, through a memory map. A file in a store is copied first.

    Raises:
      OSError: naming a file that is missing or cannot be read.
      ValueError: naming a file that is truncated or holds no array.
    """
    file = folder / f"{name}.npy"
    try:
        return np.load(local_copy(file), mmap_mode="r", allow_pickle=False)
    except OSError as error:  # the machine may be at fault: too many open files, no memory
        raise OSError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} is damaged ({reason}); delete {folder} and run `unclip embed` again"
        ) from None


class Shard:
    """One shard: embeddings, captions, text states, latents and neighbours of its images. Files are mapped
    when first read."""

    def __init__(
        self,
        folder: Any,
        states: bool,
        latents: bool = False,
        neighbours: bool = False,
        codes: bool = False,
    ):
        self.folder, self.states, self._arrays = folder, states, {}
        kept = {"latents": latents, "neighbours": neighbours, "codes": codes}
        self.of_images = [name for name, is_kept in kept.items() if is_kept]

    def array(self, name: str) -> np.ndarray:
        """One of the shard's arrays."""
        if name not in self._arrays:
            self._arrays[name] = read_array(self.folder, name)
        return self._arrays[name]

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of image i."""
        first, last = self.array("first_caption")[i : i + 2].tolist()
        ends = [0 if j < 0 else int(self.array("caption_end")[j]) for j in range(first - 1, last)]
        text = self.array("captions_utf8")[ends[0] : ends[-1]].tobytes()
        return tuple(
            text[a - ends[0] : b - ends[0]].decode("utf-8", "surrogatepass") for a, b in zip(ends, ends[1:])
        )

    def row(self, i: int) -> dict[str, np.ndarray]:
        """The embeddings of image i and of its captions.

        `image_embed` (D,), `text_embed` (captions, D), and, if they are stored, `text_states` (captions, L,
        W), `latents` (h, w, Z), `neighbours` (K, D) and `codes` (N,).
        """
        first, last = self.array("first_caption")[i : i + 2].tolist()
        row = {
            "image_embed": np.asarray(self.array("image_embed")[i]),
            "text_embed": self.array("text_embed")[first:last],
        }
        row |= {name: np.asarray(self.array(name)[i]) for name in self.of_images}
        return row | ({"text_states": self.array("text_states")[first:last]} if self.states else {})


def join_captions(captions: list[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The arrays that store the captions of images: `first_caption`, `captions_utf8`, `caption_end`."""
    texts = [caption.encode("utf-8", "surrogatepass") for of_image in captions for caption in of_image]
    return {
        "first_caption": np.cumsum([0, *(len(of_image) for of_image in captions)], dtype=np.int64),
        "captions_utf8": np.frombuffer(b"".join(texts), np.uint8),
        "caption_end": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }


def open_embedded(path: str) -> Embedded:
    """The description of a finished folder of embeddings.

    Raises:
      FileNotFoundError: if there is no such folder, or it is unfinished.
      ValueError: if its description is damaged or of another version.
    """
    folder = user_path(path)
    with store_errors(path):
        exists = folder.is_dir()
    if not exists:
        raise FileNotFoundError(f"no folder {path}: embeddings are made with `unclip embed`")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") is not None:
        raise InputError(f"{folder} holds an {manifest['kind']} for retrieval, not embeddings with captions")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise InputError(
            f"{folder}/manifest.json has format version {version}; this version reads {FORMAT_VERSION}"
        )
    _check_manifest(manifest, f"{folder}/manifest.json")
    files = sorted(local_copy(folder / EMPTY).glob("*.npy"))
    empty = {file.stem: np.array(read_array(folder / EMPTY, file.stem)) for file in files}
    mean, std = (np.asarray(manifest["image_embed"][name], np.float64) for name in ("mean", "std"))
    about = (manifest[name] for name in ("clip", "source", "embed_dim", "states", "tokenizer"))
    kept = (manifest.get(name) for name in ("latents", "neighbours", "codes"))
    return Embedded(str(folder), *about, mean, std, empty, tuple(manifest["shards"]), *kept)


def _check_manifest(manifest: dict, name: str) -> None:
    types = {
        "clip": str,
        "source": str,
        "embed_dim": int,
        "states": bool,
        "tokenizer": dict,
        "image_embed": dict,
        "shards": list,
    }
    for key, kind in types.items():
        if type(manifest.get(key)) is not kind:
            raise InputError(f"{name} has no {key!r} of type {kind.__name__}; copy the embeddings again")
    for key, fields in (("latents", LATENTS), ("neighbours", NEIGHBOURS), ("codes", CODES)):
        if key in manifest:
            check_fields(manifest[key], fields, f"{name}: {key}")
    for key in ("mean", "std"):
        values = manifest["image_embed"].get(key)
        if not isinstance(values, list) or len(values) != manifest["embed_dim"]:
            raise InputError(
                f"{name}: {key!r} must be {manifest['embed_dim']} numbers; copy the embeddings again"
            )
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise InputError(
                f"{name}: {key!r} has a value that is no finite number; copy the embeddings again"
            )
    types = {"images": int, "sha256": dict}
    for number, shard in enumerate(manifest["shards"]):
        fits = isinstance(shard, dict) and all(type(shard.get(key)) is kind for key, kind in types.items())
        if not fits or shard["images"] < 0:
            raise InputError(f"{name} does not describe shard {number}; copy the embeddings again")
    if not sum(shard["images"] for shard in manifest["shards"]):
        raise InputError(f"{name} lists no image; copy the embeddings again")


def is_embedded(path: str | os.PathLike) -> bool:
    """Whether a path is a folder that `unclip embed` has finished or begun."""
    with store_errors(path):
        return (user_path(path) / "plan.json").is_file()


def has_latents(path: str | os.PathLike) -> bool:
    """Whether a finished folder of embeddings holds latents. Raises as `open_embedded`."""
    return open_embedded(path).latents is not None
