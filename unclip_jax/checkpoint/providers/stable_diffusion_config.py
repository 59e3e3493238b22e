"""What the JSON files of Stable Diffusion's folders may say, key by key, and what that is here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' name -> ours
# The pipelines' own defaults.
SAMPLING = {"steps": 50, "guidance_scale": 7.5, "clip": None}
BETA_ENDS = (0.00085, 0.012)  # of the schedule that is called scaled_linear here
SCALE_FACTOR = 0.18215

# ------------------------------------------------------------------------------------------- tables
SCHEDULERS = {  # diffusers' class -> our sampler
    "PNDMScheduler": "plms",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DDPMScheduler": "ddpm",
}
VARIANCES = {  # of DDPMScheduler -> ours. Those of the logarithm are the same variances.
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(SCHEDULERS),
}
# The parts of a pipeline that do not draw, and may be missing.
ASIDE = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")

UNET = Settings(
    read={
        "sample_size": (int, STATED),
        "in_channels": (int, 4),
        "out_channels": (int, 4),
        "layers_per_block": (int, 2),
        "block_out_channels": (tuple[int, ...], (320, 640, 1280, 1280)),
        "down_block_types": (tuple[str, ...], STATED),
        "up_block_types": (tuple[str, ...], STATED),
        "cross_attention_dim": (int, 1280),
        "attention_head_dim": (int | tuple[int, ...], 8),
        "num_attention_heads": (int | tuple[int, ...] | None, None),
        "transformer_layers_per_block": (int, 1),
        "use_linear_projection": (bool, False),
        "norm_num_groups": (int, 32),
        "class_embed_type": (str | None, None),
        "projection_class_embeddings_input_dim": (int | None, None),
    },
    same={
        "_class_name": CLASSES["unet"],
        "act_fn": ("silu",),
        "norm_eps": (1e-5,),
        "freq_shift": (0,),
        "flip_sin_to_cos": (True,),
        "downsample_padding": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "mid_block_scale_factor": (1,),
        "resnet_time_scale_shift": ("default",),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
    },
    # The scores of attention are float32 here in any case.
    free=("dropout", "upcast_attention", "addition_embed_type_num_heads"),
)
# Settings of one scheduler stand in the files of others, which pass them over.
_LEFT_OVER = (
    *("clip_sample", "clip_sample_range", "set_alpha_to_one", "skip_prk_steps", "steps_offset"),
    *("sample_max_value", "dynamic_thresholding_ratio", "thresholding", "rescale_betas_zero_snr"),
    *("interpolation_type", "final_sigmas_type", "timestep_type", "sigma_min", "sigma_max", "flow_shift"),
    *("algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final"),
    *("lambda_min_clipped", "variance_type", "use_karras_sigmas", "use_exponential_sigmas"),
    *("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "time_shift_type", "timestep_spacing"),
)
_READ = {
    "num_train_timesteps": (int, 1000),
    "beta_start": (float, 0.0001),
    "beta_end": (float, 0.02),
    "beta_schedule": (str, "linear"),
    "prediction_type": (str, "epsilon"),
    "steps_offset": (int | None, 0),
}
_ZERO_SNR = {"rescale_betas_zero_snr": (bool, False)}
_FINAL = {"final_sigmas_type": (str, "zero")}


def _scheduler(name: str, spacing: str, read: dict, **tables: dict) -> Settings:
    # `steps_offset` may be 0, which `Settings` counts as no size; `scheduler` checks it.
    read = _READ | {"timestep_spacing": (str, spacing)} | read
    del read["steps_offset"]
    tables["same"] = {"_class_name": (name,), "trained_betas": (None,)} | tables.get("same", {})
    taken = read.keys() | tables["same"].keys() | tables.get("stated", {}).keys()
    return Settings(read=read, free=[key for key in _LEFT_OVER if key not in taken], **tables)


_NO_KARRAS = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}
SETTINGS = {
    "plms": _scheduler(
        "PNDMScheduler", "leading", {"set_alpha_to_one": (bool, False)}, stated={"skip_prk_steps": (True,)}
    ),
    "ddim": _scheduler(
        "DDIMScheduler",
        "leading",
        {"set_alpha_to_one": (bool, True)} | _ZERO_SNR,
        same={"thresholding": (False,)},
        stated={"clip_sample": (False,)},
    ),
    "euler": _scheduler(
        "EulerDiscreteScheduler",
        "linspace",
        _ZERO_SNR | _FINAL,
        same=_NO_KARRAS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "euler_ancestral": _scheduler("EulerAncestralDiscreteScheduler", "linspace", _ZERO_SNR),
    "dpmpp_2m": _scheduler(
        "DPMSolverMultistepScheduler",
        "linspace",
        _ZERO_SNR | _FINAL,
        same=_NO_KARRAS
        | {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "lower_order_final": (True,),
            "euler_at_final": (False,),
            "thresholding": (False,),
            "variance_type": (None,),
            "use_lu_lambdas": (False, None),
            "use_flow_sigmas": (False, None),
        },
    ),
    "ddpm": _scheduler(
        "DDPMScheduler",
        "leading",
        _ZERO_SNR
        | {
            "variance_type": (str, "fixed_small"),
            "clip_sample": (bool, True),
            "clip_sample_range": (float, 1.0),
            "thresholding": (bool, False),
            "dynamic_thresholding_ratio": (float, 0.995),
            "sample_max_value": (float, 1.0),
        },
    ),
}


# ------------------------------------------------------------------------------------------- networks
def _multiples(channels: tuple[int, ...], name: str) -> tuple[int, ...]:
    if any(c % channels[0] for c in channels):
        raise InputError(f"{name}: block_out_channels must be multiples of the first, {channels[0]}")
    return tuple(c // channels[0] for c in channels)


def unet_model(config: Mapping[str, Any], name: str) -> dict:
    """`UNet2DConditionModel`'s configuration -> keyword arguments of `LatentUNet`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    taken = UNET.take(config, name)
    channels = tuple(taken["block_out_channels"])
    levels, attends = len(channels), []
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    for down, up in zip(taken["down_block_types"], reversed(taken["up_block_types"])):
        if down not in kinds or up != down.replace("Down", "Up"):
            raise InputError(
                f"{name}: the blocks {shown(down)} and {shown(up)} of one level are not known here"
            )
        attends.append(kinds[down])
    if len(taken["down_block_types"]) != levels or len(taken["up_block_types"]) != levels:
        raise InputError(f"{name}: {levels} block_out_channels need as many down and up blocks")
    # diffusers calls the number of heads attention_head_dim.
    heads = taken["num_attention_heads"] or taken["attention_head_dim"]
    heads = (heads,) * levels if isinstance(heads, int) else tuple(heads)
    if len(heads) != levels or any(c % h for c, h in zip(channels, heads) if h < 1 or c % h):
        raise InputError(
            f"{name}: attention_head_dim must be {levels} numbers of heads that divide the channels"
        )
    projected = taken["class_embed_type"] == "projection"
    if taken["class_embed_type"] not in (None, "projection"):
        raise InputError(f"{name}: class_embed_type is {shown(taken['class_embed_type'])}; known: projection")
    return {
        "image_size": taken["sample_size"],
        "in_channels": taken["in_channels"],
        "out_channels": taken["out_channels"],
        "channels": channels[0],
        "channel_mult": _multiples(channels, name),
        "res_blocks": taken["layers_per_block"],
        "heads": heads,
        "attention_levels": tuple(level for level, attend in enumerate(attends) if attend),
        "context_dim": taken["cross_attention_dim"],
        "transformer_depth": taken["transformer_layers_per_block"],
        "linear": taken["use_linear_projection"],
        "groups": taken["norm_num_groups"],
        **({"vector_dim": taken["projection_class_embeddings_input_dim"]} if projected else {}),
    }


