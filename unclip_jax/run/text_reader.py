"""How Imagen reads captions: with a frozen T5, or with the text tower of a frozen CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.data.tokenizers import AnyTokenizer, tokenizer_of
from unclip_jax.generate.networks import Network
from unclip_jax.generate.text import TextConditioning
from unclip_jax.run.frozen import EMPTY, captions_of, clip_tokenizer
from unclip_jax.sharding import Mesh, gather_rest


class TextReader(NamedTuple):
    """What a stage reads with the T5 or the CLIP under it.

    captions: (frozen, batch) -> the states of the batch's captions, and their mask. empty: (frozen) -> those
    of the empty caption, one row. Neither has a gradient; `frozen` are the parameters by role, as the step
    gets them.
    tokenizers: of the batch's captions, as `examples.captioned_example` takes them.
    zeros: one caption's conditioning with every value zero, to initialise networks with.
    """

    captions: Callable[[Mapping[str, Any], Mapping[str, jax.Array]], TextConditioning]
    empty: Callable[[Mapping[str, Any]], TextConditioning]
    tokenizers: dict[str, AnyTokenizer]
    zeros: TextConditioning


def text_reader(mesh: Mesh, frozen: Mapping[str, Network]) -> TextReader:
    """The reader of a stage with a T5 or a CLIP under it."""
    return _t5_reader(mesh, frozen["t5"]) if "t5" in frozen else _clip_reader(mesh, frozen["clip"])


def _t5_reader(mesh: Mesh, t5: Network) -> TextReader:
    tokenizer = tokenizer_of(t5.config["tokenizer"])
    nothing = dict(zip(("tokens", "token_mask"), (jnp.asarray(a)[None] for a in tokenizer.empty())))

    def captions(frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> TextConditioning:
        mask = batch["token_mask"]
        if "text_states" in batch:
            return TextConditioning(None, batch["text_states"], mask)
        states = t5.with_params(gather_rest(frozen["t5"], mesh)).apply(batch["tokens"], mask)
        return TextConditioning(None, jax.lax.stop_gradient(states), mask)

    def empty(frozen: Mapping[str, Any]) -> TextConditioning:
        if t5.module is None:
            return TextConditioning(None, frozen["t5"]["states"], frozen["t5"]["mask"])
        return captions(frozen, nothing)

    zeros = _zeros(tokenizer.length, t5.config["model"]["width"])
    return TextReader(captions, empty, {"tokenizer": tokenizer}, zeros)


def _clip_reader(mesh: Mesh, clip: Network) -> TextReader:
    tokenizer = clip_tokenizer(clip)

    def states(text: TextConditioning) -> TextConditioning:
        return TextConditioning(None, text.states, text.mask)

    def captions(frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> TextConditioning:
        return states(captions_of(clip, mesh, True, frozen["clip"], batch))

    zeros = _zeros(tokenizer.length, clip.config["model"]["text"]["width"])
    return TextReader(captions, lambda frozen: states(frozen[EMPTY]), {"clip_tokenizer": tokenizer}, zeros)


def _zeros(length: int, width: int) -> TextConditioning:
    states = jnp.zeros((1, length, width))
    return TextConditioning(None, states, jnp.ones(states.shape[:2], bool))
