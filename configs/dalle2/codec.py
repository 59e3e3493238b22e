"""The codec of the paper's autoregressive prior (unCLIP section 2.2).

It needs the run of `configs/dalle2/clip.py` in the folder beside its own.

    unclip train configs/dalle2/codec.py --workdir runs/dalle2/codec \\
        --set data.train.pattern='/data/laion/*.tfrecord'

components    319 of 1,024 principal components; the mean squared error of a reconstruction is below 1 %
              because the paper's CLIP was trained with SAM

A choice where the paper is silent: the codec is fitted to four million images.

The stage computes no gradients and has one checkpoint, at its end, so `grad_accumulation`, `remat`,
`eval_every` and `checkpoint_every` have no effect.

variant   what it is
(none)    the paper's
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("codec")
    defaults.small_run(config)
    config.frozen = {"clip": "../clip"}
    config.keep = 1
    with config.unlocked():
        config.steps = 1000
        config.batch_size = 4096
        config.data = defaults.shards(None)
        config.data.crop_scale = 1.0
        config.dims = 319
        config.report = (20, 80, 160, 320, 512)
    if variant == "tiny":
        defaults.tiny(config)
        config.steps = 2
        config.dims = 6
    return config.lock()
