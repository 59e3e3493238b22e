"""dalle-mini's cascade (Dayma et al. 2021): caption, codes, and the VQGAN's image, in one compiled program.

A CLIP ranks candidates. Guidance moves each code's logits away from those of the empty caption ("super
conditioning").
"""

from __future__ import annotations

import functools

from unclip_jax.sampling import dalle
from unclip_jax.sampling.dalle import Cascade

CASCADE = Cascade("dalle_mini", "autoencoder")
sample_stages = functools.partial(dalle.sample_stages, cascade=CASCADE)
made_by = functools.partial(dalle.made_by, cascade=CASCADE)
sizes = functools.partial(dalle.sizes, cascade=CASCADE)
