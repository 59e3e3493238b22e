"""Kandinsky 2.2 in the folder layout of diffusers.

It is published as pipelines in repositories of their own: the prior with its CLIP, the decoder with its
autoencoder (MoVQ), and a decoder that inpaints. A bundle needs a prior and a decoder, so a path to it is a
folder that holds theirs side by side, by any names:

    kandinsky/kandinsky-2-2-prior            clip (OpenCLIP ViT-bigG/14), prior_diffusion
    kandinsky/kandinsky-2-2-decoder          latent, autoencoder
    kandinsky/kandinsky-2-2-decoder-inpaint  latent_inpaint, if it is there; `latent` where it is alone

Single parts are also read from one pipeline's own folder.

The prior has Karlo's topology, and so has the U-Net; the rules of both are Karlo's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.check import kandinsky_shapes
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, norm, shapes_of
from unclip_jax.checkpoint.files import Place, keep, open_weights, read_json
from unclip_jax.checkpoint.providers import (
    autoencoder,
    clip,
    kandinsky_config,
    karlo,
    karlo_config,
    preprocess,
    stable_diffusion,
    stable_diffusion_config,
)
from unclip_jax.checkpoint.providers.kandinsky_config import CLASSES, PIPELINES
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import VQAutoencoder
from unclip_jax.sharding import path_name

CONDITIONING: tuple[Rule, ...] = (
    *linear(r"encoder_hid_proj\.image_embeds", "image/tokens"),
    *norm(r"encoder_hid_proj\.norm", "image/tokens_norm/norm"),
    *linear(r"add_embedding\.image_proj", "image/cond"),
    *norm(r"add_embedding\.image_norm", "image/cond_norm/norm"),
)
WORDS = {"prior": "prior", "decoder": "decoder", "inpaint": "decoder that inpaints"}
Makers = dict[str, Callable[[], Part]]


def unet(model: dict) -> tuple[Rule, ...]:
    """Rules of the decoder's names.

    Args:
      model: keyword arguments of `KandinskyDecoder`.
    """
    return (*CONDITIONING, *karlo.unet(len(model["unet"]["channel_mult"])))


# ------------------------------------------------------------------------------------------- folders
def _role(path: Path) -> str | None:
    # What the pipeline in a folder is for; None where there is no pipeline of Kandinsky 2.2.
    if not (path / "model_index.json").is_file():
        return None
    name = read_json(path / "model_index.json").get("_class_name")
    return next((role for role, names in PIPELINES.items() if name in names), None)


def _roles(path: Path) -> dict[str, Path]:
    # The folder of each role, of a pipeline's own folder or one that holds pipelines side by side. There is
    # none without a pipeline of Kandinsky 2.2.
    if not path.is_dir() or (path / "bundle.json").is_file():
        return {}
    if (path / "model_index.json").is_file():
        role = _role(path)
        return {} if role is None else {role: path}
    found: dict[str, Path] = {}
    for folder in sorted(p for p in path.iterdir() if (p / "model_index.json").is_file()):
        role = _role(folder)
        if role is None:
            continue
        if role in found:
            raise InputError(
                f"{path} holds two folders of a {WORDS[role]}, {found[role].name} and {folder.name}: "
                "move one of them away"
            )
        found[role] = folder
    return found


def recognises(path: Path) -> bool:
    """Whether a folder is one of the pipelines, or holds some."""
    return bool(_roles(path))


def _check_whole(path: Path, roles: dict[str, Path]) -> None:
    # A prior and a decoder, and no other pipeline beside them.
    others = [p for p in sorted(path.iterdir()) if (p / "model_index.json").is_file()]
    for folder in others:
        if folder not in roles.values():
            kind = read_json(folder / "model_index.json").get("_class_name")
            raise InputError(f"{folder} is a {kind}, which is not of Kandinsky 2.2: move it away")
    lacks = "prior" if "prior" not in roles else "decoder"
    if "prior" not in roles or len(roles) == 1:
        words = " and a ".join(WORDS[role] for role in roles)
        raise InputError(
            f"{path} holds Kandinsky's {words} without a {lacks}: put the folders of both into one folder, "
            "and name that"
        )


# ------------------------------------------------------------------------------------------- reading
def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads folders as a bundle; see `providers.Provider`. Prior and decoders hold the hashes of the parts
    under them, so those that are there are read even when `only` names another part."""
    roles = _roles(path)
    if only is None:
        _check_whole(path, roles)
    for role, folder in roles.items():
        index = folder / "model_index.json"
        stable_diffusion_config.check_index(read_json(index), str(index), CLASSES[role], aside=())
    makers: Makers = {}
    sampling: dict[str, dict] = {}
    dim = None
    if "prior" in roles:
        dim = _prior(roles["prior"], makers, sampling, place)
    decoders = [role for role in ("decoder", "inpaint") if role in roles]
    for name, role in zip(("latent", "latent_inpaint"), decoders):
        _decoder(roles[role], name, dim, makers, sampling, place)
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, "kandinsky", sampling, {"source": str(path)}, str(path))


