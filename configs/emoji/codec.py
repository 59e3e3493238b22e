"""The codec of the autoregressive prior for the embedded emoji; it needs the CLIP of `configs/emoji/clip.py` beside it.

    unclip train configs/emoji/pca.py --workdir runs/emoji/pca

variant   what it is
(none)    the shipped bundle's
:quick    for `launch/quickstart --train`
:tiny     seconds on a CPU, for tests

`steps` batches are read twice: once for the covariance, once for the extremes of the projections. `dims` and `report` are numbers of
components for which the explained variance is told.
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration. Raises ValueError on an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/emoji/pca.py; choose one of quick, tiny, or none")
    config = ConfigDict()
    config.stage = "pca"
    config.clip = "../clip"
    config.seed = 0
    config.steps = 100
    config.batch_size = 128
    config.dtype = "auto"
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = {"train": {"name": "emoji", "split": "train"}, "backend": "auto", "max_bad_fraction": 0.01, "crop_scale": 0.95}
    config.dims = 32
    config.report = (8, 16, 64, 96)
    config.log_every = 20
    config.keep = 1
    if variant == "quick":
        config.steps = 20
    if variant == "tiny":
        config.steps = 2
        config.batch_size = 16
        config.dims = 6
        config.log_every = 1
    return config.lock()
