"""Retrieval-augmented diffusion (Blattmann et al. 2022, appendix), at the sizes of the published networks.

It needs the autoencoder of `configs/latent/autoencoder.py` in the folder beside its own, CLIP, an index of
other pictures, and the neighbours of the training set there:

    unclip embed --index --clip CLIP --data name=tfrecord --data pattern='data/index/*.tfrecord' \\
        --patches 2 --patch 256 --out embeds/index
    unclip embed --clip CLIP --data name=tfrecord --data pattern='data/train/*.tfrecord' \\
        --neighbours embeds/index --nearest 20 --latents runs/latent/autoencoder --size 256 --out embeds/train
    unclip embed --clip CLIP --data name=tfrecord --data pattern='data/val/*.tfrecord' \\
        --neighbours embeds/index --nearest 20 --latents runs/latent/autoencoder --size 256 --out embeds/val
    unclip train configs/retrieval/retrieval.py --workdir runs/retrieval/retrieval \\
        --embeddings embeds/train --embeddings eval=embeds/val

variant   parameters      autoencoder  CLIP   embeddings  schedule          for
(none)    400,920,579     vq-f4        B/32   raw         0.0015 to 0.0195  ImageNet, 256 px
:ffhq     414,713,603     vq-f4        B/32   raw         0.0015 to 0.0195  FFHQ, 256 px
:768      1,335,480,400   kl-f16       L/14   unit        0.0015 to 0.0150  LAION, 768 px (`--space unit`)
:tiny     runs in seconds on a CPU, for tests, on the embedded emoji with their neighbours

from the authors' programs   the networks; k = 4 neighbours; noise is predicted, with the plain squared error;
                             AdamW at 1e-4, warm-up of 100 steps (FFHQ: 10,000); averages of decay 0.9999;
                             DDIM with 100 steps, guided by 2 against zeros, with no neighbours dropped

The paper is silent about our choices: the number of steps, and the batch on all devices together. It takes 10
neighbours at 768 px for drawing; here training sees 10 there, too.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "ffhq", "768", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    faces, large = variant == "ffhq", variant == "768"
    config = defaults.run("retrieval")
    config.frozen = {"clip": "../clip", "autoencoder": "../autoencoder"}
    with config.unlocked():
        config.steps = 400_000
        config.batch_size = 384
        config.data = defaults.shards("val")
        config.model = {
            "image_size": 48 if large else 64,
            "in_channels": 16 if large else 3,
            "out_channels": 16 if large else 3,
            "channels": 448 if large else 224 if faces else 192,
            "channel_mult": (1, 2, 3, 4) if faces or large else (1, 2, 3, 5),
            "res_blocks": 2,
            "heads": (14, 28, 42, 56) if large else (7, 14, 21, 28) if faces else (6, 12, 18, 30),
            "attention_levels": (0, 1, 2) if large else (1, 2, 3),
            "context_dim": 768 if large else 512,
            "transformer_depth": 1,
            "linear": False,
            "groups": 32,
            "dropout": 0.0,
        }
        config.diffusion = {
            "schedule": "scaled_linear",
            "num_steps": 1000,
            "prediction": "eps",
            "beta_ends": (0.0015, 0.015 if large else 0.0195),
        }
        config.embedding_space = "unit" if large else "raw"
        config.neighbours = 10 if large else 4
        config.drop_neighbours = 0.0
        config.optimizer = defaults.adamw(
            learning_rate=1e-4, warmup_steps=10_000 if faces else 100, weight_decay=0.01, clip_norm=None
        )
        config.ema_decay = 0.9999
        config.sampling = {"steps": 100, "sampler": "ddim", "guidance_scale": 2.0, "clip": None}
        config.eval = {"batch_size": 48, "rows": 2048, "samples": 16}
    if variant == "tiny":
        defaults.tiny(config)
        config.model.update({"image_size": 8, "in_channels": 4, "out_channels": 4, "channels": 16})
        config.model.update({"channel_mult": (1, 2), "res_blocks": 1, "heads": (2, 2), "groups": 8})
        config.model.update({"attention_levels": (1,), "context_dim": 16})
        config.sampling.steps = 3
        config.neighbours = 2
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
