"""Captions as conditioning: the frozen CLIP's features, and the tokens of a stage's own text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.generate.networks import Network
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.prior_diffusion import DiffusionPrior


class TextConditioning(NamedTuple):
    """A batch of captions.

    From the frozen text encoder: embed (B, D) raw, states (B, L, W), mask (B, L) bool. For networks with
    their own text encoder: tokens (B, L') int32 and token_mask (B, L') bool. Absent arrays are None.
    """

    embed: jax.Array | None
    states: jax.Array | None
    mask: jax.Array | None
    tokens: jax.Array | None = None
    token_mask: jax.Array | None = None


class Texts(NamedTuple):
    """The two halves of guidance: `captions` (B rows), and `empty`, the empty caption (1 row) or negative
    captions (B rows)."""

    captions: TextConditioning
    empty: TextConditioning

    @property
    def rows(self) -> int:
        """B, the number of captions."""
        return jax.tree.leaves(self.captions)[0].shape[0]

    def both(self) -> TextConditioning:
        """2 B rows: the captions, then as many empty ones."""
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, jnp.broadcast_to(b, a.shape)]), self.captions, self.empty
        )


def encode_text(clip: Network, batch: Mapping[str, jax.Array]) -> TextConditioning:
    """Encodes a batch's `clip_tokens` and `clip_token_mask` with the frozen CLIP's text tower.

    `tokens` and `token_mask` are passed through.
    """
    features = clip.apply(batch["clip_tokens"], method="encode_text")
    return TextConditioning(
        features.embed,
        features.states,
        batch["clip_token_mask"],
        batch.get("tokens"),
        batch.get("token_mask"),
    )


def text_inputs(model: DiffusionPrior | ARPrior | Decoder, text: TextConditioning) -> dict[str, Any]:
    """A network's text arguments: z_t, and tokens if it has its own text encoder, or else CLIP's states."""
    if model.text is None:
        return {"text_embed": text.embed, "text_states": text.states, "text_mask": text.mask}
    return {"text_embed": text.embed, "tokens": text.tokens, "token_mask": text.token_mask}


def select_text(keep: jax.Array, text: TextConditioning, empty: TextConditioning) -> TextConditioning:
    """The caption's conditioning where keep (B,) is True, the empty caption's (1 row) elsewhere."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, text, empty)


def twice(tree: Any, guided: bool) -> Any:
    """Repeats the rows of every array for the two halves of guidance; without guidance, the tree itself."""
    return jax.tree.map(lambda a: jnp.concatenate([a, a]), tree) if guided else tree
