"""The upsampler for the embedded emoji, from 32 to 64 px.

    unclip train configs/emoji/upsampler.py --workdir runs/emoji/upsampler_64

from the paper    no attention; no conditioning but the small image; random crops in training; Gaussian blur
                  of the small image with kernel 3 and sigma 0.6; DDIM

Where it differs from the paper:

- Crops are half of the side, because the images are small. The paper's are a quarter.
- The small image is blurred for half of the rows.
- The network predicts v. The paper's predicts the noise, and a network trained as briefly as this one leaves
  noise in the image that it does not predict.

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
    config = defaults.small_run(defaults.run("upsampler"))
    config.eval_every = 500
    with config.unlocked():
        config.steps = 1500
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.data.update({"crop_size": 32, "degradation": "blur", "blur_prob": 0.5})
        config.factor = 2
        config.model = {
            "unet": {
                "image_size": 64,
                "out_channels": 3,
                "channels": 16,
                "channel_mult": (1, 2, 4),
                "res_blocks": 1,
                "attention_resolutions": (),
                "middle_attention": False,
                "groups": 8,
                "dropout": 0.0,
            },
            "resize": "cubic",
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 0.0}
        config.optimizer = defaults.adamw(
            learning_rate=1e-3, warmup_steps=100, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.998
        config.sampling = {"steps": 12, "sampler": "ddim", "eta": 0.0, "clip": 1.0}
        config.eval = {"batch_size": 32, "rows": 128, "samples": 16, "fid_rows": 0}
    if variant == "quick":
        config.steps = 140
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.sampling.steps = 6
        config.eval_every = 140
        config.checkpoint_every = 40
    if variant == "tiny":
        defaults.tiny(config)
        config.data.crop_size = 8
        config.model.unet.update(
            {"image_size": 16, "channels": 8, "channel_mult": (1, 2), "groups": 4, "dropout": 0.1}
        )
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
