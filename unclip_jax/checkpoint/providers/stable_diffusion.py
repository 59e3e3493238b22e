"""Stable Diffusion 1.x and 2.x: folders in diffusers' layout, and single files with CompVis' names.

A bundle of the system `latent` has three parts: `clip`, the text tower; `latent`, the U-Net; `autoencoder`. A
folder's safety checker is the part `safety`.
The tower of 1.x is CLIP's ViT-L/14 with its last states, and captions are padded with the end token. That of
2.x is OpenCLIP's ViT-H/14 without its last block (files hold it, and nothing uses it), and captions are
padded with 0. A U-Net of 2 Z + 1 input channels inpaints: it also sees the mask and the latents of the known
part.

A single file has no configuration. The shapes of its tensors say which U-Net it is, but not the heads: they
are known for the contexts of 1.x (768) and 2.x (1024) alone. Nor do they say what the U-Net predicts. The 1.x
networks predict eps; for 2.x, the file's own metadata (`modelspec.prediction_type`) must say it, or a file of
the same name that ends in .json: {"prediction_type": "epsilon"} for 2.x-base, "v_prediction" for 2.x-768.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.check import clip_shapes, latent_shapes
from unclip_jax.checkpoint.convert import Rule, array, convert, shapes_of
from unclip_jax.checkpoint.files import Place, Weights, keep, open_file, open_weights, read_json
from unclip_jax.checkpoint.providers import (
    autoencoder,
    clip,
    latent_names,
    preprocess,
    stable_diffusion_config,
)
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.safety import SafetyChecker
from unclip_jax.sharding import path_name
from unclip_jax.typed import shown

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
# Prefixes of a single file.
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
# Width of the context -> what a single file cannot say: the version, the U-Net's heads at a width, the text
# tower's activation. Its heads have 64 channels in both.
VERSIONS: dict[int, tuple[str, Callable[[int], int], str]] = {
    768: ("1.x", lambda channels: 8, "quick_gelu"),
    1024: ("2.x", lambda channels: max(channels // 64, 1), "gelu"),
}
HOW_TO_SAY = (
    'write {"prediction_type": "epsilon"} (2.x-base) or {"prediction_type": "v_prediction"} (2.x-768) into'
)
log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- reading
def recognises(path: Path) -> bool:
    """Whether a path is one of the pipelines' folders, or a single file with CompVis' names."""
    if path.is_file():
        return path.suffix == ".safetensors" and any(name.startswith(UNET) for name in open_file(path))
    index = path / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") in PIPELINES


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder or a file as a bundle; see `providers.Provider`. The U-Net holds the hashes of the two
    other parts, so these are read even when `only` is "latent"."""
    makers, sampling, notes = (_file if path.is_file() else _folder)(path, place)
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, "latent", sampling, {"source": str(path)} | notes, str(path))


def _parts(
    clip_model: dict,
    tokenizer: dict,
    read_clip: Callable[[], dict],
    vae_model: dict,
    scale_factor: float,
    read_vae: Callable[[Any], dict],
    unet_model: dict,
    diffusion: dict,
    read_unet: Callable[[Any], dict],
    place: Place,
    text: str = "clip",
) -> dict[str, Callable[[], Part]]:
    # A function that makes each part; `text` names the text tower's. The parameters of text tower and
    # autoencoder are hashed before they are placed.
    width = clip_model["text"]["width"]
    if unet_model["context_dim"] != width:
        raise InputError(
            f"the U-Net takes text states of {unet_model['context_dim']}, and CLIP makes {width}"
        )
    latents = vae_model["latent_channels"]
    if unet_model["out_channels"] != latents or unet_model["in_channels"] not in (latents, 2 * latents + 1):
        raise InputError(
            f"the U-Net takes {unet_model['in_channels']} channels and makes {unet_model['out_channels']}, "
            f"and the autoencoder has {latents}; known here are U-Nets of {latents}, "
            f"and of {2 * latents + 1} to inpaint"
        )

    def placed(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda where, value: place(path_name(where), value), params)

    @functools.cache
    def clip_part() -> Part:
        params = read_clip()
        config = {"kind": "clip", "model": clip_model, "tokenizer": tokenizer}
        return Part(config, placed(params), params_hash(params))

    @functools.cache
    def vae_part() -> Part:
        model = KLAutoencoder(**vae_model)
        params = read_vae(shapes_of(model.init, array(1, model.factor, model.factor, 3)))
        config = {"kind": "kl_autoencoder", "model": vae_model, "scale_factor": scale_factor}
        return Part(config, placed(params), params_hash(params))

    def unet_part() -> Part:
        frozen = {text: clip_part().hash, "autoencoder": vae_part().hash}
        config = {"kind": "latent", "model": unet_model, "diffusion": diffusion, "frozen": frozen}
        return Part(config, read_unet(latent_shapes(unet_model)))

    return {text: clip_part, "latent": unet_part, "autoencoder": vae_part}


