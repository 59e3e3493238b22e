"""The paper's upsampler from 64 to 256 px (unCLIP section 2.1 and appendix C, table 3).

    unclip train configs/dalle2/upsampler_256.py --workdir runs/dalle2/upsampler_256 \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size           700M parameters; this topology has 729,702,083
U-Net          320 channels, depth 3, multiples 1,2,3,4, no attention, dropout 0.1
diffusion      1,000 steps, cosine
degradation    Gaussian blur of the small image with kernel 3 and sigma 0.6; crops of a quarter of the side
training       1M iterations at batch 1,024, AdamW 1.2e-4 with betas 0.9 and 0.999, eps 1e-8, EMA 0.9999
sampling       27 steps of DDIM, without captions and without guidance

Choices where the paper is silent:

- The small image is blurred for half of the rows.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- The small image is enlarged bilinearly, as in GLIDE.
- The variance is fixed, so the network has 3 output channels.
- The 27 steps are GLIDE's `fast27`. The paper tuned its own by hand and does not list them.

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
                "groups": 32,
                "dropout": 0.1,
            },
            "resize": "linear",
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
        config.optimizer = defaults.adamw(learning_rate=1.2e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {"steps": "fast27", "sampler": "ddim", "eta": 0.0, "clip": 1.0}
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 8, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.data.crop_size = 8
        config.model.unet.update({"image_size": 32, "channels": 8, "channel_mult": (1, 2)})
        config.model.unet.update({"res_blocks": 1, "groups": 4})
        config.sampling.steps = "3"
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
