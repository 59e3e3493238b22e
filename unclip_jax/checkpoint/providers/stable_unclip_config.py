"""What the JSON files of StableUnCLIP's folders may say beside those of Stable Diffusion and Karlo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.providers import karlo_config, stable_diffusion_config
from unclip_jax.checkpoint.providers.preprocess import PROCESSORS
from unclip_jax.checkpoint.settings import Settings

DRAWS, VARIES = "StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"
NOISING = "DDPMScheduler"
SAMPLING = {
    "steps": 20,
    "guidance_scale": 10.0,
}  # the pipelines' own defaults, where Stable Diffusion differs
PRIOR_SCHEDULERS = ("UnCLIPScheduler", "DDPMScheduler")
_SHARED = stable_diffusion_config.CLASSES | {
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
    "image_noising_scheduler": (NOISING,),
}
# Pipeline -> the classes of its parts.
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    VARIES: _SHARED | {"image_encoder": ("CLIPVisionModelWithProjection",), "feature_extractor": PROCESSORS},
    DRAWS: _SHARED
    | {
        "prior": ("PriorTransformer",),
        "prior_tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "prior_text_encoder": ("CLIPTextModelWithProjection",),
        "prior_scheduler": PRIOR_SCHEDULERS,
    },
}
NORMALIZER = Settings(read={"embedding_dim": (int, 768)}, same={"_class_name": _SHARED["image_normalizer"]})
# A scheduler that adds noise to embeddings uses its table alone.
AUGMENTS = Settings(
    read={
        "num_train_timesteps": (int, 1000),
        "beta_start": (float, 0.0001),
        "beta_end": (float, 0.02),
        "beta_schedule": (str, "linear"),
    },
    same={"_class_name": (NOISING,), "trained_betas": (None,), "rescale_betas_zero_snr": (False,)},
    free=(
        *("variance_type", "prediction_type", "clip_sample", "clip_sample_range", "timestep_spacing"),
        *("dynamic_thresholding_ratio", "sample_max_value", "steps_offset", "thresholding"),
    ),
)


def augmentation(config: Mapping[str, Any], name: str) -> dict:
    """`image_noising_scheduler`'s configuration -> a part's `augmentation`.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    schedules = stable_diffusion_config.ALL_SCHEDULES
    return stable_diffusion_config.noise_schedule(AUGMENTS.take(config, name), name, schedules)


def prior_scheduler(config: Mapping[str, Any], name: str) -> tuple[dict, dict]:
    """`prior_scheduler`'s configuration -> the prior's `diffusion`, and its sampling defaults.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    if config.get("_class_name") != NOISING:
        diffusion = karlo_config.schedule(config, "x0", name)
        return diffusion, karlo_config.sampling(config, "prior_diffusion", name)
    schedules, defaults = stable_diffusion_config.ALL_SCHEDULES, karlo_config.SAMPLING["prior_diffusion"]
    diffusion, sampling = stable_diffusion_config.scheduler(config, name, schedules)
    return diffusion, sampling | {key: defaults[key] for key in ("steps", "guidance_scale")}


def normalizer_dim(config: Mapping[str, Any], name: str) -> int:
    """The size of the embeddings that an `image_normalizer` whitens."""
    return NORMALIZER.take(config, name)["embedding_dim"]