def _folder(path: Path, place: Place) -> tuple[dict, dict, dict]:
    index = read_json(path / "model_index.json")
    stable_diffusion_config.check_index(index, str(path / "model_index.json"))
    parts, sampling = folder_parts(path, place)
    if index.get("safety_checker") and index["safety_checker"][-1] is not None:
        parts["safety"] = _safety(path, place)
    return parts, {"latent": sampling}, {}


def folder_parts(path: Path, place: Place, text: str = "clip") -> tuple[dict[str, Callable[[], Part]], dict]:
    """What the folders of Stable Diffusion's family share: text tower, U-Net and autoencoder.

    Args:
      path: the pipeline's folder, whose index was checked.
      place: where each parameter goes.
      text: the name of the text tower's part.

    Returns:
      A function that makes each part, by name, and the U-Net's sampling defaults. All configurations are
      checked, and no weights are read.
    """
    clip_model = text_tower(read_json(path / "text_encoder" / "config.json"))
    tokenizer = folder_tokenizer(path / "tokenizer", clip_model["text"]["length"])
    first_stage = read_json(path / "vae" / "config.json")
    first_stage = autoencoder.part_config(first_stage, "kl_autoencoder", "the autoencoder")
    vae, scale = first_stage["model"], first_stage["scale_factor"]
    unet = stable_diffusion_config.unet_model(read_json(path / "unet" / "config.json"), "the U-Net")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json", infinities=True)
    diffusion, sampling = stable_diffusion_config.scheduler(scheduler, "the scheduler")

    def read_clip() -> dict:
        return clip.read_halves(clip_model, {"text": path / "text_encoder"}, keep)

    def read_vae(shapes: Any) -> dict:
        rules = autoencoder.diffusers_rules(len(vae["channel_mult"]))
        return convert(open_weights(path / "vae"), rules, shapes, "the autoencoder")

    def read_unet(shapes: Any) -> dict:
        return convert(
            open_weights(path / "unet"), latent_names.diffusers_unet(unet), shapes, "the U-Net", place
        )

    parts = _parts(
        clip_model, tokenizer, read_clip, vae, scale, read_vae, unet, diffusion, read_unet, place, text
    )  # fmt: skip
    return parts, sampling


SAFETY: tuple[Rule, ...] = (
    Rule("concept_embeds", "concept"),
    Rule("concept_embeds_weights", "concept_threshold"),
    Rule("special_care_embeds", "special"),
    Rule("special_care_embeds_weights", "special_threshold"),
    *(
        rule
        if rule.pattern.startswith("visual_projection")
        else Rule(rf"vision_model\.{rule.pattern}", rule.target, rule.transform)
        for rule in clip.IMAGE
    ),
)


def _safety(path: Path, place: Place) -> Callable[[], Part]:
    config = read_json(path / "safety_checker" / "config.json")
    whole = clip.WHOLE_SETTINGS.take(
        {k: v for k, v in config.items() if k not in ("text_config",)}, "the safety checker"
    )
    tower = clip.transformers_config(None, config.get("vision_config") or {}, whole["projection_dim"])
    side = tower["image"]["image_size"]
    tower["image"] |= preprocess.of_transformers(path / "feature_extractor", side, required=True)
    model = {name: tower[name] for name in ("embed_dim", "image", "activation")}

    def make() -> Part:
        shapes = shapes_of(SafetyChecker(**model).init, array(1, side, side, 3))
        weights = open_weights(path / "safety_checker")
        return Part(
            {"kind": "safety", "model": model}, convert(weights, SAFETY, shapes, "the safety checker", place)
        )

    return make


def text_tower(config: dict) -> dict:
    """Keyword arguments of `CLIP` for a text tower without projection (`CLIPTextModel`)."""
    model = clip.transformers_config(config, None, clip.text_config(config)["width"])
    return model | {"text": model["text"] | {"project": False}}


