"""The diffusion prior for the embedded emoji; it needs the CLIP of `configs/emoji/clip.py` beside it.

    unclip train configs/emoji/prior_diffusion.py --workdir runs/emoji/prior

variant   what it is
(none)    the shipped bundle's
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests

Choices: embeddings are whitened per dimension, as in the public Karlo prior, rather than scaled by 17.2; 32 sampling steps.
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/prior_diffusion.py; choose one of quick, tiny, or none")
    config = ConfigDict()
    config.stage = "prior_diffusion"
    config.clip = "../clip"
    config.text_tokenizer = None
    config.seed = 0
    config.steps = 500
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
    config.model = {"width": 192, "layers": 4, "heads": 6, "dropout": 0.1, "text": None}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.space = {"kind": "whitened", "scale": 1.0}
    config.statistics_batches = 40
    config.drop_text = 0.1
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.96,
        "eps": 1e-6,
        "weight_decay": 6e-2,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.99
    config.sampling = {"steps": 32, "sampler": "ddpm", "variance": "small", "guidance_scale": 2.0, "clip": 5.0, "candidates": 2}
    config.eval = {"batch_size": 100, "rows": 400, "candidates": 100}
    config.log_every = 20
    config.eval_every = 500
    config.checkpoint_every = 250
    config.keep = 2
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "quick":
        config.checkpoint_every = 40
        config.steps = 120
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.sampling.steps = 16
        config.eval_every = 120
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
