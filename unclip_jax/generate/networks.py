"""Networks with their weights, and the modules that parts' configurations describe."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from unclip_jax.backend import platform_of
from unclip_jax.diffusion.embedding_space import EmbeddingSpace
from unclip_jax.diffusion.schedule import Schedule, schedule_of
from unclip_jax.errors import InputError, input_errors
from unclip_jax.models.kinds import KINDS
from unclip_jax.models.layers import Dtype
from unclip_jax.sharding import Mesh, compute_dtype, make_gather


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its weights.

    module: the linen module; None for a part that has weights only (a codec, an embedded caption).
    params: its parameters: arrays, or tracers inside a program.
    config: the part's configuration: kind, model, diffusion, ...
    hash: the hash of the weights (`checkpoint.store.params_hash`), or "" where it is not needed.
    """

    module: nn.Module | None
    params: Any
    config: dict
    hash: str = ""

    def apply(self, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        """Applies the module with these weights."""
        return self.module.apply({"params": self.params}, *args, method=method, **kwargs)

    def with_params(self, params: Any) -> Network:
        """The same network with other weights."""
        return dataclasses.replace(self, params=params)


def build_model(part_config: dict, dtype: Dtype = jnp.float32, **hooks: Any) -> nn.Module:
    """The linen module that a part's configuration describes.

    Args:
      part_config: the configuration (`kind`, `model`).
      dtype: compute dtype.
      hooks: the attributes remat, scan, gather, and winograd (U-Nets only).

    Raises:
      ValueError: on an unknown kind, or an unknown model option.
    """
    kind, settings = part_config.get("kind"), part_config.get("model")
    if kind not in KINDS or KINDS[kind].module is None:
        known = ", ".join(name for name, row in KINDS.items() if row.module is not None)
        raise InputError(f"unknown kind of network {kind!r}; known: {known}")
    with input_errors(f"the model of a {kind}", TypeError):
        return KINDS[kind].module(**settings, dtype=dtype, **hooks)


WINOGRAD = (
    *("decoder", "upsampler", "glide", "imagen", "imagen_upsampler", "latent", "kandinsky"),
    *("kl_autoencoder", "vq_autoencoder"),
)


def sampling_model(part_config: dict, mesh: Mesh) -> nn.Module:
    """The module that samples a part on a mesh, in the mesh's compute dtype.

    On CPU the U-Nets use convolutions with fewer products (`models.winograd`).
    """
    on_cpu = platform_of(mesh) == "cpu" and part_config["kind"] in WINOGRAD
    hooks = {"winograd": True} if on_cpu else {}
    return build_model(part_config, compute_dtype("auto", mesh), gather=make_gather(mesh), **hooks)


@functools.lru_cache(maxsize=64)
def _schedule(described: str) -> Schedule:
    return schedule_of(json.loads(described))


def part_schedule(part_config: dict) -> Schedule:
    """The noise schedule that a part was trained with."""
    return _schedule(json.dumps(part_config["diffusion"], sort_keys=True))


def part_space(part_config: dict) -> EmbeddingSpace:
    """The embedding space in which a prior diffuses."""
    space = dict(part_config["embedding_space"])
    for key in ("mean", "std"):
        if space.get(key) is not None:
            space[key] = np.asarray(space[key], np.float32)
    return EmbeddingSpace(**space)


def image_size(config: dict) -> int:
    """The side in pixels of the images that a U-Net part draws."""
    return config["model"]["unet"]["image_size"]