def folder_tokenizer(path: Path, length: int) -> dict:
    """The configuration of a folder's tokenizer, with the padding that its own files name.

    Raises:
      ValueError: when they name no padding.
    """
    tokenizer = ClipTokenizer.from_folder(path, length)
    named = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = read_json(path / file).get("pad_token") if (path / file).is_file() else None
        found = found.get("content") if isinstance(found, dict) else found
        named = named or found
    ids = {"!": 0, "<|endoftext|>": tokenizer.eot_id}
    if named not in ids:
        raise InputError(f"{path}: pad_token is {shown(named)}; known here: {', '.join(ids)}")
    return ClipTokenizer.from_folder(path, length, ids[named]).config()


# ------------------------------------------------------------------------------------------- single files
def _file(path: Path, place: Place) -> tuple[dict, dict, dict]:
    weights = open_file(path)
    unet, vae = weights.under(UNET), weights.under(VAE)
    if not vae or not any(name.startswith((TEXT_1, TEXT_2)) for name in weights):
        raise InputError(
            f"{path} holds a U-Net without its autoencoder or text encoder: take the whole checkpoint"
        )
    unet_model = file_unet(unet, str(path))
    version = VERSIONS[unet_model["context_dim"]][0]
    vae_model, scale = file_vae(vae, str(path)), stable_diffusion_config.SCALE_FACTOR
    if "scale_factor" in weights:
        scale = float(np.asarray(weights["scale_factor"]).reshape(-1)[0])
    prediction = file_prediction(path, weights, version)
    diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": prediction}
    _check_schedule(path, weights, diffusion)
    is_2 = version == "2.x"
    text = weights.under(TEXT_2 if is_2 else TEXT_1)
    clip_model, rules = file_text(text, is_2, str(path))
    length, vocab = clip_model["text"]["length"], clip_model["text"]["vocab_size"]
    tokenizer = ClipTokenizer(length, vocab, 0 if is_2 else vocab - 1).config()
    spare = len(weights) - len(unet) - len(vae) - len(text)
    if spare:
        log.info("%s: %d tensors draw nothing here (averages, tables) and are left out", path, spare)

    def read_clip() -> dict:
        return convert(text, rules, clip_shapes(clip_model), "CLIP's text encoder")

    def read_vae(shapes: Any) -> dict:
        known = (*autoencoder.compvis_rules(), Rule(r"loss\..*", ()), Rule(r"model_ema\..*", ()))
        return convert(vae, known, shapes, "the autoencoder")

    def read_unet(shapes: Any) -> dict:
        return convert(unet, latent_names.compvis_unet(unet_model), shapes, "the U-Net", place)

    # The scheduler that the authors of each version sample with.
    sampling = stable_diffusion_config.SAMPLING | {
        "sampler": "ddim" if is_2 else "plms",
        "spacing": "leading",
        "offset": 1,
        "last": "first",
    }
    parts = _parts(
        clip_model, tokenizer, read_clip, vae_model, scale, read_vae, unet_model, diffusion, read_unet, place
    )  # fmt: skip
    return parts, {"latent": sampling}, {"version": version}


def _count(weights: Weights, pattern: str) -> int:
    # One more than the largest number that the pattern's group matches.
    return 1 + max((int(m[1]) for name in weights if (m := re.match(pattern, name))), default=-1)


