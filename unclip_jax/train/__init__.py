"""Training: one linear file per stage. `STAGES` lists them."""

import importlib

# stage -> its module, imported when it is first asked for: a stage needs JAX, and the command line's help does not.
_NAMES = ("clip", "prior_diffusion", "codec", "prior_ar", "decoder", "upsampler")
