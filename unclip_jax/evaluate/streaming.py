"""Features of a set of images, computed batch by batch and kept in a working folder.

The folder holds one file per batch while the work goes on. A file appears complete or not at all, so that a
process that is killed loses at most the batch at which it was. The same call then continues. In the end the
batches become one array per output of the network, which figures read memory-mapped:

    plan.json                 what was computed, for people
    blocks-64/000000000.npz   the batches of 64 images, and so on; deleted in the end
    pool.npy, ...             the features, (N, D) float32
    rows.npy, done.json       the numbers of the images that could be used, and what else was seen

The folder's name is a checksum of everything that decides the features. So another figure of the same
images by the same network computes nothing again.

Every host computes its own batches, on its own devices, in its own folder. The results are gathered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from unclip_jax.data import ops
from unclip_jax.data.record import json_checksum
from unclip_jax.errors import InputError
from unclip_jax.evaluate.sets import ImageSet, Picture
from unclip_jax.paths import cache_folder, is_remote, user_path, write_json, write_whole
from unclip_jax.run.hosts import leave_if_stopped, stop_signals, wait_for_hosts
from unclip_jax.sampling.programs import Progress

log = logging.getLogger("unclip_jax")

FORMAT_VERSION = 1
BATCH = 64
SHOWN_BAD = 3  # reasons that are printed
SAMPLE = 4  # batches whose first image is compared with what was read before
ROWS, DIGEST, STORED, BAD = "rows", "digest", "stored", "bad"  # what a batch holds beside the outputs


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to an image before a network sees it.

    crop: "none", or "center": the largest central square.
    size: side in pixels to which the square is brought, bicubic and antialiased; None leaves its size. Only
      with "center".
    jpeg: quality at which the pixels are encoded as JPEG and decoded again; None leaves them.
    """

    crop: str = "none"
    size: int | None = None
    jpeg: int | None = None

    def __post_init__(self):
        if self.crop not in ("none", "center"):
            raise InputError(f"unknown crop {self.crop!r}: choose none or center")
        if self.size is not None and (self.crop != "center" or not 1 <= self.size <= 4096):
            raise InputError(
                f"a size goes with the crop center and lies between 1 and 4096, got {self.crop} {self.size}"
            )
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise InputError(f"the quality of JPEG lies between 1 and 100, got {self.jpeg}")

    @property
    def crop_words(self) -> str:
        """The crop as statistics state it."""
        return self.crop if self.size is None else f"{self.crop} {self.size} bicubic"

    @property
    def codec_words(self) -> str:
        """The codec as statistics state it."""
        return "none" if self.jpeg is None else f"jpeg {self.jpeg}"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8, prepared."""
        if self.crop == "center":
            image = ops.center_crop_square(image)
        if self.size is not None:
            image = ops.resize(image, self.size)
        if self.jpeg is not None:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=self.jpeg)
            image = ops.decode_image(file.getvalue())
        return image


PLAIN = Preparation()


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a set.

    outputs: output of the network -> (N, D) float32, memory-mapped.
    rows: (N,) numbers of the images; images that could not be used are missing.
    bad: number of images that could not be used.
    stored: formats in which the images were stored, sorted.
    """

    outputs: Mapping[str, np.ndarray]
    rows: np.ndarray
    bad: int
    stored: tuple[str, ...]


def work_folder(base: str | os.PathLike | None = None) -> Path:
    """The folder below which features are kept: `base`, or one in the package's cache.

    Raises:
      ValueError: if it lies in a store; features are mapped into memory, which needs a local disk.
    """
    if base is None:
        return cache_folder() / "features"
    path = user_path(base)
    if is_remote(path):
        raise InputError(f"--work {base}: features are mapped into memory, so the folder must be local")
    return path


