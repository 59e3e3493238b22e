"""GLIDE's upsampler from 64 to 256 px, which reads the caption too (Nichol et al. 2021, section 4).

    unclip train configs/glide/glide_256.py --workdir runs/glide/glide_256 \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size            1.5B parameters as printed
U-Net           ADM's for upsampling ImageNet, 384 channels wide: depth 2, multiples 1,1,2,2,4,4, head
                channels 64, attention at 32, 16 and 8 px
text encoder    as that of the network of 64 px, but of width 1024
diffusion       1,000 steps, linear, learned variance (hybrid loss)
training        1.6M iterations at batch 512, whole pictures
sampling        27 steps of DDIM (`fast27`), without guidance; the noise is scaled by 0.997, as in the
                published notebooks

Choices where the paper is silent are those of `configs/glide/glide.py`, and:

- The small image is a clean reduction (bicubic), and is enlarged bilinearly.
- The text encoder has 24 blocks and 16 heads. The upsampler to inpaint is fine-tuned as the other network is.

variant            what it is
(none)             the paper's
:inpaint           fine-tuned to inpaint
:filtered          of the public size, 398M parameters; it takes public weights as the other network does
:filtered-inpaint  of the public size, to inpaint
:tiny              runs in seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "inpaint", "filtered", "filtered-inpaint", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("glide")
    with config.unlocked():
        config.text_tokenizer = {"length": 128, "vocab_size": 49408, "folder": None}
        config.steps = 1_600_000
        config.batch_size = 512
        config.data = defaults.shards("val")
        config.data.crop_scale = 1.0
        config.factor = 4
        config.model = {
            "inpaint": False,
            "text": {"width": 1024, "layers": 24, "heads": 16},
            "unet": {
                "image_size": 256,
                "out_channels": 6,
                "channels": 384,
                "channel_mult": (1, 1, 2, 2, 4, 4),
                "res_blocks": 2,
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
                "groups": 32,
                "dropout": 0.1,
            },
        }
        config.diffusion = {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "vb_weight": 1e-3}
        config.drop_text = 0.0
        config.optimizer = defaults.adamw(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {"steps": "fast27", "sampler": "ddim", "variance": "learned", "clip": 1.0}
        config.sampling.noise_scale = 0.997
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 8, "fid_rows": 0}
    if variant.startswith("filtered"):
        config.model.unet.channels = 192
        config.model.text.update({"width": 512, "layers": 16, "heads": 8})
    if variant.endswith("inpaint"):
        config.steps = 200_000
        config.drop_text = 0.2
        config.model.inpaint = True
        config.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 1000})
        config.sampling.sampler = "ddpm"
    if variant == "tiny":
        defaults.tiny(config)
        config.text_tokenizer.update({"length": 12, "vocab_size": 8192})
        config.factor = 2
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        config.model.unet.update({"image_size": 16, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (), "head_channels": 8, "groups": 4})
        config.sampling.steps = "3"
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
