"""Public weights in the folders their libraries write, read as bundles, without those libraries.

diffusers' layout of Karlo (text to image, and image variations), transformers' folders of CLIP, and OpenAI's CLIP by its own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.convert import Rule, Weights, convert, open_weights, read_json, shapes_of
from unclip_jax.checkpoint.rules import clip as clip_rules
from unclip_jax.checkpoint.rules import karlo
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.tokenizer import VOCAB_SIZE, ClipTokenizer
from unclip_jax.models.clip import CLIP
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.unet import Decoder, Upsampler

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
# The pipelines' own defaults.
SAMPLING = {
    "prior": {"steps": 25, "sampler": "ddpm", "variance": "small", "guidance_scale": 4.0, "clip": 5.0},
    "decoder": {"steps": 25, "sampler": "ddpm", "variance": "learned", "guidance_scale": 8.0, "clip": 1.0},
    "upsampler": {"steps": 7, "sampler": "ddpm", "variance": "small", "clip": 1.0},
}
_VARIANCES = {"fixed_small_log": "small", "learned_range": "learned"}


def is_public(path: Path) -> bool:
    """Whether a folder holds weights in one of these layouts."""
    return path.is_dir() and any((path / name).is_file() for name in ("model_index.json", "config.json")) or _is_openai(path)


def load_public(path: Path) -> Bundle:
    """Reads a folder of public weights as a bundle.

    Args:
      path: a folder in diffusers' layout of Karlo, a transformers folder of CLIP, or one with OpenAI's CLIP as `model.safetensors`.

    Raises:
      FileNotFoundError, ValueError: one line each: what is missing, damaged, of another architecture, or does not fit.
    """
    try:
        if (path / "model_index.json").is_file():
            return _karlo(path)
        part, tokenizer = _clip_folder(path) if (path / "config.json").is_file() else _openai(path)
    except KeyError as error:
        raise ValueError(f"{path}: a configuration lacks {error.args[0]!r}; download it again") from None
    return Bundle({"clip": part}, tokenizer, {}, {"source": str(path)}, str(path))


def _karlo(path: Path) -> Bundle:
    pipeline = read_json(path / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"{path} is a {pipeline}; the diffusers folders read here are those of {', '.join(PIPELINES)}")
    text = read_json(path / "text_encoder" / "config.json")
    image = read_json(path / "image_encoder" / "config.json") if pipeline == PIPELINES[1] else None
    clip = _clip(text, image, {"text": path / "text_encoder", "image": path / "image_encoder"})
    made_with = params_hash(clip.params)
    length = clip.config["model"]["text"]["length"]
    tokenizer = ClipTokenizer.from_folder(path / "tokenizer", length).config()
    parts, sampling = {"clip": clip}, {}
    if image is None:
        parts["prior"], sampling["prior"] = _prior(path, length, clip, made_with)
    parts["decoder"], sampling["decoder"] = _decoder(path, clip, made_with)
    for folder, suffix in (("super_res_first", ""), ("super_res_last", "_last")):
        part = _upsampler(path, folder, parts["decoder"].config["model"]["unet"]["image_size"])
        name = f"upsampler_{part.config['model']['unet']['image_size']}{suffix}"
        parts[name], sampling[name] = part, _sampling(path, "super_res_scheduler", "upsampler")
    sampling = {name: chosen for name, chosen in sampling.items() if not name.endswith("_last")}
    return Bundle(parts, tokenizer, sampling, {"source": str(path)}, str(path))


def _sampling(path: Path, scheduler: str, part: str) -> dict:
    config = read_json(path / scheduler / "scheduler_config.json")
    variance = config.get("variance_type", "fixed_small_log")
    if variance not in _VARIANCES:
        raise ValueError(f"{scheduler}: variance_type is {variance!r}, one of {', '.join(_VARIANCES)} is known here")
    return SAMPLING[part] | {"variance": _VARIANCES[variance], "clip": float(config.get("clip_sample_range", 1.0))}


def _diffusion(path: Path, scheduler: str, prediction: str) -> dict:
    return karlo.schedule(read_json(path / scheduler / "scheduler_config.json"), prediction, scheduler)


def _prior(path: Path, length: int, clip: Part, made_with: str) -> tuple[Part, dict]:
    model = karlo.prior_model(read_json(path / "prior" / "config.json"))
    if model["embed_dim"] != clip.config["model"]["embed_dim"] or model["length"] != length:
        raise ValueError(
            f"the prior works on {model['length']} states and embeddings of {model['embed_dim']}, but the text encoder makes "
            f"{length} and {clip.config['model']['embed_dim']}: they are of different CLIPs"
        )
    weights, width = open_weights(path / "prior"), clip.config["model"]["text"]["width"]
    dim = model["embed_dim"]
    text = {"text_embed": jnp.zeros((1, dim)), "text_states": jnp.zeros((1, length, width)), "text_mask": jnp.ones((1, length), bool)}
    shapes = shapes_of(DiffusionPrior(**model).init, jnp.zeros((1, dim)), jnp.zeros(1), **text)
    params = convert(weights, karlo.PRIOR, shapes, "the prior")
    missing = [name for name in ("clip_mean", "clip_std") if name not in weights]
    if missing:
        raise ValueError(f"the prior's file lacks {', '.join(missing)}")
    mean, std = (np.asarray(weights[name], np.float32).reshape(-1) for name in ("clip_mean", "clip_std"))
    if mean.shape != (dim,) or std.shape != (dim,):
        raise ValueError(f"the prior's clip_mean and clip_std are of {mean.size} and {std.size}, not of {dim}")
    space = {"kind": "whitened", "scale": None, "mean": mean.tolist(), "std": std.tolist()}
    diffusion = _diffusion(path, "prior_scheduler", "x0")
    config = {"kind": "prior_diffusion", "model": model, "diffusion": diffusion, "embedding_space": space, "clip": made_with}
    return Part(config, params), _sampling(path, "prior_scheduler", "prior")


def _decoder(path: Path, clip: Part, made_with: str) -> tuple[Part, dict]:
    config, text_proj = read_json(path / "decoder" / "config.json"), read_json(path / "text_proj" / "config.json")
    model = karlo.decoder_model(config, text_proj)
    dim, text = clip.config["model"]["embed_dim"], clip.config["model"]["text"]
    if text_proj.get("clip_embeddings_dim", 768) != dim:
        raise ValueError(f"text_proj takes embeddings of {text_proj['clip_embeddings_dim']}, CLIP makes {dim}: they are of different CLIPs")
    inputs = {"image_embed": jnp.zeros((1, dim)), "drop_image": jnp.zeros(1, bool), "text_embed": jnp.zeros((1, dim))}
    inputs |= {"text_states": jnp.zeros((1, text["length"], text["width"])), "text_mask": jnp.ones((1, text["length"]), bool)}
    side = 2 ** (len(model["unet"]["channel_mult"]) - 1)  # parameters do not depend on it
    shapes = shapes_of(Decoder(**model).init, jnp.zeros((1, side, side, 3)), jnp.zeros(1), **inputs)
    params = {
        **convert(open_weights(path / "text_proj"), karlo.TEXT_PROJ, {"conditioning": shapes["conditioning"]}, "text_proj"),
        **convert(open_weights(path / "decoder"), karlo.unet(len(model["unet"]["channel_mult"])), {"unet": shapes["unet"]}, "the decoder"),
    }
    part = {"kind": "decoder", "model": model, "diffusion": _diffusion(path, "decoder_scheduler", "eps"), "clip": made_with}
    return Part(part, params), _sampling(path, "decoder_scheduler", "decoder")


def _upsampler(path: Path, folder: str, low: int) -> Part:
    model = karlo.upsampler_model(read_json(path / folder / "config.json"), folder)
    side = 2 ** (len(model["unet"]["channel_mult"]) - 1)
    low_res = jnp.zeros((1, 1, 1, 3))
    shapes = shapes_of(Upsampler(**model).init, jnp.zeros((1, side, side, 3)), jnp.zeros(1), low_res=low_res)
    params = convert(open_weights(path / folder), karlo.unet(len(model["unet"]["channel_mult"])), shapes, folder)
    size = model["unet"]["image_size"]
    if size % low:
        raise ValueError(f"{folder} makes {size} px, which is no multiple of the decoder's {low}")
    diffusion = _diffusion(path, "super_res_scheduler", "eps")
    return Part({"kind": "upsampler", "model": model, "diffusion": diffusion, "factor": size // low}, params)


# ---------------------------------------------------------------------------------------------------------------------- CLIP
def _clip_shapes(model: dict) -> Any:
    module, shapes = CLIP(**model), {}
    if model["image"] is not None and model["text"] is not None:
        size, length = model["image"]["image_size"], model["text"]["length"]
        return shapes_of(module.init, jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32))
    if model["image"] is not None:
        size = model["image"]["image_size"]
        shapes |= shapes_of(module.init, jnp.zeros((1, size, size, 3)), method="encode_image")
    if model["text"] is not None:
        shapes |= shapes_of(module.init, jnp.zeros((1, model["text"]["length"]), jnp.int32), method="encode_text")
    return shapes


def _clip(text: Mapping | None, image: Mapping | None, folders: Mapping[str, Path]) -> Part:
    # Halves in files of their own; there is no temperature between them.
    halves = {"text": (text, clip_rules.TEXT), "image": (image, clip_rules.IMAGE)}
    dims = {config.get("projection_dim", 512) for config, _ in halves.values() if config is not None}
    if len(dims) != 1:
        raise ValueError(f"the encoders make embeddings of {' and '.join(map(str, sorted(dims)))}: they are of different CLIPs")
    model = clip_rules.transformers_config(text, image, dims.pop())
    params = {}
    for half, (config, rules) in halves.items():
        if config is not None:
            shapes = _clip_shapes(model | {"text": None, "image": None, half: model[half]})
            params |= convert(open_weights(folders[half]), rules, shapes, f"CLIP's {half} encoder")
    if text is not None and image is not None:
        params["logit_scale"] = np.float32(np.log(100.0))  # not in these files; training clamps it there
    return Part({"kind": "clip", "model": model}, params)


def _clip_folder(path: Path) -> tuple[Part, dict]:
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind == "clip":
        text, image = ({**config.get(f"{half}_config", {}), **(config.get(f"{half}_config_dict") or {})} for half in ("text", "vision"))
        model = clip_rules.transformers_config(text, image, config.get("projection_dim", 512))
        part = Part({"kind": "clip", "model": model}, convert(open_weights(path), clip_rules.BOTH, _clip_shapes(model), "CLIP"))
    elif kind == "clip_text_model":
        part = _clip(config, None, {"text": path})
    elif kind == "clip_vision_model":
        part = _clip(None, config, {"image": path})
    else:
        raise ValueError(f"{path} holds a {kind!r} model; CLIP's are clip, clip_text_model and clip_vision_model")
    return part, _tokenizer(path, part.config["model"]["text"])


def _tokenizer(path: Path, text: Mapping | None) -> dict:
    # The folder's own, or the shipped one where the number of tokens is CLIP's.
    if text is None:
        return {}
    if any((path / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return ClipTokenizer.from_folder(path, text["length"]).config()
    if text["vocab_size"] != VOCAB_SIZE:
        raise ValueError(f"{path} has no tokenizer, and its {text['vocab_size']} tokens are not CLIP's {VOCAB_SIZE}")
    return ClipTokenizer(text["length"]).config()


def _is_openai(path: Path) -> bool:
    return (path / "model.safetensors").is_file() and not (path / "bundle.json").is_file()


def _openai(path: Path) -> tuple[Part, dict]:
    weights: Weights = open_weights(path)
    if "visual.conv1.weight" not in weights:
        raise ValueError(f"{path} has no config.json, and its tensors are not OpenAI's CLIP (a ViT: visual.conv1.weight ...)")
    try:
        model = clip_rules.openai_config(weights.shape, list(weights))
    except KeyError as error:
        raise ValueError(f"CLIP does not fit these weights: {error.args[0]} is missing") from None
    rules: tuple[Rule, ...] = clip_rules.OPENAI
    params = convert(weights, rules, _clip_shapes(model), "CLIP")
    return Part({"kind": "clip", "model": model}, params), _tokenizer(path, model["text"])
