"""CLIP for the embedded emoji: it compares images of 64 px with captions.

    unclip train configs/emoji/clip.py --workdir runs/emoji/clip
    unclip train configs/emoji/clip.py:judge --workdir runs/judge

variant   what it is
(none)    for the next bundle
:judge    another size and seed, trained on all splits: it judges samples and never guides them
:quick    for `launch/quickstart --train`
:tiny     runs in seconds on a CPU, for tests

Patches of 8 px give the image tower 64 patches of an emoji. The CLIP of the shipped bundle `emoji` has 16
patches of 16 px. `balance` draws a concept of n drawings in proportion to the square root of n. The run saw
358,400 images in 7,949 s on two shared CPU cores, with jax 0.11.2.

figure                                              `emoji`, 153,600 images    this recipe
recall@1 among all 604 of compose, image to text    0.548                      0.619
recall@1 among all 604 of compose, text to image    0.552                      0.648

    unclip evaluate retrieval --bundle BUNDLE --data name=emoji --data split=compose

The shipped bundle `judge` is `:judge` after 1,200 steps: 307,200 images in 5,835 s on two busy CPU cores,
with jax 0.11.2. It ranks the own caption of a real picture first of 100 for 0.99 of 400 rows of `compose`,
and for 0.98 of 400 rows of `val`. It was trained on both.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "judge", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("clip"))
    config.eval_every = 100
    config.checkpoint_every = 50
    with config.unlocked():
        config.steps = 1400
        config.batch_size = 256
        config.tokenizer = {"length": 24, "vocab_size": 8192}
        config.data = defaults.emoji(("val", "compose"))
        config.data.train.balance = {"by": "base", "power": 0.5}
        config.data.crop_scale = 0.85
        config.model = {
            "embed_dim": 128,
            "image": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "heads": 6},
            "text": {"width": 128, "layers": 2, "heads": 4},
            "activation": "quick_gelu",
        }
        config.optimizer = defaults.adamw(
            learning_rate=1e-3,
            warmup_steps=100,
            schedule="cosine",
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.2,
        )
        config.sam = {"rho": 0.0, "group_size": 64}  # off
        config.ema_decay = 0.995
        config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    if variant == "judge":
        config.seed = 1
        config.data.train.split = "all"
        config.model.image.update({"width": 160, "layers": 6, "heads": 5})
        config.model.text.update({"width": 160, "heads": 5})
    if variant == "quick":
        config.steps = 220
        config.batch_size = 128
        config.model.image.patch_size = 16
        config.optimizer.warmup_steps = 30
        config.ema_decay = 0.95
        config.eval_every = 220
        config.checkpoint_every = 40
    if variant == "tiny":
        defaults.tiny(config)
        config.model.embed_dim = 16
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
