"""The paper's autoregressive prior (unCLIP section 2.2, appendix C table 3); it needs runs of CLIP and of pca.py beside it.

    unclip train configs/dalle2/prior_ar.py --workdir runs/dalle2/prior_ar --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        1B parameters: text encoder of context 256, width 2048, 24 blocks, 32 heads; latent decoder of context 384, width 1664,
                   24 blocks, 26 heads; 319 of 1,024 principal components in 1,024 buckets each
training           1M iterations at batch 4,096, AdamW 1.6e-4, betas 0.9 and 0.91, eps 1e-10, weight decay 0.04, EMA 0.999;
                   captions dropped 10 %
sampling           z_i.z_t from the top half of its distribution

Choices, where the paper is silent: the text encoder's states are keys and values before each layer's own, as in GLIDE, so that the
latent decoder needs 320 of its 384 positions; the dot product in 128 equally frequent bins; CLIP's vocabulary of 49,408; buckets of equal
width between the extremes of each projection; a constant rate after 5,000 steps of warmup; gradients clipped at norm 1; no guidance.

variant   what it is
(none)    the paper's
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/prior_ar.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "prior_ar"
    config.clip = "../clip"
    config.pca = "../pca"
    config.text_tokenizer = {"length": 256, "vocab_size": 49408}
    config.seed = 0
    config.steps = 1_000_000
    config.batch_size = 4096
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "full"
    config.scan_layers = True
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "eval": {"val": {"name": "tfrecord", "pattern": "data/val/*.tfrecord"}},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_scale": 1.0,
    }
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
    config.optimizer = {
        "learning_rate": 1.6e-4,
        "warmup_steps": 5000,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.91,
        "eps": 1e-10,
        "weight_decay": 4e-2,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.999
    config.sampling = {"guidance_scale": 1.0, "temperature": 1.0, "dot_quantile": 0.5}
    config.eval = {"batch_size": 256, "rows": 2048, "candidates": 128}
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 2000
    config.keep = 3
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.remat = "none"
        config.scan_layers = False
        config.mesh.fsdp = 1
        config.text_tokenizer = {"length": 12, "vocab_size": 8192}
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"val": {"name": "emoji", "split": "val"}}
        config.model.update({"codes": 6, "buckets": 16, "dot_bins": 4, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.optimizer.warmup_steps = 1
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
