"""The paper's decoder at 64 px (unCLIP section 2.1, appendix C table 3); it needs a CLIP run beside it.

    unclip train configs/dalle2/decoder.py --workdir runs/dalle2/decoder --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        3.5B parameters: GLIDE's U-Net of 512 channels, depth 3, multiples 1,2,3,4, head channels 64, attention at 32, 16 and 8,
                   dropout 0.1; GLIDE's text encoder of context 256, width 2048, 24 blocks, 32 heads, trained with it, or kept as
                   `--init-from` gives it with `freeze_text`
diffusion          1,000 steps, cosine, learned variance (hybrid loss); sampled with 250 steps
conditioning       z_i added to the time embedding and as 4 tokens; z_i dropped 10 %, captions 50 %, independently
training           800K iterations at batch 2,048, AdamW 1.2e-4, betas 0.9 and 0.999, eps 1e-8, EMA 0.9999

Choices, where the paper is silent: CLIP's vocabulary of 49,408 (GLIDE's: 50,257); a learned null embedding where z_i is dropped;
a constant rate after 5,000 steps of warmup; gradients clipped at norm 1; guidance 1.25, at which the paper's FID is reported.
Of the decoder that inpaints neither paper gives a length: 100,000 steps at a tenth of the rate.

    unclip train configs/dalle2/decoder.py:inpaint --workdir runs/dalle2/decoder_inpaint --init-from runs/dalle2/decoder

variant   what it is
(none)    the paper's
:inpaint  fine-tuned from it, with four more input channels that start at zero (GLIDE)
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "inpaint", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/decoder.py; choose inpaint, tiny, or none")
    config = ConfigDict()
    config.stage = "decoder"
    config.clip = "../clip"
    config.text_tokenizer = {"length": 256, "vocab_size": 49408}
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
        "text": {"width": 2048, "layers": 24, "heads": 32},
        "unet": {
            "image_size": 64,
            "out_channels": 6,
            "channels": 512,
            "channel_mult": (1, 2, 3, 4),
            "res_blocks": 3,
            "attention_resolutions": (32, 16, 8),
            "head_channels": 64,
            "groups": 32,
            "dropout": 0.1,
        },
        "conditioning": {"context_dim": 2048, "clip_tokens": 4, "use_text_embed": False, "use_text_states": False},
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
    config.sampling = {"steps": 250, "sampler": "ddpm", "variance": "learned", "guidance_scale": 1.25, "clip": 1.0}
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
        config.text_tokenizer = {"length": 12, "vocab_size": 8192}
        config.data.train = {"name": "emoji", "split": "train"}
        config.data.eval = {"name": "emoji", "split": "compose"}
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
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
