"""The paper's CLIP: ViT-H/16 at 256 px, trained with SAM (unCLIP section 2 and appendix C).

    unclip train configs/dalle2/clip.py --workdir runs/dalle2/clip \\
        --set data.train.pattern='/data/laion/*.tfrecord'

image tower   width 1280, 32 blocks: 632,307,200 parameters
text tower    causal, width 1024, 24 blocks: 354,032,640 parameters
embeddings    of 1,024 dimensions
training      SAM with rho 0.1, perturbed independently for every 64 images; learning rate 3e-4; otherwise as
              CLIP's paper: batch 32,768, 32 epochs, AdamW with betas 0.9 and 0.98, eps 1e-6, weight decay
              0.2, 2,000 steps of warmup, cosine

Choices where the paper is silent:

- Both towers have 16 heads and QuickGELU.
- The 32 epochs are of 650 million pairs.
- Gradients are not clipped, because CLIP's paper does not clip them.
- The evaluation uses an EMA of 0.999.

variant   what it is
(none)    the paper's
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
        config.steps = 32 * 650_000_000 // 32_768
        config.batch_size = 32_768
        config.tokenizer = {"length": 77, "vocab_size": 49408}
        config.data = defaults.shards(("val",))
        config.data.crop_scale = 1.0
        config.model = {
            "embed_dim": 1024,
            "image": {"image_size": 256, "patch_size": 16, "width": 1280, "layers": 32, "heads": 16},
            "text": {"width": 1024, "layers": 24, "heads": 16},
            "activation": "quick_gelu",
        }
        config.optimizer = defaults.adamw(
            learning_rate=3e-4,
            warmup_steps=2000,
            schedule="cosine",
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.2,
            clip_norm=None,
        )
        config.sam = {"rho": 0.1, "group_size": 64}
        config.ema_decay = 0.999
        config.eval = {"batch_size": 1024, "rows": 8192, "candidates": 1024}
    if variant == "tiny":
        defaults.tiny(config)
        config.tokenizer = {"length": 24, "vocab_size": 8192}
        config.model.embed_dim = 16
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.sam.group_size = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
