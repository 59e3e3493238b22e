"""The codec of the paper's autoregressive prior (unCLIP section 2.2); it needs a CLIP run beside it.

    unclip train configs/dalle2/pca.py --workdir runs/dalle2/pca --set data.train.pattern='/data/laion/*.tfrecord'

the paper's        319 of 1,024 principal components keep all but 1 % of the mean squared error, as CLIP was trained with SAM

Choices, where the paper is silent: fitted on four million images.

variant   what it is
(none)    the paper's
:tiny     seconds on a CPU, on the embedded emoji, for tests
"""

from ml_collections import ConfigDict

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/dalle2/pca.py; choose tiny, or none")
    config = ConfigDict()
    config.stage = "pca"
    config.clip = "../clip"
    config.seed = 0
    config.steps = 1000
    config.batch_size = 4096
    config.dtype = "auto"
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = {
        "train": {"name": "tfrecord", "pattern": "data/train/*.tfrecord"},
        "backend": "auto",
        "max_bad_fraction": 0.05,
        "crop_scale": 1.0,
    }
    config.dims = 319
    config.report = (20, 80, 160, 320, 512)
    config.log_every = 20
    config.keep = 1
    if variant == "tiny":
        config.steps = 2
        config.batch_size = 16
        config.data.train = {"name": "emoji", "split": "train"}
        config.dims = 6
        config.log_every = 1
    return config.lock()
