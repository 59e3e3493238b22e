"""What turns images into codes in DALLE-pytorch: its own discrete VAE, and the VQGAN of taming-transformers.

    vae*.pt      the discrete VAE that its training wrote: `hparams` and `weights`
    dalle*.pt    a whole DALL-E; the discrete VAE or the VQGAN in it is read
    vqgan*.ckpt  a VQGAN as taming-transformers published it, with the networks of its losses beside it

The widths are those of the tensors. Whether the discrete VAE saw pixels in [0, 1] or in [-1, 1] changed with
the library's versions, and files say it only where `normalization` is among their settings. For others a JSON
file of the same name beside the weights says it.

Not read: the transformer of a DALL-E, whose positions, token shifts and layer scales ours does not have; a
VQGAN with a Gumbel quantiser. Files are pickles, which are read as inert values (`torch_file`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, shapes_of
from unclip_jax.checkpoint.files import Place, read_json
from unclip_jax.checkpoint.providers.autoencoder import compvis_rules
from unclip_jax.checkpoint.torch_file import TorchTensors, open_torch
from unclip_jax.errors import InputError
from unclip_jax.models.kinds import KINDS
from unclip_jax.typed import shown

log = logging.getLogger(__name__)
NAME, VQGAN = "dvae", "autoencoder"  # a VQGAN is both: the coder of a DALL-E, and of latent diffusion
FILES = ("vae*.pt", "dalle*.pt", "vqgan*.ckpt")
# Where the weights may stand in a file, the innermost first, and a tensor that shows them there.
PLACES = {
    "vqgan": (("weights.vae.model.", "state_dict.", ""), "quantize.embedding.weight"),
    "gumbel": (("weights.vae.model.", "state_dict.", ""), "quantize.proj.weight"),
    "dvae": (("weights.vae.", "weights.", ""), "codebook.weight"),
    "openai": (("weights.vae.",), "enc.blocks.input.w"),
}
# The class beside whose name the files of taming-transformers keep how training went.
LIGHTNING = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
GROUPS = 32  # of the VQGAN's norms, in its code
MOST_LEVELS = 8


# ------------------------------------------------------------------------------------------- the discrete VAE
def dvae_rules(levels: int, code_blocks: int) -> tuple[Rule, ...]:
    """Rules of the names of the discrete VAE, whose halves are sequences with numbered places."""

    def blocks(way: str, first: int) -> list[Rule]:
        return [
            rule
            for i in range(code_blocks)
            for n, place in enumerate((0, 2, 4), 1)
            for rule in linear(rf"{way}\.{first + i}\.net\.{place}", f"{way}/block_{i}/conv{n}", "conv")
        ]

    begins = code_blocks + 1 if code_blocks else 0  # of the transposed convolutions
    found = [Rule(r"codebook\.weight", "codebook"), *blocks("encoder", levels), *blocks("decoder", 1)]
    for i in range(levels):
        found += linear(rf"encoder\.{i}\.0", f"encoder/pool_{i}", "conv")
        found += linear(rf"decoder\.{begins + i}\.0", f"decoder/expand_{i}", "transposed_conv")
    if code_blocks:
        found += linear(r"decoder\.0", "decoder/conv_in", "conv")
    found += linear(rf"encoder\.{levels + code_blocks}", "encoder/conv_out", "conv")
    found += linear(rf"decoder\.{begins + levels}", "decoder/conv_out", "conv")
    return tuple(found)


def _unit_range(settings: Mapping[str, Any], file: Path) -> bool:
    # Whether the network saw pixels in [0, 1], by the library's setting `normalization`.
    beside = file.with_suffix(".json")
    told = read_json(beside) if beside.is_file() else settings
    if "normalization" not in told:
        raise InputError(
            f"{file} does not say which pixels its network saw: write into {beside.name} beside it "
            '{"normalization": null} for [0, 1], or {"normalization": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]} '
            "for [-1, 1]"
        )
    given = told["normalization"]
    if given is None:
        return True
    pair = isinstance(given, (list, tuple)) and len(given) == 2
    if not pair or any(not isinstance(half, (list, tuple)) or set(half[:3]) != {0.5} for half in given):
        raise InputError(
            f"{file}: pixels are read in [0, 1] (normalization null) or in [-1, 1] (all means and deviations "
            f"0.5), not with the normalization {shown(given)}"
        )
    return False


def _read_dvae(weights: TorchTensors, settings: Mapping[str, Any], file: Path, place: Place) -> Part:
    first = _shape(weights, "encoder.0.0.weight", 4, file)
    codes, embed_dim = _shape(weights, "codebook.weight", 2, file)
    count = lambda pattern: sum(bool(re.fullmatch(pattern, name)) for name in weights)
    levels, code_blocks = count(r"encoder\.\d+\.0\.weight"), count(r"encoder\.\d+\.net\.0\.weight")
    if levels > MOST_LEVELS or code_blocks > 64:
        raise InputError(f"{file} has {levels} levels and {code_blocks} blocks; at most {MOST_LEVELS} and 64")
    model = {
        "channels": first[0], "levels": levels, "code_blocks": code_blocks, "codes": codes,
        "embed_dim": embed_dim, "image_channels": first[1], "unit_range": _unit_range(settings, file),
    }  # fmt: skip
    config = {"kind": "dvae_strided", "model": model}
    return _converted(weights, dvae_rules(levels, code_blocks), config, f"{file}: the discrete VAE", place)


# ------------------------------------------------------------------------------------------- the VQGAN
def _read_vqgan(weights: TorchTensors, file: Path, place: Place) -> Part:
    channels, image_channels = _shape(weights, "encoder.conv_in.weight", 4, file)[:2]
    codes, latent_channels = _shape(weights, "quantize.embedding.weight", 2, file)
    found = [re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name) for name in weights]
    blocks = [(int(match[1]), int(match[2])) for match in found if match]
    levels = 1 + max((level for level, _ in blocks), default=0)
    if levels > MOST_LEVELS:
        raise InputError(f"{file} has {levels} levels; at most {MOST_LEVELS} are read")
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    widths = [_shape(weights, name, 4, file)[0] for name in first]
    if any(width % channels or width % GROUPS for width in (channels, *widths)):
        raise InputError(
            f"{file}: the widths {widths} must be multiples of the first, {channels}, and of {GROUPS}"
        )
    model = {
        "latent_channels": latent_channels,
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "res_blocks": 1 + max(block for _, block in blocks),
        "attention_levels": [i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in weights],
        "middle_attention": "encoder.mid.attn_1.norm.weight" in weights,
        "image_channels": image_channels,
        "groups": GROUPS,
        "codes": codes,
    }
    config = {"kind": "vq_autoencoder", "model": model, "scale_factor": 1.0}
    left = sum(name.startswith("loss.") for name in weights)
    if left:
        log.info("%s: %d tensors of the networks of its losses are not read", file, left)
    rules = (Rule(r"loss\..*", ()), *compvis_rules())
    return _converted(weights, rules, config, f"{file}: the VQGAN", place)


# ------------------------------------------------------------------------------------------- the files
def _shape(weights: TorchTensors, name: str, axes: int, file: Path) -> tuple[int, ...]:
    found = weights.shape(name) if name in weights else ()
    if len(found) != axes:
        raise InputError(f"{file} is no network of DALLE-pytorch: it has no {name} of {axes} axes")
    return found


def _converted(weights: TorchTensors, rules: Any, config: dict, name: str, place: Place) -> Part:
    module = KINDS[config["kind"]].module(**config["model"])
    shapes = shapes_of(module.init, array(1, module.factor, module.factor, module.image_channels))
    return Part(config, convert(weights, rules, shapes, name, place))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if any(path.match(pattern) for pattern in FILES) else []
    return sorted({file for pattern in FILES for file in path.glob(pattern)})


def recognises(path: Path) -> bool:
    """Whether a path is a file under one of the known names, or a folder that holds one."""
    return bool(_files(path))


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the weights as a bundle of the one part `dvae`; see `providers.Provider`. Where the part
    `autoencoder` is asked for, a VQGAN is given under that name."""
    files = _files(path)
    if len(files) > 1:
        raise InputError(f"{path} holds {', '.join(file.name for file in files)}: name the one to read")
    (file,) = files
    weights = open_torch(file, inert=LIGHTNING)
    kind, prefix = next(
        (
            (kind, prefix)
            for kind, (prefixes, shows) in PLACES.items()
            for prefix in prefixes
            if prefix + shows in weights
        ),
        (None, ""),
    )
    if kind == "gumbel":
        raise InputError(f"{file} holds a VQGAN with a Gumbel quantiser (quantize.proj), which is not read")
    if kind == "openai":
        raise InputError(
            f"{file} holds OpenAI's discrete VAE: give the folder of its encoder.pkl and decoder.pkl"
        )
    if kind is None:
        raise InputError(f"{file} holds neither a discrete VAE of DALLE-pytorch nor a VQGAN")
    names = (NAME, VQGAN) if kind == "vqgan" else (NAME,)
    if only not in (None, *names):
        raise no_part(path, only, names)
    if prefix.startswith("weights.vae."):
        left = sum(name.startswith("weights.") and not name.startswith("weights.vae.") for name in weights)
        log.warning("%s: the %d tensors of its transformer are not read, only its %s", file, left, kind)
    inner = weights.under(prefix)
    if kind == "vqgan":
        part = _read_vqgan(inner, file, place)
    else:
        value = weights.value if isinstance(weights.value, Mapping) else {}
        settings = value.get("vae_params" if prefix == "weights.vae." else "hparams")
        part = _read_dvae(inner, settings if isinstance(settings, Mapping) else {}, file, place)
    return Bundle({only or NAME: part}, provenance={"source": str(path)}, path=str(path))
