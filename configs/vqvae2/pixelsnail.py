"""The priors of VQ-VAE-2 (Razavi et al. 2019, appendix A, table 5).

    unclip train configs/vqvae2/pixelsnail.py --workdir runs/vqvae2/pixelsnail_1
    unclip train configs/vqvae2/pixelsnail.py:bottom --workdir runs/vqvae2/pixelsnail_0

They need the run of `configs/vqvae2/vqvae.py` in the folder `vqvae` beside their own. The top prior draws the
codes of level 1, and the bottom prior those of level 0, conditioned on the top's.

variant         codes     channels, inside   blocks   attention   condition   parameters    batch
top (none)      32 x 32   256, 256           4 x 4    8 heads     -           84,873,280    32
bottom          64 x 64   256, 256           4 x 4    none        3 blocks    89,762,816    32
paper-top       32 x 32   512, 2048          4 x 5    8 heads     -           1024 rows a batch
paper-bottom    64 x 64   512, 1024          4 x 5    none        20 blocks   512 rows a batch
emoji-top       4 x 4     64, 96             2 x 2    4 heads     captions    on the embedded emoji
emoji-bottom    8 x 8     64, 96             2 x 2    none        1, captions
tiny, tiny-bottom         run in seconds on a CPU, for tests

`top` and `bottom` are the sizes of the widely used PyTorch code: kernels of 5, dropout 0.1, Adam at 3e-4.
`paper-top` and `paper-bottom` are our reading of the table: 20 layers are 4 blocks of 5, with 20 layers of a
position alone behind those of the top.

Captions: the emoji's priors see the embedding of a caption by the run `clip` beside theirs, and training
drops one caption in ten. The other variants see no captions; `--set frozen.clip=DIR` gives them one. The
paper's condition is a class, which is a caption of one word here.
"""

from ml_collections import ConfigDict

from unclip_jax.run import defaults

VARIANTS = (
    "", "top", "bottom", "paper-top", "paper-bottom", "emoji-top", "emoji-bottom", "tiny", "tiny-bottom"
)  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    defaults.check_variant(variant, VARIANTS, __file__)
    top = not variant.endswith("bottom")
    config = defaults.run("pixelsnail")
    config.frozen = {"clip": None, "vqvae": "../vqvae"}
    with config.unlocked():
        config.steps = 900_000
        config.batch_size = 32
        config.image_size = 256
        config.level = 1 if top else 0
        config.data = defaults.shards("val")
        config.data.crop_scale = 0.8
        config.model = {
            "channels": 256,
            "kernel": 5,
            "blocks": 4,
            "res_blocks": 4,
            "res_channels": 256,
            "heads": 8,
            "attention": top,
            "dropout": 0.1,
            "condition_blocks": 3,
            "out_blocks": 0,
            "activated_skip": False,
        }
        config.drop_text = 0.1
        config.optimizer = defaults.adamw(learning_rate=3e-4, warmup_steps=0, clip_norm=None)
        config.ema_decay = 0.9999
        config.sampling = {"temperature": 1.0, "guidance_scale": 1.0}
        config.eval = {"batch_size": 32, "rows": 512}
    if variant.startswith("paper"):
        config.batch_size = 1024 if top else 512
        config.model.update({"channels": 512, "res_channels": 2048 if top else 1024, "res_blocks": 5})
        config.model.update({"out_blocks": 20 if top else 0, "condition_blocks": 20})
    if variant.startswith(("emoji", "tiny")):
        defaults.small_run(config)
        config.frozen.clip = "../clip"
        config.steps, config.batch_size, config.image_size, config.eval_every = 4000, 64, 32, 500
        config.data = defaults.emoji("compose")
        with config.unlocked():
            config.data.crop_scale = 0.95
        config.model.update({"channels": 64, "res_channels": 96, "blocks": 2, "res_blocks": 2})
        config.model.update({"heads": 4, "condition_blocks": 1, "kernel": 3})
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"})
        config.optimizer.clip_norm = 1.0
        config.ema_decay = 0.998
        config.sampling.guidance_scale = 2.0
        config.eval.rows = 256
    if variant.startswith("tiny"):
        defaults.tiny(config)
        config.image_size = 16
        config.model.update({"channels": 16, "res_channels": 16, "blocks": 1, "res_blocks": 1, "heads": 2})
        config.model.dropout = 0.0
        config.eval.update({"batch_size": 8, "rows": 8})
    return config.lock()
