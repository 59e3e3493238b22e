"""Karlo, the openly trained unCLIP, in the folder layout of diffusers: prior, decoder with its text
projection, two networks for super-resolution, of which the second makes the last sampling step. Or the twin
of it that draws variations of images: it has an image encoder and no prior.

Our networks have Karlo's topology, so the rules only rename: a tensor of Karlo's is a parameter of ours.
`karlo_export` writes the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, norm, shapes_of
from unclip_jax.checkpoint.files import Place, finite, keep, open_weights, read_json
from unclip_jax.checkpoint.providers import clip, karlo_config, preprocess
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.sharding import path_name

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")


# ------------------------------------------------------------------------------------------- names


def attention(theirs: str, ours: str) -> list[Rule]:
    """Rules of an attention layer by diffusers' names."""
    return [
        *linear(rf"{theirs}to_q", f"{ours}/query", "heads"),
        *linear(rf"{theirs}to_k", f"{ours}/key", "heads"),
        *linear(rf"{theirs}to_v", f"{ours}/value", "heads"),
        *linear(rf"{theirs}to_out\.0", f"{ours}/out", "merge"),
    ]


_BLOCK, _OURS = r"transformer_blocks\.(\d+)\.", r"transformer/block_\1"
PRIOR: tuple[Rule, ...] = (
    Rule("clip_mean|clip_std", ()),  # the embedding space's
    Rule("positional_embedding", "position_embedding", "drop_ones"),
    Rule("prd_embedding", "query", "drop_ones"),
    *linear(r"time_embedding\.linear_([12])", r"time/fc\1"),
    *linear("proj_in", "z_in"),
    *linear("embedding_proj", "text_embed_in"),
    *linear("encoder_hidden_states_proj", "text_states_in"),
    *norm(rf"{_BLOCK}norm1", f"{_OURS}/ln1/norm"),
    *attention(rf"{_BLOCK}attn1\.", f"{_OURS}/attn"),
    *norm(rf"{_BLOCK}norm3", f"{_OURS}/ln2/norm"),
    *linear(rf"{_BLOCK}ff\.net\.0\.proj", f"{_OURS}/fc1"),
    *linear(rf"{_BLOCK}ff\.net\.2", f"{_OURS}/fc2"),
    *norm("norm_out", "ln_out/norm"),
    *linear("proj_to_clip_embeddings", "z_out"),
)

TEXT_PROJ: tuple[Rule, ...] = (
    Rule("learned_classifier_free_guidance_embeddings", "conditioning/null_image_embed"),
    *linear("embedding_proj", "conditioning/text_embed_cond"),
    *linear("clip_image_embeddings_project_to_time_embeddings", "conditioning/image_embed_cond"),
    *linear("clip_extra_context_tokens_proj", "conditioning/image_embed_tokens"),
    *linear("encoder_hidden_states_proj", "conditioning/text_states_in"),
    *norm("text_encoder_hidden_states_norm", "conditioning/text_states_norm/norm"),
)


def res_block(theirs: str, ours: str) -> list[Rule]:
    """Rules of a residual block by diffusers' names."""
    return [
        *(rule for n in "12" for rule in norm(rf"{theirs}norm{n}", f"{ours}/norm{n}")),
        *(rule for n in "12" for rule in linear(rf"{theirs}conv{n}", f"{ours}/conv{n}", "conv")),
        *linear(rf"{theirs}time_emb_proj", f"{ours}/time"),
        *linear(rf"{theirs}conv_shortcut", f"{ours}/skip", "conv"),
    ]


def _cross_attention(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(rf"{theirs}group_norm", f"{ours}/norm"),
        *attention(theirs, ours),
        *linear(rf"{theirs}add_k_proj", f"{ours}/context_key", "heads"),
        *linear(rf"{theirs}add_v_proj", f"{ours}/context_value", "heads"),
    ]


def ways(levels: int) -> list[tuple[str, str, str, int, int]]:
    """The levels of a U-Net, down and up, each with its way, diffusers' and our name of what resamples, and
    diffusers' and our number. On the way up, diffusers counts from the coarsest level, and we from the finest
    one."""
    down = [("down", "downsamplers", "pool", level, level) for level in range(levels)]
    return down + [("up", "upsamplers", "expand", levels - 1 - level, level) for level in range(levels)]


