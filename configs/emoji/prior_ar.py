"""The autoregressive prior for the embedded emoji.

It needs the runs of `configs/emoji/clip.py` and `configs/emoji/codec.py` in the folders beside its own.

    unclip train configs/emoji/prior_ar.py --workdir runs/emoji/prior_ar

Where it differs from the paper:

- The codec keeps 32 of 128 components (99 % of the variance) in 128 buckets, because there are only 7,000
  images. The paper keeps 319 of 1,024 components in 1,024 buckets.
- The dot product z_i.z_t falls into one of 16 bins, which are equally frequent.
- The context is the text states of the frozen CLIP. The paper trains a text encoder with the prior.

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
    config = defaults.small_run(defaults.run("prior_ar"))
    config.frozen = {"clip": "../clip", "codec": "../codec"}
    config.eval_every = 400
    with config.unlocked():
        config.text_tokenizer = None
        config.steps = 400
        config.batch_size = 128
        config.data = defaults.emoji(("val", "compose"))
        config.data.crop_scale = 0.95
        config.model = {
            "codes": 32,
            "buckets": 128,
            "dot_bins": 16,
            "width": 192,
            "layers": 4,
            "heads": 6,
            "dropout": 0.1,
            "text": None,
        }
        config.statistics_batches = 40
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=1e-3,
            warmup_steps=50,
            schedule="cosine",
            b1=0.9,
            b2=0.91,
            eps=1e-10,
            weight_decay=4e-2,
        )
        config.ema_decay = 0.99
        config.sampling = {"guidance_scale": 2.0, "temperature": 1.0, "dot_quantile": 0.5, "candidates": 2}
        config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    if variant == "quick":
        config.steps = 80
        config.statistics_batches = 10
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.eval_every = 80
        config.checkpoint_every = 40
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"codes": 6, "buckets": 16, "dot_bins": 4, "width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
