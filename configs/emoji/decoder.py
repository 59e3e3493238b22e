"""The decoder for the embedded emoji, 32 px; it needs the CLIP of `configs/emoji/clip.py` beside it.

    unclip train configs/emoji/decoder.py --workdir runs/emoji/decoder
    unclip train configs/emoji/decoder.py:inpaint --workdir runs/emoji/decoder_inpaint --init-from runs/emoji/decoder

variant   what it is
(none)    the shipped bundle's
:inpaint  the decoder that inpaints, fine-tuned from the other one
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests

The paper's: cosine schedule, learned variance, embedding dropped 10 % and caption 50 % independently, four CLIP tokens. Karlo's: frozen
CLIP text states as the context, z_t added to the time embedding. A choice: v-prediction (both predict noise), with which 32,000 images
seen draw better shapes than 45,000 with the noise; colours of large areas are no longer an error divided by little signal.
"""

from ml_collections import ConfigDict

VARIANTS = ("", "inpaint", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/decoder.py; choose one of inpaint, quick, tiny, or none")
    config = ConfigDict()
    config.stage = "decoder"
    config.clip = "../clip"
    config.text_tokenizer = None
    config.seed = 0
    config.steps = 7000
    config.batch_size = 32
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "none"
    config.scan_layers = False
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = {
        "train": {"name": "emoji", "split": "train"},
        "eval": {"name": "emoji", "split": "compose"},
        "backend": "auto",
        "max_bad_fraction": 0.01,
        "crop_scale": 1.0,
    }
    config.model = {
        "inpaint": False,
        "text": None,
        "unet": {
            "image_size": 32,
            "out_channels": 6,
            "channels": 16,
            "channel_mult": (1, 2, 4, 8),
            "res_blocks": 1,
            "attention_resolutions": (8, 4),
            "head_channels": 32,
            "groups": 8,
            "dropout": 0.0,
        },
        "conditioning": {"context_dim": 128, "clip_tokens": 4, "use_text_embed": True, "use_text_states": True},
    }
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "vb_weight": 1e-3}
    config.freeze_text = False
    config.drop_embedding = 0.1
    config.drop_text = 0.5
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 300,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "mu_dtype": None,
    }
    config.ema_decay = 0.999
    config.sampling = {"steps": 32, "sampler": "ddpm", "variance": "small", "guidance_scale": 2.0, "clip": 1.0}
    config.eval = {"batch_size": 32, "rows": 256, "samples": 16}
    config.log_every = 20
    config.eval_every = 1000
    config.checkpoint_every = 250
    config.keep = 2
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "inpaint":
        config.model.inpaint = True
        config.steps = 2000
        config.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 100})
        config.eval_every = 500
    if variant == "quick":
        config.checkpoint_every = 40
        config.steps = 300
        config.optimizer.warmup_steps = 30
        config.ema_decay = 0.97
        config.sampling.steps = 16
        config.eval_every = 300
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "attention_resolutions": (4,)})
        config.model.unet.update({"head_channels": 8, "groups": 4, "dropout": 0.1})
        config.model.conditioning.context_dim = 16
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
