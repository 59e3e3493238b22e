"""Karlo's super-resolution from 64 to 256 px (kakaobrain/karlo-v1-alpha).

    unclip train configs/karlo/upsampler_256.py --workdir runs/karlo/upsampler_256 \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size           691,579,523 parameters
U-Net          320 channels, depth 3, multiples 1,2,3,4, no attention; the time embedding is added
diffusion      1,000 steps, cosine
sampling       7 steps; a second network of the same shape makes the last one

Choices, because Karlo's training is not published:

- The training is unCLIP's (appendix C, table 3): 1M iterations at batch 1,024, AdamW 1.2e-4, dropout 0.1, EMA
  0.9999, crops of a quarter of the side.
- The small image is blurred for half of the rows.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.

No stage here trains the second network. In an exported folder, the network of this run makes the last step
too.

variant   what it is
(none)    the public size
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("upsampler")
    config.scan_layers = False  # the U-Net has no stack of equal layers
    with config.unlocked():
        config.steps = 1_000_000
        config.batch_size = 1024
        config.data = defaults.shards("val")
        config.data.update({"crop_size": 64, "degradation": "blur", "blur_prob": 0.5})
        config.factor = 4
        config.model = {
            "unet": {
                "image_size": 256,
                "out_channels": 3,
                "channels": 320,
                "channel_mult": (1, 2, 3, 4),
                "res_blocks": 3,
                "attention_resolutions": (),
                "middle_attention": False,
                "scale_shift": False,
                "groups": 32,
                "dropout": 0.1,
            },
            "resize": "cubic",
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
        config.optimizer = defaults.adamw(learning_rate=1.2e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {"steps": 7, "sampler": "ddpm", "variance": "small", "clip": 1.0}
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 8, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.data.crop_size = 8
        config.model.unet.update({"image_size": 32, "channels": 8, "channel_mult": (1, 2)})
        config.model.unet.update({"res_blocks": 1, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
