"""CLIP ViT-L/14, on which Karlo stands (Radford et al. 2021, table 20).

Karlo itself took OpenAI's weights. If you give the other stages a transformers folder of those weights with
`--clip DIR`, you need not train this one.

    unclip train configs/karlo/clip.py --workdir runs/karlo/clip \\
        --set data.train.pattern='/data/laion/*.tfrecord'

image tower   width 1024, 24 blocks, patches of 14 px, images of 224 px
text tower    width 768, 12 blocks
embeddings    of 768 dimensions; the export to diffusers needs text states as wide as these
training      batch 32,768, 32 epochs of 400 million pairs, AdamW 4e-4 with betas 0.9 and 0.98, eps 1e-6,
              weight decay 0.2, 2,000 steps of warmup, cosine

A choice: the evaluation uses an EMA of 0.999.

variant   what it is
(none)    the public size
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("clip")
    with config.unlocked():
        config.steps = 32 * 400_000_000 // 32_768
        config.batch_size = 32_768
        config.tokenizer = {"length": 77, "vocab_size": 49408}
        config.data = defaults.shards(("val",))
        config.data.crop_scale = 1.0
        config.model = {
            "embed_dim": 768,
            "image": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
            "text": {"width": 768, "layers": 12, "heads": 12},
            "activation": "quick_gelu",
        }
        config.optimizer = defaults.adamw(
            learning_rate=4e-4,
            warmup_steps=2000,
            schedule="cosine",
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.2,
            clip_norm=None,
        )
        config.sam = {"rho": 0.0, "group_size": 64}  # off
        config.ema_decay = 0.999
        config.eval = {"batch_size": 1024, "rows": 8192, "candidates": 1024}
    if variant == "tiny":
        defaults.tiny(config)
        config.tokenizer = {"length": 24, "vocab_size": 8192}
        config.model.embed_dim = 32
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.sam.group_size = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
