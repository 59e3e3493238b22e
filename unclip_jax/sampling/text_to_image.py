"""Captions to pictures: text, prior, decoder and upsamplers in one compiled program (unCLIP section 2).

Guidance scales are arguments of the program: changing one does not compile again, except between 1 (no guidance) and not 1.
Every row has its own random key: the picture of (caption, seed, position) does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate import Options, sample_decoder
from unclip_jax.sampling import programs


class Stages(NamedTuple):
    """What each stage drew: z_text, z_image (B, D) raw embeddings; images, one float array (B, H, W, 3) in [-1, 1] per size, the
    decoder's first; all NumPy. Without an embedding (prior `null`) z_image is zero."""

    z_text: np.ndarray
    z_image: np.ndarray
    images: list[np.ndarray]


def _cascade(bundle: Bundle, options: dict[str, Options], prior: str | None) -> Callable:
    # prior None: z_i is given.
    models = programs.models_of(bundle)
    configs = {name: part.config for name, part in bundle.parts.items()}

    def run(params, scales, captions, empty, z_image, seed, positions):
        chosen = {name: programs.with_scale(options[name], scales[name]) for name in options}
        keys = programs.row_keys(seed, positions)
        text, nothing = programs.both_texts(models["clip"], params["clip"], captions, empty)
        if prior is not None:
            z_image = programs.draw_z_image(prior, models, params, configs, text, nothing, fold_in(keys, 0), chosen)
        drawn = sample_decoder(
            models["decoder"], params["decoder"], configs["decoder"], z_image, text, nothing, fold_in(keys, 1), chosen["decoder"]
        )
        images = programs.enlarge(drawn, models, params, configs, keys, options)
        return text.embed, jnp.zeros_like(text.embed) if z_image is None else z_image, images

    return run


def sample_stages(
    bundle: Bundle,
    captions: Sequence[str],
    *,
    seed: int = 0,
    prior: str = "diffusion",
    z_image: np.ndarray | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Stages:
    """Runs the cascade and keeps what every stage drew.

    Args:
      bundle: with parts clip, decoder, the prior chosen, and any number of upsamplers.
      captions: any number of texts, of any length (cut to the tokenizer's slots).
      seed: non-negative integer.
      prior: `diffusion` or `ar`; or, as in the paper's ablation, `none`: the text embedding takes the place of z_i, or `null`: the
        decoder's null embedding does, and the caption alone says what to draw.
      z_image: (B, D) raw image embeddings, one per caption, to be drawn instead of the prior's.
      options: overrides of the bundle's sampling defaults per part.
      progress: called with (images done, images in all) after each batch.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: when there are no captions, another number of embeddings, or options are out of range; KeyError when the bundle lacks a
        part.
    """
    captions = list(captions)
    if not captions:
        raise ValueError("no captions: give at least one")
    for name in ("clip", "decoder"):
        bundle.part(name)
    way = prior if z_image is None else None
    if way is not None:
        programs.check_prior(bundle, way)
    elif len(z_image) != len(captions):
        raise ValueError(f"expected one embedding per caption, got {len(z_image)} and {len(captions)}")
    static, scales = programs.split_scales(programs.stage_options(bundle, options))
    run = programs.program(bundle, ("text_to_image", way, *static.items()), lambda: _cascade(bundle, static, way))
    params, arrays, empty = programs.device_params(bundle), programs.captions_of(bundle, captions), programs.captions_of(bundle, [""])

    given = None if z_image is None else np.asarray(z_image, np.float32)

    def batch(rows):
        texts, z, positions = programs.rows_of(bundle, (arrays, given, np.arange(len(captions), dtype=np.uint32)), rows)
        return run(params, scales, texts, empty, z, np.uint32(seed), positions)

    return Stages(*programs.in_batches(bundle, batch, len(captions), progress))


def text_to_image(
    bundle: Bundle,
    captions: Sequence[str] | str,
    *,
    seed: int = 0,
    prior: str = "diffusion",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draws one picture per caption.

    Args:
      bundle: from `load_bundle`.
      captions: texts; a single string is one caption.
      seed, prior, options, progress: as in `sample_stages`.

    Returns:
      uint8 (B, H, W, 3), H = W = the largest upsampler's size, or the decoder's when there is none.

    Raises:
      ValueError, KeyError: as in `sample_stages`.
    """
    captions = [captions] if isinstance(captions, str) else captions
    return ops.to_uint8(sample_stages(bundle, captions, seed=seed, prior=prior, options=options, progress=progress).images[-1])
