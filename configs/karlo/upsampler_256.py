"""Karlo's super-resolution 64 -> 256 (kakaobrain/karlo-v1-alpha).

    unclip train configs/karlo/upsampler_256.py --workdir runs/karlo/upsampler_256 --set data.train.pattern='/data/laion/*.tfrecord'

Karlo's           691,579,523 parameters: 320 channels, depth 3, multiples 1,2,3,4, no attention, the time embedding added
diffusion         1,000 steps, cosine; sampled with 7 steps, of which another network of the same shape makes the last

Choices, as Karlo's training is not published: unCLIP's (appendix C table 3), AdamW 1.2e-4, batch 1,024, 1M iterations, dropout 0.1, EMA
0.9999, crops of a quarter of the side, the small image blurred on half of the rows; a constant rate after 5,000 steps of warmup;
gradients clipped at norm 1. The network of the last step is not trained by a stage here: in an exported folder this one makes it too.

variant   what it is
(none)    the public size
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/karlo/upsampler_256.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "upsampler"
    config.seed = 0
    config.steps = 1_000_000
    config.batch_size = 1024
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "full"
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "eval": {"name": "tfrecord", "pattern": "data/val/*.tfrecord"},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_size": 64,
        "degradation": "blur",
        "blur_prob": 0.5,
    }
    config.factor = 4
    config.model = {
        "unet": {
            "image_size": 256,
            "out_channels": 3,
            "channels": 320,
            "channel_mult": (1, 2, 3, 4),
            "res_blocks": 3,
            "attention_resolutions": (),
            "middle_attention": False,
            "scale_shift": False,
            "groups": 32,
            "dropout": 0.1,
        },
        "resize": "cubic",
    }
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
    config.optimizer = {
        "learning_rate": 1.2e-4,
        "warmup_steps": 5000,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.9999
    config.sampling = {"steps": 7, "sampler": "ddpm", "variance": "small", "clip": 1.0}
    config.eval = {"batch_size": 64, "rows": 1024, "samples": 8}
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
        config.mesh.fsdp = 1
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"name": "emoji", "split": "compose"}
        config.data.crop_size = 8
        config.model.unet.update({"image_size": 32, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1, "groups": 4})
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