def _placed(params: Any, place: Place) -> Any:
    return jax.tree_util.tree_map_with_path(lambda where, value: place(path_name(where), value), params)


def _prior(path: Path, makers: Makers, sampling: dict[str, dict], place: Place) -> int:
    # Adds the parts of the prior's folder, and returns the size of the embeddings.
    text, image = (read_json(path / f"{half}_encoder" / "config.json") for half in ("text", "image"))
    model = clip.two_halves(text, image)
    side = model["image"]["image_size"]
    model["image"] |= preprocess.of_transformers(path / "image_processor", side, required=True)
    tokenizer = stable_diffusion.folder_tokenizer(path / "tokenizer", model["text"]["length"])

    @functools.cache
    def clip_part() -> Part:
        folders = {half: path / f"{half}_encoder" for half in ("text", "image")}
        params = clip.read_halves(model, folders, keep)
        config = {"kind": "clip", "model": model, "tokenizer": tokenizer}
        return Part(config, _placed(params, place), params_hash(params))

    config = read_json(path / "scheduler" / "scheduler_config.json")
    diffusion = karlo_config.schedule(config, "x0", "the prior's scheduler")
    makers["clip"] = clip_part
    makers["prior_diffusion"] = karlo.prior_maker(
        path, model, diffusion, lambda: {"clip": clip_part().hash}, place
    )
    sampling["prior_diffusion"] = karlo_config.sampling(config, "prior_diffusion", "the prior's scheduler")
    return model["embed_dim"]


def _decoder(
    path: Path, name: str, dim: int | None, makers: Makers, sampling: dict[str, dict], place: Place
) -> None:
    # Adds the parts of a decoder's folder: the U-Net, and the autoencoder where another folder has not added
    # it already. `dim` is the size of CLIP's embeddings, where CLIP is there.
    movq = autoencoder.part_config(
        read_json(path / "movq" / "config.json"), "vq_autoencoder", f"{path.name}/movq"
    )
    model = kandinsky_config.decoder_model(
        read_json(path / "unet" / "config.json"), movq["model"]["latent_channels"], f"{path.name}/unet"
    )
    if dim not in (None, model["embed_dim"]):
        raise InputError(
            f"{path.name}/unet takes embeddings of {model['embed_dim']}, and CLIP makes {dim}: they are of "
            "different CLIPs"
        )
    config = read_json(path / "scheduler" / "scheduler_config.json")
    diffusion, sampling[name] = kandinsky_config.scheduler(config, f"{path.name}/scheduler")

    @functools.cache
    def vae_part() -> Part:
        module = VQAutoencoder(**movq["model"])
        shapes = shapes_of(module.init, array(1, module.factor, module.factor, 3))
        rules = autoencoder.rules_of(movq["model"])
        params = convert(open_weights(path / "movq"), rules, shapes, f"{path.name}/movq")
        return Part(movq, _placed(params, place), params_hash(params))

    shared = makers.setdefault("autoencoder", vae_part)
    clip_part = makers.get("clip")

    def make() -> Part:
        if shared is not vae_part and shared().hash != vae_part().hash:
            raise InputError(
                f"{path.name}/movq is not the autoencoder of the other decoder: take both of one release"
            )
        frozen = {"autoencoder": vae_part().hash} | ({"clip": clip_part().hash} if clip_part else {})
        weights, shapes = open_weights(path / "unet"), kandinsky_shapes(model)
        params = convert(weights, unet(model), shapes, f"{path.name}/unet", place)
        part = {"kind": "kandinsky", "model": model, "diffusion": diffusion, "frozen": frozen}
        return Part(part, params)

    makers[name] = make
