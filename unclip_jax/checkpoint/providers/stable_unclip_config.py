"""What the JSON files of StableUnCLIP's folders may say beside those of Stable Diffusion and Karlo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.providers import karlo_config, stable_diffusion_config
from unclip_jax.checkpoint.providers.preprocess import PROCESSORS
from unclip_jax.checkpoint.settings import Settings
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

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
SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled_linear"}
# diffusers' variance -> ours. The forms with "log" compute the same.
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
}
_DDPM_READ = {
    "num_train_timesteps": (int, 1000),
    "beta_start": (float, 0.0001),
    "beta_end": (float, 0.02),
    "beta_schedule": (str, "linear"),
}
_DDPM_SAME = {
    "_class_name": (NOISING,),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
}
_DDPM_SAMPLES = {
    "variance_type": (str, "fixed_small"),
    "prediction_type": (str, "epsilon"),
    "clip_sample": (bool, True),
    "clip_sample_range": (float, 1.0),
    "timestep_spacing": (str, "leading"),
}
_UNUSED = ("dynamic_thresholding_ratio", "sample_max_value", "steps_offset")
# A scheduler that adds noise to embeddings uses its table alone.
AUGMENTS = Settings(read=_DDPM_READ, same=_DDPM_SAME, free=(*_DDPM_SAMPLES, *_UNUSED, "thresholding"))
DRAWS_EMBEDDINGS = Settings(
    read=_DDPM_READ | _DDPM_SAMPLES, same=_DDPM_SAME | {"thresholding": (False,)}, free=_UNUSED
)


def _schedule(taken: Mapping[str, Any], name: str) -> dict:
    theirs = taken["beta_schedule"]
    if theirs not in SCHEDULES:
        raise InputError(f"{name}: beta_schedule is {shown(theirs)}; known: {', '.join(SCHEDULES)}")
    schedule = {"schedule": SCHEDULES[theirs], "num_steps": taken["num_train_timesteps"]}
    if schedule["schedule"] == "cosine":
        return schedule
    return schedule | {"beta_ends": [taken["beta_start"], taken["beta_end"]]}


def augmentation(config: Mapping[str, Any], name: str) -> dict:
    """`image_noising_scheduler`'s configuration -> a part's `augmentation`.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    return _schedule(AUGMENTS.take(config, name), name)


def prior_scheduler(config: Mapping[str, Any], name: str) -> tuple[dict, dict]:
    """`prior_scheduler`'s configuration -> the prior's `diffusion`, and its sampling defaults.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    if config.get("_class_name") != NOISING:
        diffusion = karlo_config.schedule(config, "x0", name)
        return diffusion, karlo_config.sampling(config, "prior_diffusion", name)
    taken = DRAWS_EMBEDDINGS.take({k: v for k, v in config.items() if k != "steps_offset"}, name)
    offset, spacing, variance = (
        config.get("steps_offset", 0),
        taken["timestep_spacing"],
        taken["variance_type"],
    )
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 1000:
        raise InputError(f"{name}: steps_offset must be a whole number from 0, not {shown(offset)}")
    for key, known in (
        ("prediction_type", stable_diffusion_config.PREDICTIONS),
        ("timestep_spacing", ("leading", "trailing", "linspace")),
        ("variance_type", VARIANCES),
    ):
        if taken[key] not in known:
            raise InputError(f"{name}: {key} is {shown(taken[key])}; known: {', '.join(known)}")
    if taken["clip_sample_range"] <= 0:
        raise InputError(f"{name}: clip_sample_range must be positive, not {taken['clip_sample_range']}")
    prediction = stable_diffusion_config.PREDICTIONS[taken["prediction_type"]]
    sampling = karlo_config.SAMPLING["prior_diffusion"] | {
        "variance": VARIANCES[variance],
        "clip": taken["clip_sample_range"] if taken["clip_sample"] else None,
        "spacing": spacing,
    }
    sampling |= {"offset": offset} if spacing == "leading" and offset else {}
    return _schedule(taken, name) | {"prediction": prediction}, sampling


def normalizer_dim(config: Mapping[str, Any], name: str) -> int:
    """The size of the embeddings that an `image_normalizer` whitens."""
    return NORMALIZER.take(config, name)["embedding_dim"]
