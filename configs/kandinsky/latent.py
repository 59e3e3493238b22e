"""Kandinsky 2.2's decoder: latents of 64 x 64 x 4 from CLIP's image embedding.

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, CLIP ViT-bigG/14 and MoVQ. The public
folders hold both:

    unclip train configs/kandinsky/latent.py --workdir runs/kandinsky/latent \\
        --clip kandinsky-2-2-prior --set frozen.autoencoder=kandinsky-2-2-decoder
    unclip train configs/kandinsky/latent.py:inpaint --workdir runs/kandinsky/latent_inpaint \\
        --clip kandinsky-2-2-prior --set frozen.autoencoder=kandinsky-2-2-decoder \\
        --init-from kandinsky-2-2-decoder

variant    parameters      what it is
(none)     1,253,057,288   the decoder
:inpaint   1,253,074,568   with 5 more input channels, fine-tuned from it (`--init-from`)
:tiny      runs in seconds on a CPU, for tests; :tiny-inpaint the same for the one that inpaints

from the public files   the U-Net: 384 channels, multiples 1,2,3,4, depth 3, head channels 64, attention at
                        32, 16 and 8 latents; 32 tokens of width 768 made of z_i; betas linear from 0.00085 to
                        0.012
from the 2.1 code       the image dropped for 10 % of the rows

Choices, because the training of 2.2 is not published:

- The loss is that of the noise alone. The public network has channels for a variance, which its own pipeline
  leaves out.
- AdamW at 1e-4, constant after 5,000 steps of warmup, at batch 2,048 for 500,000 steps; averages of decay
  0.9999.
- Crops take at least 80 % of the shorter side.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "inpaint", "tiny", "tiny-inpaint")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("kandinsky")
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    with config.unlocked():
        config.steps = 500_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "unet": {
                "image_size": 64,
                "out_channels": 8,
                "channels": 384,
                "channel_mult": (1, 2, 3, 4),
                "res_blocks": 3,
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
                "groups": 32,
                "dropout": 0.0,
            },
            "latent_channels": 4,
            "context_dim": 768,
            "clip_tokens": 32,
            "inpaint": variant.endswith("inpaint"),
        }
        config.diffusion = {
            "schedule": "linear",
            "num_steps": 1000,
            "prediction": "eps",
            "beta_ends": (0.00085, 0.012),
        }
        config.drop_embedding = 0.1
        config.optimizer = defaults.adamw(learning_rate=1e-4)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 50,
            "sampler": "ddpm",
            "variance": "small",
            "spacing": "leading",
            "guidance_scale": 4.0,
            "clip": None,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 16, "fid_rows": 0}
    if variant == "inpaint":
        config.steps = 100_000
        config.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 1000})
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (4,), "head_channels": 8, "groups": 4})
        config.model.update({"context_dim": 16, "clip_tokens": 2})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
