"""StableUnCLIP: Stable Diffusion 2.1's U-Net, fine-tuned to also see CLIP's image embedding, at the exact
sizes.

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`, and three frozen networks. Public weights
hold them: FOLDER is `stable-diffusion-2-1-unclip` (h), or `-small` (l), in diffusers' layout.

    unclip train configs/stable_unclip/latent.py --workdir runs/stable_unclip/latent \\
        --set frozen.clip=FOLDER --set frozen.text=FOLDER --set frozen.autoencoder=FOLDER \\
        [--init-from START]

START is FOLDER, or a folder of Stable Diffusion 2.x: its U-Net gets the two layers of the embedding, of
which the second one starts at zero weight.

The network has 870,173,124 parameters with the CLIP of h (OpenCLIP ViT-H/14, z_i of 1024), and 869,517,764
with that of l (CLIP ViT-L/14, 768).

variant   what it is
(none)    both, by frozen.clip
:tiny     runs in seconds on a CPU, for tests

from the published configurations   the network of 2.1-768, which predicts v; noise on z_i by the cosine
                                    schedule of 1,000 steps, its level uniform; z_i dropped for 25 % of the
                                    rows, with its level; AdamW at 1e-4

Where they are silent:

- z_i is whitened by the mean and the deviation of the training data. The published h has mean 0 and
  deviation 1 in their place, and the published l has Karlo's.
- The caption is dropped for 10 % of the rows, as in Stable Diffusion.
- The steps, the batch and the average are ours: 200,000 steps of 2,048.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("stable_unclip")
    with config.unlocked():
        config.frozen = {"clip": "../clip", "text": "../text", "autoencoder": "../autoencoder"}
        config.steps = 200_000
        config.batch_size = 2048
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "image_size": 96,
            "in_channels": 4,
            "out_channels": 4,
            "channels": 320,
            "channel_mult": (1, 2, 4, 4),
            "res_blocks": 2,
            "heads": (5, 10, 20, 20),
            "attention_levels": (0, 1, 2),
            "context_dim": 1024,
            "transformer_depth": 1,
            "linear": True,
            "groups": 32,
            "dropout": 0.0,
        }
        config.diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"}
        config.augmentation = {"schedule": "cosine", "num_steps": 1000}
        config.space = {"kind": "whitened", "scale": None}
        config.statistics_batches = 8
        config.drop_text = 0.1
        config.drop_image = 0.25
        config.optimizer = defaults.adamw(
            learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01, clip_norm=None
        )
        config.ema_decay = 0.9999
        config.sampling = {
            "steps": 20,
            "sampler": "ddim",
            "spacing": "leading",
            "offset": 1,
            "last": "first",
            "guidance_scale": 10.0,
            "clip": None,
        }
        config.eval = {"batch_size": 64, "rows": 2048, "samples": 16, "fid_rows": 0}
    if variant == "tiny":
        defaults.tiny(config)
        config.frozen.text = None  # one tiny CLIP serves both
        config.model.update({"image_size": 8, "channels": 16, "channel_mult": (1, 2), "groups": 8})
        config.model.update({"res_blocks": 1, "heads": (2, 2), "attention_levels": (0,), "context_dim": 32})
        config.statistics_batches = 2
        config.sampling.steps = 3
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
