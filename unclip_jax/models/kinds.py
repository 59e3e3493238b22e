"""The kinds of networks that a bundle's parts may be, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from unclip_jax.models.autoencoder import KLAutoencoder, VQAutoencoder
from unclip_jax.models.clip import CLIP, ImageTower, TextTower
from unclip_jax.models.dalle import DALLE
from unclip_jax.models.dalle_mini import DalleMini
from unclip_jax.models.decoder import ClipConditioning, Decoder
from unclip_jax.models.dinov2 import DINOv2
from unclip_jax.models.dvae import DVAE
from unclip_jax.models.dvae_strided import StridedDVAE
from unclip_jax.models.glide import Glide
from unclip_jax.models.imagen import EfficientUNet, Imagen, ImagenUpsampler
from unclip_jax.models.inception import Inception
from unclip_jax.models.kandinsky import KandinskyDecoder
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.models.lpips import LPIPS
from unclip_jax.models.pixelsnail import PixelSNAIL
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.prior_laion import LaionPrior
from unclip_jax.models.safety import SafetyChecker
from unclip_jax.models.t5 import T5Encoder
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.models.vqvae import VQVAE


class Kind(NamedTuple):
    """A kind of network.

    keys: of a part's `config.json`: name -> (type, whether it must be there).
    module: what the network is built of; None for parts that are arrays alone.
    inner: field of the module -> the module whose keyword arguments the field holds.
    """

    keys: Mapping[str, tuple[Any, bool]]
    module: type[nn.Module] | None = None
    inner: Mapping[str, type[nn.Module]] = {}


SHARED = {"kind": (str, True), "frozen": (dict, False), "tokenizer": (dict, False)}
NETWORK = SHARED | {"model": (dict, True)}
ENCODES = NETWORK | {"scale_factor": (float, True)}
DIFFUSES = NETWORK | {"diffusion": (dict, True)}
KINDS: dict[str, Kind] = {
    "clip": Kind(NETWORK, CLIP, {"image": ImageTower, "text": TextTower}),
    "codec": Kind(SHARED | {"embed_dim": (int, True), "dims": (int, False)}),
    "prior_diffusion": Kind(
        DIFFUSES | {"embedding_space": (dict, True), "x0_error": (tuple[float, ...], False)}, DiffusionPrior
    ),
    "prior_laion": Kind(DIFFUSES | {"embedding_space": (dict, True)}, LaionPrior),
    "prior_ar": Kind(NETWORK | {"dot_edges": (tuple[float, ...], True)}, ARPrior, {"text": TextEncoder}),
    "decoder": Kind(DIFFUSES, Decoder, {"unet": UNet, "conditioning": ClipConditioning, "text": TextEncoder}),
    "upsampler": Kind(
        DIFFUSES | {"factor": (int, True), "last_step_of": (str, False)}, Upsampler, {"unet": UNet}
    ),
    "latent": Kind(
        DIFFUSES
        | {
            "augmentation": (dict, False),
            "embedding_space": (dict, False),
            "class_names": (tuple[str, ...], False),
        },
        LatentUNet,
    ),
    "retrieval": Kind(
        DIFFUSES | {"embedding_space": (dict, True), "neighbours": (int, True), "popular": (dict, False)},
        LatentUNet,
    ),
    "index": Kind(
        SHARED
        | {"embed_dim": (int, True), "rows": (int, True), "embedding_space": (dict, True)}
        | {"checksum": (str, True)}
    ),
    "glide": Kind(DIFFUSES | {"factor": (int, False)}, Glide, {"unet": UNet, "text": TextEncoder}),
    "kandinsky": Kind(DIFFUSES, KandinskyDecoder, {"unet": UNet}),
    "safety": Kind(NETWORK, SafetyChecker, {"image": ImageTower}),
    "kl_autoencoder": Kind(ENCODES, KLAutoencoder),
    "vq_autoencoder": Kind(ENCODES, VQAutoencoder),
    "vqvae": Kind(NETWORK, VQVAE),
    "imagen": Kind(DIFFUSES, Imagen, {"unet": UNet}),
    "imagen_upsampler": Kind(DIFFUSES | {"factor": (int, True)}, ImagenUpsampler, {"unet": EfficientUNet}),
    "t5": Kind(NETWORK, T5Encoder),
    "dvae": Kind(NETWORK, DVAE),
    "dvae_strided": Kind(NETWORK, StridedDVAE),
    "dalle": Kind(NETWORK | {"tokenizer": (dict, True)}, DALLE),
    "dalle_mini": Kind(NETWORK | {"tokenizer": (dict, True)}, DalleMini),
    "pixelsnail": Kind(NETWORK | {"level": (int, True)}, PixelSNAIL),
    "lpips": Kind(NETWORK, LPIPS),
    "inception": Kind(NETWORK, Inception),
    "dinov2": Kind(NETWORK, DINOv2),
}
