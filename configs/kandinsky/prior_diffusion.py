"""Kandinsky 2.2's prior: Karlo's, for the embeddings of CLIP ViT-bigG/14.

It needs that CLIP: the public folder of the prior holds it.

    unclip train configs/kandinsky/prior_diffusion.py --workdir runs/kandinsky/prior_diffusion \\
        --clip kandinsky-2-2-prior --set data.train.pattern='/data/laion/*.tfrecord'

size         1,026,225,920 parameters with the embeddings' mean and deviation: 20 blocks, width 2048, 32 heads
diffusion    1,000 steps, cosine; the network predicts x0, on whitened embeddings
sampling     25 steps, guidance 4, x0 bounded at 10

Its training is not published. The settings are those of `configs/karlo/prior_diffusion.py`.

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
            "clip": 10.0,
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
