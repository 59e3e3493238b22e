"""The paper's CLIP (unCLIP section 2 and appendix C): ViT-H/16 at 256 px, trained with SAM.

    unclip train configs/dalle2/clip.py --workdir runs/dalle2/clip --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        image tower width 1280, 32 blocks (632,307,200 parameters); text tower causal, width 1024, 24 blocks (354,032,640);
                   embeddings of 1024
training           SAM with rho 0.1, perturbed independently for every 64 images; learning rate 3e-4; the rest as CLIP: batch 32,768,
                   32 epochs, AdamW betas 0.9 and 0.98, eps 1e-6, weight decay 0.2, warmup 2,000, cosine

Choices, where the paper is silent: 16 heads in both towers; QuickGELU; 32 epochs counted over 650 million pairs; no gradient clipping, as
CLIP's paper has none; EMA 0.999 for evaluation.

variant   what it is
(none)    the paper's
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/clip.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "clip"
    config.seed = 0
    config.steps = 32 * 650_000_000 // 32_768
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
        "embed_dim": 1024,
        "image": {"image_size": 256, "patch_size": 16, "width": 1280, "layers": 32, "heads": 16},
        "text": {"width": 1024, "layers": 24, "heads": 16},
        "activation": "quick_gelu",
    }
    config.optimizer = {
        "learning_rate": 3e-4,
        "warmup_steps": 2000,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
        "clip_norm": None,
        "mu_dtype": None,
    }
    config.sam = {"rho": 0.1, "group_size": 64}
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
        config.model.embed_dim = 16
        config.model.image.update({"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2})
        config.model.text.update({"width": 32, "layers": 1, "heads": 2})
        config.optimizer.warmup_steps = 1
        config.sam.group_size = 2
        config.eval.update({"batch_size": 16, "rows": 16, "candidates": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
