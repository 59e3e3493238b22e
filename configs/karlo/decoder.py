"""Karlo's decoder, which draws images of 64 px (kakaobrain/karlo-v1-alpha).

It needs a CLIP: the run of `configs/karlo/clip.py` in the folder beside its own, or a transformers folder of
ViT-L/14 that `--clip DIR` names.

    unclip train configs/karlo/decoder.py --workdir runs/karlo/decoder \\
        --clip clip-vit-large-patch14 --set data.train.pattern='/data/laion/*.tfrecord'
    unclip train configs/karlo/decoder.py:inpaint --workdir runs/karlo/decoder_inpaint \\
        --clip clip-vit-large-patch14 --init-from karlo-v1-alpha \\
        --set data.train.pattern='/data/laion/*.tfrecord'

size            885,439,686 parameters, and 7,878,400 of the text projection
U-Net           320 channels, depth 3, multiples 1,2,3,4, head channels 64, attention at 32, 16 and 8 px
conditioning    z_i and z_t are added to the time embedding; the U-Net attends to CLIP's text states and to
                four tokens made of z_i, all of width 1536
diffusion       1,000 steps, cosine; the network predicts the noise and the variance
sampling        25 steps, guidance 8

Choices, because Karlo's training is not published:

- The training is unCLIP's (appendix C, table 3): 800K iterations at batch 2,048, AdamW 1.2e-4, dropout 0.1,
  EMA 0.9999; z_i dropped for 10 % of the rows and the caption for 50 %.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- The decoder that inpaints is trained for 100,000 steps at a tenth of the learning rate.

variant   what it is
(none)    the public size
:inpaint  fine-tuned from it, with four more input channels that start at zero, as in GLIDE
:tiny     runs in seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "inpaint", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("decoder")
    config.frozen = {"clip": "../clip"}
    with config.unlocked():
        config.text_tokenizer = None
        config.steps = 800_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 1.0
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
            "conditioning": {
                "context_dim": 1536,
                "clip_tokens": 4,
                "use_text_embed": True,
                "use_text_states": True,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 1e-3}
        config.freeze_text = False
        config.drop_embedding = 0.1
        config.drop_text = 0.5
        config.optimizer = defaults.adamw(learning_rate=1.2e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 25,
            "sampler": "ddpm",
            "variance": "learned",
            "guidance_scale": 8.0,
            "clip": 1.0,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 16, "fid_rows": 0}
    if variant == "inpaint":
        config.steps = 100_000
        config.model.inpaint = True
        config.optimizer.update({"learning_rate": 1.2e-5, "warmup_steps": 1000})
    if variant == "tiny":
        defaults.tiny(config)
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (4,), "head_channels": 8, "groups": 4})
        config.model.conditioning.context_dim = 16
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
