"""Compare features and statistics for FID with torch-fidelity's, and measure what the figures depend on.

    python benchmarks/evaluation.py speed --images 128 --rounds 3
    python benchmarks/evaluation.py pitfalls --rows 600 --pairs 100
    python benchmarks/evaluation.py prdc --rows 20000

`speed` needs torch and torch-fidelity: launch/test installs them. Both libraries read the same folder of PNG
files with the same weights, and compute the mean and the covariance of Inception's pooled features. Each
library runs in a process of its own, in turn, so that neither holds memory or threads while the benchmark
times the other. The benchmark prints:

- first: the seconds until the statistics of the first images, which contain loading and compilation;
- images/s: of a whole pass over the folder after that, decoding, features and statistics included;
- cpu s/image: processor seconds of that pass, of all threads and loader processes; it hardly depends on
  what else the machine does;
- the ratios of the libraries, from each pair of processes: median and range;
- the distance between their statistics, and a distance that both give for the folder's two halves.

`pitfalls` needs the public weights: `unclip fetch inception`. It draws rows of the embedded emoji and prints:

- how far the same images move when they are stored or resized in another way;
- what two random halves of one set give as the number of images grows: FID, KID, and FID at infinity.

`prdc` measures precision, recall, density and coverage between two sets of made-up features as wide as
Inception's: the time, and the peak of memory above that before the call. The features lie on disk, as those
of `unclip evaluate` do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64  # torch-fidelity's default
FIRST = 16  # images of the first pass
WEIGHTS = "pt_inception-2015-12-05-random.pth"
PEERS = ("torch-fidelity", "unclip_jax")


# ------------------------------------------------------------------------------------------ speed
def make(folder: Path, images: int, side: int) -> None:
    """Writes random weights, and a folder of PNG files: emoji of the embedded data, enlarged to `side`."""
    import torch

    from tests.checkpoint.peers import inception_state

    (folder / "weights").mkdir(parents=True)
    (folder / "images").mkdir()
    torch.save(inception_state(), folder / "weights" / WEIGHTS)
    for i, image in enumerate(emoji(images)):
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i:05d}.png")


def emoji(rows: int) -> list[np.ndarray]:
    """The images of `rows` random rows of the embedded data, uint8 (64, 64, 3)."""
    from unclip_jax.data import ops
    from unclip_jax.data.sources import make_source

    source = make_source({"name": "emoji", "split": "train"})
    numbers = np.random.default_rng(0).permutation(len(source))[:rows]
    return [ops.decode_image(source.read(int(i)).image) for i in numbers]


def our_pass(folder: Path) -> Callable[[Path, Path], np.ndarray]:
    """Returns a function: a folder of images, a working folder -> features, by the path of the command."""
    from unclip_jax.evaluate.sets import open_set
    from unclip_jax.evaluate.streaming import image_features
    from unclip_jax.run.features import open_network

    network = open_network("inception", folder / "weights", outputs=["pool"])

    def whole(images: Path, work: Path) -> np.ndarray:
        found = open_set(str(images), lambda texts: {}).images
        return image_features(network, found, work=work).outputs["pool"]

    return whole


def their_pass(folder: Path) -> Callable[[Path, Path], np.ndarray]:
    """The same by torch-fidelity's loader of folders and its network."""
    from tests.fidelity import torch_fidelity

    torch_fidelity("metrics")
    utils, datasets = torch_fidelity("utils"), torch_fidelity("datasets")
    extractor = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=folder / "weights" / WEIGHTS
    )

    def whole(images: Path, work: Path) -> np.ndarray:
        files = utils.glob_samples_paths(str(images), False, "png", verbose=False)
        data = datasets.ImagesPathDataset(files)
        return utils.get_featuresdict_from_dataset(data, extractor, BATCH, False, False, False)["2048"]

    return whole


