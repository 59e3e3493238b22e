"""Release bundles: a folder with one subfolder per part (`config.json` + `model.safetensors`) and `bundle.json`.

`bundle.json` lists the parts with their hashes, the embedding space, the tokenizer, the samplers' defaults and the provenance.
Tensors are named by their path in the parameter tree ("unet/conv_in/kernel"), one per layer, float16 on disk and float32 in memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors.numpy import save_file

from unclip_jax.checkpoint.files import Place, keep, open_weights, read_json
from unclip_jax.checkpoint.store import ParamsHash, load_run, params_hash
from unclip_jax.checkpoint.store import folder as checkpoint_folder
from unclip_jax.paths import is_remote, local_copy, store_errors, user_path, whole_folder, write_json
from unclip_jax.sharding import placer

FORMAT_VERSION = 1
SHIPPED = Path(__file__).resolve().parent.parent / "bundles"


@dataclass(frozen=True)
class Part:
    """One network: `config` (JSON: kind, model keyword arguments, clip hash, ...), `params` (a tree of float32 NumPy arrays, or of arrays
    on a mesh), and the `hash` of the file they were read from ("" when they were not)."""

    config: dict
    params: Any
    hash: str = ""


@dataclass(frozen=True)
class Bundle:
    """A set of networks that belong together.

    parts: by name (`clip`, `prior`, `decoder`, `upsampler_<px>`); tokenizer: its configuration; sampling: default options per part;
    provenance: how it was made; path: where it was read; mesh: where its parameters were placed, None when they are on the host;
    cache: compiled programs of this bundle, filled as it is used.
    """

    parts: dict[str, Part]
    tokenizer: dict
    sampling: dict
    provenance: dict = field(default_factory=dict)
    path: str = ""
    mesh: Mesh | None = None
    cache: dict = field(default_factory=dict, compare=False, repr=False)

    def part(self, name: str) -> Part:
        """The named part.

        Raises:
          KeyError: naming the part, the bundle and what it has.
        """
        if name not in self.parts:
            raise no_part(self.path or "(unsaved)", name, self.parts)
        return self.parts[name]


def no_part(path: str | os.PathLike, name: str, names: Iterable[str]) -> KeyError:
    """The error of a part that a bundle does not have."""
    return KeyError(f"the bundle {path} has no part {name!r}; it has {', '.join(names)}")


def upsampler_names(parts: Iterable[str]) -> list[str]:
    """The upsamplers among the names of parts, in the order of their sizes; networks for a last step (`_last`) are not among them."""
    return sorted((n for n in parts if n.startswith("upsampler_") and not n.endswith("_last")), key=lambda n: int(n.split("_")[1]))


def bundle_path(name_or_path: str | os.PathLike) -> Path:
    """A shipped bundle's folder by name (`emoji`), or the folder itself.

    Raises:
      FileNotFoundError: when there is no bundle there.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists() and (SHIPPED / str(name_or_path)).is_dir():
        path = SHIPPED / str(name_or_path)
    if not (path / "bundle.json").is_file():
        shipped = sorted(p.parent.name for p in SHIPPED.glob("*/bundle.json"))
        raise FileNotFoundError(f"{name_or_path} is not a bundle (no bundle.json); give a bundle's folder or one of: {', '.join(shipped)}")
    return path


def read_part(path: Path, expected_hash: str | None = None, place: Place = keep) -> Part:
    """Reads one part's folder, tensor by tensor; nothing from the files is executed.

    Args:
      expected_hash: what the weights must have, if known.
      place: where each parameter goes as soon as it is read.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing, damaged, or not the one its bundle was made with.
    """
    config, weights, made = read_json(path / "config.json", "bundle"), open_weights(path, ["model"], "bundle"), ParamsHash()
    if config["kind"] == "pca":
        place = keep  # small, and its directions must stay orthogonal
    flat = {}
    for name in sorted(weights):
        value = weights[name]
        made.update(name, value)
        flat[tuple(name.split("/"))] = place(name, keep(name, value))
        weights.release(name)
    if expected_hash not in (None, made.digest()):
        raise ValueError(f"{path} does not hold the network that bundle.json describes (hash differs); copy the bundle again")
    return Part(config, traverse_util.unflatten_dict(flat), made.digest())


def check_same_clip(parts: dict[str, Part]) -> None:
    """Every part that works on CLIP embeddings must have been trained with the bundle's own CLIP.

    Raises:
      ValueError: naming both.
    """
    clip = parts["clip"].hash or params_hash(parts["clip"].params) if "clip" in parts else None
    for name, part in parts.items():
        made_with = part.config.get("clip")
        if clip and made_with and made_with != clip:
            raise ValueError(
                f"part {name!r} was trained in the embedding space of CLIP {made_with}, but the clip part is {clip}; "
                "combine parts trained with the same CLIP"
            )


