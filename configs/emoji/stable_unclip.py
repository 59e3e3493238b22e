"""StableUnCLIP for the embedded emoji: latents of 8 x 8 x 4, from z_i with noise and captions.

It needs the runs of `configs/emoji/clip.py` and `configs/emoji/autoencoder.py` in the folders beside its own.
The emoji CLIP makes z_i and reads the captions. With the run of `configs/emoji/prior_diffusion.py` beside
them, the bundle draws from captions.

    unclip train configs/emoji/stable_unclip.py --workdir runs/emoji/stable_unclip

from StableUnCLIP   noise on the whitened z_i by the cosine schedule of 1,000 steps; z_i dropped for 25 % of
                    the rows; the caption for 10 %

The network is that of `configs/emoji/latent.py`.

variant   what it is
(none)    32 px, from `configs/emoji/autoencoder.py`
:64       64 px in 16 x 16 x 4, from `configs/emoji/autoencoder.py:64`
:tiny     runs in seconds on a CPU, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "64", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("stable_unclip"))
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    config.eval_every = 1000
    with config.unlocked():
        config.steps = 8000
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.data.crop_scale = 1.0
        config.model = {
            "image_size": 16 if variant == "64" else 8,
            "in_channels": 4,
            "out_channels": 4,
            "channels": 64,
            "channel_mult": (1, 2, 3),
            "res_blocks": 1,
            "heads": (2, 4, 6),
            "attention_levels": (0, 1, 2),
            "context_dim": 128,
            "transformer_depth": 1,
            "linear": True,
            "groups": 16,
            "dropout": 0.0,
        }
        config.diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"}
        config.augmentation = {"schedule": "cosine", "num_steps": 1000}
        config.space = {"kind": "whitened", "scale": None}
        config.statistics_batches = 8
        config.drop_text = 0.1
        config.drop_image = 0.25
        config.optimizer = defaults.adamw(
            learning_rate=6e-4, warmup_steps=300, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.999
        config.sampling = {"steps": 30, "sampler": "dpmpp_2m", "guidance_scale": 3.0, "clip": None}
        config.eval = {"batch_size": 32, "rows": 256, "samples": 16, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"channels": 16, "channel_mult": (1, 2), "heads": (2, 2), "groups": 8})
        config.model.update({"attention_levels": (1,), "context_dim": 32})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
