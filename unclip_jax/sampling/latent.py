"""Latent diffusion's cascade: text, latents, autoencoder, in one compiled program (Rombach et al. 2022).

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key. The
negative caption is an argument too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import Inputs, decode_latents, sample_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import LatentSamplingOptions, Options, is_guided
from unclip_jax.generate.text import Texts, encode_text
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

log = logging.getLogger(__name__)
LATENT = 0  # what the stage folds into a row's random key
PARTS = ("latent", "autoencoder")  # and the clip, where the U-Net reads captions
LARGEST_SIDE = 4096  # of a picture, in pixels


class LatentStages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    latents: (B, h, w, Z) scaled latents.
    images: [float array (B, H, W, 3) in [-1, 1]].
    """

    latents: np.ndarray
    images: list[np.ndarray]


def picture_size(sampler: Sampler, options: LatentSamplingOptions, part: str = "latent") -> tuple[int, int]:
    """(h, w) of the latents of a picture of the size that the options ask for, drawn by `part`.

    Raises:
      ValueError: when a side is no multiple of what autoencoder and U-Net need, or out of range.
    """
    factor, module = sampler.network("autoencoder").module.factor, sampler.network(part).module
    side, multiple, sizes = module.image_size, factor * module.multiple, []
    for name, pixels in (("height", options.height), ("width", options.width)):
        pixels = side * factor if pixels is None else pixels
        if pixels % multiple or not multiple <= pixels <= LARGEST_SIDE:
            raise InputError(
                f"the {name} of a picture must be a multiple of {multiple} from {multiple} to "
                f"{LARGEST_SIDE} pixels, got {pixels}"
            )
        sizes.append(pixels // factor)
    return sizes[0], sizes[1]


def noise_shape(sampler: Sampler) -> tuple[int, int, int]:
    """(h, w, Z) of the latents that a bundle draws by its defaults, and of their noise."""
    module = sampler.network("latent").module
    return module.image_size, module.image_size, module.out_channels


def exact_ddim(steps: Any, guidance_scale: float, eta: float) -> dict[str, dict[str, Any]]:
    """Overrides of the U-Net's options: DDIM from one end of the schedule to the other, which can be
    inverted, at the bundle's own size and with z_i as it is."""
    exact = {"sampler": "ddim", "spacing": "even", "offset": 0, "last": "clean", "clip": None}
    exact |= {"threshold": None, "threshold_most": None, "noise_level": 0}
    exact |= {"negative": "", "height": None, "width": None}
    return {"latent": {"steps": steps, "guidance_scale": guidance_scale, "eta": eta, **exact}}


def tile_size(sampler: Sampler, options: LatentSamplingOptions) -> int | None:
    """The side of the decoder's tiles in latents; None for the whole picture.

    Raises:
      ValueError: when it is no multiple of the autoencoder's factor, or below 4 latents.
    """
    if options.tile is None:
        return None
    factor = sampler.network("autoencoder").module.factor
    if options.tile % factor or options.tile < 4 * factor:
        raise InputError(
            f"tile must be a multiple of {factor} pixels, at least {4 * factor}, got {options.tile}"
        )
    return options.tile // factor


def sizes(bundle: Bundle) -> list[int]:
    """The side in pixels of the picture that a bundle draws by its defaults."""
    return latent_sides(bundle, "latent")


def latent_sides(bundle: Bundle, name: str) -> list[int]:
    """As `sizes`, of pictures that the part `name` draws."""
    levels = len(bundle.part("autoencoder").config["model"]["channel_mult"])
    model = bundle.part(name).config["model"]
    return [model.get("unet", model)["image_size"] * 2 ** (levels - 1)]


def made_by(bundle: Bundle, prior: None = None) -> list[str]:
    """The parts that draw: clip where the U-Net reads captions, the U-Net and the autoencoder."""
    return [*(["clip"] if reads(bundle) == "captions" else []), *PARTS]


def owns(config: Mapping[str, Any]) -> bool:
    """Whether a part `latent` of this configuration draws without an image embedding."""
    return config["kind"] == "latent" and "augmentation" not in config


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle."""
    return tuple(made_by(Bundle(dict(parts)))) if "latent" in parts else PARTS


def enlarges(model: Mapping[str, Any]) -> bool:
    """Whether a U-Net of these keyword arguments sees a small image (3 channels) beside the latents."""
    return "in_channels" in model and model["in_channels"] == model["out_channels"] + 3


def check_draws(bundle: Bundle) -> None:
    """Raises a ValueError if the bundle's U-Net needs more than a caption."""
    model = bundle.part("latent").config["model"]
    if model["in_channels"] != model["out_channels"]:
        raise InputError(
            f"the part 'latent' of {bundle.path or 'the bundle'} "
            f"{'enlarges' if enlarges(model) else 'inpaints'}: it takes {model['in_channels']} channels, "
            "and a caption alone does not give them"
        )


class Call(NamedTuple):
    """The checked arguments of a call of a latent U-Net, for B pictures.

    seeds, positions: (B,) uint32.
    options, scales: of the U-Net, by its part's name, from `split_scales`; without the negative captions, and
      with the filter on, so that calls which differ in these share a program.
    negative: B negative captions.
    drawn_with: the options of the first row, as they were given.
    """

    seeds: np.ndarray
    positions: np.ndarray
    options: dict[str, Options]
    scales: dict[str, np.ndarray]
    negative: list[str]
    drawn_with: LatentSamplingOptions


def check_call(
    sampler: Sampler,
    name: str,
    count: int,
    seed: int | Sequence[int],
    positions: Sequence[int] | None,
    options: Overrides | Sequence[Overrides],
) -> Call:
    """Checks the arguments that all calls of a latent U-Net share, before anything is compiled.

    Args:
      name: the U-Net's part.
      count: B.
      seed, positions, options: as in `sample_stages`.

    Raises:
      ValueError: if one of them is out of range, or a negative caption is given without guidance.
    """
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    rows = [row[name] for row in sampler.row_options(options, count)]
    if any(row.negative and not is_guided(row) for row in rows):
        raise InputError("a negative caption needs guidance: set a guidance_scale other than 1")
    plain = {row: {name: dataclasses.replace(row, negative="", filter=True)} for row in set(rows)}
    static, scales = split_scales([plain[row] for row in rows])
    return Call(seeds, places, static, scales, [row.negative for row in rows], rows[0])


def reads(bundle: Bundle, name: str = "latent") -> str:
    """What conditions a bundle's U-Net: `captions`, `classes` or `nothing`. name: of its part."""
    model = bundle.part(name).config["model"]
    if model.get("classes") is not None:
        return "classes"
    return "nothing" if model.get("context_dim") is None else "captions"


def check_parts(bundle: Bundle, name: str = "latent") -> None:
    """Raises a KeyError if a bundle lacks a part that its U-Net, the part `name`, needs."""
    for needed in (name, "autoencoder", *(["clip"] if reads(bundle, name) == "captions" else [])):
        bundle.part(needed)


def labels_of(config: Mapping[str, Any], captions: Sequence[str]) -> np.ndarray:
    """The classes (B,) int32 that captions name: by a name among the part's `class_names`, or by number.

    config: the U-Net's.

    Raises:
      ValueError: on a caption that is neither.
    """
    names, count = list(config.get("class_names", ())), config["model"]["classes"]
    labels = []
    for caption in captions:
        if caption in names:
            labels.append(names.index(caption))
        elif caption.isascii() and caption.isdigit() and int(caption) < count:
            labels.append(int(caption))
        else:
            known = f", or one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""
            raise InputError(
                f"{caption!r} is no class of this bundle: give a number from 0 to {count - 1}{known}"
            )
    return np.asarray(labels, np.int32)


def tokens(sampler: Sampler, captions: Sequence[str], call: Call, name: str = "latent") -> Any:
    """What the U-Net `name` is told of B captions, for `conditions`: the tokens of the captions and of the
    call's negative captions; or classes; or None.

    Raises:
      ValueError: when the U-Net reads no captions, and one is given; or one names no class.
    """
    kind = reads(sampler.bundle, name)
    if kind != "captions" and any(call.negative):
        raise InputError("this bundle reads no captions: leave the negative one out")
    if kind == "classes":
        return labels_of(sampler.bundle.part(name).config, captions)
    if kind == "nothing":
        if any(captions):
            raise InputError("this bundle draws without captions: leave them out")
        return None
    return sampler.captions(captions), sampler.captions(call.negative)


def conditions(clip: Network | None, latent: Network, told: Any) -> tuple[Texts | None, Inputs | None]:
    """The conditioning of `sample_latents`, from `tokens`: texts, and other inputs."""
    if told is None:
        return None, None
    if isinstance(told, tuple):
        return encode_captions(clip, *told), None
    return None, {"label": (told, jnp.full((1,), latent.module.classes, jnp.int32))}


def encode_captions(clip: Network, captions: dict, negative: dict) -> Texts:
    """Encodes B captions and as many negative ones."""
    return Texts(encode_text(clip, captions), encode_text(clip, negative))


class Condition(NamedTuple):
    """What a latent U-Net sees when it draws from pictures.

    arrays: (sampler, captions, images, call, name of the U-Net's part) -> a tree of arrays of B rows, made
      before the program runs.
    read: (networks, name, arrays, keys, options by part) -> `Texts` and `latents.Inputs`, each or None, in
      the program.
    """

    arrays: Callable[[Sampler, Sequence[str], Sequence[np.ndarray], Call, str], Any]
    read: Callable[..., tuple[Texts | None, Inputs | None]]


def _read_captions(networks, name, arrays, keys, options) -> tuple[Texts | None, Inputs | None]:
    return conditions(networks.get("clip"), networks[name], arrays)


# The captions alone, or classes, or nothing.
CAPTIONS = Condition(
    lambda sampler, captions, images, call, name: tokens(sampler, captions, call, name), _read_captions
)


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> LatentStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts latent and autoencoder, and clip where the U-Net reads captions.
      captions: at least one text. The tokenizer truncates texts that are too long. A U-Net of classes takes
        their names or numbers, and one without condition an empty text for each picture.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    if not captions:
        raise InputError("no captions: give at least one")
    check_parts(sampler.bundle)
    check_draws(sampler.bundle)
    call = check_call(sampler, "latent", len(captions), seed, positions, options)
    size, tile = picture_size(sampler, call.drawn_with), tile_size(sampler, call.drawn_with)
    run = sampler.program(
        ("latent", size, tile, *call.options.items()), lambda: _cascade(sampler, call.options, size, tile)
    )
    given = (call.scales, tokens(sampler, captions, call), call.seeds, call.positions)
    batch = lambda rows: run(sampler.params, *sampler.rows(given, rows))
    latents, image = sampler.in_batches(batch, len(captions), ["latent", "autoencoder"], progress)
    if call.drawn_with.filter:
        image = np.where(flagged(sampler, ops.to_uint8(image))[:, None, None, None], -1.0, image)
    return LatentStages(latents, [np.float32(image)])


def flagged(sampler: Sampler, images: np.ndarray) -> np.ndarray:
    """What the bundle's safety checker flags, and a warning of it; nothing where the bundle has none.

    Args:
      images: uint8 (B, H, W, 3).

    Returns:
      (B,) bool.
    """
    if "safety" not in sampler.bundle.parts:
        return np.zeros(len(images), bool)
    side = sampler.network("safety").config["model"]["image"]["image_size"]
    seen = ops.to_float(np.stack([ops.resize_then_crop(image, side) for image in images]))
    check = sampler.program(
        ("safety",), lambda: lambda params, seen: sampler.with_params(params)["safety"].apply(seen)
    )
    run = lambda rows: check(sampler.params, sampler.rows(seen, rows))
    found = np.asarray(sampler.in_batches(run, len(images), ["safety"]))
    if found.any():
        log.warning(
            "the safety checker flagged %d of %d pictures, which are black; --no-filter keeps them",
            found.sum(),
            len(found),
        )
    return found


def _cascade(
    sampler: Sampler, options: dict[str, Options], size: tuple[int, int], tile: int | None
) -> Callable:
    def run(params, scales, told, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys = row_keys(seeds, positions)
        texts, inputs = conditions(networks.get("clip"), networks["latent"], told)
        z = sample_latents(
            networks["latent"], texts, size, fold_in(keys, LATENT), chosen["latent"],
            inputs=inputs, rows=len(seeds),
        )  # fmt: skip
        return z, decode_latents(networks["autoencoder"], z, tile)

    return run
