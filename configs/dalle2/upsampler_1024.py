"""The paper's upsampler from 256 to 1024 px (unCLIP section 2.1 and appendix C, table 3).

    unclip train configs/dalle2/upsampler_1024.py --workdir runs/dalle2/upsampler_1024 \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size           300M parameters; this topology has 282,059,139
U-Net          192 channels, depth 2, multiples 1,1,2,2,4,4, no attention, no dropout
diffusion      1,000 steps, linear
degradation    BSR of the small image, in its light form; crops of a quarter of the side
training       1M iterations at batch 512, AdamW 1e-4 with betas 0.9 and 0.999, eps 1e-8, EMA 0.9999
sampling       15 steps of DDIM, without captions and without guidance

Choices where the paper is silent:

- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- The small image is enlarged bilinearly, as in GLIDE.
- The variance is fixed, so the network has 3 output channels.
- The 15 steps are evenly spread. The paper tuned its own by hand and does not list them.

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
    config = defaults.run("upsampler")
    config.scan_layers = False  # the U-Net has no stack of equal layers
    with config.unlocked():
        config.steps = 1_000_000
        config.batch_size = 512
        config.data = defaults.shards("val")
        config.data.update({"crop_size": 256, "degradation": "bsr_light", "blur_prob": 0.5})
        config.factor = 4
        config.model = {
            "unet": {
                "image_size": 1024,
                "out_channels": 3,
                "channels": 192,
                "channel_mult": (1, 1, 2, 2, 4, 4),
                "res_blocks": 2,
                "attention_resolutions": (),
                "middle_attention": False,
                "groups": 32,
                "dropout": 0.0,
            },
            "resize": "linear",
        }
        config.diffusion = {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
        config.optimizer = defaults.adamw(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {"steps": 15, "sampler": "ddim", "eta": 0.0, "clip": 1.0}
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 8, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.data.crop_size = 16
        config.model.unet.update({"image_size": 64, "channels": 8, "channel_mult": (1, 1, 2)})
        config.model.unet.update({"res_blocks": 1, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
