"""The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1 and appendix A.2).

    unclip train configs/dalle/dvae.py --workdir runs/dalle/dvae

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`.

variant   pixels   codes            encoder, decoder         batch
(none)    256      32 x 32 of 8192  53,786,240, 43,829,766   512
:emoji    32       8 x 8 of 512     small                    64, on the embedded emoji, one device
:tiny     runs in seconds on a CPU, for tests

from the paper   4 groups of 2 blocks, 256 channels; temperature 1 -> 1/16 over 150,000 updates; KL weight
                 0 -> 6.6 over 5,000; 3,000,000 updates of AdamW (0.9, 0.999) with eps 1e-8 and weight decay
                 1e-4; averages of decay 0.999

Where it differs from the paper:

- The rate, 1e-4, falls along half a cosine to 0 over the whole run, in the paper to 1.25e-6 over 1,200,000
  updates.
- Crops take at least 80 % of the shorter side; the paper's augmentation is not published.

A KL-free run is `--set kl_weight.end=0`; the same with a codebook of vectors is `configs/vqvae2/vqvae.py`.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "emoji", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("dvae")
    with config.unlocked():
        config.steps = 3_000_000
        config.batch_size = 512
        config.image_size = 256
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {"channels": 256, "levels": 4, "level_blocks": 2, "codes": 8192, "embed_dim": 128}
        config.temperature = {"start": 1.0, "end": 1 / 16, "steps": 150_000}
        config.kl_weight = {"start": 0.0, "end": 6.6, "steps": 5000}
        config.optimizer = defaults.adamw(
            learning_rate=1e-4, warmup_steps=0, schedule="cosine", weight_decay=1e-4, clip_norm=None
        )
        config.ema_decay = 0.999
        config.eval = {"batch_size": 16, "rows": 512, "samples": 16, "fid_rows": 0}
    if variant == "emoji":
        defaults.small_run(config)
        config.steps, config.batch_size, config.image_size, config.eval_every = 4000, 64, 32, 500
        config.data = defaults.emoji("compose")
        with config.unlocked():
            config.data.crop_scale = 0.8
        config.model.update({"channels": 32, "levels": 3, "level_blocks": 1, "codes": 512, "embed_dim": 64})
        config.temperature.steps, config.kl_weight.steps = 3000, 1000
        config.kl_weight.end = 0.5
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})
        config.ema_decay = 0.998
        config.eval.update({"batch_size": 32, "rows": 128})
    if variant == "tiny":
        defaults.tiny(config)
        config.image_size = 16
        config.model.update({"channels": 8, "levels": 2, "level_blocks": 1, "codes": 16, "embed_dim": 8})
        config.temperature.steps, config.kl_weight.steps = 100, 100
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
