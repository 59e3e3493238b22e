"""DALL-E's published discrete VAE: `encoder.pkl` and `decoder.pkl` in one folder.

Each file is a whole pickled module, for which torch would need the package that defines it and run what the
pickle asks for. Here the pickle is read as inert values (`torch_file`): of the classes of that package and of
torch's own layers it takes parameters, and refuses everything else. So nothing has to be converted first, and
nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, shapes_of
from unclip_jax.checkpoint.files import Place
from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.errors import InputError
from unclip_jax.models.dvae import DVAE

NAME = "dvae"
FILES = {"encoder": "encoder.pkl", "decoder": "decoder.pkl"}
CLASSES = ("dall_e.", "torch.nn.modules.")
BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.res_path\.conv_1\.w")


def _layer(theirs: str, ours: str) -> list[Rule]:
    return [Rule(rf"{theirs}\.w", f"{ours}/kernel", "conv"), Rule(rf"{theirs}\.b", f"{ours}/bias")]


def rules(levels: int, level_blocks: int) -> tuple[Rule, ...]:
    """Rules of the names of the encoder or the decoder, with so many groups of so many blocks."""
    found = [*_layer(r"blocks\.input", "conv_in"), *_layer(r"blocks\.output\.conv", "conv_out")]
    for number in range(levels * level_blocks):
        group, block = number // level_blocks + 1, number % level_blocks + 1
        at = rf"blocks\.group_{group}\.block_{block}"
        found += _layer(rf"{at}\.id_path", f"block_{number}/skip")
        found += _layer(rf"{at}\.res_path\.conv_(\d)", rf"block_{number}/conv\1")
    return tuple(found)


def recognises(path: Path) -> bool:
    """Whether a folder holds the encoder or the decoder."""
    return path.is_dir() and any((path / name).is_file() for name in FILES.values())


def _model(weights: Mapping[str, Any], path: Path) -> dict:
    # The module's keyword arguments, from the shapes of the tensors.
    def shape(half: str, name: str) -> tuple[int, ...]:
        found = weights[half].shape(name) if name in weights[half] else ()
        if len(found) != 4:
            raise InputError(f"{path / FILES[half]} is no half of a discrete VAE: it has no {name} of 4 axes")
        return found

    blocks = [
        tuple(map(int, match.groups())) for name in weights["encoder"] if (match := BLOCK.fullmatch(name))
    ]
    first = shape("encoder", "blocks.input.w")
    return {
        "channels": first[0],
        "levels": max((group for group, _ in blocks), default=1),
        "level_blocks": max((block for _, block in blocks), default=1),
        "codes": shape("encoder", "blocks.output.conv.w")[0],
        "embed_dim": shape("decoder", "blocks.input.w")[0],
        "image_channels": first[1],
    }


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the folder as a bundle of the one part `dvae`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    weights = {half: open_torch(path / name, CLASSES) for half, name in FILES.items()}
    model = _model(weights, path)
    if model["levels"] > 8:
        raise InputError(f"{path / FILES['encoder']} has {model['levels']} groups; at most 8 are read")
    module = DVAE(**model)
    shapes = shapes_of(module.init, array(1, module.factor, module.factor, model["image_channels"]))
    names = rules(model["levels"], model["level_blocks"])
    params = {
        half: convert(weights[half], names, shapes[half], f"{path / name}: the {half}", place)
        for half, name in FILES.items()
    }
    part = Part({"kind": "dvae", "model": model}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))
