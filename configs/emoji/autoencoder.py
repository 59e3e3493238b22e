"""An autoencoder for the embedded emoji: 32 px to latents of 8 x 8 x 4, or 64 px to 16 x 16 x 4.

    unclip train configs/emoji/autoencoder.py --workdir runs/emoji/autoencoder

from the paper    KL of weight 1e-6 against the summed absolute error; the patch discriminator, its
                  weight adaptive, from the middle of the run on; Adam's betas (0.5, 0.9) for both players

Where it differs from the paper:

- It is f4 with 32 channels, for two CPU cores.
- LPIPS is off, because its weights are not in the package. `unclip fetch lpips` gets them;
  `--set perceptual_weight=1 --set frozen.lpips=lpips` then uses them.
- The rate is larger, has a warmup and decays; the weights are averaged.

variant   what it is
(none)    KL, 32 px -> 8 x 8 x 4
:64       KL, 64 px -> 16 x 16 x 4
:vq       a codebook of 512 averages, 32 px -> 8 x 8; dead codes start again
:tiny     runs in seconds on a CPU, for tests; :tiny-vq the same with a codebook
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "64", "vq", "tiny", "tiny-vq")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.small_run(defaults.run("autoencoder"))
    config.frozen = {"lpips": None}
    config.eval_every = 500
    with config.unlocked():
        config.steps = 3000
        config.batch_size = 32
        config.image_size = 64 if variant == "64" else 32
        config.data = defaults.emoji("compose")
        config.data.crop_scale = 0.8
        config.model = {
            "latent_channels": 4,
            "channels": 32,
            "channel_mult": (1, 2, 2),
            "res_blocks": 1,
            "attention_levels": (),
            "middle_attention": True,
            "groups": 8,
            "dropout": 0.0,
        }
        config.kl_weight, config.quantiser = 1e-6, None
        if variant in ("vq", "tiny-vq"):
            config.model.codes, config.kl_weight = 512, None
            config.quantiser = defaults.quantiser(codebook="averages", beta=0.25, restart=0.01)
        config.perceptual_weight = 0.0
        config.discriminator = {"weight": 0.1, "start": 1500, "layers": 2, "channels": 32}
        config.optimizer = defaults.adamw(
            learning_rate=6e-4, warmup_steps=100, schedule="cosine", b1=0.5, b2=0.9, clip_norm=None
        )
        config.discriminator_optimizer = config.optimizer.copy_and_resolve_references()
        config.ema_decay = 0.998
        config.scale_latents = True
        config.eval = {"batch_size": 32, "rows": 128, "samples": 16, "fid_rows": 0}
    if variant in ("tiny", "tiny-vq"):
        defaults.tiny(config)
        config.image_size = 16
        config.model.update({"channels": 8, "channel_mult": (1, 2), "res_blocks": 1, "groups": 4})
        config.discriminator.update({"start": 2, "layers": 1, "channels": 8})
        if variant == "tiny-vq":
            config.model.codes = 16
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
