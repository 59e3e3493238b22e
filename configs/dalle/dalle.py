"""The transformer of DALL-E (Ramesh et al. 2021, section 2.2 and appendix B).

    unclip train configs/dalle/dalle.py --workdir runs/dalle/dalle

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, and the run of `configs/dalle/dvae.py` in
the folder `dvae` beside its own. `--set frozen.dvae=FOLDER` takes the published discrete VAE.

variant   layers   width, heads   text          image              parameters       batch
(none)    64       3968, 62       256 of 16384  32 x 32 of 8192    12,293,857,024   1024
:emoji    4        192, 6         32 of 2048    8 x 8 of 512       small            64, on the embedded emoji
:tiny     runs in seconds on a CPU, for tests

from the paper   the masks of the layers, their order, and an 11 x 11 window; padding tokens of their own for
                 each position; 1/8 of the loss on text; AdamW (0.9, 0.96) with eps 1e-8, weight decay 4.5e-2,
                 gradients clipped at 4; 430,000 updates; averages of decay 0.999; BPE dropout of 10 %

Where the paper is silent, or where it differs:

- The parameters are our count. The paper says 12 billion.
- The rate, 4.5e-4 after 5,000 steps, falls along half a cosine; the paper's is halved when the loss stalls.
- The tokenizer is the first 16,384 entries of CLIP's byte pairs; the paper's are its own.
- Text and image have output layers of their own, so no logits have to be masked.
- One caption in ten is dropped for guidance, which the paper does not use (`drop_text=0`).
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "emoji", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("dalle")
    config.frozen = {"dvae": "../dvae"}
    with config.unlocked():
        config.steps = 430_000
        config.batch_size = 1024
        config.image_size = 256
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.tokenizer = {"length": 256, "vocab_size": 16384}
        config.model = {"width": 3968, "layers": 64, "heads": 62, "window": 11, "dropout": 0.0}
        config.drop_text = 0.1
        config.bpe_dropout = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=4.5e-4, schedule="cosine", b1=0.9, b2=0.96, weight_decay=4.5e-2, clip_norm=4.0
        )
        config.ema_decay = 0.999
        config.sampling = {"temperature": 1.0, "guidance_scale": 1.0}
        config.eval = {"batch_size": 64, "rows": 512, "samples": 16, "fid_rows": 0}
    if variant == "emoji":
        defaults.small_run(config)
        config.steps, config.batch_size, config.image_size, config.eval_every = 6000, 64, 32, 1000
        config.data = defaults.emoji("compose")
        with config.unlocked():
            config.data.crop_scale = 0.95
        config.tokenizer.update({"length": 32, "vocab_size": 2048})
        config.model.update({"width": 192, "layers": 4, "heads": 6, "window": 5, "dropout": 0.1})
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 200, "clip_norm": 1.0})
        config.ema_decay = 0.998
        config.sampling.guidance_scale = 2.0
        config.eval.update({"batch_size": 32, "rows": 256})
    if variant == "tiny":
        defaults.tiny(config)
        config.image_size = 16
        config.tokenizer.update({"length": 8, "vocab_size": 600})
        config.model.update({"width": 32, "layers": 3, "heads": 2, "window": 3, "dropout": 0.1})
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
