"""The frozen T5 of a stage: the encoder itself, or a folder of states that it made (`unclip embed --t5`)."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.text_states import is_text_states, open_text_states, padded
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.run.batches import Data
from unclip_jax.sharding import Mesh, compute_dtype, infer_shardings, make_gather, replicate


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
