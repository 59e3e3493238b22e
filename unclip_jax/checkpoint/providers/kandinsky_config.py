"""What the JSON files of Kandinsky 2.2's folders may say, key by key, and what that is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.providers import stable_diffusion_config
from unclip_jax.checkpoint.providers.karlo_config import UNET_READ, UNET_SAME, unet_model
from unclip_jax.checkpoint.providers.preprocess import PROCESSORS
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

# What a pipeline of diffusers is for -> the names of its classes; the first is the one written.
PIPELINES = {
    "prior": ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"),
    "decoder": ("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline"),
    "inpaint": ("KandinskyV22InpaintPipeline",),
}
_DECODES = {
    "unet": ("UNet2DConditionModel",),
    "scheduler": ("DDPMScheduler", "DDIMScheduler"),
    "movq": ("VQModel",),
}
# The classes that may read each folder of a pipeline.
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "prior": {
        "prior": ("PriorTransformer",),
        "image_encoder": ("CLIPVisionModelWithProjection",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "scheduler": ("UnCLIPScheduler",),
        "image_processor": PROCESSORS,
    },
    "decoder": _DECODES,
    "inpaint": _DECODES,
}
SAMPLING = {"steps": 100, "guidance_scale": 4.0}  # the decoder pipelines' own defaults
TOKENS = 32  # that diffusers' `ImageProjection` makes of an embedding

UNET = Settings(
    read=UNET_READ
    | {
        "in_channels": (int, STATED),
        "cross_attention_dim": (int, STATED),
        "attention_head_dim": (int, STATED),
        "encoder_hid_dim": (int, STATED),
    },
    same=UNET_SAME
    | {
        "_class_name": _DECODES["unet"],
        "resnet_out_scale_factor": (1.0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
    },
    stated={
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
        "addition_embed_type": ("image",),
        "encoder_hid_dim_type": ("image_proj",),
        "resnet_time_scale_shift": ("scale_shift",),
    },
    free=("dropout", "downsample_padding", "transformer_layers_per_block", "addition_embed_type_num_heads"),
)


def decoder_model(config: Mapping[str, Any], latent_channels: int, name: str) -> dict:
    """`UNet2DConditionModel`'s configuration -> keyword arguments of `KandinskyDecoder`.

    Args:
      config: the configuration.
      latent_channels: Z, of the autoencoder beside it.
      name: of the folder, for messages.

    Raises:
      ValueError: when it is another network than Kandinsky 2.2's, or does not fit the autoencoder.
    """
    taken = UNET.take(config, name)
    channels, made = taken["in_channels"], taken["out_channels"]
    inpaint = channels == 2 * latent_channels + 1
    if made != 2 * latent_channels or not (inpaint or channels == latent_channels):
        raise InputError(
            f"{name} takes {channels} channels and makes {made}, and the autoencoder has {latent_channels}; "
            f"known here are U-Nets of {latent_channels}, or {2 * latent_channels + 1} to inpaint, that make "
            f"{2 * latent_channels}"
        )
    head = taken["attention_head_dim"]
    if any(width % head for width in taken["block_out_channels"]):
        raise InputError(f"{name}: widths {taken['block_out_channels']} have no heads of {head} channels")
    return {
        "unet": unet_model(taken, name) | {"head_channels": head},
        "embed_dim": taken["encoder_hid_dim"],
        "latent_channels": latent_channels,
        "context_dim": taken["cross_attention_dim"],
        "clip_tokens": TOKENS,
        "inpaint": inpaint,
    }


def scheduler(config: Mapping[str, Any], name: str) -> tuple[dict, dict]:
    """The decoder's scheduler -> the part's `diffusion`, and its sampling defaults.

    Raises:
      ValueError: naming the setting that is not known here.
    """
    kind = config.get("_class_name")
    if kind not in _DECODES["scheduler"]:
        raise InputError(f"{name}: it is a {shown(kind)}; known here: {', '.join(_DECODES['scheduler'])}")
    diffusion, sampling = stable_diffusion_config.scheduler(config, name)
    return diffusion, sampling | SAMPLING