def image_features(
    network: Any,
    images: ImageSet,
    *,
    preparation: Preparation = PLAIN,
    work: Path | None = None,
    batch: int = BATCH,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Features:
    """Computes all outputs of a network for all images of a set, or continues where an earlier call stopped.

    Images may have different sizes: the network resizes each on its own.

    Args:
      network: a `features.FeatureNetwork`, or a `Joined`.
      images: the set.
      preparation: what is done to an image first.
      work: from `work_folder`.
      batch: number of images at a time.
      skip_bad: whether images that cannot be decoded are left out instead of refused.
      progress: called with this host's (images done, images in all).

    Raises:
      ValueError: naming the first image that cannot be used, unless `skip_bad`; if none can be used.
      NumericalError: if a feature is not finite.
    """
    plan = {
        "format": FORMAT_VERSION,
        "network": network.name,
        "hash": network.hash,
        "config": network.config,
        "resize": network.resize,
        "outputs": dict(network.outputs),
        "crop": preparation.crop_words,
        "codec": preparation.codec_words,
        "images": images.checksum,
        "count": images.count,
        "skip_bad": skip_bad,
    }

    def compute(rows: Sequence[int], loaded: Sequence[Picture | str]) -> dict[str, np.ndarray]:
        kept = [(i, each) for i, each in zip(rows, loaded, strict=True) if not isinstance(each, str)]
        bad = [each for each in loaded if isinstance(each, str)]
        if bad and not skip_bad:
            raise InputError(f"{bad[0]}; mend it, or leave such images out with --skip-bad")
        for reason in bad[:SHOWN_BAD]:
            log.warning("left out: %s", reason)
        found = {name: np.zeros((0, width), np.float32) for name, width in network.outputs.items()}
        if kept:
            found = network([preparation(picture.pixels) for _, picture in kept])
        return {
            **{name: np.asarray(found[name], np.float32) for name in network.outputs},
            ROWS: np.asarray([i for i, _ in kept], np.int64),
            DIGEST: np.asarray(_digest(loaded[0])),
            STORED: np.asarray(json.dumps(sorted({picture.stored for _, picture in kept}))),
            BAD: np.asarray(len(bad)),
        }

    folder = (work or work_folder()) / json_checksum(plan)[:32]
    described = plan | {"images_name": images.name}
    found = _run(folder, described, images, network.outputs, compute, batch, progress)
    if len(found.rows) == 0:
        raise InputError(f"none of the {images.count} images of {images.name} can be used")
    return found


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several networks as one, so that a bundle draws its samples once for all of them.

    networks: by name. The output of a network is called "name.output" here. The rest is as in
      `features.FeatureNetwork`.
    """

    networks: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The names of all."""
        return "+".join(self.networks)

    @property
    def hash(self) -> list[str]:
        """The hashes of all."""
        return [network.hash for network in self.networks.values()]

    @property
    def config(self) -> list[Mapping]:
        """The configurations of all."""
        return [network.config for network in self.networks.values()]

    @property
    def resize(self) -> list[str]:
        """How each resizes."""
        return [network.resize for network in self.networks.values()]

    @property
    def outputs(self) -> dict[str, int]:
        """The outputs of all, with their widths."""
        return {f"{n}.{o}": width for n, each in self.networks.items() for o, width in each.outputs.items()}

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The features of all."""
        return {f"{n}.{o}": found for n, each in self.networks.items() for o, found in each(images).items()}

    def split(self, found: Features) -> dict[str, Features]:
        """What `image_features` returns for this network -> the same for each of its networks."""
        return {
            n: dataclasses.replace(found, outputs={o: found.outputs[f"{n}.{o}"] for o in each.outputs})
            for n, each in self.networks.items()
        }


def text_features(
    encode: Callable[[Sequence[str]], np.ndarray], captions: Sequence[str], batch: int = BATCH
) -> np.ndarray:
    """Embeds captions in batches, (N, D) float32. Every host embeds all of them: they cost little."""
    pieces = [encode(captions[first : first + batch]) for first in range(0, len(captions), batch)]
    return np.concatenate([np.asarray(piece, np.float32) for piece in pieces])


def _digest(picture: Picture | str) -> str:
    if isinstance(picture, str):
        return ""
    shape = np.asarray(picture.pixels.shape, np.int64).tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(picture.pixels).tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------ one host
def _run(
    folder: Path,
    plan: Mapping,
    images: ImageSet,
    outputs: Mapping[str, int],
    compute: Callable[[Sequence[int], Sequence[Picture | str]], dict[str, np.ndarray]],
    batch: int,
    progress: Progress | None,
) -> Features:
    if batch < 1:
        raise InputError(f"a batch has at least one image, got {batch}")
    hosts = jax.process_count()
    if hosts > 1:
        folder = folder / f"host-{jax.process_index()}-of-{hosts}"
    own = _own_batches(images.count, batch, jax.process_index(), hosts)
    done = _finished(folder, outputs)
    if done is None or not _same_images(done, images):
        with _alone(folder):
            if done is not None:
                (folder / "done.json").unlink(missing_ok=True)
            done = _finished(folder, outputs)  # another process may have finished it meanwhile
            if done is None:
                _compute_all(folder, plan, images, outputs, compute, batch, own, progress)
                done = _finished(folder, outputs)
    if hosts == 1:
        return done[1]
    # Hosts may end hours apart, as some may have been stopped, and a collective waits for minutes only.
    wait_for_hosts("features")
    return _gathered(done[1])


def _own_batches(count: int, batch: int, host: int, hosts: int) -> list[range]:
    # The batches of one host. Batches are dealt like the shards of `train.embed`.
    batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    return batches[host::hosts]


def _compute_all(folder, plan, images, outputs, compute, batch, own, progress) -> None:
    blocks = folder / f"blocks-{batch}"
    total = sum(len(rows) for rows in own)
    write_json(folder / "plan.json", plan)
    waiting: Future | None = None
    with stop_signals(alone=True) as stop, ThreadPoolExecutor(1) as pool:
        missing = [rows for rows in own if _block(blocks, rows, outputs) is None]
        checked = [rows for rows in own if rows not in missing][:SAMPLE] if images.ahead else []
        if any(
            _digest(images.load(rows[:1])[0]) != _block(blocks, rows, outputs)[DIGEST] for rows in checked
        ):
            log.warning("the images of %s have changed: all are computed again", images.name)
            shutil.rmtree(blocks)
            missing = list(own)
        seen = total - sum(len(rows) for rows in missing)
        for i, rows in enumerate(missing):
            loaded = images.load(rows) if waiting is None else waiting.result()
            following = missing[i + 1] if i + 1 < len(missing) else None
            waiting = pool.submit(images.load, following) if images.ahead and following is not None else None
            file = io.BytesIO()
            np.savez(file, **compute(rows, loaded))
            write_whole(_block_path(blocks, rows), file.getvalue())
            seen += len(rows)
            if progress is not None:
                progress(seen, total)
            if stop:
                break
    leave_if_stopped(stop)
    _join(folder, blocks, own, outputs)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    # Two processes that want the same features compute them once: the second one waits. The system drops the
    # lock of a process that is killed.
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process computes these features in %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _block_path(blocks: Path, rows: range) -> Path:
    return blocks / f"{rows.start:09d}.npz"


def _block(blocks: Path, rows: range, outputs: Mapping[str, int]) -> dict[str, np.ndarray] | None:
    # What a batch's file holds; None if it is missing or damaged. Reading checks the archive's checksums.
    try:
        with np.load(_block_path(blocks, rows), allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*outputs, ROWS, DIGEST, STORED, BAD)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    count = len(arrays[ROWS])
    return arrays if all(arrays[n].shape == (count, width) for n, width in outputs.items()) else None


def _join(folder: Path, blocks: Path, own: Sequence[range], outputs: Mapping[str, int]) -> None:
    # Writes one array per output. `done.json` comes last; before it, the batches are still there.
    # Each value is read once: an array of an archive is read when it is asked for.
    kept, bad, stored, digests = [], 0, set(), {}
    for rows in own:
        with np.load(_block_path(blocks, rows), allow_pickle=False) as block:
            kept.append(block[ROWS])
            bad += int(block[BAD])
            stored |= set(json.loads(str(block[STORED])))
            digests[str(rows.start)] = str(block[DIGEST])
    numbers = np.concatenate([np.zeros(0, np.int64), *kept])
    for name, width in outputs.items():
        partial, first, shape = folder / f".{name}.partial.npy", 0, (len(numbers), width)
        if len(numbers):
            array = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            for rows in own:
                with np.load(_block_path(blocks, rows), allow_pickle=False) as block:
                    values = block[name]
                array[first : first + len(values)] = values
                first += len(values)
            array.flush()
            del array
        else:  # an empty file cannot be mapped
            np.save(partial, np.zeros(shape, np.float32))
        partial.replace(folder / f"{name}.npy")
    file = io.BytesIO()
    np.save(file, numbers)
    write_whole(folder / "rows.npy", file.getvalue())
    write_json(folder / "done.json", {"bad": bad, "stored": sorted(stored), "digests": digests})
    for each in folder.glob("blocks-*"):  # also those of a stopped call with other batches
        shutil.rmtree(each, ignore_errors=True)


def _finished(folder: Path, outputs: Mapping[str, int]) -> tuple[dict, Features] | None:
    # The content of a folder whose work is done; None if it is not, or if it is damaged.
    try:
        about = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        rows = np.load(folder / "rows.npy")
        arrays = {name: _mapped(folder / f"{name}.npy", len(rows), width) for name, width in outputs.items()}
        return about, Features(arrays, rows, about["bad"], tuple(about["stored"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _mapped(path: Path, count: int, width: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r") if count else np.load(path)
    if array.shape != (count, width):
        raise ValueError(f"{path} has the shape {array.shape}")
    return array


def _same_images(done: tuple[dict, Features], images: ImageSet) -> bool:
    # Reads a few images again. What a bundle draws is decided by its weights, which the folder's name holds.
    if not images.ahead:
        return True
    digests = done[0]["digests"]
    some = list(digests)[:: max(1, len(digests) // SAMPLE)][:SAMPLE]
    same = all(_digest(images.load([int(first)])[0]) == digests[first] for first in some)
    if not same:
        log.warning("the images of %s have changed: all are computed again", images.name)
    return same


# ------------------------------------------------------------------------------------------ several hosts
def _gathered(own: Features) -> Features:
    # The features of all hosts, in the order of the images. Hosts may have different numbers of images, and a
    # collective wants equal shapes, so each pads to the largest.
    from jax.experimental import multihost_utils

    gather = lambda array: np.asarray(multihost_utils.process_allgather(array))
    counts = gather(np.asarray([len(own.rows), own.bad]))
    most = int(counts[:, 0].max())

    def joined(array: np.ndarray) -> np.ndarray:
        padded = np.zeros((most, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        return np.concatenate([rows[:n] for rows, n in zip(gather(padded), counts[:, 0])])

    rows = joined(np.asarray(own.rows, np.int32))
    order = np.argsort(rows)
    formats = gather(np.frombuffer(json.dumps(list(own.stored)).encode().ljust(256), np.uint8))
    stored = {name for line in formats for name in json.loads(line.tobytes())}
    outputs = {name: joined(values)[order] for name, values in own.outputs.items()}
    return Features(outputs, rows[order].astype(np.int64), int(counts[:, 1].sum()), tuple(sorted(stored)))
