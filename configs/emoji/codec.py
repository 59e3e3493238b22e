"""The codec of the autoregressive prior for the embedded emoji.

It needs the run of `configs/emoji/clip.py` in the folder beside its own.

    unclip train configs/emoji/codec.py --workdir runs/emoji/codec

The stage reads `steps` batches twice: once for the covariance of the embeddings, once for the extremes of
their projections. It reports the explained variance for `dims` components and for each number in `report`. It
computes no gradients and has one checkpoint, at its end, so `grad_accumulation`, `remat`, `eval_every`
and `checkpoint_every` have no effect.

variant   what it is
(none)    the one in the shipped bundle
:quick    for `launch/quickstart --train`
:tiny     runs in seconds on a CPU, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("codec"))
    config.frozen = {"clip": "../clip"}
    config.keep = 1
    with config.unlocked():
        config.steps = 100
        config.batch_size = 128
        config.data = defaults.emoji(None)
        config.data.crop_scale = 0.95
        config.dims = 32
        config.report = (8, 16, 64, 96)
    if variant == "quick":
        config.steps = 20
    if variant == "tiny":
        defaults.tiny(config)
        config.steps = 2
        config.dims = 6
    return config.lock()