def unet(levels: int) -> tuple[Rule, ...]:
    """Rules of a U-Net with so many levels."""
    return (
        *linear("conv_in", "unet/conv_in", "conv"),
        *linear(r"time_embedding\.linear_([12])", r"unet/time/fc\1"),
        *(
            rule
            for way, sampler, resample, at, level in ways(levels)
            for rule in (
                *res_block(rf"{way}_blocks\.{at}\.resnets\.(\d+)\.", rf"unet/{way}_{level}_res_\1"),
                *res_block(rf"{way}_blocks\.{at}\.{sampler}\.0\.", f"unet/{way}_{level}_{resample}"),
                *_cross_attention(
                    rf"{way}_blocks\.{at}\.attentions\.(\d+)\.", rf"unet/{way}_{level}_attn_\1"
                ),
            )
        ),
        *res_block(r"mid_block\.resnets\.([01])\.", r"unet/middle_res_\1"),
        *_cross_attention(r"mid_block\.attentions\.0\.", "unet/middle_attn"),
        *norm("conv_norm_out", "unet/norm_out"),
        *linear("conv_out", "unet/conv_out", "conv"),
    )


# ------------------------------------------------------------------------------------------- reading
def recognises(path: Path) -> bool:
    """Whether a folder is one of Karlo's pipelines."""
    index = path / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") in PIPELINES


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder as a bundle; see `providers.Provider`. The other parts hold the hash of CLIP, so CLIP's
    text encoder is read even when `only` names another part."""
    makers, sampling = _plan(path, place)
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, sampling=sampling, provenance={"source": str(path)}, path=str(path))


def _plan(path: Path, place: Place) -> tuple[dict[str, Callable[[], Part]], dict]:
    # A function that makes each part, and the sampling defaults. It checks all configurations and reads no
    # weights.
    index = read_json(path / "model_index.json")
    karlo_config.check_index(index, str(path / "model_index.json"))
    varies = index["_class_name"] == PIPELINES[1]
    text = read_json(path / "text_encoder" / "config.json")
    image = read_json(path / "image_encoder" / "config.json") if varies else None
    model = clip.two_halves(text, image)
    if varies:
        size = model["image"]["image_size"]
        model["image"] |= preprocess.of_transformers(path / "feature_extractor", size, required=True)
    tokenizer = ClipTokenizer.from_folder(path / "tokenizer", model["text"]["length"]).config()

    @functools.cache
    def clip_part() -> Part:
        folders = {"text": path / "text_encoder", "image": path / "image_encoder"}
        params = clip.read_halves(model, folders, keep)
        placed = jax.tree_util.tree_map_with_path(lambda where, value: place(path_name(where), value), params)
        return Part({"kind": "clip", "model": model, "tokenizer": tokenizer}, placed, params_hash(params))

    def frozen() -> dict:
        return {"clip": clip_part().hash}

    makers, sampling = {"clip": clip_part}, {}
    if not varies:
        diffusion = _diffusion(path, "prior", "x0")
        makers["prior_diffusion"] = prior_maker(path, model, diffusion, frozen, place)
        sampling["prior_diffusion"] = _sampling(path, "prior", "prior_diffusion")
    makers["decoder"] = _decoder(path, model, frozen, place)
    sampling["decoder"] = _sampling(path, "decoder", "decoder")
    low = read_json(path / "decoder" / "config.json")["sample_size"]
    folders = ("super_res_first", "super_res_last")
    models = [
        karlo_config.upsampler_model(read_json(path / folder / "config.json"), folder) for folder in folders
    ]
    sizes = [upsampler["unet"]["image_size"] for upsampler in models]
    if sizes[0] != sizes[1]:
        raise InputError(f"{folders[0]} makes {sizes[0]} px, but {folders[1]}, its last step, {sizes[1]} px")
    name = f"upsampler_{sizes[0]}"
    makers[name] = _upsampler(path, folders[0], models[0], low, None, place)
    makers[f"{name}_last"] = _upsampler(path, folders[1], models[1], low, name, place)
    sampling[name] = _sampling(path, "super_res", "upsampler")
    return makers, sampling


def _sampling(path: Path, part: str, kind: str) -> dict:
    config = read_json(path / f"{part}_scheduler" / "scheduler_config.json")
    return karlo_config.sampling(config, kind, f"{part}_scheduler")


def _diffusion(path: Path, part: str, prediction: str) -> dict:
    config = read_json(path / f"{part}_scheduler" / "scheduler_config.json")
    return karlo_config.schedule(config, prediction, f"{part}_scheduler")


def prior_maker(
    path: Path, clip_model: dict, diffusion: dict, frozen: Callable[[], dict], place: Place
) -> Callable[[], Part]:
    """A function that makes the part of a pipeline's `prior`.

    Args:
      path: the pipeline's folder.
      clip_model: keyword arguments of the `CLIP` whose embeddings it draws.
      diffusion: the part's.
      frozen: makes the part's `frozen`.
      place: where each parameter goes.

    Raises:
      FileNotFoundError, ValueError: when its configuration is missing or does not fit CLIP.
    """
    model = karlo_config.prior_model(read_json(path / "prior" / "config.json"))
    dim, length = clip_model["embed_dim"], clip_model["text"]["length"]
    if model["embed_dim"] != dim or model["length"] != length:
        raise InputError(
            f"the prior works on {model['length']} states and embeddings of {model['embed_dim']}, "
            f"but the text encoder makes {length} and {dim}: they are of different CLIPs"
        )

    def make() -> Part:
        weights = open_weights(path / "prior")
        shapes = shapes_of(DiffusionPrior(**model).init, array(1, dim), array(1), **_text_inputs(clip_model))
        params = convert(weights, PRIOR, shapes, "the prior", place)
        missing = [name for name in ("clip_mean", "clip_std") if name not in weights]
        if missing:
            raise InputError(f"the prior's file lacks {', '.join(missing)}")
        mean, std = (
            finite(np.asarray(weights[name], np.float32).reshape(-1), name, "the prior")
            for name in ("clip_mean", "clip_std")
        )
        if mean.shape != (dim,) or std.shape != (dim,):
            raise InputError(
                f"the prior's clip_mean and clip_std are of {mean.size} and {std.size}, not of {dim}"
            )
        if std.min() <= 0:
            raise InputError("the prior's clip_std must be positive")
        space = {"kind": "whitened", "scale": None, "mean": mean.tolist(), "std": std.tolist()}
        config = {"kind": "prior_diffusion", "model": model, "diffusion": diffusion, "embedding_space": space}
        return Part(config | {"frozen": frozen()}, params)

    return make


def _decoder(path: Path, clip_model: dict, frozen: Callable[[], dict], place: Place) -> Callable[[], Part]:
    config, text_proj = (read_json(path / folder / "config.json") for folder in ("decoder", "text_proj"))
    model, diffusion = karlo_config.decoder_model(config, text_proj), _diffusion(path, "decoder", "eps")
    dim = clip_model["embed_dim"]
    takes = karlo_config.projected_dim(text_proj)
    if takes != dim:
        raise InputError(
            f"text_proj takes embeddings of {takes}, CLIP makes {dim}: they are of different CLIPs"
        )

    def make() -> Part:
        inputs = {
            "image_embed": array(1, dim),
            "drop_image": array(1, dtype=bool),
            **_text_inputs(clip_model),
        }
        levels = len(model["unet"]["channel_mult"])
        side = 2 ** (levels - 1)  # the parameters do not depend on it
        shapes = shapes_of(Decoder(**model).init, array(1, side, side, 3), array(1), **inputs)
        params: dict = {}
        for folder, name, half, rules in (
            ("text_proj", "text_proj", "conditioning", TEXT_PROJ),
            ("decoder", "the decoder", "unet", unet(levels)),
        ):
            params |= convert(open_weights(path / folder), rules, {half: shapes[half]}, name, place)
        return Part({"kind": "decoder", "model": model, "diffusion": diffusion, "frozen": frozen()}, params)

    return make


def _text_inputs(clip_model: dict) -> dict:
    length, width = clip_model["text"]["length"], clip_model["text"]["width"]
    return {
        "text_embed": array(1, clip_model["embed_dim"]),
        "text_states": array(1, length, width),
        "text_mask": array(1, length, dtype=bool),
    }


def _upsampler(
    path: Path, folder: str, model: dict, low: int, last_step_of: str | None, place: Place
) -> Callable[[], Part]:
    diffusion, size = _diffusion(path, "super_res", "eps"), model["unet"]["image_size"]
    if size % low:
        raise InputError(f"{folder} makes {size} px, which is no multiple of the decoder's {low}")
    config = {"kind": "upsampler", "model": model, "diffusion": diffusion, "factor": size // low}
    if last_step_of is not None:
        config["last_step_of"] = last_step_of

    def make() -> Part:
        levels = len(model["unet"]["channel_mult"])
        side, low_res = 2 ** (levels - 1), array(1, 1, 1, 3)
        shapes = shapes_of(Upsampler(**model).init, array(1, side, side, 3), array(1), low_res=low_res)
        return Part(config, convert(open_weights(path / folder), unet(levels), shapes, folder, place))

    return make
