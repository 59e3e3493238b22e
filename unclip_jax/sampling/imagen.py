"""Imagen's cascade: T5, the network of 64 px, and the upsamplers to 256 and 1024 px (Saharia et al. 2022)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from unclip_jax.generate.networks import Network
from unclip_jax.generate.text import TextConditioning
from unclip_jax.sampling import captioned
from unclip_jax.sampling.captioned import Cascade


def _encode(networks: Mapping[str, Network], arrays: Mapping[str, jax.Array]) -> TextConditioning:
    mask = arrays["token_mask"]
    return TextConditioning(None, networks["t5"].apply(arrays["tokens"], mask), mask)


CASCADE = Cascade(base="imagen", parts=("t5", "imagen"), encode=_encode)
sample_stages = functools.partial(captioned.sample_stages, CASCADE)
img2img_rows = functools.partial(captioned.img2img_rows, CASCADE)
upscale_rows = functools.partial(captioned.upscale_rows, CASCADE)
made_by = functools.partial(captioned.made_by, CASCADE)
sizes = functools.partial(captioned.sizes, CASCADE)
