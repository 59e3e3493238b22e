"""unclip_jax: unCLIP (DALL-E 2) in JAX/Flax.

    import unclip_jax
    bundle = unclip_jax.load_bundle("emoji")
    images = unclip_jax.text_to_image(bundle, ["a 3d emoji of a fox"], seed=0)   # uint8 (B, H, W, 3)

Importing the package imports nothing heavy. Each name is loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Sampler", "load_bundle", "save_bundle", "text_to_image"]

_HOME = {
    "Sampler": "unclip_jax.sampling.programs",
    "load_bundle": "unclip_jax.checkpoint.load",
    "save_bundle": "unclip_jax.checkpoint.bundle",
    "text_to_image": "unclip_jax.sampling.text_to_image",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'unclip_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOME])
