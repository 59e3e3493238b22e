"""Karlo's decoder at 64 px (kakaobrain/karlo-v1-alpha); it needs a CLIP beside it, or `--clip DIR`: a transformers folder of ViT-L/14.

    unclip train configs/karlo/decoder.py --workdir runs/karlo/decoder --clip clip-vit-large-patch14 \\
      --set data.train.pattern='/data/laion/*.tfrecord'

Karlo's           885,439,686 parameters and 7,878,400 of text projection: 320 channels, depth 3, multiples 1,2,3,4, head channels 64,
                  attention at 32, 16 and 8 to CLIP's text states and four tokens of z_i, of 1536; z_i and z_t in the time embedding
diffusion         1,000 steps, cosine, noise and learned variance; sampled with 25 steps, guidance 8

Choices, as Karlo's training is not published: unCLIP's (appendix C table 3), AdamW 1.2e-4, batch 2,048, 800K iterations, z_i dropped 10 %,
captions 50 %, dropout 0.1, EMA 0.9999; a constant rate after 5,000 steps of warmup; gradients clipped at norm 1.

    unclip train configs/karlo/decoder.py:inpaint --workdir runs/karlo/decoder_inpaint --init-from karlo-v1-alpha

variant   what it is
(none)    the public size
:inpaint  fine-tuned from it, with four more input channels that start at zero (GLIDE)
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "inpaint", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/karlo/decoder.py; choose inpaint, tiny, or none")
    config = ConfigDict()
    config.stage = "decoder"
    config.clip = "../clip"
    config.text_tokenizer = None
    config.seed = 0
    config.steps = 800_000
    config.batch_size = 2048
    config.dtype = "auto"
    config.grad_accumulation = 1
    config.remat = "full"
    config.scan_layers = True
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "eval": {"name": "tfrecord", "pattern": "data/val/*.tfrecord"},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_scale": 1.0,
    }
    config.model = {
        "inpaint": False,
        "text": None,
        "unet": {
            "image_size": 64,
            "out_channels": 6,
            "channels": 320,
            "channel_mult": (1, 2, 3, 4),
            "res_blocks": 3,
            "attention_resolutions": (32, 16, 8),
            "head_channels": 64,
            "groups": 32,
            "dropout": 0.1,
        },
        "conditioning": {"context_dim": 1536, "clip_tokens": 4, "use_text_embed": True, "use_text_states": True},
    }
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 1e-3}
    config.freeze_text = False
    config.drop_embedding = 0.1
    config.drop_text = 0.5
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
    config.sampling = {"steps": 25, "sampler": "ddpm", "variance": "learned", "guidance_scale": 8.0, "clip": 1.0}
    config.eval = {"batch_size": 64, "rows": 1024, "samples": 16}
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 2000
    config.keep = 3
    config.keep_best = None
    config.watchdog = 1800.0
    config.profile = None
    config.track = {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None}
    if variant == "inpaint":
        config.model.inpaint = True
        config.steps = 100_000
        config.optimizer.update({"learning_rate": 1.2e-5, "warmup_steps": 1000})
    if variant == "tiny":
        config.steps = 4
        config.batch_size = 16
        config.remat = "none"
        config.scan_layers = False
        config.mesh.fsdp = 1
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"name": "emoji", "split": "compose"}
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1, "attention_resolutions": (4,)})
        config.model.unet.update({"head_channels": 8, "groups": 4})
        config.model.conditioning.context_dim = 16
        config.optimizer.warmup_steps = 1
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
        config.log_every = 1
        config.eval_every = 4
        config.checkpoint_every = 2
    return config.lock()