def processor_seconds() -> float:
    """Seconds that all threads of this process and of its finished children have computed."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def worker(args: argparse.Namespace) -> None:
    """Times one library, prints the figures as JSON, and writes its features."""
    ours, folder = args.worker == "unclip_jax", args.folder
    started = time.perf_counter()
    whole = our_pass(folder) if ours else their_pass(folder)
    if ours:
        from unclip_jax.metrics.moments import moments as statistics
    else:
        from tests.fidelity import torch_fidelity

        statistics = torch_fidelity("metric_fid").fid_features_to_statistics
    with tempfile.TemporaryDirectory() as work:
        statistics(whole(folder / "first", Path(work) / "first"))
        figures = {"first": time.perf_counter() - started}
        started, used = time.perf_counter(), processor_seconds()
        features = whole(folder / "images", Path(work) / "images")
        statistics(features)
        figures["images/s"] = args.images / (time.perf_counter() - started)
        figures["cpu s/image"] = (processor_seconds() - used) / args.images
        np.save(folder / f"{args.worker}.npy", np.asarray(features))
    print(json.dumps(figures))


def speed(args: argparse.Namespace) -> None:
    """Runs both libraries in turn and prints their figures."""
    from tests.fidelity import torch_fidelity
    from unclip_jax.metrics.fid import frechet_distance

    folder = args.folder
    make(folder, args.images, args.side)
    (folder / "first").mkdir()
    for file in sorted((folder / "images").iterdir())[:FIRST]:
        os.link(file, folder / "first" / file.name)
    rows: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    for i in range(args.rounds):
        for peer in PEERS:
            command = [sys.executable, __file__, "speed", "--worker", peer, "--folder", str(folder)]
            command += ["--images", str(args.images)]
            env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            rows[peer].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"round {i + 1}  {peer:15}" + "".join(f"  {k} {v:.2f}" for k, v in rows[peer][-1].items()),
                flush=True,
            )
    print(f"\n{args.images} images of {args.side} pixels, medians of {args.rounds} rounds")
    for peer in PEERS:
        medians = {k: np.median([row[k] for row in rows[peer]]) for k in rows[peer][0]}
        print(f"{peer:15}" + "".join(f"  {k} {v:7.2f}" for k, v in medians.items()))
    for name in ("images/s", "cpu s/image"):
        ratios = [ours[name] / theirs[name] for theirs, ours in zip(*(rows[peer] for peer in PEERS))]
        print(
            f"{name}, unclip_jax / torch-fidelity: {np.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    theirs, ours = (np.load(folder / f"{peer}.npy") for peer in PEERS)
    print(
        f"features differ by at most {np.abs(theirs - ours).max() / np.abs(theirs).max():.1e} of the largest"
    )
    metric, half = torch_fidelity("metric_fid"), args.images // 2
    import torch

    stats = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (theirs[:half], theirs[half:])]
    value = metric.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    print(f"FID of the folder's halves: {value:.6f} and {frechet_distance(ours[:half], ours[half:]):.6f}")


# ------------------------------------------------------------------------------------------ pitfalls
def pitfalls(args: argparse.Namespace) -> None:
    """Prints what storage, resizing and the number of images do to the figures."""
    from unclip_jax.data import ops
    from unclip_jax.evaluate.streaming import Preparation
    from unclip_jax.metrics.fid import frechet_distance, frechet_distance_at_infinity
    from unclip_jax.metrics.kid import kernel_distance
    from unclip_jax.run.features import open_network

    network = open_network("inception", args.weights, outputs=["pool"])
    images = emoji(2 * args.rows)

    def features(name: str, pictures: list[np.ndarray]) -> np.ndarray:
        report = lambda done, total: print(f"\r{name}: {done} of {total}", end="", file=sys.stderr)
        return network(pictures, report)["pool"]

    def enlarged(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC))

    both, some = features("png", images), images[: args.pairs]
    made = {
        "png": both[: args.pairs],
        "jpeg 95": features("jpeg 95", [Preparation(jpeg=95)(image) for image in some]),
        "jpeg 75": features("jpeg 75", [Preparation(jpeg=75)(image) for image in some]),
        "bicubic": features("bicubic", [enlarged(image) for image in some]),
        "half, antialiased": features("half, antialiased", [ops.resize(image, 32) for image in some]),
        "half, every second pixel": features("half, every second pixel", [image[::2, ::2] for image in some]),
    }
    print(f"\nFID between two treatments of the same {args.pairs} images")
    for a, b in (
        ("png", "jpeg 95"),
        ("png", "jpeg 75"),
        ("png", "bicubic"),
        ("png", "half, antialiased"),
        ("half, antialiased", "half, every second pixel"),
    ):
        print(f"  {a} | {b}: {frechet_distance(made[a], made[b]):.2f}", flush=True)

    reference, samples = both[: args.rows], both[args.rows :]
    print(f"\ntwo random halves of one set, {args.rows} images in the reference")
    for n in (args.rows // 8, args.rows // 4, args.rows // 2, args.rows):
        fid, kid = (f(samples[:n], reference) for f in (frechet_distance, kernel_distance))
        print(f"  {n:6} samples: FID {fid:.2f}, KID {1000 * kid:.3f} / 1000")
    limit = frechet_distance_at_infinity(samples, reference, smallest=args.rows // 4)
    print(f"  FID at infinity: {limit.distance:.2f}, standard error {limit.error:.2f}")


# ------------------------------------------------------------------------------------------ prdc
def made_up(file: Path, rows: int, seed: int) -> np.ndarray:
    """Features (rows, 2048) float32 in a file, mapped: like Inception's, at least 0 and of few dimensions."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(7).normal(size=(32, 2048))
    array = np.lib.format.open_memmap(file, "w+", np.float32, (rows, 2048))
    for first in range(0, rows, 1024):
        block = rng.normal(size=(min(1024, rows - first), 32)) @ directions
        array[first : first + 1024] = np.maximum(block + rng.normal(size=block.shape), 0)
    array.flush()
    return np.load(file, mmap_mode="r")


