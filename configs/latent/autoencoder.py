"""The autoencoders of latent diffusion (Rombach et al. 2022, tables 8 and 12 and the released models).

    unclip train configs/latent/autoencoder.py --workdir runs/latent/autoencoder

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord` and the network of LPIPS
(`unclip fetch lpips`). Without a variant it is kl-f8, the autoencoder of Stable Diffusion.

variant        f   widths         attention  latents           parameters   discriminator     batch
kl-f4          4   1,2,4          middle     3                 55,312,063   50,001 at 0.5     10
kl-f8          8   1,2,4,4        middle     4                 83,653,863   50,001 at 0.5     12
kl-f16         16  1,1,2,2,4      16 px      16                69,610,963   50,001 at 0.5     6
vq-f4          4   1,2,4          middle     3 of 8192         55,322,782   0 at 0.75         8
vq-f4-noattn   4   1,2,4          none       3 of 8192         53,219,486   11 at 0.75        8
vq-f8          8   1,2,2,4        32 px      4 of 16384        67,717,295   1 at 0.6, 2 deep  10
vq-f8-n256     8   1,2,2,4        32 px      4 of 256          67,652,783   250,001 at 0.75   10
vq-f16         16  1,1,2,2,4      16 px      8 of 16384        69,593,371   250,001 at 0.75, 2 deep  14
:tiny          runs in seconds on a CPU, for tests: a KL autoencoder with its discriminator
:tiny-vq       the same with a codebook

from the paper   channels 128; 2 residual blocks; 256 px; KL weight 1e-6; L1 and LPIPS of weight 1; patch
                 discriminator with the adaptive weight; rate 4.5e-6 times the batch; Adam's betas (0.5, 0.9)
                 for both players; no averages of the weights, no clipping of gradients, no warmup

The batch is that of one GPU. The rate is scaled by the global batch, as there (`--scale_lr`): set
`optimizer.learning_rate` and `discriminator_optimizer.learning_rate` to 4.5e-6 times yours.

Where the paper and its code are silent:

- Steps. The release does not say how many; 500,000 is ours.
- Crops. Ours take at least 80 % of the shorter side.
- The published code runs the adaptive weight and batch normalisation on each GPU alone. Here both are of the
  global batch.
- The dead-code restart and the intended beta are options that are off (`quantiser.restart`, `.legacy`).
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

F4, F8_KL, F8_VQ, F16 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)
# variant -> widths, attention levels, latents, codes, the discriminator's start, weight and depth, the batch
ROWS = {
    "kl-f4": (F4, (), 3, None, 50_001, 0.5, 3, 10),
    "kl-f8": (F8_KL, (), 4, None, 50_001, 0.5, 3, 12),
    "kl-f16": (F16, (4,), 16, None, 50_001, 0.5, 3, 6),
    "vq-f4": (F4, (), 3, 8192, 0, 0.75, 3, 8),
    "vq-f4-noattn": (F4, (), 3, 8192, 11, 0.75, 3, 8),
    "vq-f8": (F8_VQ, (3,), 4, 16384, 1, 0.6, 2, 10),
    "vq-f8-n256": (F8_VQ, (3,), 4, 256, 250_001, 0.75, 3, 10),
    "vq-f16": (F16, (4,), 8, 16384, 250_001, 0.75, 2, 14),
}
VARIANTS = ("", *ROWS, "tiny", "tiny-vq")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    tiny = {"tiny": "kl-f8", "tiny-vq": "vq-f8"}
    row = ROWS[tiny.get(variant, variant) or "kl-f8"]
    widths, attention, latents, codes, start, weight, layers, batch = row
    config = defaults.run("autoencoder")
    config.frozen = {"lpips": "lpips"}
    with config.unlocked():
        config.steps = 500_000
        config.batch_size = batch
        config.image_size = 256
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "latent_channels": latents,
            "channels": 128,
            "channel_mult": widths,
            "res_blocks": 2,
            "attention_levels": attention,
            "middle_attention": variant != "vq-f4-noattn",
            "groups": 32,
            "dropout": 0.0,
        }
        config.kl_weight, config.quantiser = 1e-6, None
        if codes is not None:
            config.model.codes, config.kl_weight = codes, None
            config.quantiser = defaults.quantiser()
        config.perceptual_weight = 1.0
        config.discriminator = {"weight": weight, "start": start, "layers": layers, "channels": 64}
        rate = 4.5e-6 * batch
        config.optimizer = defaults.adamw(learning_rate=rate, warmup_steps=0, b1=0.5, b2=0.9, clip_norm=None)
        config.discriminator_optimizer = config.optimizer.copy_and_resolve_references()
        config.ema_decay = 0.0
        config.scale_latents = codes is None
        config.eval = {"batch_size": 16, "rows": 512, "samples": 16, "fid_rows": 0}
    if variant in tiny:
        defaults.tiny(config)
        config.image_size = 16
        config.frozen.lpips, config.perceptual_weight = None, 0.0
        config.model.update({"channels": 8, "channel_mult": (1, 2), "res_blocks": 1, "groups": 4})
        config.model.attention_levels = ()
        config.discriminator.update({"start": 2, "layers": 1, "channels": 8})
        if codes is not None:
            config.model.codes = 16
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
