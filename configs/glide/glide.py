"""GLIDE's network of 64 px (Nichol et al. 2021, section 4).

    unclip train configs/glide/glide.py --workdir runs/glide/glide \\
        --set data.train.pattern='/data/laion/*.tfrecord'
    unclip train configs/glide/glide.py:guidance --workdir runs/glide/guidance --init-from runs/glide/glide
    unclip train configs/glide/glide.py:inpaint --workdir runs/glide/inpaint --init-from runs/glide/guidance

size            3.5B parameters; with GLIDE's vocabulary 3,554,414,086
U-Net           ADM's for ImageNet 64, 512 channels wide: depth 3, multiples 1,2,3,4, head channels 64,
                attention at 32, 16 and 8 px
text encoder    context 128, width 2048, 24 blocks, 32 heads
diffusion       1,000 steps, cosine, learned variance (hybrid loss)
training        2.5M iterations at batch 2,048, all captions kept
:guidance       fine-tuning in which 20 % of the captions are empty
:inpaint        fine-tuning with regions erased at random; four more input channels start at zero
sampling        150 steps; guidance 1.5 where the paper reports its FID

Choices where the paper is silent:

- The vocabulary is CLIP's, of 49,408 tokens, which lies in the package. `--set text_tokenizer.folder=DIR
  --set text_tokenizer.vocab_size=50257` takes GLIDE's from the files of glide-text2im.
- AdamW at 1e-4 with betas 0.9 and 0.999, dropout 0.1, EMA 0.9999. The rate is constant after 5,000 steps of
  warmup, and gradients are clipped at norm 1.
- The fine-tunings take 200,000 steps at a tenth of the rate. Inpainting keeps the 20 % of empty captions.

The variants `filtered` have the size of the public networks (385M), whose files `--init-from` takes:

    unclip train configs/glide/glide.py:filtered --workdir runs/glide/mine --init-from glide \\
        --set text_tokenizer.folder=glide --set text_tokenizer.vocab_size=50257 --set drop_text=0.2

variant            what it is
(none)             the paper's
:guidance          fine-tuned for guidance
:inpaint           fine-tuned to inpaint
:filtered          of the public size
:filtered-inpaint  of the public size, to inpaint
:tiny              runs in seconds on a CPU, on the embedded emoji, for tests
:tiny-inpaint      the same, to inpaint
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "guidance", "inpaint", "filtered", "filtered-inpaint", "tiny", "tiny-inpaint")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("glide")
    with config.unlocked():
        config.text_tokenizer = {"length": 128, "vocab_size": 49408, "folder": None}
        config.steps = 2_500_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 1.0
        config.factor = None
        config.model = {
            "inpaint": False,
            "text": {"width": 2048, "layers": 24, "heads": 32},
            "unet": {
                "image_size": 64,
                "out_channels": 6,
                "channels": 512,
                "channel_mult": (1, 2, 3, 4),
                "res_blocks": 3,
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
                "groups": 32,
                "dropout": 0.1,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 1e-3}
        config.drop_text = 0.0
        config.optimizer = defaults.adamw(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 150,
            "sampler": "ddpm",
            "variance": "learned",
            "guidance_scale": 1.0,
            "clip": 1.0,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 16, "fid_rows": 0}
    if variant.startswith("filtered"):
        config.model.unet.channels = 192
        config.model.text.update({"width": 512, "layers": 16, "heads": 8})
    if variant == "guidance" or variant.endswith("inpaint"):
        config.steps = 200_000
        config.drop_text = 0.2
        config.sampling.guidance_scale = 1.5
        config.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 1000})
        config.model.inpaint = variant.endswith("inpaint")
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.text_tokenizer.update({"length": 12, "vocab_size": 8192})
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (4,), "head_channels": 8, "groups": 4})
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
