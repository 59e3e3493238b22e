"""Public weights in the folders their libraries write, read as bundles, without those libraries.

diffusers' layout of Karlo (text to image, and image variations), transformers' folders of CLIP, and OpenAI's CLIP by its own names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import convert, shapes_of
from unclip_jax.checkpoint.files import Place, keep, open_weights, read_json
from unclip_jax.checkpoint.rules import clip as clip_rules
from unclip_jax.checkpoint.rules import karlo
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.tokenizer import VOCAB_SIZE, ClipTokenizer
from unclip_jax.models.clip import CLIP
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.unet import Decoder, Upsampler
from unclip_jax.sharding import path_name

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
    return (path / "model_index.json").is_file() or (path / "config.json").is_file() or _is_openai(path)


def load_public(path: Path, only: str | None = None, place: Place = keep) -> Bundle:
    """Reads a folder of public weights as a bundle.

    Args:
      path: a folder in diffusers' layout of Karlo, a transformers folder of CLIP, or one with OpenAI's CLIP as `model.safetensors`.
      only: the one part to read, all when None. (A part's embedding space is CLIP's, so CLIP's text encoder is read too.)
      place: where each parameter goes as soon as it is read.

    Raises:
      FileNotFoundError, ValueError: one line each: what is missing, damaged, of another architecture, or does not fit.
      KeyError: when it has no part `only`; it lists those it has.
    """
    try:
        if (path / "model_index.json").is_file():
            makers, tokenizer, sampling = _karlo(path, place)
        else:
            part, tokenizer = _clip_folder(path, place) if (path / "config.json").is_file() else _openai(path, place)
            makers, sampling = {"clip": lambda: part}, {}
    except KeyError as error:
        raise ValueError(f"{path}: a configuration lacks {error.args[0]!r}; copy the folder again") from None
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, tokenizer, sampling, {"source": str(path)}, str(path))


def _karlo(path: Path, place: Place) -> tuple[dict[str, Callable[[], Part]], dict, dict]:
    # What makes each part, the tokenizer, and the sampling defaults; no weights are read yet.
    pipeline = read_json(path / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"{path} is a {pipeline}; the diffusers folders read here are those of {', '.join(PIPELINES)}")
    text = read_json(path / "text_encoder" / "config.json")
    image = read_json(path / "image_encoder" / "config.json") if pipeline == PIPELINES[1] else None
    clip = _clip_config(text, image)
    length = clip["text"]["length"]

    @functools.cache
    def clip_part() -> Part:
        params = _clip_params(clip, {"text": path / "text_encoder", "image": path / "image_encoder"}, keep)
        placed = jax.tree_util.tree_map_with_path(lambda where, value: place(path_name(where), value), params)
        return Part({"kind": "clip", "model": clip}, placed, params_hash(params))

    made_with = lambda: clip_part().hash  # noqa: E731
    makers, sampling = {"clip": clip_part}, {}
    if image is None:
        makers["prior"], sampling["prior"] = _prior(path, clip, made_with, place), _sampling(path, "prior_scheduler", "prior")
    makers["decoder"], sampling["decoder"] = _decoder(path, clip, made_with, place), _sampling(path, "decoder_scheduler", "decoder")
    low = read_json(path / "decoder" / "config.json")["sample_size"]
    for folder, suffix in (("super_res_first", ""), ("super_res_last", "_last")):
        model = karlo.upsampler_model(read_json(path / folder / "config.json"), folder)
        name = f"upsampler_{model['unet']['image_size']}"
        makers[name + suffix] = _upsampler(path, folder, model, low, place)
        sampling[name] = _sampling(path, "super_res_scheduler", "upsampler")
    return makers, ClipTokenizer.from_folder(path / "tokenizer", length).config(), sampling


def _sampling(path: Path, scheduler: str, part: str) -> dict:
    config = read_json(path / scheduler / "scheduler_config.json")
    variance = config.get("variance_type", "fixed_small_log")
    if variance not in _VARIANCES:
        raise ValueError(f"{scheduler}: variance_type is {variance!r}, one of {', '.join(_VARIANCES)} is known here")
    return SAMPLING[part] | {"variance": _VARIANCES[variance], "clip": float(config.get("clip_sample_range", 1.0))}


def _diffusion(path: Path, scheduler: str, prediction: str) -> dict:
    return karlo.schedule(read_json(path / scheduler / "scheduler_config.json"), prediction, scheduler)


def _prior(path: Path, clip: dict, made_with: Callable[[], str], place: Place) -> Callable[[], Part]:
    model, dim, length = karlo.prior_model(read_json(path / "prior" / "config.json")), clip["embed_dim"], clip["text"]["length"]
    if model["embed_dim"] != dim or model["length"] != length:
        raise ValueError(
            f"the prior works on {model['length']} states and embeddings of {model['embed_dim']}, but the text encoder makes "
            f"{length} and {dim}: they are of different CLIPs"
        )
    diffusion = _diffusion(path, "prior_scheduler", "x0")

    def make() -> Part:
        weights, width = open_weights(path / "prior"), clip["text"]["width"]
        text = {"text_embed": jnp.zeros((1, dim)), "text_states": jnp.zeros((1, length, width)), "text_mask": jnp.ones((1, length), bool)}
        shapes = shapes_of(DiffusionPrior(**model).init, jnp.zeros((1, dim)), jnp.zeros(1), **text)
        params = convert(weights, karlo.PRIOR, shapes, "the prior", place)
        missing = [name for name in ("clip_mean", "clip_std") if name not in weights]
        if missing:
            raise ValueError(f"the prior's file lacks {', '.join(missing)}")
        mean, std = (np.asarray(weights[name], np.float32).reshape(-1) for name in ("clip_mean", "clip_std"))
        if mean.shape != (dim,) or std.shape != (dim,):
            raise ValueError(f"the prior's clip_mean and clip_std are of {mean.size} and {std.size}, not of {dim}")
        space = {"kind": "whitened", "scale": None, "mean": mean.tolist(), "std": std.tolist()}
        config = {"kind": "prior_diffusion", "model": model, "diffusion": diffusion, "embedding_space": space, "clip": made_with()}
        return Part(config, params)

    return make


def _decoder(path: Path, clip: dict, made_with: Callable[[], str], place: Place) -> Callable[[], Part]:
    config, text_proj = read_json(path / "decoder" / "config.json"), read_json(path / "text_proj" / "config.json")
    model, diffusion = karlo.decoder_model(config, text_proj), _diffusion(path, "decoder_scheduler", "eps")
    dim, text = clip["embed_dim"], clip["text"]
    if text_proj.get("clip_embeddings_dim", 768) != dim:
        raise ValueError(f"text_proj takes embeddings of {text_proj['clip_embeddings_dim']}, CLIP makes {dim}: they are of different CLIPs")

    def make() -> Part:
        inputs = {"image_embed": jnp.zeros((1, dim)), "drop_image": jnp.zeros(1, bool), "text_embed": jnp.zeros((1, dim))}
        inputs |= {"text_states": jnp.zeros((1, text["length"], text["width"])), "text_mask": jnp.ones((1, text["length"]), bool)}
        levels = len(model["unet"]["channel_mult"])
        side = 2 ** (levels - 1)  # parameters do not depend on it
        shapes = shapes_of(Decoder(**model).init, jnp.zeros((1, side, side, 3)), jnp.zeros(1), **inputs)
        read = lambda folder, half, rules, name: convert(open_weights(path / folder), rules, {half: shapes[half]}, name, place)  # noqa: E731
        params = read("text_proj", "conditioning", karlo.TEXT_PROJ, "text_proj")
        params |= read("decoder", "unet", karlo.unet(levels), "the decoder")
        return Part({"kind": "decoder", "model": model, "diffusion": diffusion, "clip": made_with()}, params)

    return make


def _upsampler(path: Path, folder: str, model: dict, low: int, place: Place) -> Callable[[], Part]:
    diffusion, size = _diffusion(path, "super_res_scheduler", "eps"), model["unet"]["image_size"]
    if size % low:
        raise ValueError(f"{folder} makes {size} px, which is no multiple of the decoder's {low}")

    def make() -> Part:
        levels = len(model["unet"]["channel_mult"])
        side, low_res = 2 ** (levels - 1), jnp.zeros((1, 1, 1, 3))
        shapes = shapes_of(Upsampler(**model).init, jnp.zeros((1, side, side, 3)), jnp.zeros(1), low_res=low_res)
        params = convert(open_weights(path / folder), karlo.unet(levels), shapes, folder, place)
        return Part({"kind": "upsampler", "model": model, "diffusion": diffusion, "factor": size // low}, params)

    return make


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


def _clip_config(text: Mapping | None, image: Mapping | None) -> dict:
    dims = {config.get("projection_dim", 512) for config in (text, image) if config is not None}
    if len(dims) != 1:
        raise ValueError(f"the encoders make embeddings of {' and '.join(map(str, sorted(dims)))}: they are of different CLIPs")
    return clip_rules.transformers_config(text, image, dims.pop())


def _clip_params(model: dict, folders: Mapping[str, Path], place: Place) -> dict:
    # Of halves in folders of their own; there is no temperature between them.
    halves, params = {"text": clip_rules.TEXT, "image": clip_rules.IMAGE}, {}
    for half, rules in halves.items():
        if model[half] is not None:
            shapes = _clip_shapes(model | dict.fromkeys(halves) | {half: model[half]})
            params |= convert(open_weights(folders[half]), rules, shapes, f"CLIP's {half} encoder", place)
    if model["text"] is not None and model["image"] is not None:
        params["logit_scale"] = place("logit_scale", np.float32(np.log(100.0)))  # not in these files; training clamps it there
    return params


def _clip_folder(path: Path, place: Place) -> tuple[Part, dict]:
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind == "clip":
        text, image = ({**config.get(f"{half}_config", {}), **(config.get(f"{half}_config_dict") or {})} for half in ("text", "vision"))
        model = clip_rules.transformers_config(text, image, config.get("projection_dim", 512))
        params = convert(open_weights(path), clip_rules.BOTH, _clip_shapes(model), "CLIP", place)
    elif kind in ("clip_text_model", "clip_vision_model"):
        text = kind == "clip_text_model"
        model = _clip_config(config if text else None, None if text else config)
        params = _clip_params(model, {"text": path, "image": path}, place)
    else:
        raise ValueError(f"{path} holds a {kind!r} model; CLIP's are clip, clip_text_model and clip_vision_model")
    return Part({"kind": "clip", "model": model}, params), _tokenizer(path, model["text"])


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


def _openai(path: Path, place: Place) -> tuple[Part, dict]:
    weights = open_weights(path)
    if "visual.conv1.weight" not in weights:
        raise ValueError(f"{path} has no config.json, and its tensors are not OpenAI's CLIP (a ViT: visual.conv1.weight ...)")
    try:
        model = clip_rules.openai_config(weights.shape, list(weights))
    except KeyError as error:
        raise ValueError(f"CLIP does not fit these weights: {error.args[0]} is missing") from None
    params = convert(weights, clip_rules.OPENAI, _clip_shapes(model), "CLIP", place)
    return Part({"kind": "clip", "model": model}, params), _tokenizer(path, model["text"])