# ------------------------------------------------------------------------------------------- scheduler
# diffusers' name of a noise schedule -> ours: those of latents, and those of embeddings too.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear"}
ALL_SCHEDULES = SCHEDULES | {"squaredcos_cap_v2": "cosine"}


def noise_schedule(taken: Mapping[str, Any], name: str, known: Mapping[str, str] = SCHEDULES) -> dict:
    """The keys of a scheduler's configuration that make its noise schedule, as a part says it.

    Raises:
      ValueError: when the schedule is not among the `known` ones.
    """
    theirs = taken["beta_schedule"]
    if theirs not in known:
        raise InputError(f"{name}: beta_schedule is {shown(theirs)}; known: {', '.join(known)}")
    schedule = {"schedule": known[theirs], "num_steps": taken["num_train_timesteps"]}
    if schedule["schedule"] == "cosine":
        return schedule
    return schedule | {"beta_ends": [taken["beta_start"], taken["beta_end"]]}


def scheduler(
    config: Mapping[str, Any], name: str, schedules: Mapping[str, str] = SCHEDULES
) -> tuple[dict, dict]:
    """A scheduler's configuration -> a part's `diffusion`, and the sampling defaults.

    schedules: those that are known, as in `noise_schedule`.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise InputError(
            f"{name}: the scheduler {shown(kind)} is not known here; known: {', '.join(SCHEDULERS)}"
        )
    sampler = SCHEDULERS[kind]
    taken = SETTINGS[sampler].take({k: v for k, v in config.items() if k != "steps_offset"}, name)
    offset, spacing = config.get("steps_offset", 0), taken["timestep_spacing"]
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 1000:
        raise InputError(f"{name}: steps_offset must be a whole number from 0, not {shown(offset)}")
    for key, known in (
        ("prediction_type", PREDICTIONS),
        ("timestep_spacing", ("leading", "trailing", "linspace")),
    ):
        if taken[key] not in known:
            raise InputError(f"{name}: {key} is {shown(taken[key])}; known: {', '.join(known)}")
    first = not taken["set_alpha_to_one"] if "set_alpha_to_one" in taken else False
    if taken.get("final_sigmas_type", "zero") not in ("zero", "sigma_min"):
        raise InputError(f"{name}: final_sigmas_type is {shown(taken['final_sigmas_type'])}")
    first = first or taken.get("final_sigmas_type") == "sigma_min"
    sampling = {"sampler": sampler, "spacing": spacing, "last": "first" if first else "clean"}
    sampling |= {"offset": offset} if spacing == "leading" and offset else {}
    if sampler == "ddpm":
        sampling |= _ancestral(taken, name)
    diffusion = noise_schedule(taken, name, schedules)
    diffusion["prediction"] = PREDICTIONS[taken["prediction_type"]]
    if taken.get("rescale_betas_zero_snr"):
        diffusion["zero_snr"] = True
    return diffusion, SAMPLING | sampling


def _ancestral(taken: Mapping[str, Any], name: str) -> dict:
    # The sampling defaults that `DDPMScheduler` adds: its variance, and how it bounds x0.
    variance, bound = taken["variance_type"], taken["clip_sample_range"]
    ratio, most = taken["dynamic_thresholding_ratio"], taken["sample_max_value"]
    if variance not in VARIANCES:
        raise InputError(f"{name}: variance_type is {shown(variance)}; known here: {', '.join(VARIANCES)}")
    if taken["thresholding"]:
        if not 0 < ratio <= 1 or most < 1:
            raise InputError(
                f"{name}: dynamic_thresholding_ratio must be in (0, 1] and sample_max_value at least 1, "
                f"not {ratio} and {most}"
            )
        bounds = {"clip": 1.0, "threshold": 100 * ratio, "threshold_most": most}
    elif taken["clip_sample"] and not bound > 0:
        raise InputError(f"{name}: clip_sample_range must be positive, not {bound}")
    else:
        bounds = {"clip": bound if taken["clip_sample"] else None}
    return {"variance": VARIANCES[variance]} | bounds


def check_index(
    index: Mapping[str, Any],
    name: str,
    classes: Mapping[str, tuple[str, ...]] = CLASSES,
    aside: Collection[str] = ASIDE,
) -> None:
    """Checks that each part of `model_index.json` is of a class that is known here.

    Args:
      index: what the file holds. name: the file's, for messages.
      classes: part -> the classes that are known; each part must be there.
      aside: parts that are not read, and may be missing.

    Raises:
      ValueError: naming the part and its class.
    """
    for part, (*_, kind) in ((k, v) for k, v in index.items() if isinstance(v, list) and v):
        if part in aside:
            if part == "safety_checker" and kind not in (None, "StableDiffusionSafetyChecker"):
                raise InputError(f"{name}: safety_checker is a {shown(kind)}, which is not known here")
            continue
        if part not in classes or kind not in classes[part]:
            known = ", ".join(classes.get(part, ())) or "no such part"
            raise InputError(f"{name}: {part} is a {shown(kind)}; known here: {known}")
    missing = [part for part in classes if not index.get(part)]
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}; copy the folder again")
