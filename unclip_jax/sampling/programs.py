"""What the functions of this package share: a bundle's parameters on the device, its compiled programs, and padded batches.

Batches are padded to the next power of two, at most MAX_BATCH, so a bundle compiles a fixed, small number of programs however many
calls follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate import (
    Options,
    TextConditioning,
    build_model,
    check_options,
    compute_dtype,
    encode_text,
    is_guided,
    options_from,
    sample_prior,
    sample_upsampler,
)
from unclip_jax.models.prior_ar import Codec

MAX_BATCH = 16


def upsampler_names(parts: Iterable[str]) -> list[str]:
    """The upsamplers among the names of parts, in the order of their sizes; networks for a last step (`_last`) are not among them."""
    return sorted((n for n in parts if n.startswith("upsampler_") and not n.endswith("_last")), key=lambda n: int(n.split("_")[1]))


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


def device_params(bundle: Bundle) -> dict[str, Any]:
    """All parts' parameters on the device, put there once."""
    if "params" not in bundle.cache:
        bundle.cache["params"] = jax.device_put({name: part.params for name, part in bundle.parts.items()})
    return bundle.cache["params"]


def tokenizer(bundle: Bundle) -> ClipTokenizer:
    """The bundle's tokenizer, made once."""
    if "tokenizer" not in bundle.cache:
        bundle.cache["tokenizer"] = ClipTokenizer.from_config(bundle.tokenizer)
    return bundle.cache["tokenizer"]


def models_of(bundle: Bundle) -> dict[str, nn.Module]:
    """Every network's module, in the compute dtype of this machine."""
    return {name: build_model(part.config, compute_dtype("auto")) for name, part in bundle.parts.items() if name != "pca"}


def program(bundle: Bundle, key: Hashable, make: Callable[[], Callable]) -> Callable:
    """The jitted function of `make()`, made once per bundle and key."""
    if key not in bundle.cache:
        bundle.cache[key] = jax.jit(make())
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


def rows_of(batch: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of every array."""
    return {name: array[rows] for name, array in batch.items()}


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
    run: Callable[[np.ndarray], Any], count: int, progress: Callable[[int, int], None] | None = None, max_batch: int | None = None
) -> Any:
    """Calls `run(rows)` on padded batches of row indices and joins the results.

    Args:
      run: row indices (a power of two of them, the last one repeated as padding) -> tree of arrays with that leading axis.
      count: number of rows, at least 1.
      progress: called with (rows done, rows in all) after each batch.
      max_batch: at most so many rows at once; MAX_BATCH when None.

    Returns:
      The tree as NumPy arrays of `count` rows.
    """
    pieces, size_most = [], max_batch or MAX_BATCH
    for first in range(0, count, size_most):
        rows = np.arange(first, min(first + size_most, count))
        size = 1 << (len(rows) - 1).bit_length()
        leaves, tree = jax.tree.flatten(run(np.concatenate([rows, np.full(size - len(rows), rows[-1])])))
        pieces.append([np.asarray(a)[: len(rows)] for a in leaves])
        if progress is not None:
            progress(int(rows[-1]) + 1, count)
    return jax.tree.unflatten(tree, [np.concatenate(column) for column in zip(*pieces)])
