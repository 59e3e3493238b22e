"""The latents or codes of pictures, for `unclip embed --latents` and `--codes`.

What trains on them then encodes nothing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.autoencoder import Moments
from unclip_jax.sharding import BATCH, compute_dtype, gather_rest, infer_shardings, make_gather


@dataclasses.dataclass(frozen=True)
class LatentEncoder:
    """An autoencoder's encoder on this host's devices.

    name: of the array: `latents` or `codes`.
    size: the side of the pictures that it takes.
    described: what the folder's plan says of the latents: the autoencoder's hash, the pictures' side, the
      shape (h, w, Z), and the scale factor.
    encode: pictures (B, size, size, 3) in [-1, 1] -> latents (B, h, w, Z) float16, not scaled: the mean of a
      KL autoencoder's Gaussian, or a VQ one's latents before its codebook.
    """

    name: str
    size: int
    described: dict
    encode: Callable[[np.ndarray], jax.Array]


def latent_encoder(path: str | None, size: int | None, mesh: Mesh, dtype: str) -> LatentEncoder | None:
    """The encoder of an autoencoder: a run, a bundle or public weights. None for the path None.

    Raises:
      ValueError: when only one of the path and the size is given, or the size is no multiple of the
        autoencoder's factor.
      FileNotFoundError, KeyError: as `load_part`.
    """
    if (path is None) != (size is None):
        raise InputError("latents need both the autoencoder and the size of the images: --latents and --size")
    if path is None:
        return None
    part, _ = load_part(path, "autoencoder")
    module = build_model(part.config, compute_dtype(dtype, mesh), gather=make_gather(mesh))
    if size < 1 or size % module.factor:
        raise InputError(f"--size {size} must be a multiple of {module.factor}, the pixels along a latent")
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    sharding = NamedSharding(mesh, BATCH)

    @jax.jit
    def encode(params: Any, pictures: jax.Array) -> jax.Array:
        found = module.apply({"params": gather_rest(params, mesh)}, pictures, method="encode")
        return (found.mean if isinstance(found, Moments) else found).astype(jnp.float16)

    side = size // module.factor
    described = {
        "autoencoder": params_hash(part.params),
        "size": size,
        "shape": [side, side, module.latent_channels],
        "scale_factor": part.config["scale_factor"],
    }
    return LatentEncoder(
        "latents", size, described, lambda pictures: encode(params, jax.device_put(pictures, sharding))
    )


CODERS = ("vqvae", "dvae")


def code_encoder(path: str, size: int | None, mesh: Mesh, dtype: str) -> LatentEncoder:
    """The encoder of a VQ-VAE or of a discrete VAE: a run, a bundle or public weights.

    Its codes are int32 (B, N), those of all levels in raster order one after the other, the bottom's first.

    Raises:
      ValueError: when there is no size, or it is no multiple of the network's factor.
      FileNotFoundError, KeyError: as `load_part`.
    """
    if size is None:
        raise InputError("codes need the size of the images, too: --codes and --size")
    part = None
    for name in CODERS:
        try:
            part, _ = load_part(path, name)
            break
        except KeyError:
            continue
    if part is None:
        raise InputError(f"{path} holds neither a {' nor a '.join(CODERS)}, which make codes")
    module = build_model(part.config, compute_dtype(dtype, mesh), gather=make_gather(mesh))
    if size < 1 or size % module.factor:
        raise InputError(f"--size {size} must be a multiple of {module.factor}, the pixels along a top code")
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    sharding = NamedSharding(mesh, BATCH)

    @jax.jit
    def encode(params: Any, pictures: jax.Array) -> jax.Array:
        levels = module.apply({"params": gather_rest(params, mesh)}, pictures, method="encode_codes")
        return jnp.concatenate([codes.reshape(len(pictures), -1) for codes in levels], axis=1)

    described = {
        "coder": params_hash(part.params),
        "size": size,
        "shape": [sum(side**2 for side in module.sides(size))],
    }
    return LatentEncoder(
        "codes", size, described, lambda pictures: encode(params, jax.device_put(pictures, sharding))
    )
