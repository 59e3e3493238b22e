"""CLIP ViT-L/14, on which Karlo stands (Radford et al. 2021, table 20). Karlo itself took OpenAI's weights: `--clip DIR` gives the other
stages a transformers folder of them, and this need not be trained.

    unclip train configs/karlo/clip.py --workdir runs/karlo/clip --set data.train.pattern='/data/laion/*.tfrecord'

CLIP's            image tower width 1024, 24 blocks, patches of 14 at 224 px; text tower width 768, 12 blocks; embeddings of 768
training          batch 32,768, 32 epochs of 400 million pairs, AdamW 4e-4, betas 0.9 and 0.98, eps 1e-6, weight decay 0.2,
                  warmup 2,000, cosine

The text states must be of the embeddings' size for export to diffusers, as they are here. A choice: EMA 0.999 for evaluation.

variant   what it is
(none)    the public size
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/karlo/clip.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "clip"
    config.seed = 0
    config.steps = 32 * 400_000_000 // 32_768
    config.batch_size = 32_768
    config.dtype = "auto"
    config.remat = "full"
    config.scan_layers = True
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.tokenizer = {"length": 77, "vocab_size": 49408}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "eval": {"val": {"name": "tfrecord", "pattern": "data/val/*.tfrecord"}},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_scale": 1.0,
    }
    config.model = {
        "embed_dim": 768,
        "image": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
        "text": {"width": 768, "layers": 12, "heads": 12},
        "activation": "quick_gelu",
    }
    config.optimizer = {
        "learning_rate": 4e-4,
        "warmup_steps": 2000,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
        "clip_norm": None,
        "mu_dtype": None,
    }
    config.sam = {"rho": 0.0, "group_size": 64}
    config.ema_decay = 0.999
    config.eval = {"batch_size": 1024, "rows": 8192, "candidates": 1024}
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
        config.tokenizer = {"length": 24, "vocab_size": 8192}
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"val": {"name": "emoji", "split": "val"}}
        config.model.embed_dim = 32
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.optimizer.warmup_steps = 1
        config.sam.group_size = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