def file_unet(weights: Weights, name: str) -> dict:
    """Keyword arguments of `LatentUNet` from the shapes of CompVis' tensors.

    Raises:
      ValueError: when tensors are missing, or the heads are not known.
    """
    shape = functools.partial(_shape, weights, name)
    pools = [
        i
        for i in range(_count(weights, r"input_blocks\.(\d+)\."))
        if f"input_blocks.{i}.0.op.weight" in weights
    ]
    if not pools:
        raise InputError(f"{name}: the U-Net is not one of Stable Diffusion: no level of it halves the sides")
    count, channels = pools[0] - 1, shape("input_blocks.0.0.weight")[0]
    firsts = [1 + level * (count + 1) for level in range(len(pools) + 1)]
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in firsts]
    attends = [f"input_blocks.{i}.1.proj_in.weight" in weights for i in firsts]
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    if context_dim not in VERSIONS:
        raise InputError(
            f"{name}: a U-Net for text states of {context_dim} is not one of Stable Diffusion 1.x (768) or "
            "2.x (1024), and a single file does not say how many heads it has: "
            "use the folder with its configuration"
        )
    heads = VERSIONS[context_dim][1]
    model = {
        "image_size": 64,
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "res_blocks": count,
        "heads": tuple(heads(width) for width in widths),
        "attention_levels": tuple(level for level, attend in enumerate(attends) if attend),
        "context_dim": context_dim,
        "transformer_depth": _count(weights, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "linear": len(shape("middle_block.1.proj_in.weight")) == 2,
    }
    if "label_emb.0.0.weight" in weights:
        model["vector_dim"] = shape("label_emb.0.0.weight")[1]
    return model


def file_vae(weights: Weights, name: str) -> dict:
    """Keyword arguments of `KLAutoencoder` from the shapes of CompVis' tensors."""
    shape = functools.partial(_shape, weights, name)
    levels, channels = _count(weights, r"encoder\.down\.(\d+)\."), shape("encoder.conv_in.weight")[0]
    widths = [shape(f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)]
    return {
        "latent_channels": shape("post_quant_conv.weight")[0],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "res_blocks": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
    }


def file_text(weights: Weights, is_2: bool, name: str) -> tuple[dict, tuple[Rule, ...]]:
    """Keyword arguments of `CLIP` for the text tower of a single file, and the rules of its names."""
    shape = functools.partial(_shape, weights, name)
    if is_2:
        blocks, table = r"transformer\.resblocks\.(\d+)\.", "token_embedding.weight"
        hidden = shape("transformer.resblocks.0.mlp.c_fc.weight")[0]
        positions = shape("positional_embedding")[0]
        last = _count(weights, blocks) - 1
        unused = (
            rf"text_projection|logit_scale|attn_mask|transformer\.resblocks\.{last}\..*",
            r"visual\..*",
        )
        rules = (*(Rule(pattern, ()) for pattern in unused), *clip.OPENAI)
        layers = last
    else:
        prefix = "text_model." if "text_model.final_layer_norm.weight" in weights else ""
        blocks, table = rf"{prefix}encoder\.layers\.(\d+)\.", f"{prefix}embeddings.token_embedding.weight"
        hidden = shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
        positions = shape(f"{prefix}embeddings.position_embedding.weight")[0]
        rules, layers = clip.TEXT, _count(weights, blocks)
    vocab, width = shape(table)
    if width % 64:
        raise InputError(f"{name}: a text encoder of width {width} has no heads of 64 channels")
    text = {
        "vocab_size": vocab,
        "length": positions,
        "width": width,
        "layers": layers,
        "heads": width // 64,
        "mlp_ratio": hidden / width,
        "project": False,
    }
    activation = VERSIONS[width][2] if width in VERSIONS else "quick_gelu"
    return {"embed_dim": width, "image": None, "text": text, "activation": activation}, rules


def file_prediction(path: Path, weights: Weights, version: str) -> str:
    """What the U-Net of a single file predicts: `eps` or `v` (module docstring).

    Raises:
      ValueError: when nothing says it; the error says where to write it.
    """
    beside = path.with_suffix(".json")
    names = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
    said = read_json(beside).get("prediction_type") if beside.is_file() else None
    said = said or weights.metadata().get("modelspec.prediction_type")
    if said is None and version == "1.x":
        log.info("%s: a network of version 1.x; it is taken to predict eps, as those published do", path)
        return "eps"
    if said is None:
        raise InputError(f"{path} does not say whether it predicts the noise or v: {HOW_TO_SAY} {beside}")
    if not isinstance(said, str) or said not in names:
        raise InputError(f"{path}: the prediction_type {shown(said)} is not known: {HOW_TO_SAY} {beside}")
    return names[said]


def _check_schedule(path: Path, weights: Weights, diffusion: dict) -> None:
    if "alphas_cumprod" not in weights:
        return
    table = np.asarray(weights["alphas_cumprod"], np.float64).reshape(-1)
    ours = schedule_of(diffusion).alphas_cumprod
    if table.shape != ours.shape or not np.allclose(table, ours, rtol=1e-2):
        raise InputError(
            f"{path} was trained with another noise schedule than Stable Diffusion's: use a folder"
        )


def _shape(weights: Weights, name: str, tensor: str) -> tuple[int, ...]:
    if tensor not in weights:
        raise InputError(f"{name} does not fit Stable Diffusion: {tensor} is missing")
    return weights.shape(tensor)
