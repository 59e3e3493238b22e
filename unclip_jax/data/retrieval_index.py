"""An index of neighbours: CLIP embeddings of the pictures, or of patches of them, that retrieval draws from.

`unclip embed --index` writes a folder (Blattmann et al. 2022, section 3.1: the database D):

    manifest.json      which CLIP and source, the space, counts and hashes of all shards; written last
    plan.json          what decides the contents: a folder can be continued only with the same plan
    00000/ 00001/      one shard each, with the n patches of consecutive images of the source:
        embedding      float16 (n, D), in the space that the manifest names
        img_id         int64 (n,): the number of each patch's record in the source
        patch_coords   int32 (n, 4): x0, y0, x1, y1 of the patch in the image
        picture        uint64 (images,): `picture_hash` of each image's bytes
        shard.json     the range of records, counts, records that could not be read, sha256 of every file

The published databases are folders of `.npz` files with `embedding`, `img_id` and `patch_coords`. Their parts
are joined in the order of the numbers in their names. They do not say which CLIP made them, nor in which
space the rows are. A file `index.json` beside them does: {"clip": hash, "embedding_space": "raw" or "unit"}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.data.embeddings import file_hash, read_array, read_json, shard_path
from unclip_jax.data.record import json_checksum
from unclip_jax.errors import InputError, one_line
from unclip_jax.paths import local_copy, store_errors, user_path
from unclip_jax.typed import check_fields, shown

FORMAT_VERSION = 1
KIND = "index"  # in a manifest; folders of embeddings have none
SPACES = ("raw", "unit")
NORMS = 256  # rows whose norms are compared with the space
UNIT = 0.01  # largest difference of a unit row's norm from 1, in half precision
MANIFEST = {
    "clip": (str, True),
    "embed_dim": (int, True),
    "embedding_space": (str, True),
    "rows": (int, True),
    "shards": (tuple[dict, ...], True),
}
POPULAR = {"index": (str, True), "rows": (tuple[int, ...], True), "uses": (tuple[int, ...], True)}
BESIDE = {"clip": (str, True), "embedding_space": (str, True)}


@dataclasses.dataclass(frozen=True)
class RetrievalIndex:
    """Rows to retrieve from.

    Attributes:
      name: what messages call it.
      clip: the hash of the CLIP that made the rows.
      space: `raw`, or `unit` for rows of norm 1.
      checksum: sha256 in hex of what it holds.
      blocks: the rows, (n, D) arrays one after the other; they may be memory maps.
      pictures: uint64, ascending: the hashes of all pictures; None where the index does not say.
    """

    name: str
    clip: str
    space: str
    checksum: str
    blocks: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
    pictures: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.blocks[0].shape[1]

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to `last` - 1: (n, D) in the type that they are stored in."""
        pieces, start = [], 0
        for block in self.blocks:
            low, high = max(first - start, 0), min(last - start, len(block))
            if low < high:
                pieces.append(block[low:high])
            start += len(block)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (...): float32 (..., D)."""
        flat, ends = np.ravel(numbers), np.cumsum([len(block) for block in self.blocks])
        made = np.empty((len(flat), self.embed_dim), np.float32)
        where = np.searchsorted(ends, flat, side="right")
        for number in np.unique(where):
            chosen, start = where == number, ends[number - 1] if number else 0
            made[chosen] = self.blocks[number][flat[chosen] - start]
        return made.reshape(*np.shape(numbers), self.embed_dim)

    def holds(self, picture: int) -> bool:
        """Whether a picture of this hash is in the index. Raises ValueError where the index does not say."""
        if self.pictures is None:
            raise InputError(f"{self.name} does not say which pictures it holds")
        place = int(np.searchsorted(self.pictures, np.uint64(picture)))
        return place < len(self.pictures) and int(self.pictures[place]) == picture


def picture_hash(image: bytes | np.ndarray) -> int:
    """A hash of 64 bits of a record's image: of the encoded bytes, or of the decoded array."""
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_index(path: str) -> bool:
    """Whether a path is a folder that `unclip embed --index` has finished."""
    file = user_path(path) / "manifest.json"
    with store_errors(path):
        return file.is_file() and read_json(file).get("kind") == KIND


def open_index(path: str) -> RetrievalIndex:
    """Opens a finished index, or a published database of `.npz` files.

    Raises:
      FileNotFoundError: when the folder, or a file that it needs, is missing.
      ValueError: one line that names what is damaged, or what the database does not say.
    """
    folder = user_path(path)
    with store_errors(path):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {path}: an index is made with `unclip embed --index`")
        parts = sorted(folder.glob("*.npz"), key=_part_number)
        ours = (folder / "plan.json").is_file() or (folder / "manifest.json").is_file()
    if not ours and not parts:
        raise InputError(
            f"{path} holds no index: no manifest.json, and no .npz files of a published database"
        )
    return _own(folder) if ours else _published(folder, parts)


def _own(folder: Any) -> RetrievalIndex:
    manifest, where = read_json(folder / "manifest.json"), f"{folder}/manifest.json"
    if manifest.get("kind") != KIND:
        raise InputError(f"{folder} holds embeddings and no index: make one with `unclip embed --index`")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = shown(manifest.get("format_version"))
        raise InputError(f"{where} has format version {version}; this version reads {FORMAT_VERSION}")
    check_fields({key: manifest[key] for key in MANIFEST if key in manifest}, MANIFEST, where)
    blocks, pictures = [], []
    for number, described in enumerate(manifest["shards"]):
        shard = shard_path(folder, number)
        if read_json(shard / "shard.json").get("sha256") != described.get("sha256"):
            raise InputError(f"{shard} is not the shard that {where} describes: copy the index again")
        blocks.append(read_array(shard, "embedding"))
        pictures.append(np.asarray(read_array(shard, "picture")))
    shapes_fit = all(b.ndim == 2 and b.shape[1] == manifest["embed_dim"] for b in blocks)
    if not shapes_fit or not blocks or sum(map(len, blocks)) != manifest["rows"]:
        raise InputError(f"{where} does not describe the arrays of its shards: copy the index again")
    checksum = json_checksum([shard["sha256"] for shard in manifest["shards"]])
    about = (str(folder), manifest["clip"], manifest["embedding_space"], checksum)
    return checked(RetrievalIndex(*about, tuple(blocks), np.unique(np.concatenate(pictures))))


