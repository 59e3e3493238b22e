"""Imagen's upsamplers (Saharia et al. 2022, sections 2.4 and 2.5, appendices B and F): efficient U-Nets.

They need the encoder of T5 1.1 XXL, as the network of 64 px does.

    unclip train configs/imagen/upsampler.py --workdir runs/imagen/imagen_256 \\
        --set frozen.t5=/models/t5-v1_1-xxl --set data.train.pattern='/data/laion/*.tfrecord'
    unclip train configs/imagen/upsampler.py:1024 --workdir runs/imagen/imagen_1024 \\
        --set frozen.t5=/models/t5-v1_1-xxl --set data.train.pattern='/data/laion/*.tfrecord'

                the paper         here
64 -> 256       600M              457,916,547
256 -> 1024     400M              453,718,147
U-Net           128 channels, multiples 1,2,4,8, residual blocks 2,4,8,8; attention at the lowest level, to
                the positions and the text (256), or to the text alone (1024)
augmentation    noise of a level from U(0, 1) on the small image, of which the network is told
training        Adam at 1e-4 after 10,000 steps of warmup, batch 2,048; the larger one on crops of
                64 -> 256 px
sampling        guidance 8 at FID-30K; levels of augmentation around 0.1 to 0.3

Choices where the paper is silent:

- The network predicts v. The paper says it for neither; v is what later work of its authors uses here.
- The noise schedule of the images is cosine for 256 px and linear for 1024 px, in continuous time. That of
  the augmentation is in `diffusion/augmentation.py`. The noise is added to the enlarged image.
- One skip leaves each level, and enlarging is nearest neighbour and a convolution. The sizes above follow.
- 1,000,000 steps; EMA 0.9999; 50 steps of DDIM in sampling.

variant   what it is
(none)    64 -> 256 px
:1024     256 -> 1024 px
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests, with a small T5
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "1024", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("imagen")
    config.frozen = {"t5": "../t5", "clip": None}
    config.scan_layers = False
    with config.unlocked():
        config.steps = 1_000_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.update({"crop_scale": 1.0, "crop_size": None})
        config.factor = 4
        config.model = {
            "context_dim": 512,
            "unet": {
                "image_size": 256,
                "out_channels": 3,
                "channels": 128,
                "channel_mult": (1, 2, 4, 8),
                "res_blocks": (2, 4, 8, 8),
                "attention": ("none", "none", "none", "self"),
                "head_channels": 64,
                "groups": 32,
                "dropout": 0.0,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 0.0}
        config.diffusion.continuous = True
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=1e-4, warmup_steps=10_000)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 50,
            "sampler": "ddim",
            "guidance_scale": 8.0,
            "clip": 1.0,
            "threshold": 99.5,
            "augmentation": 0.2,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 8, "fid_rows": 0}
    if variant == "1024":
        config.data.crop_size = 256
        config.model.unet.image_size = 1024
        config.model.unet.attention = ("none", "none", "none", "cross")
        config.diffusion.schedule = "linear"
    if variant == "tiny":
        defaults.tiny(config)
        config.data.crop_size = 8
        config.factor = 2
        config.model.context_dim = 16
        config.model.unet.update({"image_size": 16, "channels": 8, "channel_mult": (1, 2)})
        config.model.unet.update({"res_blocks": (1, 1), "attention": ("cross", "self")})
        config.model.unet.update({"head_channels": 8, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
