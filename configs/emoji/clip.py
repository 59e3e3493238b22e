"""CLIP for the embedded emoji: images of 64 px against captions.

    unclip train configs/emoji/clip.py --workdir runs/emoji/clip

variant   what it is
(none)    the shipped bundle's
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/clip.py; choose one of quick, tiny, or none")
    config = ConfigDict()
    config.stage = "clip"
    config.seed = 0
    config.steps = 1400
    config.batch_size = 256
    config.dtype = "auto"
    config.remat = "none"
    config.scan_layers = False
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.tokenizer = {"length": 24, "vocab_size": 8192}
    config.data = {
        "train": {"name": "emoji", "split": "train", "balance": {"by": "base", "power": 0.5}},
        "eval": {"val": {"name": "emoji", "split": "val"}, "compose": {"name": "emoji", "split": "compose"}},
        "backend": "auto",
        "max_bad_fraction": 0.01,
        "crop_scale": 0.85,
    }
    config.model = {
        "embed_dim": 128,
        "image": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "heads": 6},
        "text": {"width": 128, "layers": 2, "heads": 4},
        "activation": "quick_gelu",
    }
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.sam = {"rho": 0.0, "group_size": 64}  # off
    config.ema_decay = 0.995
    config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 50
    config.keep = 2
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "quick":
        config.batch_size = 128
        config.model.image.patch_size = 16
        config.checkpoint_every = 40
        config.steps = 220
        config.optimizer.warmup_steps = 30
        config.ema_decay = 0.95
        config.eval_every = 220
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.model.embed_dim = 16
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.optimizer.warmup_steps = 1
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
