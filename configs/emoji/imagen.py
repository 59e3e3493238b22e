"""Imagen for the embedded emoji: images of 32 px from captions, and an efficient U-Net from 32 to 64 px.

It needs the run of `configs/emoji/clip.py` in the folder beside its own.

    unclip train configs/emoji/imagen.py --workdir runs/emoji/imagen
    unclip train configs/emoji/imagen.py:upsampler --workdir runs/emoji/imagen_64

`unclip bundle` takes a folder with these runs and CLIP's alone (docs/family.md).

from the paper    a frozen text encoder, whose states the attention sees and whose mean joins the time
                  embedding; continuous time; the caption dropped for 10 % of the rows; the efficient U-Net;
                  noise conditioning augmentation; dynamic thresholding

Where it differs from the paper, so that it can be compared with `configs/emoji/decoder.py`:

- The frozen text encoder is the text tower of the emoji CLIP. The paper compares T5 with CLIP and uses T5.
  `--set frozen.t5=FOLDER --set frozen.clip=None` takes a T5, such as google/t5-v1_1-small.
- The U-Net, the optimizer, the steps and the batch are those of `configs/emoji/decoder.py`. The network has
  3,300,275 parameters, and the decoder has 3,370,726. The upsampler has 743,379, and that of
  `configs/emoji/upsampler.py` has 727,907.
- It predicts v, and Adam trains it. The variance is not learned, as in the paper.
- The upsampler learns on crops of half of the side, and not of a quarter.

These recipes have not been run to their end yet.

variant          what it is
(none)           32 px
:upsampler       32 -> 64 px
:tiny            runs in seconds on a CPU, for tests; :tiny-upsampler the same for the upsampler
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "upsampler", "tiny", "tiny-upsampler")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("imagen"))
    config.frozen = {"clip": "../clip", "t5": None}
    config.eval_every = 1000
    unet = {
        "image_size": 32,
        "out_channels": 3,
        "channels": 16,
        "channel_mult": (1, 2, 4, 8),
        "res_blocks": 1,
        "attention_resolutions": (8, 4),
        "head_channels": 32,
        "groups": 8,
        "dropout": 0.0,
    }
    with config.unlocked():
        config.steps = 7000
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.data.update({"crop_scale": 1.0, "crop_size": None})
        config.factor = None
        config.model = {"context_dim": 128, "unet": unet}
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 0.0}
        config.diffusion.continuous = True
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=1e-3, warmup_steps=300, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.999
        config.sampling = {
            "steps": 32,
            "sampler": "ddpm",
            "guidance_scale": 2.0,
            "clip": 1.0,
            "threshold": 99.5,
        }
        config.eval = {"batch_size": 32, "rows": 256, "samples": 16, "fid_rows": 0}
    if variant.endswith("upsampler"):
        config.steps, config.eval_every = 1500, 500
        config.factor = 2
        config.data.crop_size = 32
        config.model.context_dim = 64
        levels = {"channel_mult": (1, 2, 4), "res_blocks": (1, 1, 3), "attention": ("none", "none", "self")}
        with config.unlocked():
            del unet["attention_resolutions"]
            config.model.unet = unet | levels | {"image_size": 64}
        config.optimizer.warmup_steps = 100
        config.ema_decay = 0.998
        config.sampling.update({"steps": 12, "sampler": "ddim", "guidance_scale": 1.0})
        with config.unlocked():
            config.sampling.augmentation = 0.1
        config.eval.rows = 128
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.model.context_dim = 16
        config.model.unet.update({"channels": 8, "channel_mult": (1, 2), "head_channels": 8, "groups": 4})
        if variant == "tiny":
            config.model.unet.update({"image_size": 8, "attention_resolutions": (4,)})
        else:
            config.data.crop_size = 8
            config.model.unet.update({"image_size": 16, "res_blocks": (1, 1), "attention": ("none", "self")})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
