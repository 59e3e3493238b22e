"""What the functions of this package share: a bundle's parameters on the device, its compiled programs, and padded batches.

Batches are padded to the next power of two, at most MAX_BATCH, on each device, so a bundle compiles a fixed, small number of programs
however many calls follow. A batch is split over the devices of the bundle's mesh; parameters are replicated or sharded, as the mesh says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.checkpoint.bundle import Bundle, upsampler_names
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate import (
    Options,
    TextConditioning,
    check_options,
    encode_text,
    is_guided,
    options_from,
    sample_prior,
    sample_upsampler,
    sampling_model,
)
from unclip_jax.models.prior_ar import Codec
from unclip_jax.sharding import BATCH, compute_dtype, path_name, placer, replicate, sampling_mesh

MAX_BATCH = 16


def stage_options(bundle: Bundle, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Options]:
    """The bundle's sampling defaults with overrides per part, e.g. {"decoder": {"guidance_scale": 3.0, "steps": 50}}.

    Raises:
      ValueError: on an unknown part or option, or a value out of range.
    """
    names = [name for name in ("prior", "prior_ar", "decoder", "decoder_inpaint") if name in bundle.parts] + upsampler_names(bundle.parts)
    unknown = set(overrides or {}) - set(names)
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))} in the sampling options; this bundle samples {', '.join(names)}")
    options = {}
    for name in names:
        config = bundle.part(name).config
        chosen = options_from(bundle.sampling.get(name, {}), config["kind"], **(overrides or {}).get(name, {}))
        try:
            check_options(chosen, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        options[name] = chosen
    return options


def mesh_of(bundle: Bundle) -> Mesh:
    """The mesh that a bundle is sampled on: the one it was loaded onto, else `sharding.sampling_mesh`'s."""
    if "mesh" not in bundle.cache:
        sizes = (leaf.size for part in bundle.parts.values() for leaf in jax.tree.leaves(part.params))
        bytes_each = jnp.dtype(compute_dtype("auto")).itemsize
        bundle.cache["mesh"] = bundle.mesh or sampling_mesh(weight_bytes=bytes_each * sum(sizes))
    return bundle.cache["mesh"]


def device_params(bundle: Bundle) -> dict[str, Any]:
    """All parts' parameters on the bundle's mesh, put there once."""
    if "params" not in bundle.cache:
        params = {name: part.params for name, part in bundle.parts.items()}
        if bundle.mesh is None:
            mesh = mesh_of(bundle)
            place, put = placer(mesh), replicate(params.pop("pca", {}), mesh)
            params = jax.tree_util.tree_map_with_path(lambda path, value: place(path_name(path), value), params)
            params |= {"pca": put} if put else {}
        bundle.cache["params"] = params
    return bundle.cache["params"]


def tokenizer(bundle: Bundle) -> ClipTokenizer:
    """The bundle's tokenizer, made once."""
    if "tokenizer" not in bundle.cache:
        bundle.cache["tokenizer"] = ClipTokenizer.from_config(bundle.tokenizer)
    return bundle.cache["tokenizer"]


def models_of(bundle: Bundle) -> dict[str, nn.Module]:
    """Every network's module, in the compute dtype of the bundle's mesh."""
    return {name: sampling_model(part.config, mesh_of(bundle)) for name, part in bundle.parts.items() if name != "pca"}


def program(bundle: Bundle, key: Hashable, make: Callable[[], Callable]) -> Callable:
    """The jitted function of `make()`, made once per bundle and key. Its results are whole on every device."""
    if key not in bundle.cache:
        bundle.cache[key] = jax.jit(make(), out_shardings=NamedSharding(mesh_of(bundle), PartitionSpec()))
    return bundle.cache[key]


def split_scales(options: Mapping[str, Options]) -> tuple[dict[str, Options], dict[str, jax.Array]]:
    """Options with the guidance scales taken out, to be part of a program's key, and the scales, to be its arguments.

    Only whether there is guidance stays in the options (scale 0 or 1); `with_scale` joins the two again inside the program.
    """
    static = {n: dataclasses.replace(o, guidance_scale=0.0 if is_guided(o) else 1.0) for n, o in options.items()}
    return static, {name: jnp.float32(o.guidance_scale) for name, o in options.items()}


def with_scale(options: Options, scale: jax.Array) -> Options:
    """Options out of `split_scales` with their (traced) scale, if they are guided."""
    return dataclasses.replace(options, guidance_scale=scale) if is_guided(options) else options


