"""Latent diffusion for the embedded emoji: latents of 8 x 8 x 4, from captions.

It needs the runs of `configs/emoji/clip.py` and `configs/emoji/autoencoder.py` in the folders beside its own.

    unclip train configs/emoji/latent.py --workdir runs/emoji/latent

from Stable Diffusion   the U-Net's blocks; the text states of the frozen CLIP as the context; the scaled
                        linear schedule; the caption dropped for 10 % of the rows

Where it differs from it: the network is small, and predicts v.

variant   what it is
(none)    32 px, from `configs/emoji/autoencoder.py`
:64       64 px in 16 x 16 x 4, from `configs/emoji/autoencoder.py:64`
:small    32 px; with the autoencoder of the size of `configs/emoji/decoder.py`, to compare the systems
:inpaint  the U-Net that inpaints, fine-tuned from the other one (`--init-from runs/emoji/latent`)
:tiny     runs in seconds on a CPU, for tests; :tiny-inpaint the same for the one that inpaints
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "64", "small", "inpaint", "tiny", "tiny-inpaint")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("latent"))
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    config.eval_every = 1000
    with config.unlocked():
        config.steps = 8000
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.data.crop_scale = 1.0
        config.model = {
            "image_size": 16 if variant == "64" else 8,
            "in_channels": 9 if variant.endswith("inpaint") else 4,
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
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=6e-4, warmup_steps=300, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.999
        config.sampling = {"steps": 30, "sampler": "dpmpp_2m", "guidance_scale": 3.0, "clip": None}
        config.eval = {"batch_size": 32, "rows": 256, "samples": 16, "fid_rows": 0}
    if variant == "small":
        config.model.update({"channels": 32, "heads": (1, 2, 3)})
    if variant == "inpaint":
        config.steps = 2000
        config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 100})
        config.eval_every = 500
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.model.update({"channels": 16, "channel_mult": (1, 2), "heads": (2, 2), "groups": 8})
        config.model.update({"attention_levels": (1,), "context_dim": 32})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
