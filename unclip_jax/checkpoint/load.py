"""Reads bundles and their parts, wherever they lie and whoever wrote them: release bundles of format 1 and 2,
the folders of public weights (`providers`), and, for single parts, training runs.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from jax.sharding import Mesh

from unclip_jax.checkpoint.bundle import Bundle, Part, check_frozen, check_sizes, read_description, read_part
from unclip_jax.checkpoint.check import check_config
from unclip_jax.checkpoint.fetch import PACKAGED
from unclip_jax.checkpoint.files import Place, keep
from unclip_jax.checkpoint.providers import Provider, find_provider
from unclip_jax.checkpoint.store import META, load_run
from unclip_jax.checkpoint.store import folder as checkpoint_folder
from unclip_jax.errors import InputError, MissingError, MissingPackageError
from unclip_jax.paths import is_remote, local_copy, store_errors, user_path
from unclip_jax.sharding import placer

SHIPPED = Path(__file__).resolve().parent.parent / "bundles"


def bundle_path(name_or_path: str | os.PathLike) -> Path:
    """The folder of a shipped bundle by its name (`emoji`), or the folder itself.

    Raises:
      FileNotFoundError: when there is no bundle there.
    """
    path = user_path(name_or_path)
    if not path.exists() and (SHIPPED / str(name_or_path)).is_dir():
        path = SHIPPED / str(name_or_path)
    if not (path / "bundle.json").is_file():
        shipped = sorted(p.parent.name for p in SHIPPED.glob("*/bundle.json"))
        raise FileNotFoundError(
            f"{name_or_path} is not a bundle (no bundle.json); "
            f"give a bundle's folder or one of: {', '.join(shipped)}"
        )
    return path


def load_bundle(name_or_path: str | os.PathLike, *, mesh: Mesh | None = None) -> Bundle:
    """Reads a release bundle or a folder of public weights.

    Args:
      name_or_path: one of
        - `"emoji"`, the bundle shipped with the package;
        - a folder, here or in a store (`gs://...`): a bundle, or public weights in the layout of one of
          `PROVIDERS`;
        - "hf:owner/name@revision", a repository of the Hugging Face hub that holds either (extra `web`).
      mesh: where the parameters go. With a mesh, every parameter goes straight onto it: sharded by
        `sharding.infer_shardings`, matrices in the mesh's compute dtype. This suits sampling with large
        weights. None: they stay on the host in float32, to be sampled, saved, exported or trained further.

    Raises:
      FileNotFoundError, ValueError: when it is missing, incomplete, damaged, or made of parts that do not
        belong together.
    """
    path, place = user_path(_local(name_or_path)), keep if mesh is None else placer(mesh)
    provider = find_provider(path)
    if provider is not None:
        return dataclasses.replace(_public(provider, path, None, place), mesh=mesh)
    path = bundle_path(path)
    found = read_description(path)
    shipped = path.is_relative_to(SHIPPED)
    parts = {
        name: read_part(folder, found.configs[name], found.top["parts"][name]["hash"], place, shipped)
        for name, folder in found.folders.items()
    }
    check_frozen(parts)
    check_sizes(parts, str(path))
    top = found.top
    return Bundle(parts, top["system"], top["sampling"], top["provenance"], str(path), mesh)


def load_trained(workdir: str | os.PathLike) -> tuple[Part, dict, int]:
    """The part that a run trains, with its newest averaged weights; the run's meta; and its step.

    Raises:
      FileNotFoundError, ValueError: as `store.load_run`; and when the description is not whole.
    """
    meta, params, step = load_run(workdir)
    for key in META:
        if key not in meta:
            raise InputError(f"the description of step {step} of {workdir} lacks {key!r}")
    return Part(meta["part"], params), meta, step


def load_part(path: str | os.PathLike, name: str) -> tuple[Part, dict]:
    """Reads one part of a bundle, or the newest averaged weights of a training run.

    Args:
      path: a bundle (name or folder), public weights, or a run's folder.
      name: of the part; a run must have trained it.

    Returns:
      The part, and its meta: {"sampling", "provenance"}. A run's meta also has "name", "part" and "config",
        and its provenance
      has the "step" of the weights.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line each.
    """
    with store_errors(path):
        trained = checkpoint_folder(path).is_dir()
    if trained:
        part, meta, step = load_trained(path)
        if meta["name"] != name:
            raise MissingError(f"{path} is a run of {meta['name']!r}, not of {name!r}")
        meta["provenance"]["step"] = step
        return part, meta
    path = user_path(_local(path))
    provider = find_provider(path)
    if provider is not None:
        read = _public(provider, path, name, keep)
        return read.parts[name], {"sampling": read.sampling.get(name, {}), "provenance": read.provenance}
    try:
        path = bundle_path(path)
    except FileNotFoundError:
        first = f"run `unclip fetch {name}`" if name in PACKAGED else f"train {name!r} first"
        raise FileNotFoundError(
            f"{path} holds neither checkpoints nor a bundle; {first}, or name another folder"
        ) from None
    found = read_description(path, name)
    provenance = found.top["provenance"]
    meta = {
        "sampling": found.top["sampling"].get(name, {}),
        "provenance": provenance.get("training", {}).get(name, provenance),
    }
    return read_part(found.folders[name], found.configs[name], found.top["parts"][name]["hash"]), meta


def _public(provider: Provider, path: Path, name: str | None, place: Place) -> Bundle:
    # Public weights as a bundle: what is read must be what a bundle may hold.
    read = provider.read(path, name, place)
    for part, value in read.parts.items():
        check_config(value.config, f"{path}: {part}")
    check_sizes(read.parts, str(path))
    return read


def stored_bytes(name_or_path: str | os.PathLike) -> int:
    """The size on disk of the tensors of a bundle or of public weights, in bytes; 0 where there are none."""
    path = user_path(_local(name_or_path))
    path = path if path.exists() else SHIPPED / path
    if path.is_file():
        return path.stat().st_size
    files = (file for ending in ("safetensors", "msgpack") for file in path.rglob(f"*.{ending}"))
    return sum(file.stat().st_size for file in files)


def _local(path: str | os.PathLike) -> str | os.PathLike:
    # A path of this machine: a copy of what lies in a store; the files of a hub's repository, which the hub's
    # library fetches once into its own cache; any other path as it is.
    text = os.fspath(path)
    if is_remote(text):
        return local_copy(text)
    if not text.startswith("hf:"):
        return path
    name, _, revision = text.removeprefix("hf:").partition("@")
    if not revision or name.count("/") != 1:
        raise InputError(
            f"{text}: write hf:owner/name@revision; the revision (a commit or tag) fixes what is loaded"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            'reading from the hub needs huggingface_hub: pip install "unclip_jax[web]"'
        ) from None
    wanted = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "*/merges.txt", "merges.txt"]
    try:
        return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except Exception as error:  # the hub's library and the network raise many kinds of errors
        raise OSError(f"{text} cannot be fetched: {' '.join(str(error).split())[:300]}") from None
