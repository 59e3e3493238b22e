"""Completion: keeps the upper rows of a picture and draws the rows below them for a caption (DALL-E, and
dalle-mini).

A discrete VAE or a VQGAN makes a grid of codes of the picture. The codes of the upper rows stay. The
transformer, which draws codes in raster order, begins behind them: it reads the caption and these codes at
once, and draws the rest. Ramesh et al. 2021 have this from the factorisation of section 2.2, without training
for it.

The decoder of the codes makes all pixels of the result. So the upper rows show what the codes keep of
the picture, and not its own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.dalle import CASCADE, Cascade, TokenStages, check_call, sample_stages, sizes
from unclip_jax.sampling.edits.img2img import check_rows
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler

ROWS = 0.5


def check_share(rows: float) -> None:
    """Raises ValueError unless the share of the rows that are kept lies in (0, 1)."""
    if not 0 < rows < 1:
        raise InputError(f"rows is the share of the picture that is kept, in (0, 1), got {rows:g}")


def kept_rows(rows: float, side: int) -> int:
    """The number of rows of codes, of `side`, that a share of them keeps: the nearest whole number.

    Raises:
      ValueError: if the share is out of range, or keeps no row or all of them.
    """
    check_share(rows)
    kept = round(rows * side)
    if not 0 < kept < side:
        raise InputError(
            f"rows={rows:g} keeps {kept} of {side} rows of codes: give a share from {1 / side:g} "
            f"to {1 - 1 / side:g}"
        )
    return kept


def complete(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    rows: float = ROWS,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
    cascade: Cascade = CASCADE,
) -> TokenStages:
    """Completes pictures from their upper rows, each for its own caption.

    Args:
      bundle: with the parts of the cascade, and a CLIP where candidates are ranked.
      images: uint8 (H, W, 3), any sizes. They are cropped to their centred squares and resized.
      captions: one per image; each describes the whole picture.
      rows: the share of the rows that are kept, from the top, in (0, 1). It is rounded to rows of codes.
      seed, positions, options, progress: as in `dalle.sample_stages`.

    Returns:
      The stages; the upper rows of `codes` are those of the images.

    Raises:
      ValueError: if an input is not an image, the share keeps no row of codes or all of them, or an option is
        out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    check_rows(images, captions)
    check_call(sampler, len(captions), seed, positions, options, cascade)
    network, coder = cascade
    kept = kept_rows(rows, sampler.network(network).module.side)
    target = ops.to_float(square(images, sizes(sampler.bundle, cascade=cascade)[0]))

    def make():
        encode = lambda params, image: sampler.with_params(params)[coder].apply(image, method="encode_codes")
        return lambda params, image: encode(params, image)[0]

    encode = sampler.program((network, "encode"), make)
    batch = lambda numbers: encode(sampler.params, sampler.rows(target, numbers))
    codes = np.asarray(sampler.in_batches(batch, len(images), [coder]))
    return sample_stages(
        sampler, captions, seed=seed, positions=positions, options=options, known=codes[:, :kept],
        progress=progress, cascade=cascade,
    )  # fmt: skip
