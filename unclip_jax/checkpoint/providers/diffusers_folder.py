"""What the folders of diffusers' pipelines share when a bundle is written as one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.files import cast, save_tensors
from unclip_jax.errors import InputError
from unclip_jax.models.clip import MEAN, STD
from unclip_jax.paths import check_writable, store_errors, user_path, whole_folder

VERSION = "0.33.1"  # of diffusers: the last in which Karlo's pipeline is not deprecated


def check_target(path: str | os.PathLike) -> Any:
    """Checks that a pipeline can be written to a folder; call it before long work.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: when it is not empty. OSError: when it cannot be written.
    """
    path = user_path(path)
    with store_errors(path):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise InputError(f"{path} exists and is not empty; choose another folder")
    check_writable(path / "model_index.json")
    return path


def write_whole(
    bundle: Bundle,
    path: str | os.PathLike,
    dtype: Any,
    obstacles: Callable[[Bundle], Iterator[str]],
    write_folders: Callable[[Bundle, Path, Any], None],
) -> Any:
    """Writes a pipeline. Its folder appears whole or not at all.

    Args:
      bundle: the parts that the layout needs.
      path: a folder that is empty or does not exist yet.
      dtype: of the tensors.
      obstacles: what keeps a bundle from the layout, a sentence each.
      write_folders: (bundle, folder, dtype); it writes all files.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: naming everything that keeps the bundle from the layout, or when the folder is not empty.
    """
    path = check_target(path)
    reasons = list(obstacles(bundle))
    if reasons:
        name = bundle.path or "(unsaved)"
        raise InputError(f"the bundle {name} cannot be exported to diffusers: {'; '.join(reasons)}")
    with whole_folder(path, "model_index.json") as temporary:
        write_folders(bundle, temporary, dtype)
    return path


def write_network(
    folder: Path, reader: tuple[str, str], config: Mapping, tensors: Mapping[str, np.ndarray], dtype: Any
) -> None:
    """Writes a network: its configuration, and its tensors in `dtype`.

    reader: the library and the class that read it.
    """
    library, kind = reader
    transformers = library == "transformers"
    header = (
        {"architectures": [kind]} if transformers else {"_class_name": kind, "_diffusers_version": VERSION}
    )
    write_config(folder / "config.json", header | dict(config))
    stored = {k: cast(v, dtype, k, f"the {folder.name} of diffusers") for k, v in tensors.items()}
    name = "model" if transformers else "diffusion_pytorch_model"
    save_tensors(stored, folder / f"{name}.safetensors", metadata={"format": "pt"})


def write_config(path: Path, value: dict) -> None:
    """Writes a JSON file, with its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def text_encoder_config(model: dict) -> dict:
    """transformers' configuration of a `CLIP`'s text tower."""
    text = model["text"]
    return {
        "model_type": "clip_text_model",
        "hidden_size": text["width"],
        "intermediate_size": round(text["width"] * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["length"],
        "projection_dim": model["embed_dim"],
        "hidden_act": model.get("activation", "quick_gelu"),
        "layer_norm_eps": 1e-5,
        "bos_token_id": text["vocab_size"] - 2,
        "eos_token_id": text["vocab_size"] - 1,
        "pad_token_id": 0,
    }


def image_encoder_config(model: dict) -> dict:
    """transformers' configuration of a `CLIP`'s image tower."""
    image = model["image"]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": image["width"],
        "intermediate_size": round(image["width"] * image.get("mlp_ratio", 4.0)),
        "num_hidden_layers": image["layers"],
        "num_attention_heads": image["heads"],
        "image_size": image["image_size"],
        "patch_size": image["patch_size"],
        "projection_dim": model["embed_dim"],
        "hidden_act": model.get("activation", "quick_gelu"),
        "layer_norm_eps": 1e-5,
    }


def image_processor_config(model: dict) -> dict:
    """transformers' configuration of the preparation of pictures for a `CLIP`'s image tower."""
    image, side = model["image"], model["image"]["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.get("mean", MEAN)),
        "image_std": list(image.get("std", STD)),
        "do_convert_rgb": True,
    }
