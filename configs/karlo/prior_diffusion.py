"""Karlo's diffusion prior (kakaobrain/karlo-v1-alpha).

It needs a CLIP: the run of `configs/karlo/clip.py` in the folder beside its own, or a transformers folder of
ViT-L/14 that `--clip DIR` names.

    unclip train configs/karlo/prior_diffusion.py --workdir runs/karlo/prior_diffusion \\
        --clip clip-vit-large-patch14 --set data.train.pattern='/data/laion/*.tfrecord'

size         1,022,030,080 parameters: 20 blocks, width 2048, 32 heads, over CLIP's 77 text states and 4 more
             tokens
diffusion    1,000 steps, cosine; the network predicts x0, on whitened embeddings
sampling     25 steps, guidance 4, x0 bounded at 5

Choices, because Karlo's training is not published:

- The training is unCLIP's (appendix C, table 3): 600K iterations at batch 4,096, AdamW 1.1e-4 with betas 0.9
  and 0.96, weight decay 0.06, EMA 0.9999; captions dropped for 10 % of the rows.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.

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
    config = defaults.run("prior_diffusion")
    config.frozen = {"clip": "../clip"}
    with config.unlocked():
        config.text_tokenizer = None
        config.steps = 600_000
        config.batch_size = 4096
        config.data = defaults.shards(("val",))
        config.data.crop_scale = 1.0
        config.model = {"width": 2048, "layers": 20, "heads": 32, "dropout": 0.0, "text": None}
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
        config.space = {"kind": "whitened", "scale": None}
        config.statistics_batches = 40
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=1.1e-4, b1=0.9, b2=0.96, eps=1e-6, weight_decay=6e-2)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 25,
            "sampler": "ddpm",
            "variance": "small",
            "guidance_scale": 4.0,
            "clip": 5.0,
            "candidates": 1,
        }
        config.eval = {"batch_size": 256, "rows": 2048, "candidates": 128}
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
