"""Captions to pictures: text, prior, decoder and upsamplers in one compiled program (unCLIP section 2).

Batches are padded to the next power of two, at most MAX_BATCH, so a bundle compiles a fixed, small number of programs however many
calls follow. Guidance scales are arguments of the program: changing one does not compile again, except between 1 (no guidance) and not 1.
Every row has its own random key: the picture of (caption, seed, position) does not depend on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate import (
    SamplingOptions,
    build_model,
    check_options,
    compute_dtype,
    encode_text,
    is_guided,
    options_from,
    part_schedule,
    sample_decoder,
    sample_prior,
    sample_upsampler,
)

MAX_BATCH = 16


class Stages(NamedTuple):
    """What each stage drew: z_text, z_image (B, D) raw embeddings; images, one float array (B, H, W, 3) in [-1, 1] per size, the
    decoder's first; all NumPy."""

    z_text: np.ndarray
    z_image: np.ndarray
    images: list[np.ndarray]


def upsampler_names(bundle: Bundle) -> list[str]:
    """The bundle's upsamplers in the order of their sizes."""
    return sorted((n for n in bundle.parts if n.startswith("upsampler_")), key=lambda n: int(n.split("_")[1]))


def stage_options(bundle: Bundle, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, SamplingOptions]:
    """The bundle's sampling defaults with overrides per part, e.g. {"decoder": {"guidance_scale": 3.0, "steps": 50}}.

    Raises:
      ValueError: on an unknown part or option, or a value out of range.
    """
    names = ["prior", "decoder", *upsampler_names(bundle)]
    unknown = set(overrides or {}) - set(names)
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))} in the sampling options; this bundle samples {', '.join(names)}")
    options = {}
    for name in names:
        chosen = options_from(bundle.sampling.get(name, {}), **(overrides or {}).get(name, {}))
        try:
            check_options(chosen, part_schedule(bundle.part(name).config).num_steps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        options[name] = chosen
    return options


def _compiled(bundle: Bundle, options: dict[str, SamplingOptions]) -> tuple[Callable, dict, Callable]:
    """The jitted cascade for these options (scales apart), the parameters on the device, and the tokenizer; kept in the bundle."""
    if "params" not in bundle.cache:
        bundle.cache["tokenizer"] = ClipTokenizer.from_config(bundle.tokenizer)
        bundle.cache["params"] = jax.device_put({name: part.params for name, part in bundle.parts.items()})
    # Scales other than 1 are arguments; only whether there is one is part of the program.
    static = {n: dataclasses.replace(o, guidance_scale=0.0 if is_guided(o) else 1.0) for n, o in options.items()}
    key = tuple(static.items())
    if key not in bundle.cache:
        bundle.cache[key] = jax.jit(_cascade(bundle, static))
    return bundle.cache[key], bundle.cache["params"], bundle.cache["tokenizer"]


def _cascade(bundle: Bundle, options: dict[str, SamplingOptions]) -> Callable:
    models = {name: build_model(part.config, compute_dtype("auto")) for name, part in bundle.parts.items()}
    configs = {name: part.config for name, part in bundle.parts.items()}

    def run(params, scales, tokens, mask, empty_tokens, empty_mask, seed, positions):
        def chosen(name):
            return dataclasses.replace(options[name], guidance_scale=scales[name]) if is_guided(options[name]) else options[name]

        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(positions)
        text = encode_text(models["clip"], params["clip"], tokens, mask)
        empty = encode_text(models["clip"], params["clip"], empty_tokens, empty_mask)
        z_image = sample_prior(
            models["prior"], params["prior"], configs["prior"], text, empty, fold_in(keys, 0), chosen("prior")
        )
        images = [
            sample_decoder(
                models["decoder"], params["decoder"], configs["decoder"], z_image, text, empty, fold_in(keys, 1), chosen("decoder")
            )
        ]
        for i, name in enumerate(upsampler_names(bundle)):
            images.append(sample_upsampler(models[name], params[name], configs[name], images[-1], fold_in(keys, 2 + i), options[name]))
        return text.embed, z_image, images

    return run


def sample_stages(
    bundle: Bundle,
    captions: Sequence[str],
    *,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Stages:
    """Runs the cascade and keeps what every stage drew.

    Args:
      bundle: with parts clip, prior, decoder, and any number of upsamplers.
      captions: any number of texts, of any length (cut to the tokenizer's slots).
      seed: non-negative integer.
      options: overrides of the bundle's sampling defaults per part.
      progress: called with (images done, images in all) after each batch.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: when there are no captions, or options are out of range; KeyError when the bundle lacks a part.
    """
    captions = list(captions)
    if not captions:
        raise ValueError("no captions: give at least one")
    for name in ("clip", "prior", "decoder"):
        bundle.part(name)
    chosen = stage_options(bundle, options)
    run, params, tokenizer = _compiled(bundle, chosen)
    scales = {name: jnp.float32(o.guidance_scale) for name, o in chosen.items()}
    empty_tokens, empty_mask = (a[None] for a in tokenizer.empty())
    tokens, mask = tokenizer(captions)
    pieces = []
    for first in range(0, len(captions), MAX_BATCH):
        rows = np.arange(first, min(first + MAX_BATCH, len(captions)))
        size = 1 << (len(rows) - 1).bit_length()
        padded = np.concatenate([rows, np.full(size - len(rows), rows[-1])])
        out = run(params, scales, tokens[padded], mask[padded], empty_tokens, empty_mask, np.uint32(seed), padded.astype(np.uint32))
        pieces.append([np.asarray(a)[: len(rows)] for a in jax.tree.leaves(out)])
        if progress is not None:
            progress(int(rows[-1]) + 1, len(captions))
    z_text, z_image, *images = (np.concatenate(column) for column in zip(*pieces))
    return Stages(z_text, z_image, images)


def text_to_image(
    bundle: Bundle,
    captions: Sequence[str] | str,
    *,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draws one picture per caption.

    Args:
      bundle: from `load_bundle`.
      captions: texts; a single string is one caption.
      seed, options, progress: as in `sample_stages`.

    Returns:
      uint8 (B, H, W, 3), H = W = the largest upsampler's size, or the decoder's when there is none.

    Raises:
      ValueError, KeyError: as in `sample_stages`.
    """
    captions = [captions] if isinstance(captions, str) else captions
    return ops.to_uint8(sample_stages(bundle, captions, seed=seed, options=options, progress=progress).images[-1])
