"""Imagen's cascade: T5, the network of 64 px, and the upsamplers to 256 and 1024 px (Saharia et al. 2022).

In place of T5 a CLIP reads the captions, where the networks were trained with one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.generate.networks import Network
from unclip_jax.generate.text import TextConditioning, encode_text
from unclip_jax.sampling import captioned
from unclip_jax.sampling.captioned import Cascade


def _encode(networks: Mapping[str, Network], arrays: Mapping[str, jax.Array]) -> TextConditioning:
    if "clip" in networks["imagen"].config.get("frozen", {}):
        text = encode_text(networks["clip"], arrays)
        return TextConditioning(None, text.states, text.mask)
    mask = arrays["token_mask"]
    return TextConditioning(None, networks["t5"].apply(arrays["tokens"], mask), mask)


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle: what the captions were read with is among them."""
    frozen = parts["imagen"].config.get("frozen", {}) if "imagen" in parts else {}
    return ("clip" if "clip" in frozen else "t5", "imagen")


def _tower(bundle: Bundle) -> str | None:
    # The CLIP that reads the captions; None where T5 does.
    if "clip" in bundle.part("imagen").config.get("frozen", {}):
        bundle.part("clip")
        return "clip"
    bundle.part("t5")
    return None


CASCADE = Cascade(base="imagen", parts=("imagen",), encode=_encode, tower=_tower)
sample_stages = functools.partial(captioned.sample_stages, CASCADE)
img2img_rows = functools.partial(captioned.img2img_rows, CASCADE)
upscale_rows = functools.partial(captioned.upscale_rows, CASCADE)
made_by = functools.partial(captioned.made_by, CASCADE)
sizes = functools.partial(captioned.sizes, CASCADE)
