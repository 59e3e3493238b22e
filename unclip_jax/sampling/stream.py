"""unCLIP's cascade in segments: pictures that are shown as they clear up.

The decoder stops a few times and shows its prediction of the clean picture. It makes the same steps as in one
program, so the pictures agree with those of `unclip.sample_stages` up to rounding. One program serves every
number of stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import Known, sample_decoder
from unclip_jax.generate.options import Options
from unclip_jax.sampling.programs import (
    Overrides,
    Partial,
    Sampler,
    as_sampler,
    row_keys,
    with_scales,
)
from unclip_jax.sampling.unclip import (
    DECODER,
    Stages,
    check_call,
    draw_z_image,
    encode_captions,
    enlarge,
    made_by,
)


def _functions(
    sampler: Sampler, options: dict[str, Options], prior: str | None, decoder: str
) -> tuple[Callable, ...]:
    # The cascade in three functions: up to the decoder's noise, a segment of the decoder, and the upsamplers.
    # `given` is what the caller gives: z_image (or None), x_T (or None), and the known part (or None).
    def decode(params, scales, captions, empty, given, keys, segment):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        texts, (z_image, x_T, known) = encode_captions(networks["clip"], captions, empty), given
        return sample_decoder(
            networks[decoder], z_image, texts, fold_in(keys, DECODER), chosen[decoder],
            x_T=x_T, known=known, segment=segment, clip=networks["clip"],
        )  # fmt: skip

    def begin(params, scales, captions, empty, given, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys, segment, (z_image, *rest) = row_keys(seeds, positions), Segment(0, 1), given
        texts = encode_captions(networks["clip"], captions, empty)
        if prior is not None:
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
        decode(params, scales, captions, empty, (z_image, *rest), keys, segment)
        return texts.captions.embed, z_image, segment.carry

    def advance(params, scales, captions, empty, given, seeds, positions, carry, k, count):
        segment, keys = Segment(k, count, carry), row_keys(seeds, positions)
        drawn = decode(params, scales, captions, empty, given, keys, segment)
        return segment.carry, segment.x0, drawn

    def finish(params, drawn, seeds, positions):
        networks, keys = sampler.with_params(params), row_keys(seeds, positions)
        return enlarge(sampler.bundle.parts, networks, drawn, keys, options)

    return begin, advance, finish


def stream_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    partials: int,
    seed: int | Sequence[int] = 0,
    prior: str = "prior_diffusion",
    z_image: np.ndarray | None = None,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    x_T: np.ndarray | None = None,
    known: Known | None = None,
    decoder: str = "decoder",
) -> Iterator[Partial | Stages]:
    """Runs the cascade as `sample_stages` does, and shows what the decoder predicts on its way.

    Args:
      bundle, seed, prior, z_image, positions, options: as in `sample_stages`.
      captions: at most one batch of them (`Sampler.in_batches`).
      partials: how often the decoder stops to show its prediction, at least 0.
      x_T: (B, h, w, 3) the decoder's noise; drawn when None.
      known: the part of images to keep, for a decoder that inpaints.
      decoder: the part that decodes.

    Yields:
      A `Partial` per stop, then the `Stages`.

    Raises:
      ValueError, KeyError, NumericalError: as `sample_stages`.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    if partials < 0:
        raise InputError(f"partials must be at least 0, got {partials}")
    call = check_call(sampler, captions, seed, prior, z_image, positions, options, decoder)
    key = ("stream", call.prior, decoder, x_T is None, *call.options.items())
    functions = _functions(sampler, call.options, call.prior, decoder)
    begin, advance, finish = (
        sampler.program((*key, i), lambda run=run: run) for i, run in enumerate(functions)
    )
    given = (call.z_image, x_T, known)
    rows = (call.scales, sampler.captions(captions), given, call.seeds, call.positions)
    scale, texts, given, numbers, where = sampler.rows(rows, sampler.padded(len(captions)))
    params, empty = sampler.params, sampler.captions([""])
    z_text, z, carry = begin(params, scale, texts, empty, given, numbers, where)
    given = (z, *given[1:])
    for k in range(partials + 1):
        segment = np.int32(k), np.int32(partials + 1)
        carry, x0, drawn = advance(params, scale, texts, empty, given, numbers, where, carry, *segment)
        if k < partials:
            yield Partial(np.asarray(x0)[: len(captions)], (k + 1) / (partials + 1))
    images = finish(params, drawn, numbers, where)
    z = jnp.zeros_like(z_text) if z is None else z
    made = [np.asarray(a)[: len(captions)] for a in (z_text, z, *images)]
    for part, values in zip(made_by(sampler.bundle, call.prior or "none", decoder), made, strict=True):
        sampler.check_finite(part, values)
    yield Stages(*made[:2], made[2:])
