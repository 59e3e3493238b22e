"""The paper's diffusion prior (unCLIP section 2.2 and appendix C, table 3).

It needs the run of `configs/dalle2/clip.py` in the folder beside its own.

    unclip train configs/dalle2/prior_diffusion.py --workdir runs/dalle2/prior_diffusion \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size         1B parameters: a causal transformer of 24 blocks, width 2048, 32 heads, over 256 text tokens and
             4 more
diffusion    1,000 steps, cosine; the network predicts x0, on embeddings times 17.2
training     600K iterations at batch 4,096, AdamW 1.1e-4 with betas 0.9 and 0.96, eps 1e-6, weight decay
             0.06, EMA 0.9999; captions dropped for 10 % of the rows
sampling     64 steps, analytic variance, 2 candidates

Choices where the paper is silent:

- The prior has no separate text encoder: this one transformer embeds the caption's tokens, and its first 256
  states are what the paper calls the encoded text.
- The vocabulary is CLIP's, of 49,408 tokens.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- Sampling is not guided: the paper finds that a guided prior makes images less pleasing.
- x0 is bounded at 2 while sampling.

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
    config = defaults.run("prior_diffusion")
    config.frozen = {"clip": "../clip"}
    with config.unlocked():
        config.text_tokenizer = {"length": 256, "vocab_size": 49408}
        config.steps = 600_000
        config.batch_size = 4096
        config.data = defaults.shards(("val",))
        config.data.crop_scale = 1.0
        config.model = {"width": 2048, "layers": 24, "heads": 32, "dropout": 0.0, "text": {}}
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
        config.space = {"kind": "scaled", "scale": 17.2}
        config.statistics_batches = 40
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=1.1e-4, b1=0.9, b2=0.96, eps=1e-6, weight_decay=6e-2)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 64,
            "sampler": "ddpm",
            "variance": "analytic",
            "guidance_scale": 1.0,
            "clip": 2.0,
            "candidates": 2,
        }
        config.eval = {"batch_size": 256, "rows": 2048, "candidates": 128}
    if variant == "tiny":
        defaults.tiny(config)
        config.eval_every = 2  # twice: each evaluation measures the analytic variance anew
        config.text_tokenizer = {"length": 12, "vocab_size": 8192}
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
