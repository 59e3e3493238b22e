"""Compare the input pipelines of unclip_jax and webdataset (with torch's DataLoader) in images per second.

    pip install webdataset "torch==2.13.0" && python benchmarks/input.py --rounds 5

Both pipelines decode, crop and tokenise the same tar shards. They read JPEGs of 512 pixels and return the
examples that CLIP trains on: a random square crop of at least 0.9 of the shorter side, resized to 224 pixels
with a bicubic filter, as float32 in [-1, 1], and 77 tokens.

Both call the same functions to crop, to resize (with PIL) and to tokenise. They differ in reading, decoding,
order, workers and batching. unclip_jax reads indexed records in random order, in threads, with its backend
`tf` or `numpy`. webdataset reads a stream through a shuffle buffer, in processes.

Each library runs in a process of its own, in turn. The measurement skips the first batches, because the
workers start during them.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 224  # side of the crop after resizing, in pixels
CROP = 0.9  # smallest side of the crop, relative to the shorter side of the image
SHARDS = 8
SKIPPED = 4  # batches before the measurement starts
PEERS = ("webdataset", "unclip_jax tf", "unclip_jax numpy")


def make(folder: Path, count: int, side: int) -> None:
    """Writes tar shards of JPEGs and captions.

    The JPEGs have quality 90 and the spectrum of photographs. The captions have ten words.
    """
    rng = np.random.default_rng(0)
    words = "red green fox house river bird stone cloud with under near old small large on a the of".split()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, count, SHARDS):
                layers = [
                    np.kron(rng.normal(size=(side // k, side // k, 3)), np.ones((k, k, 1))) * k
                    for k in (4, 16, 64)
                ]
                picture = np.uint8(np.clip(128 + sum(layers), 0, 255))
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "JPEG", quality=90)
                for suffix, data in (
                    ("jpg", file.getvalue()),
                    ("txt", " ".join(rng.choice(words, 10)).encode()),
                ):
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crops a random square and resizes it: uint8 (H, W, 3) -> float32 (224, 224, 3)."""
    from unclip_jax.data import ops

    side = int(round(min(image.shape[:2]) * rng.uniform(CROP, 1.0)))
    return ops.to_float(ops.resize(ops.random_crop(image, side, rng), SIZE))


def ours(folder: Path, batch_size: int, workers: int, backend: str):
    """Returns an endless iterator of unclip_jax's batches."""
    from unclip_jax.data.examples import clip_example
    from unclip_jax.data.pipeline import Workers, train_batches
    from unclip_jax.data.sources.webdataset import webdataset_source
    from unclip_jax.data.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer()
    example = functools.partial(clip_example, tokenizer=tokenizer, size=SIZE, crop_scale=CROP)
    source = webdataset_source(str(folder / "*.tar"), cache_dir=str(folder))
    return train_batches(source, example, batch_size=batch_size, seed=0, workers=Workers(backend, workers))


class Example:
    """Makes a training example from a record, in a worker of webdataset's pipeline."""

    def __init__(self):
        self.tokenizer, self.rng = None, np.random.default_rng()

    def __call__(self, row):
        from unclip_jax.data.tokenizer import ClipTokenizer

        self.tokenizer = self.tokenizer or ClipTokenizer()
        picture, caption = row
        tokens, mask = self.tokenizer([caption])
        return crop(np.asarray(picture), self.rng), tokens[0], mask[0]


def theirs(folder: Path, batch_size: int, workers: int):
    """Returns an endless iterator of webdataset's batches.

    Each worker follows webdataset's usual order: it decodes, maps, then batches.
    """
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    data = webdataset.WebDataset(
        shards, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node
    )
    data = data.shuffle(256).decode("pilrgb").to_tuple("jpg", "txt").map(Example()).batched(batch_size)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=2))


def worker(args: argparse.Namespace) -> None:
    """Times the batches of one library and prints its images per second as JSON."""
    if args.worker == "webdataset":
        batches = theirs(args.folder, args.batch, args.workers)
    else:
        batches = ours(args.folder, args.batch, args.workers, args.worker.split()[1])
    for _ in range(SKIPPED):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < args.seconds:
        batch = next(batches)
        count += 1
    seconds = time.perf_counter() - started
    images = batch["clip_image"] if isinstance(batch, dict) else batch[0]
    assert tuple(images.shape) == (args.batch, SIZE, SIZE, 3)
    print(json.dumps(args.batch * count / seconds), flush=True)
    os._exit(0)  # exits without waiting for the workers


def main() -> None:
    """Runs the libraries in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=int, default=1024, metavar="N", help="number of images in the shards (1024)"
    )
    parser.add_argument(
        "--side",
        type=int,
        default=512,
        metavar="N",
        help="side of an image in pixels, a multiple of 64 (512)",
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads of unclip_jax, or processes of webdataset (the number of cores)",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="length of each measurement in seconds (10)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), args.images, args.side)
        rates: dict[str, list[float]] = {peer: [] for peer in PEERS}
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        for i in range(args.rounds):
            for peer in PEERS:
                command = [sys.executable, __file__, "--worker", peer, "--folder", scratch]
                for name in ("batch", "workers", "seconds"):
                    command += [f"--{name}", str(getattr(args, name))]
                completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                rates[peer].append(json.loads(completed.stdout.splitlines()[-1]))
                print(f"round {i + 1}  {peer:18} {rates[peer][-1]:8.1f} images/s", flush=True)
    cores = os.cpu_count()
    print(
        f"\nJPEG {args.side} px -> {SIZE} px, batches of {args.batch}, {args.workers} workers, "
        f"{cores} cores; medians of {args.rounds} rounds"
    )
    for peer in PEERS:
        ratios = [rate / baseline for rate, baseline in zip(rates[peer], rates["webdataset"])]
        print(
            f"{peer:18} {np.median(rates[peer]) / cores:8.1f} images/s a core   "
            f"{np.median(ratios):.2f} times webdataset's rate ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
