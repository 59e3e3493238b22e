"""Retrieval-augmented diffusion's cascade: text, neighbours in an index, latents, autoencoder (Blattmann et
al. 2022, section 3.2).

Two compiled programs: the first one embeds the captions, the second one draws. Between them the index is
searched. An index is exchanged without training (`with_index`), which changes what the pictures look like.

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, check_spaces
from unclip_jax.data.retrieval_index import RetrievalIndex, check_convention, open_index
from unclip_jax.diffusion.embedding_space import normalize
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, sample_latents
from unclip_jax.generate.neighbours import Searcher
from unclip_jax.generate.networks import part_space
from unclip_jax.generate.options import Options, RetrievalSamplingOptions
from unclip_jax.generate.text import encode_text
from unclip_jax.sampling.latent import check_call, latent_sides, picture_size, tile_size
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler, row_keys, with_scales

log = logging.getLogger(__name__)
LATENT = 0  # what the stage folds into a row's random key
PARTS = ("clip", "retrieval", "autoencoder")


class RetrievalStages(NamedTuple):
    """What each stage found or drew, as NumPy arrays.

    neighbours: (B, K) int64, the numbers of the index's rows that each picture was drawn with; K may be 0.
    latents: (B, h, w, Z) scaled latents.
    images: [float array (B, H, W, 3) in [-1, 1]].
    """

    neighbours: np.ndarray
    latents: np.ndarray
    images: list[np.ndarray]


# ------------------------------------------------------------------------------------------ the index
def with_index(bundle: Bundle, path: str) -> Bundle:
    """The bundle with the index of a folder, in place of its own if it has one.

    Args:
      bundle: of the system `retrieval`.
      path: what `unclip embed --index` wrote, or a published database (`data.retrieval_index`).

    Raises:
      FileNotFoundError, ValueError: as `open_index`; when the bundle is of another system, or the index is of
        another CLIP or in the other space.
    """
    if "retrieval" not in bundle.parts:
        raise InputError(f"{bundle.path or 'the bundle'} draws without neighbours: leave --index out")
    index, config = open_index(path), bundle.part("retrieval").config
    taker = f"the bundle {bundle.path}" if bundle.path else "the network"
    clip = config.get("frozen", {}).get("clip") or bundle.part("clip").hash
    check_convention(index, clip, taker, config["embedding_space"]["kind"])
    if index.embed_dim != config["model"]["context_dim"]:
        raise InputError(
            f"{path} has rows of {index.embed_dim}, and {taker} takes {config['model']['context_dim']}"
        )
    rows = index.blocks[0] if len(index.blocks) == 1 else np.concatenate(index.blocks)
    described = {
        "kind": "index",
        "embed_dim": index.embed_dim,
        "rows": len(index),
        "embedding_space": {"kind": index.space},
        "checksum": index.checksum,
        "frozen": {"clip": index.clip},
    }
    return dataclasses.replace(bundle, parts=bundle.parts | {"index": Part(described, {"embedding": rows})})


def index_of(bundle: Bundle) -> RetrievalIndex:
    """The index of a bundle. Raises ValueError if it has none."""
    if "index" not in bundle.parts:
        raise InputError(
            f"{bundle.path or 'the bundle'} has no index to draw neighbours from: give one with --index DIR, "
            "or draw with --set retrieval.mode=text"
        )
    part = bundle.part("index")
    check_spaces(bundle.parts, bundle.path or "the bundle")
    config, rows = part.config, np.asarray(part.params["embedding"])
    about = config.get("frozen", {}).get("clip", ""), config["embedding_space"]["kind"], config["checksum"]
    return RetrievalIndex(f"the index of {bundle.path or 'the bundle'}", *about, (rows,))


def _popular(
    bundle: Bundle,
    index: RetrievalIndex,
    options: RetrievalSamplingOptions,
    seeds: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    # A row of the index for each picture, (B,): of those that served most in training. Of an index that was
    # not there in training, any row.
    known = bundle.part("retrieval").config.get("popular")
    if known is None or known["index"] != index.checksum:
        log.warning(
            "training did not use this index: rows are drawn from all of it, not from the popular ones"
        )
        rows, uses = np.arange(len(index)), np.ones(len(index))
    else:
        most = max(1, round(options.popular * len(index)))
        rows, uses = np.asarray(known["rows"])[:most], np.asarray(known["uses"], np.float64)[:most]
    chances = uses / uses.sum() if options.weighted else None
    draws = (np.random.default_rng([int(seed), int(place)]) for seed, place in zip(seeds, places))
    return np.asarray([rng.choice(rows, p=chances) for rng in draws], np.int64)


# ------------------------------------------------------------------------------------------ the cascade
def sizes(bundle: Bundle) -> list[int]:
    """The side in pixels of the picture that a bundle draws by its defaults."""
    return latent_sides(bundle, "retrieval")


def made_by(bundle: Bundle, prior: None) -> list[str]:
    """The names of the parts that draw."""
    return [*PARTS, *(["index"] if "index" in bundle.parts else [])]


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> RetrievalStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts clip, retrieval and autoencoder, and an index in all modes but `text`.
      captions: at least one text. The mode `popular` does not read them.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions or no index, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    if not captions:
        raise InputError("no captions: give at least one")
    for name in PARTS:
        sampler.bundle.part(name)
    call = check_call(sampler, "retrieval", len(captions), seed, positions, options)
    size, tile = picture_size(sampler, call.drawn_with, "retrieval"), tile_size(sampler, call.drawn_with)
    numbers, context = _context(sampler, captions, call.drawn_with, call.seeds, call.positions)
    drawn = dataclasses.replace(
        call.options["retrieval"], mode="text", neighbours=None
    )  # one program for all
    chosen = {"retrieval": drawn}
    run = sampler.program(("retrieval", size, tile, drawn), lambda: _cascade(chosen, sampler, size, tile))
    given = (call.scales, context, call.seeds, call.positions)
    batch = lambda rows: run(sampler.params, *sampler.rows(given, rows))
    latents, image = sampler.in_batches(batch, len(captions), ["retrieval", "autoencoder"], progress)
    return RetrievalStages(numbers, latents, [np.float32(image)])


def _context(
    sampler: Sampler,
    captions: list[str],
    options: RetrievalSamplingOptions,
    seeds: np.ndarray,
    places: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    # The numbers of the neighbours (B, K), and the tokens (B, L, D) that the U-Net sees.
    config, mode = sampler.network("retrieval").config, options.mode
    count = options.neighbours or config["neighbours"]
    z_text = None
    if mode != "popular":
        run = sampler.program(("retrieval_text",), lambda: _texts(sampler))
        tokens = sampler.captions(captions)
        z_text = sampler.in_batches(
            lambda rows: run(sampler.params, sampler.rows(tokens, rows)), len(captions), ["clip"]
        )
    text = None if z_text is None else np.asarray(normalize(part_space(config), jnp.asarray(z_text)))[:, None]
    nearest = {"text": 0, "text+neighbours": count - 1}.get(mode, count)
    if not nearest:
        return np.zeros((len(captions), 0), np.int64), text
    search = sampler.once("searcher", lambda: Searcher(index_of(sampler.bundle), sampler.mesh))
    if mode == "popular":
        z_text = search.index.take(_popular(sampler.bundle, search.index, options, seeds, places))
    numbers, _ = search(z_text, nearest)
    near = search.index.take(numbers)
    return numbers, np.concatenate([text, near], axis=1) if mode == "text+neighbours" else near


def _texts(sampler: Sampler) -> Callable:
    return lambda params, captions: encode_text(sampler.with_params(params)["clip"], captions).embed


def _cascade(
    options: dict[str, Options], sampler: Sampler, size: tuple[int, int], tile: int | None
) -> Callable:
    def run(params, scales, context, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)["retrieval"]
        key = fold_in(row_keys(seeds, positions), LATENT)
        given = {"context": (context, jnp.zeros((1, 1, 1)))}
        z = sample_latents(networks["retrieval"], None, size, key, chosen, inputs=given, rows=len(context))
        return z, decode_latents(networks["autoencoder"], z, tile)

    return run
