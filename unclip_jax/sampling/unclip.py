"""unCLIP's cascade: text, prior, decoder and upsamplers in one compiled program (unCLIP section 2).

Guidance scales are arguments of the program. A new scale does not compile the program again, unless it turns
guidance on or off (scale 1 means no guidance). Every row has its own random key, so the image of
(caption, seed, position) does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, last_step, upsamplers
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import sample_decoder
from unclip_jax.generate.networks import Network, image_size
from unclip_jax.generate.options import Options
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import Texts, encode_text
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.models.codec import Codec
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)

# What each stage of the cascade folds into a row's random key. Upsampler i folds in UPSAMPLERS + i.
PRIOR, DECODER, UPSAMPLERS = 0, 1, 2
# The ways to get z_i, and the parts that each needs. `none` uses the text embedding in place of z_i;
# `null` uses the decoder's null embedding.
PRIORS: dict[str, tuple[str, ...]] = {
    "prior_diffusion": ("prior_diffusion",),
    "prior_ar": ("prior_ar", "codec"),
    "none": (),
    "null": (),
}


class Stages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    z_text: (B, D) raw text embeddings.
    z_image: (B, D) raw image embeddings; zero with the prior `null`.
    images: one float array (B, H, W, 3) in [-1, 1] per size, the decoder's first.
    """

    z_text: np.ndarray
    z_image: np.ndarray
    images: list[np.ndarray]


def check_prior_name(prior: str) -> None:
    """Raises a ValueError if a prior is unknown."""
    if prior not in PRIORS:
        raise InputError(f"unknown prior {prior!r}; choose one of {', '.join(PRIORS)}")


def check_prior(bundle: Bundle, prior: str) -> None:
    """Raises a ValueError if a prior is unknown, and a KeyError if the bundle lacks a part that it needs."""
    check_prior_name(prior)
    for name in PRIORS[prior]:
        bundle.part(name)


def made_by(bundle: Bundle, prior: str, decoder: str = "decoder") -> list[str]:
    """The parts that make z_text, z_image, the decoder's image, and each upsampler's, in this order."""
    return ["clip", *(PRIORS[prior] or ("clip",))[:1], decoder, *upsamplers(bundle.parts)]


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle. A CLIP alone makes a bundle too."""
    return ("clip",) if set(parts) == {"clip"} else ("clip", "prior_diffusion", "decoder")


def sizes(bundle: Bundle) -> list[int]:
    """The sides in pixels of the pictures that the stages draw, the decoder's first."""
    return [image_size(bundle.part(name).config) for name in ("decoder", *upsamplers(bundle.parts))]


def check_embeddings(sampler: Sampler, z_image: np.ndarray) -> np.ndarray:
    """Image embeddings that a caller gives, float32.

    Raises:
      ValueError: unless they are (N, D), N at least 1, and finite.
    """
    z_image, dim = np.asarray(z_image, np.float32), sampler.network("clip").config["model"]["embed_dim"]
    if z_image.ndim != 2 or len(z_image) == 0 or z_image.shape[1] != dim:
        raise InputError(f"z_image must be (N, {dim}) with N at least 1, got {z_image.shape}")
    if not np.isfinite(z_image).all():
        raise InputError("z_image has values that are not finite (NaN or infinity)")
    return z_image


def encode_captions(
    clip: Network, captions: Mapping[str, jax.Array], empty: Mapping[str, jax.Array]
) -> Texts:
    """Encodes captions (B rows of `Sampler.captions`) and the empty caption (one row)."""
    return Texts(encode_text(clip, captions), encode_text(clip, empty))


def draw_z_image(
    prior: str, networks: Mapping[str, Network], texts: Texts, keys: jax.Array, options: Mapping[str, Options]
) -> jax.Array | None:
    """Draws z_i (B, D) for B captions with one of PRIORS; None stands for the null embedding.

    keys: (B,), one per row.
    """
    if prior == "none":
        return texts.captions.embed
    if prior == "null":
        return None
    codec = Codec(**networks["codec"].params) if prior == "prior_ar" else None
    return sample_prior(networks[prior], texts, fold_in(keys, PRIOR), options[prior], codec)


