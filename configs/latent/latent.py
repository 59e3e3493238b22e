"""Unconditional latent diffusion (Rombach et al. 2022, table 12), at the exact sizes.

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, and the autoencoder of
`configs/latent/autoencoder.py` in the folder beside its own.

    unclip train configs/latent/latent.py --workdir runs/latent/latent

variant     parameters    autoencoder  schedule           loss      for
(none)      274,056,163   vq-f4        0.0015 to 0.0195   L2        CelebA-HQ, FFHQ, LSUN bedrooms; 256 px
:churches   294,966,916   kl-f8        0.0015 to 0.0155   L2        LSUN churches; 256 px
:tiny       runs in seconds on a CPU, for tests

from the paper   the networks; noise is predicted, with the plain squared error; averages of decay 0.9999;
                 DDIM with 200 steps

Where it differs from the paper: its churches are trained with the absolute error.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "churches", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    churches = variant == "churches"
    config = defaults.run("latent")
    config.frozen = {"clip": None, "autoencoder": "../autoencoder"}
    with config.unlocked():
        config.steps = 500_000 if churches else 410_000
        config.batch_size = 96 if churches else 48
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "image_size": 32 if churches else 64,
            "in_channels": 4 if churches else 3,
            "out_channels": 4 if churches else 3,
            "channels": 192 if churches else 224,
            "channel_mult": (1, 2, 2, 4, 4) if churches else (1, 2, 3, 4),
            "res_blocks": 2,
            "heads": (8, 8, 8, 8, 8) if churches else (7, 14, 21, 28),
            "attention_levels": (0, 1, 2, 3) if churches else (1, 2, 3),
            "context_dim": None,
            "transformer_depth": 0,
            "resample": "block" if churches else "conv",
            "scale_shift": churches,
            "groups": 32,
            "dropout": 0.0,
        }
        config.diffusion = {
            "schedule": "scaled_linear",
            "num_steps": 1000,
            "prediction": "eps",
            "beta_ends": (0.0015, 0.0155 if churches else 0.0195),
        }
        config.drop_text = 0.0
        config.optimizer = defaults.adamw(
            learning_rate=5e-5 if churches else 9.6e-5, warmup_steps=10_000, weight_decay=0.01, clip_norm=None
        )
        config.ema_decay = 0.9999
        config.sampling = {"steps": 200, "sampler": "ddim", "guidance_scale": 1.0, "clip": None}
        config.eval = {"batch_size": 48, "rows": 2048, "samples": 16, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"image_size": 8, "in_channels": 4, "out_channels": 4, "channels": 16})
        config.model.update({"channel_mult": (1, 2), "res_blocks": 1, "heads": (2, 2), "groups": 8})
        config.model.attention_levels = (1,)
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
