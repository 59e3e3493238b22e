"""The paper's autoregressive prior (unCLIP section 2.2 and appendix C, table 3).

It needs the runs of `configs/dalle2/clip.py` and `configs/dalle2/codec.py` in the folders beside its own.

    unclip train configs/dalle2/prior_ar.py --workdir runs/dalle2/prior_ar \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size              1B parameters
text encoder      context 256, width 2048, 24 blocks, 32 heads
latent decoder    context 384, width 1664, 24 blocks, 26 heads
codes             319 of 1,024 principal components, each in one of 1,024 buckets
training          1M iterations at batch 4,096, AdamW 1.6e-4 with betas 0.9 and 0.91, eps 1e-10, weight decay
                  0.04, EMA 0.999; captions dropped for 10 % of the rows
sampling          with z_i.z_t from the top half of its distribution

Choices where the paper is silent:

- Every layer of the latent decoder attends to the text encoder's states, whose keys and values stand before
  its own, as in GLIDE. The latent decoder therefore needs 320 of its 384 positions.
- The dot product falls into one of 128 bins, which are equally frequent.
- The vocabulary is CLIP's, of 49,408 tokens.
- The buckets of a projection have equal widths and lie between its extremes.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- Sampling is not guided.

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
    config = defaults.run("prior_ar")
    config.frozen = {"clip": "../clip", "codec": "../codec"}
    with config.unlocked():
        config.text_tokenizer = {"length": 256, "vocab_size": 49408}
        config.steps = 1_000_000
        config.batch_size = 4096
        config.data = defaults.shards(("val",))
        config.data.crop_scale = 1.0
        config.model = {
            "codes": 319,
            "buckets": 1024,
            "dot_bins": 128,
            "width": 1664,
            "layers": 24,
            "heads": 26,
            "dropout": 0.0,
            "text": {"width": 2048, "layers": 24, "heads": 32},
        }
        config.statistics_batches = 40
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=1.6e-4, b1=0.9, b2=0.91, eps=1e-10, weight_decay=4e-2)
        config.ema_decay = 0.999
        config.sampling = {"guidance_scale": 1.0, "temperature": 1.0, "dot_quantile": 0.5}
        config.eval = {"batch_size": 256, "rows": 2048, "candidates": 128}
    if variant == "tiny":
        defaults.tiny(config)
        config.text_tokenizer = {"length": 12, "vocab_size": 8192}
        config.model.update({"codes": 6, "buckets": 16, "dot_bins": 4, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
    return config.lock()
