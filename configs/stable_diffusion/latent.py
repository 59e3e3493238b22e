"""Stable Diffusion: the U-Net of 1.x and 2.x, at the exact sizes.

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, and the text tower and the autoencoder.
Public weights hold both:

    unclip train configs/stable_diffusion/latent.py --workdir runs/stable_diffusion/latent \\
        --set frozen.clip=FOLDER --set frozen.autoencoder=FOLDER [--init-from FOLDER]

With `--init-from` a folder or single file of public weights is fine-tuned; without it, the U-Net starts
fresh.

variant    parameters   context                   predicts  latents  of
(none)     859,520,964  CLIP ViT-L/14, 768        eps       64       1.x
:v2-base   865,910,724  OpenCLIP ViT-H/14, 1024   eps       64       2.x-base
:v2-768    865,910,724  the same                  v         96       2.x-768
:inpaint   859,535,364  as 1.x                    eps       64       the 9 channels of 1.5-inpainting
:tiny      runs in seconds on a CPU, for tests; :tiny-v2 the same with 2.x's projections, and v

from the model cards   AdamW at 1e-4 with 10,000 steps of warmup, constant; a batch of 2,048; the caption
                       dropped for 10 % of the rows; no term of the variational bound; averages of decay
                       0.9999; the scaled linear schedule from 0.00085 to 0.012

Where the cards are silent:

- 1.x began with 237,000 steps at 256 px and went on with 194,000 at 512 px. The steps here are the latter.
- The weight decay is torch's default, 0.01.
- Crops. Ours take at least 80 % of the shorter side.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "v2-base", "v2-768", "inpaint", "tiny", "tiny-v2")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    is_2 = variant in ("v2-base", "v2-768", "tiny-v2")
    config = defaults.run("latent")
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    with config.unlocked():
        config.steps = 194_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "image_size": 96 if variant == "v2-768" else 64,
            "in_channels": 9 if variant == "inpaint" else 4,
            "out_channels": 4,
            "channels": 320,
            "channel_mult": (1, 2, 4, 4),
            "res_blocks": 2,
            "heads": (5, 10, 20, 20) if is_2 else (8, 8, 8, 8),
            "attention_levels": (0, 1, 2),
            "context_dim": 1024 if is_2 else 768,
            "transformer_depth": 1,
            "linear": is_2,
            "groups": 32,
            "dropout": 0.0,
        }
        config.diffusion = {
            "schedule": "scaled_linear",
            "num_steps": 1000,
            "prediction": "v" if variant in ("v2-768", "tiny-v2") else "eps",
        }
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01, clip_norm=None
        )
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 50,
            "sampler": "ddim",
            "spacing": "leading",
            "offset": 1,
            "last": "first",
            "guidance_scale": 7.5,
            "clip": None,
        }
        config.eval = {"batch_size": 64, "rows": 2048, "samples": 16, "fid_rows": 0}
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.model.update({"image_size": 8, "channels": 16, "channel_mult": (1, 2), "groups": 8})
        config.model.update({"res_blocks": 1, "heads": (2, 2), "attention_levels": (0,), "context_dim": 32})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
