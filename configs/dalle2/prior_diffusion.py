"""The paper's diffusion prior (unCLIP section 2.2, appendix C table 3); it needs a CLIP run beside it.

    unclip train configs/dalle2/prior_diffusion.py --workdir runs/dalle2/prior --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        1B parameters: a causal transformer of 24 blocks, width 2048, 32 heads, over 256 text tokens and 4 more
diffusion          1,000 steps, cosine, x0-prediction on embeddings times 17.2; sampled with 64 steps, analytic variance, 2 candidates
training           600K iterations at batch 4,096, AdamW 1.1e-4, betas 0.9 and 0.96, eps 1e-6, weight decay 0.06, EMA 0.9999;
                   captions dropped 10 %

Choices, where the paper is silent: the caption's tokens are embedded in this one transformer, which reads the paper's
"encoded text" as its own first 256 states; CLIP's vocabulary of 49,408; a constant rate after 5,000 steps of warmup; gradients clipped at
norm 1; no guidance (the paper finds that guiding the prior hurts aesthetics); x0 bounded at 2.

variant   what it is
(none)    the paper's
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/prior_diffusion.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "prior_diffusion"
    config.clip = "../clip"
    config.text_tokenizer = {"length": 256, "vocab_size": 49408}
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
    config.model = {"width": 2048, "layers": 24, "heads": 32, "dropout": 0.0, "text": {}}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.space = {"kind": "scaled", "scale": 17.2}
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
    config.sampling = {"steps": 64, "sampler": "ddpm", "variance": "analytic", "guidance_scale": 1.0, "clip": 2.0, "candidates": 2}
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
        config.model.update({"width": 32, "layers": 1, "heads": 2})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.optimizer.warmup_steps = 1
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 2
        config.checkpoint_every = 2
    return config.lock()
