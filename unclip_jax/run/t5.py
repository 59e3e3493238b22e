"""The frozen T5 of a stage: the encoder itself, or a folder of states that it made (`unclip embed --t5`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.text_states import is_text_states, open_text_states, padded
from unclip_jax.data.tokenizers import AnyTokenizer, tokenizer_of
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.generate.text import TextConditioning
from unclip_jax.run.batches import Data
from unclip_jax.sharding import Mesh, compute_dtype, gather_rest, infer_shardings, make_gather, replicate


def load_t5(path: str, config: ConfigDict, mesh: Mesh) -> Network:
    """Loads a T5; or, in its place, a folder of states, of which only those of the empty caption are kept."""
    if is_text_states(path):
        states = open_text_states(path)
        row, mask = padded(states.empty, states.tokenizer["length"])
        empty = replicate({"states": row[None], "mask": mask[None]}, mesh)
        config = {"kind": "t5", "model": {"width": states.width}, "tokenizer": states.tokenizer}
        return Network(None, empty, config, states.encoder)
    return t5_network(path, config.dtype, mesh)


def t5_network(path: str, dtype: str, mesh: Mesh) -> Network:
    """Loads the T5 of a bundle or of public weights onto a mesh. `dtype` is that of the computation."""
    part, _ = load_part(path, "t5")
    module = build_model(part.config, compute_dtype(dtype, mesh), gather=make_gather(mesh))
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    return Network(module, params, part.config, params_hash(part.params))


def check_text_states(t5: Network, data: Data) -> None:
    """Checks that the states of the sources' captions are those of this T5, and that there are such states
    where a folder of them replaces it.

    Raises:
      ValueError: naming the source.
    """
    for source in (data.train, *data.held_out.values()):
        states = source.text_states
        if states is None and t5.module is None:
            raise InputError(
                f"{source.name} has no text_states, and the T5 given is a folder of states: set the source's "
                "text_states, or give the T5 itself"
            )
        if states is not None and states.encoder != t5.hash:
            raise InputError(
                f"the states of {source.name} are of T5 {states.encoder}, but the T5 given is {t5.hash}: "
                "embed again, or give that T5"
            )


class T5Reader(NamedTuple):
    """What a stage reads with the T5 under it.

    captions: (params, batch) -> the states of the batch's `tokens`, and their mask. empty: (params) -> those
    of the empty caption, one row. Neither has a gradient; `params` are T5's, as the step gets them.
    tokenizer: T5's. zeros: one caption's conditioning with every value zero, to initialise networks with.
    """

    captions: Callable[[Any, Mapping[str, jax.Array]], TextConditioning]
    empty: Callable[[Any], TextConditioning]
    tokenizer: AnyTokenizer
    zeros: TextConditioning


def t5_reader(mesh: Mesh, frozen: Mapping[str, Network]) -> T5Reader:
    """The reader of a stage with a T5 under it."""
    t5 = frozen["t5"]
    tokenizer = tokenizer_of(t5.config["tokenizer"])
    nothing = dict(zip(("tokens", "token_mask"), (jnp.asarray(a)[None] for a in tokenizer.empty())))

    def captions(params: Any, batch: Mapping[str, jax.Array]) -> TextConditioning:
        mask = batch["token_mask"]
        if "text_states" in batch:
            return TextConditioning(None, batch["text_states"], mask)
        states = t5.with_params(gather_rest(params, mesh)).apply(batch["tokens"], mask)
        return TextConditioning(None, jax.lax.stop_gradient(states), mask)

    def empty(params: Any) -> TextConditioning:
        if t5.module is None:
            return TextConditioning(None, params["states"], params["mask"])
        return captions(params, nothing)

    states = jnp.zeros((1, tokenizer.length, t5.config["model"]["width"]))
    zeros = TextConditioning(None, states, jnp.ones(states.shape[:2], bool))
    return T5Reader(captions, empty, tokenizer, zeros)
