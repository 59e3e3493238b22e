"""The two-level VQ-VAE-2 of vq-vae-2-pytorch, from a state dictionary of torch's (`vqvae_560.pt`) or the same
tensors as safetensors.

Its codebooks are stored as (Z, K), and are averages: the counts and sums behind them lie in the file, too,
and are not read. Names may begin with `module.`, as distributed runs save them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, shapes_of
from unclip_jax.checkpoint.files import Place, open_file
from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.errors import InputError
from unclip_jax.models.vqvae import VQVAE

NAME = "vqvae"
FILES = ("vqvae*.safetensors", "vqvae*.pt")


def rules(res_blocks: int) -> tuple[Rule, ...]:
    """Rules of the names, for encoders and decoders of so many residual blocks."""
    found: list[Rule] = []

    def blocks(theirs: str, ours: str, first: int) -> None:
        for i in range(res_blocks):
            at, to = rf"{theirs}\.blocks\.{first + i}\.conv", f"{ours}/block_{i}"
            found.extend(
                [*linear(rf"{at}\.1", f"{to}/conv1", "conv"), *linear(rf"{at}\.3", f"{to}/conv2", "conv")]
            )

    def layer(theirs: str, ours: str, transform: str) -> None:
        found.extend(linear(theirs, ours, transform))

    # Positions in their sequences count the activations, too.
    for theirs, ours, halvings in (("enc_b", "encoder_0", 2), ("enc_t", "encoder_1", 1)):
        for i in range(halvings):
            layer(rf"{theirs}\.blocks\.{2 * i}", f"{ours}/pool_{i}", "conv")
        layer(rf"{theirs}\.blocks\.{2 * halvings}", f"{ours}/conv", "conv")
        blocks(theirs, ours, 2 * halvings + 1)
    for theirs, ours, halvings in (("dec", "decoder_0", 2), ("dec_t", "decoder_1", 1)):
        layer(rf"{theirs}\.blocks\.0", f"{ours}/conv", "conv")
        blocks(theirs, ours, 1)
        for i in range(halvings):
            at = res_blocks + 2 + 2 * (halvings - 1 - i)
            layer(rf"{theirs}\.blocks\.{at}", f"{ours}/expand_{i}", "transposed_conv")
    layer("upsample_t", "expand_1_0", "transposed_conv")
    for theirs, level in (("b", 0), ("t", 1)):
        layer(f"quantize_conv_{theirs}", f"quant_conv_{level}", "pointwise")
        found.append(Rule(rf"quantize_{theirs}\.embed", f"codebook_{level}", "linear"))
        found.append(Rule(rf"quantize_{theirs}\.(?:cluster_size|embed_avg)", ()))
    return tuple(Rule(rf"(?:module\.)?{rule.pattern}", rule.target, rule.transform) for rule in found)


def _file(path: Path) -> Path | None:
    # The file of the weights at a path: the file itself, or the one in a folder; None without one.
    if path.is_file():
        return path if any(path.match(pattern) for pattern in FILES) else None
    return next((file for pattern in FILES for file in sorted(path.glob(pattern))), None)


def recognises(path: Path) -> bool:
    """Whether a path is a file of a VQ-VAE under its known name, or a folder that holds one."""
    return _file(path) is not None


def _model(weights: Any, file: Path) -> dict:
    # The module's keyword arguments, from the shapes of the tensors.
    shapes = {name.removeprefix("module."): weights.shape(name) for name in weights}

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(name, ())
        if len(found) != axes:
            raise InputError(f"{file} is no VQ-VAE-2 of two levels: it has no {name} of {axes} axes")
        return found

    blocks = {
        int(m[1]) for name in shapes if (m := re.fullmatch(r"dec\.blocks\.(\d+)\.conv\.1\.weight", name))
    }
    residual = shape("dec.blocks.1.conv.1.weight", 4)[0] if blocks else 1
    embed_dim, codes = shape("quantize_b.embed", 2)
    return {
        "channels": shape("dec.blocks.0.weight", 4)[0],
        "residual_channels": residual,
        "res_blocks": len(blocks),
        "embed_dim": embed_dim,
        "codes": codes,
        "levels": 2,
        "halvings": 2,
        "image_channels": shape("enc_b.blocks.0.weight", 4)[1],
    }


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the weights as a bundle of the one part `vqvae`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    file = _file(path)
    weights = open_torch(file) if file.suffix == ".pt" else open_file(file)
    model = _model(weights, file)
    module = VQVAE(**model)
    shapes = shapes_of(module.init, array(1, module.factor, module.factor, model["image_channels"]))
    params = convert(weights, rules(model["res_blocks"]), shapes, f"{file}: the VQ-VAE", place)
    part = Part({"kind": "vqvae", "model": model}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))
