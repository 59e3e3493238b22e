"""Release bundles: a folder with one subfolder per part (`config.json` and `model.safetensors`) and
`bundle.json`.

`bundle.json` holds `format_version` (2), the `system` the parts make up, every part's hash and number of
parameters, the samplers' defaults by part, and the provenance. A part's `config.json` holds:

| key | value | parts that have it |
|---|---|---|
| `kind` | which network it is, of `models.kinds`: `clip`, `prior_diffusion`, `decoder`, ... | all |
| `model` | the network's keyword arguments | all but the codec |
| `diffusion` | noise schedule and prediction | those that diffuse |
| `frozen` | role -> hash of each network that stood frozen under it in training | those that had one |
| `tokenizer` | of the text encoder that the part owns | CLIP; a part with a text encoder of its own |
| `embedding_space` | how the image embeddings are normalised | the diffusion prior, retrieval, an index |
| `neighbours` | how many a network was trained with | retrieval |
| `popular` | the rows of an index that served most often in training, with their uses | retrieval |
| `factor` | how much larger the output is than the input | upsamplers, those of GLIDE too |
| `last_step_of` | the upsampler whose last sampling step this network makes | some upsamplers |

Tensors are named by their path in the parameter tree ("unet/conv_in/kernel"), one per layer. They are float32
in memory, and float16 on disk but for the kinds in EXACT. `load.load_bundle` reads a bundle by name, from a
store, or from the hub.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from unclip_jax.checkpoint import format1
from unclip_jax.checkpoint.check import check_config, check_inside, check_name, check_shapes, check_top
from unclip_jax.checkpoint.files import (
    Place,
    cast,
    check_floats,
    finite,
    keep,
    list_names,
    open_weights,
    read_json,
    save_tensors,
)
from unclip_jax.checkpoint.store import ParamsHash, params_hash
from unclip_jax.errors import InputError, MissingError, input_errors
from unclip_jax.models.kinds import KINDS
from unclip_jax.paths import check_writable, store_errors, user_path, whole_folder, write_json
from unclip_jax.typed import check_value, shown

FORMAT_VERSION = 2
# Kinds that are stored in float32: rounded directions would not be orthogonal, and features of rounded
# networks would change the figures that papers print to three decimals.
EXACT = ("codec", "inception", "dinov2", "lpips")
# What a part was trained with, for the error when it meets another one.
TRAINED = {"clip": "in the embedding space of CLIP"}


@dataclass(frozen=True)
class Part:
    """One network.

    config: JSON values, see the table above.
    params: a tree of float32 NumPy arrays, or of arrays on a mesh.
    hash: of the file the parameters were read from (`store.params_hash`); "" when they come from elsewhere.
    """

    config: dict
    params: Any
    hash: str = ""


@dataclass(frozen=True)
class Bundle:
    """A set of networks that belong together.

    parts: by name (`clip`, `prior_diffusion`, `decoder`, `upsampler_<px>`, ...).
    system: which cascade samples from them.
    sampling: default options by part.
    provenance: how the parts were made.
    path: where they were read; "" when they were not.
    mesh: where the parameters were placed; None when they are on the host.
    """

    parts: dict[str, Part]
    system: str = "unclip"
    sampling: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    path: str = ""
    mesh: Mesh | None = None

    def part(self, name: str) -> Part:
        """The named part.

        Raises:
          KeyError: naming the part, the bundle, and the parts it has.
        """
        if name not in self.parts:
            raise no_part(self.path or "(unsaved)", name, self.parts)
        return self.parts[name]


def no_part(path: str | os.PathLike, name: str, names: Iterable[str]) -> MissingError:
    """The error of a part that a bundle does not have."""
    return MissingError(f"the bundle {path} has no part {name!r}; it has {', '.join(names)}")


def upsamplers(parts: Mapping[str, Part]) -> list[str]:
    """The names of the upsamplers, smallest output first. Networks that make another one's last step, and
    those that inpaint, are not among them."""
    first = [
        name
        for name, part in parts.items()
        if (part.config["kind"] == "upsampler" or "factor" in part.config)
        and not (last_step_of(part) or part.config["model"].get("inpaint"))
    ]
    return sorted(first, key=lambda name: parts[name].config["model"]["unet"]["image_size"])


def last_step(parts: Mapping[str, Part], name: str) -> str | None:
    """The name of the part that makes the last sampling step of the upsampler `name`; None when it makes its
    own."""
    return next((other for other, part in parts.items() if last_step_of(part) == name), None)


def last_step_of(part: Part) -> str | None:
    """The name of the upsampler whose last sampling step this part makes; None when it makes no such step."""
    return part.config.get("last_step_of")


def check_frozen(parts: Mapping[str, Part]) -> None:
    """Every part must have been trained with those of the other parts that stood frozen under it.

    Raises:
      ValueError: naming the part, and both networks by their hashes.
    """
    hashes: dict[str, str] = {}
    for name, part in parts.items():
        for role, trained_with in part.config.get("frozen", {}).items():
            if role not in parts or not trained_with:
                continue
            if role not in hashes:
                hashes[role] = parts[role].hash or params_hash(parts[role].params)
            if hashes[role] != trained_with:
                raise InputError(
                    f"part {name!r} was trained {TRAINED.get(role, f'with the {role}')} {trained_with}, "
                    f"but the {role} part is {hashes[role]}; combine parts trained with the same {role}"
                )


def check_sizes(parts: Mapping[str, Part], where: str) -> None:
    """The parts of a bundle must make what the others take, whether or not they name one another's hashes.

    Raises:
      ValueError: naming both parts and their sizes.
    """
    clip = parts["clip"].config["model"] if "clip" in parts else {}
    text, codec = clip.get("text"), parts["codec"].config if "codec" in parts else {}
    size = clip.get("embed_dim", codec.get("embed_dim"))
    for name, part in parts.items():
        model, kind = part.config.get("model", {}), part.config["kind"]
        takes = part.config.get("embed_dim") if kind in ("codec", "index") else None
        if kind == "retrieval":
            takes = model["context_dim"]
        if kind in ("prior_diffusion", "prior_laion", "kandinsky"):
            takes = model.get("embed_dim")
        if kind == "decoder":
            takes = np.shape(part.params["conditioning"]["null_image_embed"])[0]
        if size is not None and takes not in (None, size):
            raise InputError(f"{where}: {name} takes embeddings of {takes}, but those here are of {size}")
        if text and kind in ("prior_diffusion", "prior_ar") and model.get("text") is None:
            if model["length"] != text["length"]:
                raise InputError(
                    f"{where}: {name} takes {model['length']} text states, and CLIP makes {text['length']}"
                )
        if kind == "prior_ar" and model["codes"] > codec.get("embed_dim", model["codes"]):
            raise InputError(
                f"{where}: {name} makes {model['codes']} codes, and the codec reads {codec['embed_dim']}"
            )
        refined = last_step_of(part)
        if refined is not None and refined not in upsamplers(parts):
            raise InputError(f"{where}: {name} makes the last step of {refined}, which is no upsampler here")
    check_spaces(parts, where)
    unets = [name for name in ("decoder", "glide", "imagen") if name in parts][:1] + upsamplers(parts)
    for small, large in itertools.pairwise(unets):
        low, size = (parts[name].config["model"]["unet"]["image_size"] for name in (small, large))
        if low * parts[large].config["factor"] != size:
            raise InputError(
                f"{where}: {large} enlarges pictures to {size} pixels by {parts[large].config['factor']}, "
                f"but {small} draws {low} pixels"
            )


def check_spaces(parts: Mapping[str, Part], where: str) -> None:
    """The rows of an index must be in the space in which the network takes neighbours.

    Raises:
      ValueError: naming both spaces.
    """
    if "index" not in parts or "retrieval" not in parts:
        return
    found, wanted = (parts[name].config["embedding_space"]["kind"] for name in ("index", "retrieval"))
    if found != wanted:
        raise InputError(
            f"{where}: the index holds {found} embeddings, but retrieval takes {wanted} ones: "
            f"make an index with --space {wanted}"
        )


@dataclass(frozen=True)
class Description:
    """What a bundle's JSON files hold, in format 2.

    top: `bundle.json`. configs: the parts' `config.json` by name. folders: the parts' folders by name.
    """

    top: dict
    configs: dict[str, dict]
    folders: dict[str, Path]


def read_description(path: Path, only: str | None = None) -> Description:
    """Reads a bundle's JSON files. Format 1 is converted in memory.

    Args:
      path: the bundle's folder.
      only: the one part to describe; None describes all.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing or damaged, or the format version that is
        unknown.
      KeyError: when there is no part `only`; it lists those there are.
    """
    check_inside(path / "bundle.json", path)
    top = read_json(path / "bundle.json", "bundle")
    version = top.get("format_version")
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
        raise InputError(
            f"{path}/bundle.json has format version {shown(version)}; "
            f"this version reads 1 and {FORMAT_VERSION}"
        )
    check_value(top.get("parts"), dict, f"{path}/bundle.json: parts")
    for name in top["parts"]:
        check_name(name, f"{path}/bundle.json")
    folders = {format1.part_name(name) if version == 1 else name: path / name for name in top["parts"]}
    if only is not None:
        if only not in folders:
            raise no_part(path, only, folders)
        folders = {only: folders[only]}
    for folder in folders.values():
        check_inside(folder / "config.json", path)
    configs = {name: read_json(folder / "config.json", "bundle") for name, folder in folders.items()}
    if version == 1:
        with input_errors(f"{path}/bundle.json", KeyError, TypeError, AttributeError, ValueError):
            top, configs = format1.upgrade_bundle(
                top, {folder.name: configs[name] for name, folder in folders.items()}
            )
    check_top(top, f"{path}/bundle.json")
    for name, config in configs.items():
        check_config(config, f"{folders[name]}/config.json")
    return Description(top, configs, folders)


def read_part(
    path: Path, config: dict, expected_hash: str | None = None, place: Place = keep, shipped: bool = False
) -> Part:
    """Reads the weights of one part's folder, tensor by tensor. Nothing from the files is executed.

    Args:
      path: the part's folder.
      config: the part's configuration, from `read_description`.
      expected_hash: what the weights must have, if known.
      place: where each parameter goes as soon as it is read.
      shipped: whether it is a part of this package, whose shapes a test compares with its configuration.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing, damaged, or not the one its bundle
        describes; or whose tensors are not those of the network, or not finite.
    """
    for file in path.glob("*.safetensors*"):
        check_inside(file, path.parent)
    weights, computed = open_weights(path, ["model"], "bundle"), ParamsHash()
    if not shipped:
        check_shapes(config, {name: weights.shape(name) for name in weights}, str(path))
    check_floats(weights, weights, str(path))
    if KINDS[config["kind"]].module is None:
        place = keep  # rounding would spoil a codec's directions; an index stays on the host
    flat = {}
    for name in sorted(weights):
        value = weights[name]
        computed.update(name, value)
        flat[tuple(name.split("/"))] = place(name, finite(keep(name, value), name, str(path)))
        weights.release(name)
    if expected_hash not in (None, computed.digest()):
        raise InputError(
            f"{path} does not hold the network that bundle.json describes (hash differs); "
            "copy the bundle again"
        )
    return Part(config, traverse_util.unflatten_dict(flat), computed.digest())


def check_target(path: str | os.PathLike) -> Any:
    """Checks that a bundle can be written to a folder; call it before long work.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: when something is there that is no bundle, or that lies in a bundle and is not its own, so
        that replacing it would lose it.
      OSError: when it cannot be written.
    """
    path = user_path(path)
    with store_errors(path):
        there = list(path.iterdir()) if path.is_dir() else []
        if path.is_file() or (there and not (path / "bundle.json").is_file()):
            raise InputError(f"{path} exists and is not a bundle; choose another folder")
        others = [p.name for p in there if p.name != "bundle.json" and not (p / "config.json").is_file()]
    if others:
        raise InputError(
            f"{path} is a bundle that also holds {list_names(others)}, which would be lost; "
            "choose another folder"
        )
    check_writable(path / "bundle.json")
    return path


def save_bundle(bundle: Bundle, path: str | os.PathLike, dtype: Any = np.float16) -> Any:
    """Writes a bundle. It appears whole or not at all, and it replaces an older bundle at the same place.

    Args:
      bundle: on the host.
      path: a folder that holds a bundle, is empty, or does not exist yet.
      dtype: of the weights on disk. Kinds in EXACT are always float32.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: when parts do not belong together, a name of a part is none, values are too large for
        `dtype`, or the parameters were placed on a mesh; and as `check_target`.
    """
    if bundle.mesh is not None:
        raise InputError(
            f"the bundle {bundle.path} was loaded onto a mesh, where weights may be rounded; "
            "load it without one to save it"
        )
    path = check_target(path)
    for name in bundle.parts:
        check_name(name, "the bundle")
    check_frozen(bundle.parts)
    with whole_folder(path, "bundle.json") as temporary:
        listing = {}
        for name, part in bundle.parts.items():
            (temporary / name).mkdir()
            flat = traverse_util.flatten_dict(part.params, sep="/")
            stored = np.float32 if part.config["kind"] in EXACT else dtype
            file = temporary / name / "model.safetensors"
            save_tensors({k: cast(v, stored, k, f"the part {name}") for k, v in flat.items()}, file)
            write_json(temporary / name / "config.json", part.config)
            listing[name] = {
                "hash": params_hash(part.params),
                "parameters": int(sum(np.size(v) for v in flat.values())),
            }
        top = {
            "format_version": FORMAT_VERSION,
            "system": bundle.system,
            "parts": listing,
            "sampling": bundle.sampling,
            "provenance": bundle.provenance,
        }
        write_json(temporary / "bundle.json", top)
    return path


def update_provenance(path: str | os.PathLike, **changes: dict) -> None:
    """Merges keys into the `provenance` of a bundle on disk, in place."""
    file = user_path(path) / "bundle.json"
    top = read_json(file, "bundle")
    top["provenance"].update(changes)
    write_json(file, top)
