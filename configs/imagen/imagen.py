"""Imagen's network of 64 px (Saharia et al. 2022, section 2.5 and appendix F).

It needs the encoder of T5 1.1 XXL: a folder of transformers, such as google/t5-v1_1-xxl.

    unclip train configs/imagen/imagen.py --workdir runs/imagen/imagen \\
        --set frozen.t5=/models/t5-v1_1-xxl --set data.train.pattern='/data/laion/*.tfrecord'

                the paper         here
size            2B                2,140,115,459
U-Net           that of improved DDPM, 512 channels wide: depth 3, multiples 1,2,3,4, attention at 32, 16 and
                8 px
text            T5-XXL's states in the attention, and pooled in the time embedding
diffusion       noise prediction, cosine schedule, continuous time
training        2.5M steps at batch 2,048, Adafactor at 1e-4 after 10,000 steps of warmup; 10 % of the
                captions dropped
sampling        dynamic thresholding at the 99.5th percentile; guidance 1.35 where the paper reports its FID

Choices where the paper is silent:

- The states are projected to 512 numbers, and pooled by their mean. The paper says "pooled".
- A dropped caption is the empty caption, whose states are those of the end token.
- The network sees times from 0 to 1,000 (`diffusion.num_steps`). 250 steps in sampling; the variance is that
  of the posterior. `--set diffusion.continuous=false` trains at 1,000 discrete steps.
- EMA 0.9999; gradients are clipped at norm 1; captions have 256 tokens.

variant   what it is
(none)    the paper's
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests, with a small T5
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("imagen")
    config.frozen = {"t5": "../t5", "clip": None}
    config.scan_layers = False
    with config.unlocked():
        config.steps = 2_500_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.update({"crop_scale": 1.0, "crop_size": None})
        config.factor = None
        config.model = {
            "context_dim": 512,
            "unet": {
                "image_size": 64,
                "out_channels": 3,
                "channels": 512,
                "channel_mult": (1, 2, 3, 4),
                "res_blocks": 3,
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
                "groups": 32,
                "dropout": 0.0,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
        config.diffusion.continuous = True
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=1e-4, warmup_steps=10_000, b1=0.9)
        config.optimizer.kind = "adafactor"
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 250,
            "sampler": "ddpm",
            "guidance_scale": 1.35,
            "clip": 1.0,
            "threshold": 99.5,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 16, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.model.context_dim = 16
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (4,), "head_channels": 8, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
