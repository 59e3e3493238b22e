"""Retrieval-augmented diffusion for the embedded emoji: latents of 8 x 8 x 4, from similar emoji.

It needs the runs of `configs/emoji/clip.py` and `configs/emoji/autoencoder.py` in the folders beside its own,
an index of the emoji that training never shows (split `val`), and the neighbours there:

    unclip embed --index --clip runs/emoji/clip --data name=emoji --data split=val --out embeds/index
    unclip embed --clip runs/emoji/clip --data name=emoji --neighbours embeds/index \\
        --latents runs/emoji/autoencoder --size 32 --out embeds/train
    unclip embed --clip runs/emoji/clip --data name=emoji --data split=compose --neighbours embeds/index \\
        --latents runs/emoji/autoencoder --size 32 --out embeds/compose
    unclip train configs/emoji/retrieval.py --workdir runs/emoji/retrieval \\
        --embeddings embeds/train --embeddings eval=embeds/compose

from the paper   k = 4 nearest rows as the context, CLIP's embeddings as they are, the U-Net's blocks,
                 guidance against zeros; in training, zeros replace the neighbours of 10 % of the rows

Where it differs from the paper: the network is small, and predicts v.

variant   what it is
(none)    32 px, from `configs/emoji/autoencoder.py`
:small    with the autoencoder of the size of `configs/emoji/decoder.py`, to compare the systems
:tiny     runs in seconds on a CPU, for tests
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "small", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("retrieval"))
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    config.eval_every = 1000
    with config.unlocked():
        config.steps = 8000
        config.batch_size = 32
        config.data = defaults.emoji("compose")
        config.model = {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "channels": 64,
            "channel_mult": (1, 2, 3),
            "res_blocks": 1,
            "heads": (2, 4, 6),
            "attention_levels": (0, 1, 2),
            "context_dim": 128,
            "transformer_depth": 1,
            "linear": True,
            "groups": 16,
            "dropout": 0.0,
        }
        config.diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"}
        config.embedding_space = "raw"
        config.neighbours = 4
        config.drop_neighbours = 0.1
        config.optimizer = defaults.adamw(
            learning_rate=6e-4, warmup_steps=300, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8
        )
        config.ema_decay = 0.999
        config.sampling = {"steps": 30, "sampler": "dpmpp_2m", "guidance_scale": 2.0, "clip": None}
        config.eval = {"batch_size": 32, "rows": 256, "samples": 16}
    if variant == "small":
        config.model.update({"channels": 32, "heads": (1, 2, 3)})
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"channels": 16, "channel_mult": (1, 2), "heads": (2, 2), "groups": 8})
        config.model.update({"attention_levels": (1,), "context_dim": 16})
        config.sampling.steps = 3
        config.neighbours = 2
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
