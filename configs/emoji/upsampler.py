"""The upsampler for the embedded emoji, 32 to 64 px.

    unclip train configs/emoji/upsampler.py --workdir runs/emoji/upsampler_64

variant   what it is
(none)    the shipped bundle's
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests

The paper's: no attention, no conditioning but the small image, random crops in training, Gaussian blur (kernel 3, sigma 0.6) of the
small image, DDIM. Choices: crops of half the side (the paper: a quarter) as the images are small; blur for half of the rows; v-prediction
(the paper: noise), because a network trained this briefly leaves noise in that it does not predict.
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/upsampler.py; choose one of quick, tiny, or none")
    config = ConfigDict()
    config.stage = "upsampler"
    config.seed = 0
    config.steps = 1500
    config.batch_size = 32
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "none"
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = {
        "train": {"name": "emoji", "split": "train"},
        "eval": {"name": "emoji", "split": "compose"},
        "backend": "auto",
        "max_bad_fraction": 0.01,
        "crop_size": 32,
        "degradation": "blur",
        "blur_prob": 0.5,
    }
    config.factor = 2
    config.model = {
        "unet": {
            "image_size": 64,
            "out_channels": 3,
            "channels": 16,
            "channel_mult": (1, 2, 4),
            "res_blocks": 1,
            "attention_resolutions": (),
            "middle_attention": False,
            "groups": 8,
            "dropout": 0.0,
        },
        "resize": "cubic",
    }
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 0.0}
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.998
    config.sampling = {"steps": 12, "sampler": "ddim", "eta": 0.0, "clip": 1.0}
    config.eval = {"batch_size": 32, "rows": 128, "samples": 16}
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
        config.steps = 140
        config.optimizer.warmup_steps = 20
        config.ema_decay = 0.95
        config.sampling.steps = 6
        config.eval_every = 140
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.data.crop_size = 8
        config.model.unet.update({"image_size": 16, "channels": 8, "channel_mult": (1, 2), "groups": 4, "dropout": 0.1})
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