def load_bundle(name_or_path: str | os.PathLike, *, mesh: Mesh | None = None) -> Bundle:
    """Reads a release bundle.

    Args:
      name_or_path: `"emoji"`, the one shipped with the package; a folder: a bundle, or public weights (`public.load_public`); or
        "hf:owner/name@revision", a repository of the Hugging Face hub with either (extra `web`).
      mesh: every parameter goes straight onto it, sharded by `sharding.infer_shardings`, matrices in the mesh's compute dtype: what
        sampling large weights wants. None: they stay on the host in float32, to be sampled, saved, exported or trained further.

    Raises:
      FileNotFoundError, ValueError: when it is missing, incomplete, damaged, or made of parts that do not belong together.
    """
    path, place = _local(name_or_path), keep if mesh is None else placer(mesh)
    if _is_public(path):
        return dataclasses.replace(_load_public(path, None, place), mesh=mesh)
    path = bundle_path(path)
    top = _read_top(path)
    parts = {name: read_part(path / name, info["hash"], place) for name, info in top["parts"].items()}
    check_same_clip(parts)
    return Bundle(parts, top["tokenizer"], top["sampling"], top.get("provenance", {}), str(path), mesh)


def stored_bytes(name_or_path: str | os.PathLike) -> int:
    """The size of a bundle's or of public weights' tensors on disk, 0 where there are none."""
    folder = Path(_local(name_or_path)).expanduser()
    folder = folder if folder.exists() else SHIPPED / folder
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _read_top(path: Path) -> dict:
    top = read_json(path / "bundle.json", "bundle")
    if top.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}/bundle.json has format version {top.get('format_version')}; this version reads {FORMAT_VERSION}")
    return top


def _is_public(path: str | os.PathLike) -> bool:
    from unclip_jax.checkpoint.public import is_public  # it makes bundles, so it imports this file

    return is_public(Path(path).expanduser())


def _load_public(path: str | os.PathLike, only: str | None, place: Place) -> Bundle:
    from unclip_jax.checkpoint.public import load_public

    return load_public(Path(path).expanduser(), only, place)


def _local(path: str | os.PathLike) -> str | os.PathLike:
    # Copies of what lies in a store; a hub repository's files, fetched once into the hub's own cache; any other path as it is.
    text = os.fspath(path)
    if is_remote(text):
        return local_copy(text)
    if not text.startswith("hf:"):
        return path
    name, _, revision = text.removeprefix("hf:").partition("@")
    if not revision or name.count("/") != 1:
        raise ValueError(f"{text}: write hf:owner/name@revision; the revision (a commit or tag) pins what is loaded")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError('reading from the hub needs huggingface_hub: pip install "unclip_jax[web]"') from None
    wanted = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "*/merges.txt", "merges.txt"]
    try:
        return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except Exception as error:  # the hub's and the network's errors are many
        raise OSError(f"{text} cannot be fetched: {' '.join(str(error).split())[:300]}") from None


def save_bundle(bundle: Bundle, path: str | os.PathLike, dtype: Any = np.float16) -> Any:
    """Writes a bundle; it appears whole or not at all, and replaces an older bundle at the same place.

    Raises:
      ValueError: when parts do not belong together, `path` is a folder that is not a bundle, or the parameters were placed on a mesh.
    """
    if bundle.mesh is not None:
        raise ValueError(f"the bundle {bundle.path} was loaded onto a mesh, perhaps rounded; load it without one to save it")
    path = user_path(path)
    with store_errors(path):
        if path.exists() and not (path / "bundle.json").is_file() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists and is not a bundle; choose another folder")
    check_same_clip(bundle.parts)
    with whole_folder(path, "bundle.json") as temporary:
        listing = {}
        for name, part in bundle.parts.items():
            (temporary / name).mkdir()
            flat = traverse_util.flatten_dict(part.params, sep="/")
            kept = np.float32 if part.config["kind"] == "pca" else dtype  # small, and its directions must stay orthogonal
            save_file({k: np.asarray(v, kept, order="C") for k, v in flat.items()}, temporary / name / "model.safetensors")
            (temporary / name / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read
            write_json(temporary / name / "config.json", part.config)
            listing[name] = {"hash": params_hash(part.params), "parameters": int(sum(np.size(v) for v in flat.values()))}
        top = {
            "format_version": FORMAT_VERSION,
            "parts": listing,
            "tokenizer": bundle.tokenizer,
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


def load_part(path: str | os.PathLike, name: str) -> tuple[Part, dict]:
    """One part of a bundle, or the newest averaged weights of a training run.

    Args:
      path: a bundle (name or folder), public weights, or a run's folder.
      name: of the part; a run must have trained it.

    Returns:
      The part, and its meta: {"tokenizer", "sampling", "provenance"}, a run's or out of the bundle.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line each.
    """
    with store_errors(path):
        trained = checkpoint_folder(path).is_dir()
    if trained:
        meta, params, step = load_run(path)
        if meta["name"] != name:
            raise KeyError(f"{path} is a run of {meta['name']!r}, not of {name!r}")
        meta["provenance"]["step"] = step
        return Part(meta["part"], params), meta
    path = _local(path)
    if _is_public(path):
        public = _load_public(path, name, keep)
        meta = {"tokenizer": public.tokenizer, "sampling": public.sampling.get(name, {}), "provenance": public.provenance}
        return public.parts[name], meta
    try:
        path = bundle_path(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds neither checkpoints nor a bundle; train {name!r} first, or name another folder") from None
    top = _read_top(path)
    if name not in top["parts"]:
        raise no_part(path, name, top["parts"])
    made = top["provenance"].get("training", {}).get(name, top["provenance"])
    meta = {"tokenizer": top["tokenizer"], "sampling": top["sampling"].get(name, {}), "provenance": made}
    return read_part(path / name, top["parts"][name]["hash"]), meta
