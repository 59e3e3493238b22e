"""The paper's upsampler 256 -> 1024 (unCLIP section 2.1, appendix C table 3).

    unclip train configs/dalle2/upsampler_1024.py --workdir runs/dalle2/upsampler_1024 --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        300M parameters (282,059,139 by this topology), 192 channels, depth 2, multiples 1,1,2,2,4,4, no attention, no dropout
diffusion          1,000 steps, linear; sampled with 15 steps of DDIM, unconditionally and without guidance
degradation        BSR of the small image, light variant; crops of a quarter of the side
training           1M iterations at batch 512, AdamW 1e-4, betas 0.9 and 0.999, eps 1e-8, EMA 0.9999

Choices, where the paper is silent: a constant rate after 5,000 steps of warmup; gradients clipped at norm 1; the small image
enlarged bilinearly, as in GLIDE; fixed variance (3 output channels); the 15 steps, which the paper tuned by hand and does not list, are
evenly spread.

variant   what it is
(none)    the paper's
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/upsampler_1024.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "upsampler"
    config.seed = 0
    config.steps = 1_000_000
    config.batch_size = 512
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "full"
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "eval": {"name": "tfrecord", "pattern": "data/val/*.tfrecord"},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_size": 256,
        "degradation": "bsr_light",
        "blur_prob": 0.5,
    }
    config.factor = 4
    config.model = {
        "unet": {
            "image_size": 1024,
            "out_channels": 3,
            "channels": 192,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "res_blocks": 2,
            "attention_resolutions": (),
            "middle_attention": False,
            "groups": 32,
            "dropout": 0.0,
        },
        "resize": "linear",
    }
    config.diffusion = {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "vb_weight": 0.0}
    config.optimizer = {
        "learning_rate": 1e-4,
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
    config.sampling = {"steps": 15, "sampler": "ddim", "eta": 0.0, "clip": 1.0}
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
        config.data.crop_size = 16
        config.model.unet.update({"image_size": 64, "channels": 8, "channel_mult": (1, 1, 2), "res_blocks": 1, "groups": 4})
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
