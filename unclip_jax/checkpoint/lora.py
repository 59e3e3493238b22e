"""LoRA files (Hu et al. 2021): merged into the weights of a bundle, and written for trained adapters.

A file holds for some of the network's matrices W (out, in) two small ones, and W becomes
W + scale * (alpha / r) * up @ down, where down is (r, in) and up is (out, r); without alpha, alpha = r. For
convolutions down has the kernel and up is 1x1.

Two ways to name them are read. peft and diffusers: `unet.<name>.lora_A.weight` (down), `.lora_B.weight` (up),
with `<name>` as in diffusers' networks, and `text_encoder.<name>`; likewise `decoder.<name>` and
`prior.<name>` for the networks of Karlo's topology. kohya: `lora_unet_<name>.lora_down.weight`,
`.lora_up.weight`, `.alpha`, with underscores for dots in `<name>`, and `lora_te_<name>`. Any other tensor
(LoHa, LoKr, DoRA) is refused by name. Files are written in peft's names: for diffusers' pipelines as above,
and for peft's own loader (`PeftModel.from_pretrained`) as a folder, whose tensors have the prefix
`base_model.model.` in place of the network's, with `adapter_config.json` beside them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.convert import TRANSFORMS, Rule, Transform, names_of
from unclip_jax.checkpoint.files import Weights, check_floats, finite, list_names, open_file
from unclip_jax.checkpoint.providers import clip, karlo, latent_names
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.errors import InputError

# What follows a layer's name -> which of its tensors it is.
ENDINGS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
}
PREFIXES = {"unet.": "latent", "lora_unet_": "latent", "text_encoder.": "clip", "lora_te_": "clip"}
PREFIXES |= {"decoder.": "decoder", "prior.": "prior_diffusion"}


class _Network(NamedTuple):
    # rules: of diffusers' names, from the network's keyword arguments. layers: regex of the paths of the
    # parameters that adapters are trained for: the matrices of its attention.
    rules: Callable[[Mapping[str, Any]], Sequence[Rule]]
    layers: str


_NETWORKS = {
    "latent": _Network(latent_names.diffusers_unet, r"(^|/)(self|cross)_attn/(query|key|value|out)/kernel$"),
    "decoder": _Network(
        lambda model: karlo.unet(len(model["unet"]["channel_mult"])),
        r"^unet/\w*attn(_\d+)?/(query|key|value|context_key|context_value|out)/kernel$",
    ),
    "prior_diffusion": _Network(
        lambda model: karlo.PRIOR, r"^transformer/block_\d+/attn/(query|key|value|out)/kernel$"
    ),
}


def merge_loras(bundle: Bundle, texts: Iterable[str]) -> Bundle:
    """`merge_lora` for each text FILE or FILE=SCALE, one after the other."""
    for text in texts:
        path, _, scale = text.rpartition("=")
        try:
            bundle = merge_lora(bundle, Path(path or text), float(scale) if path else 1.0)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            bundle = merge_lora(bundle, Path(text))  # what follows the sign is no number: it is a file's name
    return bundle


def merge_lora(bundle: Bundle, path: Path, scale: float = 1.0) -> Bundle:
    """The bundle with a LoRA file merged into the networks that it names.

    Args:
      bundle: on the host.
      path: a `.safetensors` file.
      scale: of the change; 0 changes nothing, and a negative number turns it round.

    Raises:
      FileNotFoundError: when the file is missing.
      ValueError: when it is no LoRA of these networks; the error names the tensors that do not fit.
    """
    if bundle.mesh is not None:
        raise InputError("a LoRA is merged into a bundle that is loaded without a mesh")
    if not np.isfinite(scale):
        raise InputError(f"the scale of a LoRA must be a finite number, got {scale}")
    weights = open_file(path)
    found = _layers(weights, path)
    parts, merged = dict(bundle.parts), {}
    for name, layers in found.items():
        if name not in parts:
            where = bundle.path or "the bundle"
            raise InputError(f"{path} changes the part {name!r}; {where} has {', '.join(parts)}")
        parts[name] = merged[name] = _merged(parts[name], name, layers, weights, scale, path)
    if not merged:
        raise InputError(f"{path} holds no LoRA")
    for name, part in parts.items():  # what was trained with a network before goes on with it as it is now
        changed = {role: merged[role].hash for role in part.config.get("frozen", {}) if role in merged}
        if changed:
            frozen = part.config["frozen"] | changed
            parts[name] = dataclasses.replace(part, config=part.config | {"frozen": frozen})
    files = [*bundle.provenance.get("lora", ()), {"file": path.name, "scale": float(scale)}]
    return dataclasses.replace(bundle, parts=parts, provenance=bundle.provenance | {"lora": files})


def _layers(weights: Weights, path: Path) -> dict[str, dict[str, dict[str, str]]]:
    # part -> layer's name with underscores -> "down", "up", "alpha" -> the tensor.
    found: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for tensor in weights:
        short = tensor.removeprefix("base_model.model.")
        prefix = next((one for one in PREFIXES if short.startswith(one)), None)
        ending = next((one for one in ENDINGS if short.endswith(f".{one}")), None)
        if prefix is None or ending is None:
            unknown.append(tensor)
            continue
        layer = short[len(prefix) : -len(ending) - 1].replace(".", "_")
        found.setdefault(PREFIXES[prefix], {}).setdefault(layer, {})[ENDINGS[ending]] = tensor
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} tensors are not those of a LoRA known here (peft's or kohya's names): "
            f"{list_names(unknown)}"
        )
    for part, layers in found.items():
        halves = [layer for layer, kinds in layers.items() if not {"down", "up"} <= kinds.keys()]
        if halves:
            raise InputError(
                f"{path}: layers of the {part} lack one of their two matrices: {list_names(halves)}"
            )
    return found


def _targets(part: Part, name: str) -> dict[str, tuple[str, Transform]]:
    # Layer's name with underscores -> the parameter's path, and the transform of its weight.
    if name != "clip":
        known = _NETWORKS[name].rules(part.config["model"])
        paths = [p for p in traverse_util.flatten_dict(part.params, sep="/") if p.endswith("/kernel")]
        if name == "decoder":  # a LoRA changes its U-Net alone
            paths = [p for p in paths if p.startswith("unet/")]
        named = names_of(paths, known, f"the {name}")
    else:
        tower = {k: v for k, v in part.params["text_tower"].items() if k != "projection"}
        flat = traverse_util.flatten_dict({"text_tower": tower}, sep="/")
        named = names_of(flat, clip.TEXT, "the text encoder")
    targets = {}
    for path, (theirs, transform) in named.items():
        if theirs.endswith(".weight"):
            layer = theirs.removesuffix(".weight").replace(".", "_")
            targets[layer] = targets[re.sub(r"^text_model_", "", layer)] = (path, TRANSFORMS[transform])
    return targets


def _merged(
    part: Part, name: str, layers: Mapping[str, Mapping[str, str]], weights: Weights, scale: float, path: Path
) -> Part:
    targets, params = _targets(part, name), traverse_util.flatten_dict(part.params, sep="/")
    missing = [layer for layer in layers if layer not in targets]
    if missing:
        raise InputError(f"{path} changes layers that the part {name!r} does not have: {list_names(missing)}")
    check_floats(weights, [t for kinds in layers.values() for t in kinds.values()], str(path))
    for layer, kinds in layers.items():
        target, transform = targets[layer]
        down, up = (np.asarray(weights[kinds[kind]], np.float32) for kind in ("down", "up"))
        rank = down.shape[0] if down.ndim else 0
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank:
            raise InputError(
                f"{path}: the matrices of {layer} do not fit: {list(up.shape)}, {list(down.shape)}"
            )
        alpha = float(np.asarray(weights[kinds["alpha"]]).reshape(-1)[0]) if "alpha" in kinds else rank
        change = np.tensordot(up.reshape(up.shape[:2]), down, axes=1) * np.float32(scale * alpha / rank)
        old = np.asarray(params[target])
        if not transform.fits(old.shape, change.shape):
            raise InputError(
                f"{path}: the change of {layer} is {list(change.shape)}, which does not fit "
                f"{target} {list(old.shape)}"
            )
        params[target] = finite(old + transform.forward(change, old.shape), layer, str(path))
        for tensor in kinds.values():
            weights.release(tensor)
    tree: Any = traverse_util.unflatten_dict(params, sep="/")
    return Part(part.config, tree, params_hash(tree))


# ------------------------------------------------------------------------------------------ writing
def adapted_layers(name: str, config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """The matrices of a network's attention, which adapters are trained for.

    Args:
      name: of the part: `latent`, `decoder` or `prior_diffusion`.
      config: its configuration.
      paths: of its parameters.

    Returns:
      Path -> the layer's name in a file, with peft's prefix.

    Raises:
      ValueError: when diffusers has no name for one of them, or there are none.
    """
    if name not in _NETWORKS:
        raise InputError(f"no adapters are trained for {name!r}; they are for {', '.join(_NETWORKS)}")
    network = _NETWORKS[name]
    chosen = [path for path in paths if re.search(network.layers, path)]
    if not chosen:
        raise InputError(f"the {name} has no attention that adapters could change")
    prefix = next(one for one, part in PREFIXES.items() if part == name)
    named = names_of(chosen, network.rules(config["model"]), f"the {name}")
    return {path: prefix + theirs.removesuffix(".weight") for path, (theirs, _) in named.items()}


def as_matrix(path: str, shape: Sequence[int]) -> tuple[int, int]:
    """The sizes (in, out) of a parameter of an attention layer.

    The output layer joins its first axes, and the others their last ones.
    """
    cut = len(shape) - 1 if path.endswith("out/kernel") else 1
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def lora_tensors(
    name: str, config: Mapping[str, Any], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Adapters as the tensors of a LoRA file, in peft's names; alpha is the rank.

    Args:
      name, config: as in `adapted_layers`.
      pairs: path -> down (in, r), up (r, out).
    """
    tensors = {}
    for path, layer in adapted_layers(name, config, pairs).items():
        down, up = pairs[path]
        tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(np.transpose(down), np.float32)
        tensors[f"{layer}.lora_B.weight"] = np.ascontiguousarray(np.transpose(up), np.float32)
    return tensors


def peft_adapter(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Adapters for peft's own loader, which takes the network itself and not a pipeline.

    Args:
      tensors: of `lora_tensors`.

    Returns:
      The tensors of `adapter_model.safetensors`, and the values of `adapter_config.json`: those without which
      peft does not know the layers, and those whose defaults in peft are others.
    """
    renamed = {f"base_model.model.{name.partition('.')[2]}": value for name, value in tensors.items()}
    ending = ".lora_A.weight"
    layers = [name.removesuffix(ending).partition(".")[2] for name in tensors if name.endswith(ending)]
    rank = next(value.shape[0] for name, value in tensors.items() if name.endswith(ending))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(layers),
    }
    return renamed, config