def resident() -> float:
    """GiB of this process's own memory now, without the pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 2**20


def many(args: argparse.Namespace) -> None:
    """Prints the time and the memory of precision, recall, density and coverage."""
    from unclip_jax.metrics.precision_recall import prdc

    with tempfile.TemporaryDirectory() as scratch:
        sets = [made_up(Path(scratch) / f"{i}.npy", args.rows, i) for i in range(2)]
        peak, done = [resident()], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                peak.append(resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started, used = time.perf_counter(), processor_seconds()
        found = prdc(*sets)
        seconds, cpu = time.perf_counter() - started, processor_seconds() - used
        done.set()
        watcher.join()
    print("  ".join(f"{name} {value:.4f}" for name, value in found._asdict().items()))
    print(
        f"{args.rows} x {args.rows} rows of 2048: {seconds:.0f} s, {cpu:.0f} processor seconds, "
        f"{max(peak) - peak[0]:.2f} GiB, of which the features take {2 * args.rows * 2048 * 4 / 2**30:.2f}"
    )


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    fast = kinds.add_parser("speed", help="against torch-fidelity")
    fast.add_argument("--images", type=int, default=128, metavar="N", help="PNG files (128)")
    fast.add_argument("--side", type=int, default=256, metavar="PIXELS", help="of the PNG files (256)")
    fast.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per library (3)")
    fast.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    fast.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    odd = kinds.add_parser("pitfalls", help="what the figures depend on")
    odd.add_argument("--rows", type=int, default=600, metavar="N", help="images of each half (600)")
    odd.add_argument("--pairs", type=int, default=100, metavar="N", help="images treated twice (100)")
    odd.add_argument("--weights", help="the public Inception (where `unclip fetch inception` put it)")
    large = kinds.add_parser("prdc", help="time and memory of precision, recall, density and coverage")
    large.add_argument("--rows", type=int, default=20_000, metavar="N", help="rows of each set (20000)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.kind == "pitfalls":
        pitfalls(args)
    elif args.kind == "prdc":
        many(args)
    elif args.worker:
        worker(args)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            args.folder = Path(scratch) / "evaluation"
            speed(args)


if __name__ == "__main__":
    main()