def row_keys(seed: jax.Array, positions: jax.Array) -> jax.Array:
    """One key per row: what is drawn for (seed, position) does not depend on the rest of the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(positions)


def captions_of(bundle: Bundle, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Captions as the bundle's networks take them (`tokenizer.caption_arrays`).

    Raises:
      ValueError: when two parts have text encoders with different tokenizers.
    """
    if "own_tokenizer" not in bundle.cache:
        configs = [part.config["text_tokenizer"] for part in bundle.parts.values() if "text_tokenizer" in part.config]
        if any(config != configs[0] for config in configs):
            raise ValueError(f"the parts of {bundle.path or 'the bundle'} have text encoders with different tokenizers")
        bundle.cache["own_tokenizer"] = ClipTokenizer.from_config(configs[0]) if configs else None
    return caption_arrays(captions, tokenizer(bundle), bundle.cache["own_tokenizer"])


def rows_of(bundle: Bundle, batch: Any, rows: np.ndarray) -> Any:
    """Some rows of every array of a tree, split over the bundle's mesh."""
    return jax.device_put(jax.tree.map(lambda array: array[rows], batch), NamedSharding(mesh_of(bundle), BATCH))


def both_texts(
    model: nn.Module, params: Any, captions: Mapping[str, jax.Array], empty: Mapping[str, jax.Array]
) -> tuple[TextConditioning, TextConditioning]:
    """Captions (B rows of `captions_of`) and the empty caption (one row), encoded."""
    return encode_text(model, params, captions), encode_text(model, params, empty)


PRIORS = ("diffusion", "ar", "none", "null")


def check_prior(bundle: Bundle, prior: str) -> None:
    """Raises ValueError on an unknown way to z_i, KeyError when the bundle lacks its parts."""
    if prior not in PRIORS:
        raise ValueError(f"unknown prior {prior!r}; choose one of {', '.join(PRIORS)}")
    for name in {"diffusion": ("prior",), "ar": ("prior_ar", "pca")}.get(prior, ()):
        bundle.part(name)


def draw_z_image(
    prior: str,
    models: Mapping[str, nn.Module],
    params: Mapping[str, Any],
    configs: Mapping[str, dict],
    text: TextConditioning,
    empty: TextConditioning,
    keys: jax.Array,
    options: Mapping[str, Options],
) -> jax.Array | None:
    """z_i (B, D) for captions, by one of PRIORS: either prior, the text embedding itself (`none`) or the null embedding (None)."""
    if prior == "none":
        return text.embed
    if prior == "null":
        return None
    name = {"diffusion": "prior", "ar": "prior_ar"}[prior]
    codec = Codec(**params["pca"]) if prior == "ar" else None
    return sample_prior(models[name], params[name], configs[name], text, empty, keys, options[name], codec)


def enlarge(
    image: jax.Array,
    models: Mapping[str, nn.Module],
    params: Mapping[str, Any],
    configs: Mapping[str, dict],
    keys: jax.Array,
    options: Mapping[str, Options],
) -> list[jax.Array]:
    """What the decoder drew (B, h, w, 3), and after it what each upsampler makes of the one before, in the order of their sizes.

    keys: (B,), one per row; folds 0 and 1 are the prior's and the decoder's, those from 2 on the upsamplers'.
    """
    images = [image]
    for i, name in enumerate(upsampler_names(models)):
        final = f"{name}_last"
        last = (models[final], params[final]) if final in models else None
        images.append(sample_upsampler(models[name], params[name], configs[name], images[-1], fold_in(keys, 2 + i), options[name], last))
    return images


def in_batches(
    bundle: Bundle,
    run: Callable[[np.ndarray], Any],
    count: int,
    progress: Callable[[int, int], None] | None = None,
    max_batch: int | None = None,
) -> Any:
    """Calls `run(rows)` on padded batches of row indices and joins the results.

    Args:
      run: row indices (a power of two of them for each device of the mesh, the last one repeated as padding) -> tree of arrays with that
        leading axis.
      count: number of rows, at least 1.
      progress: called with (rows done, rows in all) after each batch.
      max_batch: at most so many rows at once on each device; MAX_BATCH when None.

    Returns:
      The tree as NumPy arrays of `count` rows.
    """
    mesh, pieces = mesh_of(bundle), []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size_most = ways * (max_batch or MAX_BATCH)
    for first in range(0, count, size_most):
        rows = np.arange(first, min(first + size_most, count))
        size = ways << (-(-len(rows) // ways) - 1).bit_length()
        leaves, tree = jax.tree.flatten(run(np.concatenate([rows, np.full(size - len(rows), rows[-1])])))
        pieces.append([np.asarray(a)[: len(rows)] for a in leaves])
        if progress is not None:
            progress(int(rows[-1]) + 1, count)
    return jax.tree.unflatten(tree, [np.concatenate(column) for column in zip(*pieces)])
