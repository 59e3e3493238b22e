"""The autoencoder of VQ-VAE-2 (Razavi et al. 2019, appendix A, table 4).

    unclip train configs/vqvae2/vqvae.py --workdir runs/vqvae2/vqvae

It needs shards `data/train/*.tfrecord` and `data/val/*.tfrecord`.

variant    pixels   levels               widths                    parameters   batch
(none)     256      64 x 64 and 32 x 32  128, 64 inside blocks     1,716,803    128
:ffhq      1024     128, 64 and 32       128, 64 inside blocks     3,197,059    128
:public    256      64 x 64 and 32 x 32  128, 32 inside blocks     1,388,867    128
:emoji     32       8 x 8 and 4 x 4      64, 32 inside blocks      on the embedded emoji, one device
:tiny      runs in seconds on a CPU, for tests

The parameters are without the codebooks, 512 vectors of 64 on each level.

from the paper   2 residual blocks; 512 codes of 64 values; averages of decay 0.99; beta 0.25; mean squared
                 error; Adam at 3e-4 without warmup; 2,207,444 updates at 256 px, 304,741 at 1024 px
from the public  `:public` is the size of the widely used PyTorch code, whose averages are not debiased:
code             it starts from such a checkpoint by `--init-from`

Where both are silent:

- Crops. Ours take at least 80 % of the shorter side.
- Averages of the weights: none.
- Relaxed codes (`relax`) and the restart of dead codes (`quantiser.restart`) are options that are off.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = ("", "ffhq", "public", "emoji", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    config = defaults.run("vqvae")
    with config.unlocked():
        config.steps = 304_741 if variant == "ffhq" else 2_207_444
        config.batch_size = 128
        config.image_size = 1024 if variant == "ffhq" else 256
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "channels": 128,
            "residual_channels": 32 if variant == "public" else 64,
            "res_blocks": 2,
            "embed_dim": 64,
            "codes": 512,
            "levels": 3 if variant == "ffhq" else 2,
            "halvings": 3 if variant == "ffhq" else 2,
        }
        config.quantiser = defaults.quantiser(
            codebook="averages", beta=0.25, legacy=False, debias=variant != "public"
        )
        config.relax = None
        config.optimizer = defaults.adamw(learning_rate=3e-4, warmup_steps=0, clip_norm=None)
        config.ema_decay = 0.0
        config.eval = {"batch_size": 16, "rows": 512, "samples": 16, "fid_rows": 0}
    if variant == "emoji":
        defaults.small_run(config)
        config.steps, config.batch_size, config.image_size, config.eval_every = 3000, 64, 32, 500
        config.data = defaults.emoji("compose")
        with config.unlocked():
            config.data.crop_scale = 0.8
        config.model.update({"channels": 64, "residual_channels": 32, "codes": 256})
        config.quantiser.restart = 0.01
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"})
        config.ema_decay = 0.998
        config.eval.update({"batch_size": 32, "rows": 128})
    if variant == "tiny":
        defaults.tiny(config)
        config.image_size = 16
        config.model.update({"channels": 8, "residual_channels": 4, "res_blocks": 1, "embed_dim": 4})
        config.model.codes = 16
        config.quantiser.restart = 0.01
        config.eval.update({"batch_size": 8, "rows": 8, "samples": 8})
    return config.lock()
