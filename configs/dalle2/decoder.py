"""The paper's decoder, which draws images of 64 px (unCLIP section 2.1 and appendix C, table 3).

It needs the run of `configs/dalle2/clip.py` in the folder beside its own.

    unclip train configs/dalle2/decoder.py --workdir runs/dalle2/decoder \\
        --set data.train.pattern='/data/laion/*.tfrecord'
    unclip train configs/dalle2/decoder.py:inpaint --workdir runs/dalle2/decoder_inpaint \\
        --init-from runs/dalle2/decoder --set data.train.pattern='/data/laion/*.tfrecord'

size            3.5B parameters
U-Net           GLIDE's: 512 channels, depth 3, multiples 1,2,3,4, head channels 64, attention at 32, 16 and 8
                px, dropout 0.1
text encoder    GLIDE's: context 256, width 2048, 24 blocks, 32 heads; it is trained with the decoder, or
                stays as `--init-from` gives it if `freeze_text` is set
conditioning    z_i is added to the time embedding and makes 4 tokens; z_i is dropped for 10 % of the rows and
                the caption for 50 %, independently
diffusion       1,000 steps, cosine, learned variance (hybrid loss)
training        800K iterations at batch 2,048, AdamW 1.2e-4 with betas 0.9 and 0.999, eps 1e-8, EMA 0.9999
sampling        250 steps

Choices where the paper is silent:

- The vocabulary is CLIP's, of 49,408 tokens. GLIDE's has 50,257.
- A learned embedding takes the place of a z_i that is dropped.
- The learning rate is constant after 5,000 steps of warmup, and gradients are clipped at norm 1.
- The guidance is 1.25, at which the paper reports its FID.
- Neither paper says how long the decoder that inpaints was trained: 100,000 steps at a tenth of the learning
  rate.

variant   what it is
(none)    the paper's
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
        config.text_tokenizer = {"length": 256, "vocab_size": 49408}
        config.steps = 800_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 1.0
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
            "conditioning": {
                "context_dim": 2048,
                "clip_tokens": 4,
                "use_text_embed": False,
                "use_text_states": False,
            },
        }
        config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "vb_weight": 1e-3}
        config.freeze_text = False
        config.drop_embedding = 0.1
        config.drop_text = 0.5
        config.optimizer = defaults.adamw(learning_rate=1.2e-4, b1=0.9, b2=0.999, eps=1e-8)
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 250,
            "sampler": "ddpm",
            "variance": "learned",
            "guidance_scale": 1.25,
            "clip": 1.0,
        }
        config.eval = {"batch_size": 64, "rows": 1024, "samples": 16, "fid_rows": 0}
    if variant == "inpaint":
        config.steps = 100_000
        config.model.inpaint = True
        config.optimizer.update({"learning_rate": 1.2e-5, "warmup_steps": 1000})
    if variant == "tiny":
        defaults.tiny(config)
        config.text_tokenizer = {"length": 12, "vocab_size": 8192}
        config.model.text.update({"width": 16, "layers": 1, "heads": 2})
        config.model.unet.update({"image_size": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1})
        config.model.unet.update({"attention_resolutions": (4,), "head_channels": 8, "groups": 4})
        config.model.conditioning.context_dim = 16
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
