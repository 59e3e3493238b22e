"""Latent diffusion without a condition, of classes, to enlarge and to inpaint (Rombach et al. 2022, appendix
E), at the exact sizes.

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, and the autoencoder of
`configs/latent/autoencoder.py` in the folder beside its own.

    unclip train configs/latent/latent.py --workdir runs/latent/latent
    unclip train configs/latent/latent.py:cin --workdir runs/latent/latent --set data.classes=classes.txt

variant     parameters    autoencoder   schedule           for
(none)      274,056,163   vq-f4         0.0015 to 0.0195   CelebA-HQ, FFHQ, LSUN bedrooms; 256 px
:churches   294,966,916   kl-f8         0.0015 to 0.0155   LSUN churches; 256 px
:cin        401,433,091   vq-f4         0.0015 to 0.0195   ImageNet by classes; 256 px
:cin-f8     395,496,708   vq-f8         0.0015 to 0.0195   ImageNet by classes; 256 px
:sr         113,622,563   vq-f4         0.0015 to 0.0155   four times larger, of degraded images
:inpaint    387,245,827   vq-f4-noattn  0.0015 to 0.0205   Places, to inpaint; 512 px from 256 px
:tiny       runs in seconds on a CPU, for tests; :tiny-cin the same with classes, :tiny-sr to enlarge

The networks of classes count 512,512 parameters of their table of 1,000 classes and of no class. A record's
class is its `label` here: `caption`, `folder`, or a field of its metadata. `data.classes` names a file of the
classes' names, one a line, in the order of their numbers.

from the paper   the networks; noise is predicted, with the plain squared error; averages of decay 0.9999;
                 DDIM with 200 steps

Where it differs from the paper: its churches and its inpainting are trained with the absolute error. The
steps, batches and rates of `:cin`, `:cin-f8`, `:sr` and `:inpaint` are ours and were not checked against the
paper. The class is dropped for 10 % of the rows, which is ours too.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "churches", "cin", "cin-f8", "sr", "inpaint", "tiny", "tiny-cin", "tiny-sr")
F8 = {"image_size": 32, "in_channels": 4, "out_channels": 4}
CLASSES = {"context_dim": 512, "classes": 1000, "transformer_depth": 1}
# What a variant changes in the model.
MODELS = {
    "churches": F8
    | {
        "channels": 192,
        "channel_mult": (1, 2, 2, 4, 4),
        "heads": (8, 8, 8, 8, 8),
        "attention_levels": (0, 1, 2, 3),
        "resample": "block",
        "scale_shift": True,
    },
    "cin": CLASSES | {"channels": 192, "channel_mult": (1, 2, 3, 5), "heads": (1, 1, 1, 1)},
    "cin-f8": F8
    | CLASSES
    | {
        "channels": 256,
        "channel_mult": (1, 2, 4),
        "heads": (8, 16, 32),
        "attention_levels": (0, 1, 2),
    },
    "sr": {
        "in_channels": 6,
        "channels": 160,
        "channel_mult": (1, 2, 2, 4),
        "heads": (5, 10, 10, 20),
        "attention_levels": (3,),
    },
    "inpaint": {"in_channels": 7, "channels": 256, "heads": (8, 8, 8, 8), "resample": "block"},
}
# The last beta, the steps, the batch and the learning rate.
RUNS = {
    "": (0.0195, 410_000, 48, 9.6e-5),
    "churches": (0.0155, 500_000, 96, 5e-5),
    "cin": (0.0195, 178_000, 1200, 1e-4),
    "cin-f8": (0.0195, 2_000_000, 64, 6.4e-5),
    "sr": (0.0155, 860_000, 64, 6.4e-5),
    "inpaint": (0.0205, 360_000, 128, 5e-5),
}


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    kind = {"tiny": "", "tiny-cin": "cin", "tiny-sr": "sr"}.get(variant, variant)
    beta_end, steps, batch_size, learning_rate = RUNS[kind]
    config = defaults.run("latent")
    config.frozen = {"clip": None, "autoencoder": "../autoencoder"}
    with config.unlocked():
        config.steps, config.batch_size = steps, batch_size
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "image_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "channels": 224,
            "channel_mult": (1, 2, 3, 4),
            "res_blocks": 2,
            "heads": (7, 14, 21, 28),
            "attention_levels": (1, 2, 3),
            "context_dim": None,
            "transformer_depth": 0,
            "resample": "conv",
            "scale_shift": False,
            "groups": 32,
            "dropout": 0.0,
            **MODELS.get(kind, {}),
        }
        config.diffusion = {
            "schedule": "scaled_linear",
            "num_steps": 1000,
            "prediction": "eps",
            "beta_ends": (0.0015, beta_end),
        }
        config.drop_text = 0.1 if "classes" in config.model else 0.0
        if "classes" in config.model:
            config.data.update({"label": "label", "classes": "classes.txt"})
        if kind == "sr":
            config.data.degradation = "bsr_light"
        config.optimizer = defaults.adamw(
            learning_rate=learning_rate, warmup_steps=10_000, weight_decay=0.01, clip_norm=None
        )
        config.ema_decay = 0.9999
        config.sampling = {"steps": 200, "sampler": "ddim", "guidance_scale": 1.0, "clip": None}
        config.eval = {"batch_size": 48, "rows": 2048, "samples": 16}
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.model.update({"image_size": 8, "in_channels": 4, "out_channels": 4, "channels": 16})
        config.model.update({"channel_mult": (1, 2), "res_blocks": 1, "heads": (2, 2), "groups": 8})
        config.model.attention_levels = (1,)
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    if variant == "tiny-sr":
        config.model.in_channels = 7
    if variant == "tiny-cin":
        config.model.update({"context_dim": 32, "classes": 4})
        with config.unlocked():
            del config.data.classes  # a file's name
            config.data.update({"label": "style", "classes": ("3d", "flat", "blob", "noto")})
    return config.lock()
