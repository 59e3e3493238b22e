"""The autoregressive prior for the embedded emoji; it needs the runs of `configs/emoji/clip.py` and `configs/emoji/pca.py` beside it.

    unclip train configs/emoji/prior_ar.py --workdir runs/emoji/prior_ar

variant   what it is
(none)    the shipped bundle's
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests

The paper: 319 of 1,024 components, 1,024 buckets. Choices: 32 of 128 components (99 % of the variance) and 128 buckets, as there are
7,000 images; 16 bins of z_i.z_t, equally frequent; the frozen CLIP's text states as the context.
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/prior_ar.py; choose one of quick, tiny, or none")
    config = ConfigDict()
    config.stage = "prior_ar"
    config.clip = "../clip"
    config.text_tokenizer = None
    config.pca = "../pca"
    config.seed = 0
    config.steps = 400
    config.batch_size = 128
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "none"
    config.scan_layers = False
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = {
        "train": {"name": "emoji", "split": "train"},
        "eval": {"val": {"name": "emoji", "split": "val"}, "compose": {"name": "emoji", "split": "compose"}},
        "backend": "auto",
        "max_bad_fraction": 0.01,
        "crop_scale": 0.95,
    }
    config.model = {"codes": 32, "buckets": 128, "dot_bins": 16, "width": 192, "layers": 4, "heads": 6, "dropout": 0.1, "text": None}
    config.statistics_batches = 40
    config.drop_text = 0.1
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.91,
        "eps": 1e-10,
        "weight_decay": 4e-2,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.99
    config.sampling = {"guidance_scale": 2.0, "temperature": 1.0, "dot_quantile": 0.5, "candidates": 2}
    config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    config.log_every = 20
    config.eval_every = 400
    config.checkpoint_every = 250
    config.keep = 2
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "quick":
        config.checkpoint_every = 40
        config.steps = 80
        config.statistics_batches = 10
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.eval_every = 80
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.model.update({"codes": 6, "buckets": 16, "dot_bins": 4, "width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.optimizer.warmup_steps = 1
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
