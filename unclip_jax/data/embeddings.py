"""CLIP embeddings of a source on disk: what the priors train from, written by `unclip embed`.

    manifest.json       which CLIP, which source, counts and hashes of every shard, the alignment check; written last
    plan.json           what decides the contents: a folder is only ever continued with the same plan
    empty/              the empty caption: text_embed, text_states, clip_token_mask, of one row each
    00000/ 00001/ ...   one shard each: a run of the source's records, in their order
        image_embed.npy (n, D) float32, raw      text_embed.npy (m, D) float32, raw: of every caption of every image
        first_caption.npy (n + 1,): image i has the captions first_caption[i] ... first_caption[i + 1] - 1
        captions_utf8.npy, caption_end.npy: their texts, one after the other, and where each ends
        record.npy (n,): which record of the source each image was
        text_states.npy (m, L, W) float16, where they were asked for
        sum.npy (D,), outer.npy (D, D): sums of z and of z z^T, float64
        shard.json: its range of records, counts, records that could not be read, sha256 of every file
    codec/              a bundle whose one part, `pca`, is the codec of the autoregressive prior

Everything is plain `.npy`, read through memory maps; a shard's folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.paths import local_copy, store_errors, user_path, whole_folder, write_json

FORMAT_VERSION = 1
EMPTY = "empty"


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What a folder of embeddings says of itself.

    clip: hash of the CLIP that made them; embed_dim: D; states: whether text states are there; tokenizer: CLIP's; mean, std: (D,) float64
    of the image embeddings; empty: the empty caption's arrays, one row each; shards: images, captions and hashes of each.
    """

    path: str
    clip: str
    embed_dim: int
    states: bool
    tokenizer: dict
    mean: np.ndarray = dataclasses.field(repr=False, compare=False)
    std: np.ndarray = dataclasses.field(repr=False, compare=False)
    empty: Mapping[str, np.ndarray] = dataclasses.field(repr=False, compare=False)
    shards: tuple[dict, ...] = dataclasses.field(repr=False)


def shard_path(folder: str | os.PathLike, number: int) -> Any:
    """Where a shard lies: a `paths.user_path`."""
    return user_path(folder) / f"{number:05d}"


def read_json(path: Any) -> dict:
    """A JSON object. Raises ValueError naming the file when it is damaged, FileNotFoundError when it is not there."""
    try:
        with store_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: `unclip embed` did not finish; run it again with the same arguments") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the embeddings again") from None


def write_arrays(folder: Any, arrays: Mapping[str, np.ndarray], described: Mapping) -> None:
    """Writes a folder of `.npy` files and `shard.json` (`described` and the files' hashes); it appears whole or not at all."""
    with whole_folder(folder, "shard.json") as made:
        for name, array in arrays.items():
            np.save(made / f"{name}.npy", array, allow_pickle=False)
        hashes = {name: file_hash(made / f"{name}.npy") for name in sorted(arrays)}
        write_json(made / "shard.json", {**described, "sha256": hashes})


def file_hash(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Any) -> None:
    """Raises ValueError naming a file of a shard whose bytes are not those that were written, FileNotFoundError when one is missing."""
    for name, expected in read_json(folder / "shard.json")["sha256"].items():
        file = folder / f"{name}.npy"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; delete {folder} and run `unclip embed` again")
        if file_hash(local_copy(file)) != expected:
            raise ValueError(f"{file} is damaged (its hash differs); delete {folder} and run `unclip embed` again")


def read_array(folder: Any, name: str) -> np.ndarray:
    """An array of a shard, through a memory map; of a store's, a map of a copy.

    Raises:
      OSError, ValueError: naming the file when it is missing, cut short or no array.
    """
    file = folder / f"{name}.npy"
    try:
        return np.load(local_copy(file), mmap_mode="r", allow_pickle=False)
    except OSError as error:  # the machine's, perhaps: too many open files, no memory
        raise OSError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is damaged ({reason}); delete {folder} and run `unclip embed` again") from None


class Shard:
    """One shard's images by position: embeddings, captions, text states. Its files are mapped when they are first looked at."""

    def __init__(self, folder: Any, states: bool):
        self.folder, self.states, self._arrays = folder, states, {}

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
        return tuple(text[a - ends[0] : b - ends[0]].decode("utf-8", "surrogatepass") for a, b in zip(ends, ends[1:]))

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Of image i: `image_embed` (D,), `text_embed` (captions, D), and `text_states` (captions, L, W) where there are any."""
        first, last = self.array("first_caption")[i : i + 2].tolist()
        row = {"image_embed": np.asarray(self.array("image_embed")[i]), "text_embed": self.array("text_embed")[first:last]}
        return row | ({"text_states": self.array("text_states")[first:last]} if self.states else {})


def join_captions(captions: list[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Captions of images -> the arrays that hold them (module docstring)."""
    texts = [caption.encode("utf-8", "surrogatepass") for own in captions for caption in own]
    return {
        "first_caption": np.cumsum([0, *(len(own) for own in captions)], dtype=np.int64),
        "captions_utf8": np.frombuffer(b"".join(texts), np.uint8),
        "caption_end": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }


def open_embedded(path: str) -> Embedded:
    """A finished folder of embeddings.

    Raises:
      FileNotFoundError, ValueError: one line each when it is none, unfinished, or of another version.
    """
    folder = user_path(path)
    with store_errors(path):
        found = folder.is_dir()
    if not found:
        raise FileNotFoundError(f"no folder {path}: embeddings are made with `unclip embed`")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder}/manifest.json has format version {manifest.get('format_version')}; this version reads {FORMAT_VERSION}")
    empty = {file.stem: np.array(read_array(folder / EMPTY, file.stem)) for file in sorted(local_copy(folder / EMPTY).glob("*.npy"))}
    mean, std = (np.asarray(manifest["image_embed"][name], np.float64) for name in ("mean", "std"))
    about = (manifest[name] for name in ("clip", "embed_dim", "states", "tokenizer"))
    return Embedded(str(folder), *about, mean, std, empty, tuple(manifest["shards"]))


def is_embedded(path: str | os.PathLike) -> bool:
    """Whether a path is a folder that `unclip embed` made or began."""
    with store_errors(path):
        return (user_path(path) / "plan.json").is_file()
