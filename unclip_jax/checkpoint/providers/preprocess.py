"""How a CLIP's own library prepares images, read from the file beside the weights.

Here an image is cropped to its central square, resized to the tower's size with the bicubic filter, and
normalised by the tower. Only the mean and the deviation may differ; any other preparation is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.files import read_json
from unclip_jax.checkpoint.settings import Settings
from unclip_jax.errors import InputError
from unclip_jax.models.clip import MEAN, STD
from unclip_jax.typed import shown

TRIPLE = tuple[float, float, float]
PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
TRANSFORMERS = Settings(
    read={
        "image_mean": (TRIPLE, MEAN),
        "image_std": (TRIPLE, STD),
        "size": (dict | int, {"shortest_edge": 224}),
        "crop_size": (dict | int, {"height": 224, "width": 224}),
        "do_normalize": (bool, True),
    },
    same={
        "do_resize": (True,),
        "do_center_crop": (True,),
        "do_rescale": (True,),
        "resample": (3,),
        "rescale_factor": (1 / 255,),
        "image_processor_type": PROCESSORS,
        "feature_extractor_type": PROCESSORS,
    },
    free=(
        *(
            "do_convert_rgb",
            "processor_class",
            "data_format",
            "input_data_format",
            "return_tensors",
            "device",
        ),
        *("default_to_square", "disable_grouping"),
    ),
)
OPEN_CLIP = Settings(
    read={"mean": (TRIPLE, MEAN), "std": (TRIPLE, STD), "size": (int | tuple[int, ...] | None, None)},
    same={"mode": ("RGB",), "interpolation": ("bicubic",), "resize_mode": ("shortest",)},
    free=("fill_color",),
)


def of_transformers(folder: Path, image_size: int, required: bool = False) -> dict:
    """The statistics of a folder with `preprocessor_config.json`, or with its newer form in
    `processor_config.json`.

    Args:
      folder: the folder.
      image_size: of the image tower, in pixels.
      required: whether a file must be there; without one the statistics are OpenAI's.

    Returns:
      Keyword arguments of `ImageTower`: "mean" and "std"; {} where they are OpenAI's.

    Raises:
      FileNotFoundError, ValueError: when the file is missing or damaged, or asks for another preparation than
        ours.
    """
    file, settings = folder / "processor_config.json", None
    if file.is_file():
        settings = read_json(file).get("image_processor")
    if settings is None:
        file = folder / "preprocessor_config.json"
        if not file.is_file() and not required:
            return {}
        settings = read_json(file)
    taken = TRANSFORMERS.take(settings, str(file))
    crop, size = taken["crop_size"], taken["size"]
    sides = [crop.get("height"), crop.get("width")] if isinstance(crop, Mapping) else [crop, crop]
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") if size.keys() == {"shortest_edge"} else size
    if sides != [image_size] * 2 or size != image_size:
        raise InputError(
            f"{file}: the size is {shown(taken['size'])} and the crop {shown(crop)}, but here the shorter "
            f"side is resized to the image tower's {image_size} pixels, and that square is seen"
        )
    if not taken["do_normalize"]:
        return statistics((0.0,) * 3, (1.0,) * 3)
    return statistics(taken["image_mean"], taken["image_std"])


def of_open_clip(settings: Any, image_size: int, name: str) -> dict:
    """As `of_transformers`, from the `preprocess_cfg` of open_clip's configuration."""
    taken = OPEN_CLIP.take(settings, name)
    size = taken["size"]
    sides = [size, size] if isinstance(size, int) else list(size or (image_size,) * 2)
    if sides != [image_size] * 2:
        raise InputError(f"{name}: size is {shown(size)}, but the image tower takes {image_size} pixels")
    return statistics(taken["mean"], taken["std"])


def statistics(mean: Sequence[float], std: Sequence[float]) -> dict:
    """Keyword arguments of `ImageTower` for these statistics; {} where they are OpenAI's."""
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if min(std) <= 0:
        raise InputError(f"the images' standard deviation must be positive, not {list(std)}")
    return {} if (mean, std) == (MEAN, STD) else {"mean": list(mean), "std": list(std)}