def enlarge(
    parts: Mapping[str, Part],
    networks: Mapping[str, Network],
    image: jax.Array,
    keys: jax.Array,
    options: Mapping[str, Options],
) -> list[jax.Array]:
    """Runs the upsamplers one after another, in the order of their sizes.

    Args:
      parts: the bundle's parts.
      networks: their networks.
      image: (B, h, w, 3), the decoder's output.
      keys: (B,), one per row.
      options: sampling options per part.

    Returns:
      The decoder's output, then the output of each upsampler, each (B, H, W, 3).
    """
    images = [image]
    for i, name in enumerate(upsamplers(parts)):
        final = last_step(parts, name)
        last = None if final is None else networks[final]
        key = fold_in(keys, UPSAMPLERS + i)
        images.append(sample_upsampler(networks[name], images[-1], key, options[name], last))
    return images


def _cascade(sampler: Sampler, options: dict[str, Options], prior: str | None) -> Callable:
    # With prior None, the caller gives z_image.
    def run(params, scales, captions, empty, z_image, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys = row_keys(seeds, positions)
        texts = encode_captions(networks["clip"], captions, empty)
        if prior is not None:
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
        drawn = sample_decoder(
            networks["decoder"], z_image, texts, fold_in(keys, DECODER), chosen["decoder"],
            clip=networks["clip"],
        )  # fmt: skip
        images = enlarge(sampler.bundle.parts, networks, drawn, keys, options)
        z_text = texts.captions.embed
        return z_text, jnp.zeros_like(z_text) if z_image is None else z_image, images

    return run


class Call(NamedTuple):
    """The checked arguments of a call of the cascade, for B captions.

    prior: None where the caller gives `z_image`.
    z_image: (B, D) float32, or None.
    seeds, positions: (B,) uint32.
    options, scales: per part, from `split_scales`.
    """

    prior: str | None
    z_image: np.ndarray | None
    seeds: np.ndarray
    positions: np.ndarray
    options: dict[str, Options]
    scales: dict[str, Any]


def check_call(
    sampler: Sampler,
    captions: Sequence[str],
    seed: int | Sequence[int],
    prior: str,
    z_image: np.ndarray | None,
    positions: Sequence[int] | None,
    options: Overrides | Sequence[Overrides],
    decoder: str = "decoder",
) -> Call:
    """Checks the arguments of `sample_stages`, with the part that decodes, before anything is compiled.

    Raises:
      ValueError, KeyError: as `sample_stages`.
    """
    count = len(captions)
    if not count:
        raise InputError("no captions: give at least one")
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    for name in ("clip", decoder):
        sampler.bundle.part(name)
    if z_image is None:
        check_prior(sampler.bundle, prior)
    elif len(z_image) != count:
        raise InputError(f"expected one embedding per caption, got {len(z_image)} and {count}")
    static, scales = split_scales(sampler.row_options(options, count))
    if z_image is None:
        return Call(prior, None, seeds, places, static, scales)
    return Call(None, check_embeddings(sampler, z_image), seeds, places, static, scales)


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    prior: str = "prior_diffusion",
    z_image: np.ndarray | None = None,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> Stages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts clip and decoder, the chosen prior's parts, and any number of upsamplers.
      captions: at least one text. The tokenizer truncates texts that are too long.
      seed: whole number below 2**32, or a list with one per caption.
      prior: how to get z_i. `prior_diffusion` and `prior_ar` draw it with that prior. The other two are those
        of the paper's ablation: `none` gives the decoder the text embedding in place of z_i; `null` gives it
        the null embedding, so that only the caption conditions it.
      z_image: (B, D) raw image embeddings, one per caption. If given, they replace the prior's.
      positions: one whole number per caption; None means 0 to B - 1. Row i draws its noise for
        (seed, positions[i]): caption i of a longer call is drawn alone by positions=[i].
      options: overrides of the bundle's sampling defaults per part; or a list with one per caption, which
        may then differ in guidance scales only.
      progress: called with (images done, total images) after each batch.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions, the number of embeddings differs from that of captions, the prior
        is unknown, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    call = check_call(sampler, captions, seed, prior, z_image, positions, options)
    key = ("text_to_image", call.prior, *call.options.items())
    run = sampler.program(key, lambda: _cascade(sampler, call.options, call.prior))
    arrays, empty = sampler.captions(captions), sampler.captions([""])
    inputs = (call.scales, arrays, call.z_image, call.seeds, call.positions)

    def batch(rows):
        scale, texts, z, numbers, where = sampler.rows(inputs, rows)
        return run(sampler.params, scale, texts, empty, z, numbers, where)

    parts = made_by(sampler.bundle, call.prior or "none")
    return Stages(*sampler.in_batches(batch, len(captions), parts, progress))
