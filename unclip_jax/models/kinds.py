"""The kinds of networks: their modules, and the modules whose keyword arguments the fields of those hold."""

from __future__ import annotations

import flax.linen as nn

from unclip_jax.models.clip import CLIP, ImageTower, TextTower
from unclip_jax.models.decoder import ClipConditioning, Decoder
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet
from unclip_jax.models.upsampler import Upsampler

KINDS: dict[str, tuple[type[nn.Module], dict[str, type[nn.Module]]]] = {
    "clip": (CLIP, {"image": ImageTower, "text": TextTower}),
    "prior_diffusion": (DiffusionPrior, {}),
    "prior_ar": (ARPrior, {"text": TextEncoder}),
    "decoder": (Decoder, {"unet": UNet, "conditioning": ClipConditioning, "text": TextEncoder}),
    "upsampler": (Upsampler, {"unet": UNet}),
}
