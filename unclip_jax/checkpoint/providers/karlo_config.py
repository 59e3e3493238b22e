"""What the JSON files of Karlo's folders may say, key by key, and what that is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.providers.preprocess import PROCESSORS
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

# The pipelines' own defaults, by kind of part.
SAMPLING = {
    "prior_diffusion": {
        "steps": 25,
        "sampler": "ddpm",
        "variance": "small",
        "guidance_scale": 4.0,
        "clip": 5.0,
    },
    "decoder": {"steps": 25, "sampler": "ddpm", "variance": "learned", "guidance_scale": 8.0, "clip": 1.0},
    "upsampler": {"steps": 7, "sampler": "ddpm", "variance": "small", "clip": 1.0},
}
VARIANCES = {"fixed_small_log": "small", "learned_range": "learned"}  # diffusers' name -> ours

# ------------------------------------------------------------------------------------------- tables
# The classes that may read each folder.
CLASSES = {
    "prior": ("PriorTransformer",),
    "decoder": ("UNet2DConditionModel",),
    "text_proj": ("UnCLIPTextProjModel",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "feature_extractor": PROCESSORS,
    "super_res_first": ("UNet2DModel",),
    "super_res_last": ("UNet2DModel",),
    "prior_scheduler": ("UnCLIPScheduler",),
    "decoder_scheduler": ("UnCLIPScheduler",),
    "super_res_scheduler": ("UnCLIPScheduler",),
}
PRIOR = Settings(
    read={
        "num_attention_heads": (int, 32),
        "attention_head_dim": (int, 64),
        "num_layers": (int, 20),
        "embedding_dim": (int, 768),
        "num_embeddings": (int, 77),
        "embedding_proj_dim": (int | None, None),
        "clip_embed_dim": (int | None, None),
    },
    same={
        "_class_name": CLASSES["prior"],
        "additional_embeddings": (4,),
        "time_embed_act_fn": ("silu",),
        "norm_in_type": (None,),
        "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",),
        "added_emb_type": ("prd",),
        "time_embed_dim": (None,),
    },
    free=("dropout",),
)
UNET_READ = {
    "sample_size": (int, STATED),
    "out_channels": (int, STATED),
    "layers_per_block": (int, STATED),
    "block_out_channels": (tuple[int, ...], STATED),
    "down_block_types": (tuple[str, ...], STATED),
    "up_block_types": (tuple[str, ...], STATED),
    "norm_num_groups": (int, 32),
}
UNET_SAME = {
    "act_fn": ("silu",),
    "norm_eps": (1e-5,),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_scale_factor": (1,),
    "time_embedding_type": ("positional",),
}
DECODER = Settings(
    read=UNET_READ | {"cross_attention_dim": (int, STATED), "attention_head_dim": (int, STATED)},
    same=UNET_SAME
    | {
        "_class_name": CLASSES["decoder"],
        "resnet_out_scale_factor": (1.0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
    },
    stated={
        "in_channels": (3,),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
        "class_embed_type": ("identity",),
        "resnet_time_scale_shift": ("scale_shift",),
    },
    free=("dropout", "downsample_padding", "transformer_layers_per_block", "addition_embed_type_num_heads"),
)
TEXT_PROJ = Settings(
    read={
        "clip_extra_context_tokens": (int, 4),
        "clip_embeddings_dim": (int, 768),
        "time_embed_dim": (int, STATED),
        "cross_attention_dim": (int, STATED),
    },
    same={"_class_name": CLASSES["text_proj"]},
)
UPSAMPLER = Settings(
    read=UNET_READ,
    same=UNET_SAME
    | {
        "_class_name": CLASSES["super_res_first"],
        "mid_block_type": ("UNetMidBlock2D",),
        "resnet_time_scale_shift": ("default", "scale_shift"),
    },
    stated={"in_channels": (6,), "add_attention": (False,)},
    free=("dropout", "attention_head_dim", "downsample_padding", "downsample_type", "upsample_type"),
)
SCHEDULER = Settings(
    read={
        "num_train_timesteps": (int, 1000),
        "variance_type": (str, "fixed_small_log"),
        "prediction_type": (str, "epsilon"),
        "clip_sample_range": (float, 1.0),
    },
    same={
        "_class_name": CLASSES["prior_scheduler"],
        "clip_sample": (True,),
        "beta_schedule": ("squaredcos_cap_v2",),
    },
)


# ------------------------------------------------------------------------------------------- reading
def check_index(index: Mapping[str, Any], name: str) -> None:
    """Checks that a pipeline has Karlo's parts, each of its own class.

    Raises:
      ValueError: naming the part and the class that is not known here.
    """
    for part, reader in index.items():
        if part.startswith("_") or reader is None or (isinstance(reader, list) and reader[1:] == [None]):
            continue
        known = CLASSES.get(part, ())
        if not isinstance(reader, list) or len(reader) != 2 or reader[1] not in known:
            ours = f"the part here is a {known[0]}" if known else "Karlo has no such part"
            raise InputError(f"{name}: {shown(part)} is {shown(reader)}, but {ours}")


def prior_model(config: Mapping[str, Any]) -> dict:
    """`PriorTransformer`'s configuration -> keyword arguments of `DiffusionPrior`.

    Raises:
      ValueError: when it is another transformer than Karlo's.
    """
    taken = PRIOR.take(config, "prior")
    heads, dim = taken["num_attention_heads"], taken["embedding_dim"]
    for key in ("embedding_proj_dim", "clip_embed_dim"):
        if taken[key] not in (None, dim):
            raise InputError(
                f"prior: {key} is {taken[key]}, but the network here works on embeddings of one size, {dim}"
            )
    return {
        "embed_dim": dim,
        "length": taken["num_embeddings"],
        "width": heads * taken["attention_head_dim"],
        "heads": heads,
        "layers": taken["num_layers"],
    }


# The pairs of blocks that a level may have: on the way down, and on the way up.
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
CROSS = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def unet_model(taken: Mapping[str, Any], name: str) -> dict:
    """Keyword arguments of `UNet` for what `UNET_READ` names.

    Raises:
      ValueError: when its levels have other blocks than ours.
    """
    widths, down, up = taken["block_out_channels"], taken["down_block_types"], taken["up_block_types"]
    pairs = list(zip(down, reversed(up)))
    other = [pair for pair in pairs if pair not in (PLAIN, CROSS)]
    if other or not pairs or not len(widths) == len(down) == len(up):
        raise InputError(
            f"{name}: the U-Net here has levels of {PLAIN[0]} or {CROSS[0]}, the same on both ways, "
            f"not {down} and {up}"
        )
    if any(width % widths[0] for width in widths):
        raise InputError(f"{name}: widths {widths} are not multiples of the first")
    if widths[0] % taken["norm_num_groups"]:
        raise InputError(f"{name}: width {widths[0]} has no {taken['norm_num_groups']} equal groups")
    size = taken["sample_size"]
    if size % 2 ** (len(widths) - 1):
        raise InputError(f"{name}: {size} px cannot be halved {len(widths) - 1} times")
    return {
        "image_size": size,
        "out_channels": taken["out_channels"],
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "res_blocks": taken["layers_per_block"],
        "attention_resolutions": [size // 2**level for level, pair in enumerate(pairs) if pair == CROSS],
        "groups": taken["norm_num_groups"],
    }


def decoder_model(config: Mapping[str, Any], text_proj: Mapping[str, Any]) -> dict:
    """The decoder's `UNet2DConditionModel` and its `UnCLIPTextProjModel` -> keyword arguments of `Decoder`.

    Raises:
      ValueError: when they are other networks than Karlo's.
    """
    taken, projection = DECODER.take(config, "decoder"), TEXT_PROJ.take(text_proj, "text_proj")
    made, takes = projection["cross_attention_dim"], taken["cross_attention_dim"]
    if made != takes:
        raise InputError(f"text_proj makes tokens of {made}, the decoder takes {takes}")
    unet = unet_model(taken, "decoder") | {"head_channels": taken["attention_head_dim"]}
    for width in taken["block_out_channels"]:
        if width % taken["attention_head_dim"]:
            raise InputError(f"decoder: width {width} has no heads of {taken['attention_head_dim']} channels")
    tokens = projection["clip_extra_context_tokens"]
    return {"unet": unet, "conditioning": {"context_dim": takes, "clip_tokens": tokens}}


def projected_dim(text_proj: Mapping[str, Any]) -> int:
    """The size of the embeddings that a `UnCLIPTextProjModel` takes."""
    return TEXT_PROJ.take(text_proj, "text_proj")["clip_embeddings_dim"]


def upsampler_model(config: Mapping[str, Any], name: str) -> dict:
    """A super-resolution `UNet2DModel`'s configuration -> keyword arguments of `Upsampler`.

    Raises:
      ValueError: when it is another network than Karlo's.
    """
    unet = unet_model(UPSAMPLER.take(config, name), name)
    shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    return {"unet": unet | {"middle_attention": False, "scale_shift": shift}, "resize": "cubic"}


def schedule(config: Mapping[str, Any], prediction: str, name: str) -> dict:
    """`UnCLIPScheduler`'s configuration -> the part's `diffusion`.

    Raises:
      ValueError: when it is another schedule.
    """
    taken, wanted = SCHEDULER.take(config, name), {"x0": "sample", "eps": "epsilon"}[prediction]
    if taken["prediction_type"] != wanted:
        raise InputError(
            f"{name}: prediction_type is {shown(taken['prediction_type'])}, "
            f"but the network here has {wanted!r}"
        )
    return {"schedule": "cosine", "num_steps": taken["num_train_timesteps"], "prediction": prediction}


def sampling(config: Mapping[str, Any], kind: str, name: str) -> dict:
    """`UnCLIPScheduler`'s configuration -> the sampling defaults of a part of this kind.

    Raises:
      ValueError: when it samples in another way.
    """
    taken = SCHEDULER.take(config, name)
    variance, bound = taken["variance_type"], taken["clip_sample_range"]
    if variance not in VARIANCES:
        raise InputError(
            f"{name}: variance_type is {shown(variance)}, but only {', '.join(VARIANCES)} are known here"
        )
    if bound <= 0:
        raise InputError(f"{name}: clip_sample_range must be positive, not {bound}")
    return SAMPLING[kind] | {"variance": VARIANCES[variance], "clip": float(bound)}
