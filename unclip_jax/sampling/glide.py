"""GLIDE's cascade: the caption's tokens, the network of 64 px, and the upsampler (Nichol et al. 2021)."""

from __future__ import annotations

import functools

from unclip_jax.generate.text import TextConditioning
from unclip_jax.sampling import captioned
from unclip_jax.sampling.captioned import Cascade

CASCADE = Cascade(
    base="glide",
    parts=("glide",),
    encode=lambda networks, arrays: TextConditioning(
        None, None, None, arrays["tokens"], arrays["token_mask"]
    ),
    rounds=True,
)
sample_stages = functools.partial(captioned.sample_stages, CASCADE)
img2img_rows = functools.partial(captioned.img2img_rows, CASCADE)
upscale_rows = functools.partial(captioned.upscale_rows, CASCADE)
inpaint_rows = functools.partial(captioned.inpaint_rows, CASCADE)
made_by = functools.partial(captioned.made_by, CASCADE)
sizes = functools.partial(captioned.sizes, CASCADE)
