"""The diffusion prior for the embedded emoji.

It needs the run of `configs/emoji/clip.py` in the folder beside its own.

    unclip train configs/emoji/prior_diffusion.py --workdir runs/emoji/prior_diffusion

Where it differs from the paper:

- Embeddings are whitened per dimension, as in the public Karlo prior. The paper multiplies them by 17.2.
- Sampling takes 32 steps. The paper takes 64.

variant   what it is
(none)    the one in the shipped bundle
:quick    for `launch/quickstart --train`
:tiny     runs in seconds on a CPU, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("prior_diffusion"))
    config.frozen = {"clip": "../clip"}
    config.eval_every = 500
    with config.unlocked():
        config.text_tokenizer = None
        config.steps = 500
        config.batch_size = 128
        config.data = defaults.emoji(("val", "compose"))
        config.data.crop_scale = 0.95
        config.model = {"width": 192, "layers": 4, "heads": 6, "dropout": 0.1, "text": None}
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
        config.space = {"kind": "whitened", "scale": 1.0}
        config.statistics_batches = 40
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=1e-3,
            warmup_steps=50,
            schedule="cosine",
            b1=0.9,
            b2=0.96,
            eps=1e-6,
            weight_decay=6e-2,
        )
        config.ema_decay = 0.99
        config.sampling = {
            "steps": 32,
            "sampler": "ddpm",
            "variance": "small",
            "guidance_scale": 2.0,
            "clip": 5.0,
            "candidates": 2,
        }
        config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    if variant == "quick":
        config.steps = 120
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.sampling.steps = 16
        config.eval_every = 120
        config.checkpoint_every = 40
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