def _part_number(path: Any) -> tuple:
    # The published names are like 1999998x512-part_2.npz: the first number is that of the part's rows. So the
    # last number decides, and part_2 comes before part_10.
    numbers = [int(text) for text in re.findall(r"\d+", path.stem)]
    return (numbers[-1:], path.name)


def _published(folder: Any, parts: list) -> RetrievalIndex:
    beside = folder / "index.json"
    with store_errors(folder):
        if not beside.is_file():
            raise FileNotFoundError(
                f"{folder} does not say which CLIP made its rows, nor whether they are normalised: write "
                f'{beside} with {{"clip": HASH, "embedding_space": "raw"}} (or "unit"); the hash of a CLIP '
                "stands in its bundle's bundle.json"
            )
    said = read_json(beside)
    check_fields(said, BESIDE, str(beside))
    blocks = tuple(_npz_rows(local_copy(part)) for part in parts)
    if len({block.shape[1] for block in blocks}) > 1:
        sizes = ", ".join(f"{part.name}: {block.shape[1]}" for part, block in zip(parts, blocks))
        raise InputError(f"the parts of {folder} have rows of different sizes ({sizes})")
    checksum = json_checksum([file_hash(local_copy(part)) for part in parts])
    return checked(RetrievalIndex(str(folder), said["clip"], said["embedding_space"], checksum, blocks))


def _npz_rows(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("embedding", "img_id", "patch_coords") if name not in arrays]
            if missing:
                raise InputError(f"{path} has no array {missing[0]!r}: it is no part of a published database")
            rows, images, patches = (arrays[name] for name in ("embedding", "img_id", "patch_coords"))
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path} is damaged ({one_line(error, 100)}); copy it again") from None
    fits = rows.ndim == 2 and rows.dtype.kind == "f" and images.shape == (len(rows),)
    if not fits or patches.shape != (len(rows), 4) or not len(rows):
        shapes = f"embedding {rows.shape}, img_id {images.shape}, patch_coords {patches.shape}"
        raise InputError(f"the arrays of {path} do not fit together: {shapes}")
    return rows


def checked(index: RetrievalIndex) -> RetrievalIndex:
    """The index, after a look at some of its rows.

    Raises:
      ValueError: when its space is unknown or its rows are of the other one, or a row is not finite.
    """
    if index.space not in SPACES:
        known = ", ".join(SPACES)
        raise InputError(f"{index.name}: unknown embedding space {shown(index.space)}; choose one of {known}")
    some = np.linspace(0, len(index) - 1, min(len(index), NORMS)).astype(np.int64)
    norms = np.linalg.norm(index.take(some), axis=-1)
    if not np.isfinite(norms).all() or not norms.min() > 0:
        raise InputError(f"{index.name} has rows that are zero or not finite: make the index again")
    unit = bool(np.all(np.abs(norms - 1) <= UNIT))
    if unit != (index.space == "unit"):
        raise InputError(
            f"{index.name} says that its rows are {index.space}, but their norms are {norms.min():.3g} to "
            f"{norms.max():.3g}: correct its embedding_space"
        )
    return index


def check_convention(index: RetrievalIndex, clip: str, taker: str, space: str | None = None) -> None:
    """Checks that an index serves a network.

    Args:
      clip: the hash of the network's CLIP.
      taker: what messages call the network.
      space: the space of its neighbours; None for any.

    Raises:
      ValueError: when the index is of another CLIP, or in the other space.
    """
    if index.clip != clip:
        raise InputError(
            f"{index.name} was made with CLIP {index.clip}, but {taker} is of {clip}: "
            "make an index with that CLIP"
        )
    if space not in (None, index.space):
        raise InputError(
            f"{index.name} holds {index.space} embeddings, but {taker} takes {space} ones: "
            f"make an index with --space {space}"
        )


def check_described(config: Mapping[str, Any], where: str) -> None:
    """Checks what a part of a bundle says of neighbours, beside its keys' types; other parts say nothing.

    Raises:
      ValueError: naming `where`, the key and the value at fault.
    """
    if config["kind"] not in ("retrieval", "index"):
        return
    check_fields(config["embedding_space"], {"kind": (str, True)}, f"{where}: embedding_space")
    if config["embedding_space"]["kind"] not in SPACES:
        found = shown(config["embedding_space"]["kind"])
        raise InputError(f"{where}: embedding_space: unknown kind {found}; choose one of {', '.join(SPACES)}")
    if "popular" in config:
        check_fields(config["popular"], POPULAR, f"{where}: popular")
        if len(config["popular"]["rows"]) != len(config["popular"]["uses"]):
            raise InputError(f"{where}: popular: each of the rows needs its number of uses")
    if config["kind"] == "index" and not 0 < config["rows"] < 2**31:
        raise InputError(f"{where}: rows must be between 1 and {2**31 - 1}, not {config['rows']}")
    if config["kind"] == "retrieval" and config["model"].get("context_dim") is None:
        raise InputError(f"{where}: model: context_dim is the size of the neighbours; it cannot be absent")
