"""GLIDE for the embedded emoji: images of 32 px from captions alone, and an upsampler to 64 px.

    unclip train configs/emoji/glide.py --workdir runs/emoji/glide
    unclip train configs/emoji/glide.py:upsampler --workdir runs/emoji/glide_64

`unclip bundle` takes a folder with these two runs alone (docs/family.md).

from the paper    a text encoder of its own, whose last state joins the time embedding and whose states the
                  attention sees; the upsampler reads the caption too; learned variance; guidance by captions

Where it differs from the paper, so that it can be compared with `configs/emoji/decoder.py`:

- The U-Net, the optimizer, the steps and the batch are those of `configs/emoji/decoder.py`. With its text
  encoder the network has 3,657,510 parameters, and the decoder has 3,370,726.
- It predicts v, with the cosine schedule.
- The empty caption replaces the caption for 20 % of the rows from the first step on. The paper does so in a
  fine-tuning afterwards.
- The U-Net of the upsampler is that of `configs/emoji/upsampler.py`. With its text encoder the network has
  809,859 parameters, and that upsampler has 727,907.
- The tokenizer is the first 2,048 entries of CLIP's byte pairs.

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
    config = defaults.small_run(defaults.run("glide"))
    config.eval_every = 1000
    with config.unlocked():
        config.text_tokenizer = {"length": 24, "vocab_size": 2048, "folder": None}
        config.steps = 7000
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.data.crop_scale = 1.0
        config.factor = None
        config.model = {
            "inpaint": False,
            "text": {"width": 96, "layers": 2, "heads": 3},
            "unet": {
                "image_size": 32,
                "out_channels": 6,
                "channels": 16,
                "channel_mult": (1, 2, 4, 8),
                "res_blocks": 1,
                "attention_resolutions": (8, 4),
                "middle_attention": True,
                "head_channels": 32,
                "groups": 8,
                "dropout": 0.0,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 1e-3}
        config.drop_text = 0.2
        config.optimizer = defaults.adamw(
            learning_rate=1e-3, warmup_steps=300, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.999
        config.sampling = {
            "steps": 32,
            "sampler": "ddpm",
            "variance": "small",
            "guidance_scale": 2.0,
            "clip": 1.0,
        }
        config.eval = {"batch_size": 32, "rows": 256, "samples": 16, "fid_rows": 0}
    if variant.endswith("upsampler"):
        config.steps, config.eval_every = 1500, 500
        config.factor = 2
        config.model.text.update({"width": 32, "layers": 1, "heads": 1})
        config.model.unet.update({"image_size": 64, "out_channels": 3, "channel_mult": (1, 2, 4)})
        config.model.unet.update({"attention_resolutions": (), "middle_attention": False})
        config.diffusion.vb_weight = 0.0
        config.optimizer.warmup_steps = 100
        config.ema_decay = 0.998
        config.sampling = {"steps": 12, "sampler": "ddim", "eta": 0.0, "clip": 1.0}
        config.eval.rows = 128
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.text_tokenizer.update({"length": 8, "vocab_size": 600})
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        small = {"image_size": 8, "channels": 8, "channel_mult": (1, 2), "attention_resolutions": (4,)}
        if variant == "tiny-upsampler":
            small |= {"image_size": 16, "attention_resolutions": ()}
        config.model.unet.update(small)
        config.model.unet.update({"head_channels": 8, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
