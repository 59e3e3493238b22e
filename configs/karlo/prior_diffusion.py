"""Karlo's diffusion prior (kakaobrain/karlo-v1-alpha); it needs a CLIP beside it, or `--clip DIR`: a transformers folder of ViT-L/14.

    unclip train configs/karlo/prior_diffusion.py --workdir runs/karlo/prior --clip clip-vit-large-patch14 \\
      --set data.train.pattern='/data/laion/*.tfrecord'

Karlo's           1,022,030,080 parameters: 20 blocks, width 2048, 32 heads, over CLIP's 77 text states and 4 more tokens
diffusion         1,000 steps, cosine, x0-prediction on whitened embeddings; sampled with 25 steps, guidance 4, x0 bounded at 5

Choices, as Karlo's training is not published: unCLIP's (appendix C table 3), AdamW 1.1e-4, betas 0.9 and 0.96, weight decay 0.06, batch
4,096, 600K iterations, captions dropped 10 %, EMA 0.9999; a constant rate after 5,000 steps of warmup; gradients clipped at norm 1.

variant   what it is
(none)    the public size
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/karlo/prior_diffusion.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "prior_diffusion"
    config.clip = "../clip"
    config.text_tokenizer = None
    config.seed = 0
    config.steps = 600_000
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
    config.model = {"width": 2048, "layers": 20, "heads": 32, "dropout": 0.0, "text": None}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.space = {"kind": "whitened", "scale": None}
    config.statistics_batches = 40
    config.drop_text = 0.1
    config.optimizer = {
        "learning_rate": 1.1e-4,
        "warmup_steps": 5000,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.96,
        "eps": 1e-6,
        "weight_decay": 6e-2,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.9999
    config.sampling = {"steps": 25, "sampler": "ddpm", "variance": "small", "guidance_scale": 4.0, "clip": 5.0, "candidates": 1}
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
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"val": {"name": "emoji", "split": "val"}}
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.optimizer.warmup_steps = 1
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
