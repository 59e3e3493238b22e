"""GLIDE's public networks (openai/glide-text2im): a folder with their files and the tokenizer's.

| file | part |
|---|---|
| `base` | `glide`, 64 px |
| `upsample` | `glide_256` |
| `base_inpaint`, `upsample_inpaint` | `glide_inpaint`, `glide_256_inpaint` |
| `clip_image_enc`, `clip_text_enc` | `noised_clip`, both halves of the CLIP of noised images |

Each is `.safetensors`, or `.pt` as it was published, and holds a plain dictionary of tensors. A file cannot
say its heads, its size in pixels or its noise schedule. Those of the public networks are known here; another
network needs a JSON file of the same name beside its own (`base.json`), with the options of glide-text2im
that differ: {"num_channels": 64, "xf_width": 256, ...}. Another noised CLIP needs `clip.json`. The tokenizer
is read from `vocab.bpe` and `encoder.json`, with or without `.gz`, or from transformers' files of GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.check import clip_shapes
from unclip_jax.checkpoint.convert import Rule, convert, linear, norm
from unclip_jax.checkpoint.files import Place, open_file, read_json
from unclip_jax.checkpoint.settings import Settings
from unclip_jax.checkpoint.shapes import glide_shapes
from unclip_jax.checkpoint.torch_file import open_torch
from unclip_jax.data.glide_tokenizer import GlideTokenizer
from unclip_jax.data.tokenizer import VOCAB_SIZE, ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

# File -> the options of glide-text2im that its network does not share with the base network's.
FILES: dict[str, dict[str, Any]] = {
    "base": {},
    "upsample": {"super_res": True},
    "base_inpaint": {"inpaint": True},
    "upsample_inpaint": {"super_res": True, "inpaint": True},
}
SUPER_RES = {"image_size": 256, "num_res_blocks": 2, "noise_schedule": "linear"}
CHANNEL_MULT = {64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4"}
SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear"}
BASE_SIZE = 64
SETTINGS = Settings(
    read={
        "image_size": (int, 64),
        "num_channels": (int, 192),
        "num_res_blocks": (int, 3),
        "channel_mult": (str, ""),
        "num_head_channels": (int, 64),
        "attention_resolutions": (str, "32,16,8"),
        "dropout": (float, 0.1),
        "text_ctx": (int, 128),
        "xf_width": (int, 512),
        "xf_layers": (int, 16),
        "xf_heads": (int, 8),
        "diffusion_steps": (int, 1000),
        "noise_schedule": (str, "squaredcos_cap_v2"),
        "super_res": (bool, False),
        "inpaint": (bool, False),
    },
    same={
        "xf_final_ln": (True,),
        "xf_padding": (True,),
        "use_scale_shift_norm": (True,),
        "resblock_updown": (True,),
    },
    free=("num_heads", "num_heads_upsample", "timestep_respacing", "use_fp16", "cache_text_emb"),
)
# The samplers of the published notebooks.
SAMPLING = {
    "base": {"steps": 100, "sampler": "ddpm", "variance": "learned", "guidance_scale": 3.0, "clip": 1.0},
    "upsample": {"steps": "fast27", "sampler": "ddim", "clip": 1.0, "noise_scale": 0.997},
    "base_inpaint": {
        "steps": 100, "sampler": "ddpm", "variance": "learned", "guidance_scale": 5.0, "clip": 1.0,
    },
    "upsample_inpaint": {
        "steps": "fast27", "sampler": "ddpm", "variance": "learned", "clip": 1.0, "noise_scale": 0.997,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------- configuration
def _numbers(text: str, where: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{where} must be whole numbers separated by commas, not {shown(text)}") from None


def part_config(options: Mapping[str, Any], words: int, where: str) -> dict:
    """The configuration of a part (without its tokenizer) from the options of glide-text2im.

    Args:
      options: those that differ from the defaults of the base network.
      words: size of the vocabulary.
      where: what the options are, for errors.

    Raises:
      ValueError: naming the first option that our network cannot have.
    """
    taken = SETTINGS.take(dict(options), where)
    size, schedule = taken["image_size"], taken["noise_schedule"]
    if schedule not in SCHEDULES:
        raise InputError(f"{where}: noise_schedule is {shown(schedule)}; known are {', '.join(SCHEDULES)}")
    mult = taken["channel_mult"] or CHANNEL_MULT.get(size)
    if mult is None:
        raise InputError(f"{where}: a network of {size} px needs its channel_mult")
    unet = {
        "image_size": size,
        "out_channels": 6,
        "channels": taken["num_channels"],
        "channel_mult": _numbers(mult, f"{where}: channel_mult"),
        "res_blocks": taken["num_res_blocks"],
        "attention_resolutions": _numbers(taken["attention_resolutions"], f"{where}: attention_resolutions"),
        "head_channels": taken["num_head_channels"],
        "dropout": taken["dropout"],
    }
    text = {"vocab_size": words, "length": taken["text_ctx"], "width": taken["xf_width"]}
    text |= {"layers": taken["xf_layers"], "heads": taken["xf_heads"]}
    model = {"unet": unet, "text": text, "upsamples": taken["super_res"], "inpaint": taken["inpaint"]}
    diffusion = {"schedule": SCHEDULES[schedule], "num_steps": taken["diffusion_steps"], "prediction": "eps"}
    return {"kind": "glide", "model": model, "diffusion": diffusion | {"vb_weight": 1e-3}}


# ------------------------------------------------------------------------------------------- names
def _by_head(theirs: str, ours: str, names: tuple[str, ...]) -> list[Rule]:
    return [
        Rule(rf"{theirs}\.{leaf}", tuple(f"{ours}/{name}/{end}" for name in names), transform, by_head=True)
        for leaf, end, transform in (("weight", "kernel", "heads"), ("bias", "bias", "head_bias"))
    ]


_BLOCK, _OURS = r"transformer\.resblocks\.(\d+)\.", r"text/transformer/block_\1"
TEXT: tuple[Rule, ...] = (
    Rule(r"token_embedding\.weight", "text/token_embedding/embedding"),
    Rule("positional_embedding", "text/position_embedding"),
    Rule("padding_embedding", "text/padding_embedding"),
    *norm(rf"{_BLOCK}ln_([12])", r"text/transformer/block_\1/ln\2/norm"),
    *_by_head(rf"{_BLOCK}attn\.c_qkv", f"{_OURS}/attn", ("query", "key", "value")),
    *linear(rf"{_BLOCK}attn\.c_proj", f"{_OURS}/attn/out", "merge"),
    *linear(rf"{_BLOCK}mlp\.c_fc", f"{_OURS}/fc1"),
    *linear(rf"{_BLOCK}mlp\.c_proj", f"{_OURS}/fc2"),
    *norm("final_ln", "text/ln_out/norm"),
    *linear("transformer_proj", "text_cond"),
)


def res_block(theirs: str, ours: str) -> list[Rule]:
    """Rules of a residual block by the names of ADM and GLIDE."""
    return [
        *norm(rf"{theirs}in_layers\.0", f"{ours}/norm1"),
        *linear(rf"{theirs}in_layers\.2", f"{ours}/conv1", "conv"),
        *linear(rf"{theirs}emb_layers\.1", f"{ours}/time"),
        *norm(rf"{theirs}out_layers\.0", f"{ours}/norm2"),
        *linear(rf"{theirs}out_layers\.3", f"{ours}/conv2", "conv"),
        *linear(rf"{theirs}skip_connection", f"{ours}/skip", "conv"),
    ]


def attention(theirs: str, ours: str) -> list[Rule]:
    """Rules of an attention block by the names of ADM and GLIDE."""
    return [
        *norm(rf"{theirs}norm", f"{ours}/norm"),
        *_by_head(rf"{theirs}qkv", ours, ("query", "key", "value")),
        *_by_head(rf"{theirs}encoder_kv", ours, ("context_key", "context_value")),
        *linear(rf"{theirs}proj_out", f"{ours}/out", "merge"),
    ]


def unet(model: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules of a U-Net by the names of ADM and GLIDE, whose blocks are numbered through all levels.

    Args:
      model: keyword arguments of `UNet`.
    """
    levels, count = len(model["channel_mult"]), model["res_blocks"]
    attends = [model["image_size"] // 2**level in model["attention_resolutions"] for level in range(levels)]
    rules = [
        *linear(r"time_embed\.0", "unet/time/fc1"),
        *linear(r"time_embed\.2", "unet/time/fc2"),
        *linear(r"input_blocks\.0\.0", "unet/conv_in", "conv"),
    ]
    for level in range(levels):
        first = 1 + level * (count + 1)
        for i in range(count):
            rules += res_block(rf"input_blocks\.{first + i}\.0\.", f"unet/down_{level}_res_{i}")
            rules += attention(rf"input_blocks\.{first + i}\.1\.", f"unet/down_{level}_attn_{i}")
        rules += res_block(rf"input_blocks\.{first + count}\.0\.", f"unet/down_{level}_pool")
        first = (levels - 1 - level) * (count + 1)
        # The block that enlarges stands behind the attention, where there is one.
        place = 2 if attends[level] else 1
        rules += res_block(rf"output_blocks\.{first + count}\.{place}\.", f"unet/up_{level}_expand")
        for i in range(count + 1):
            rules += res_block(rf"output_blocks\.{first + i}\.0\.", f"unet/up_{level}_res_{i}")
            rules += attention(rf"output_blocks\.{first + i}\.1\.", f"unet/up_{level}_attn_{i}")
    return (
        *rules,
        *res_block(r"middle_block\.0\.", "unet/middle_res_0"),
        *attention(r"middle_block\.1\.", "unet/middle_attn"),
        *res_block(r"middle_block\.2\.", "unet/middle_res_1"),
        *norm(r"out\.0", "unet/norm_out"),
        *linear(r"out\.2", "unet/conv_out", "conv"),
    )


# ------------------------------------------------------------------------------------------- noised CLIP
CLIP_FILES = ("clip_image_enc", "clip_text_enc")
CLIP_SETTINGS = Settings(
    read={
        "image_size": (int, 64),
        "patch_size": (int, 4),
        "n_vocab": (int, 65536),
        "max_text_len": (int, 77),
        "n_embd": (int, 512),
        "n_head_text": (int, 8),
        "n_xf_blocks_text": (int, 12),
        "n_head_state_text": (int, 64),
        "n_head_image": (int, 12),
        "n_xf_blocks_image": (int, 12),
        "n_head_state_image": (int, 64),
        "n_timesteps": (int, 1000),
    },
    same={"logit_scale": (100.0,)},
    free=("beta_schedule",),
)
# Of pixels from 0 to 255.
MEANS, DEVIATIONS = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)


def _layer_norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(rf"{theirs}\.g", f"{ours}/norm/scale"), Rule(rf"{theirs}\.b", f"{ours}/norm/bias")]


def _affine(theirs: str, ours: str, transform: str = "linear") -> list[Rule]:
    bias = "head_bias" if transform == "heads" else "same"
    return [
        Rule(rf"{theirs}\.w", f"{ours}/kernel", transform),
        Rule(rf"{theirs}\.b", f"{ours}/bias", bias),
    ]


_CLIP_BLOCK, _CLIP_OURS = r"blocks\.block_(\d+)\.", r"transformer/block_\1"
CLIP_BLOCKS: tuple[Rule, ...] = (
    *_layer_norm(rf"{_CLIP_BLOCK}f_attn\.ln", f"{_CLIP_OURS}/ln1"),
    *(
        rule
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"))
        for rule in _affine(rf"{_CLIP_BLOCK}f_attn\.f_{theirs}", f"{_CLIP_OURS}/attn/{ours}", "heads")
    ),
    *_affine(rf"{_CLIP_BLOCK}f_attn\.f_c", f"{_CLIP_OURS}/attn/out", "merge"),
    *_layer_norm(rf"{_CLIP_BLOCK}f_mlp\.ln", f"{_CLIP_OURS}/ln2"),
    *_affine(rf"{_CLIP_BLOCK}f_mlp\.f_([12])", r"transformer/block_\1/fc\2"),
    Rule(r"blocks\.output\.f\.w", "projection/kernel", "linear"),
    Rule(r"blocks\.input\.w_pos", "position_embedding"),
)
CLIP_IMAGE: tuple[Rule, ...] = (
    *CLIP_BLOCKS,
    Rule(r"blocks\.input\.patch_proj", "patch_embed/kernel", "conv"),
    Rule(r"blocks\.input\.w_t", "step_embedding"),
    *_layer_norm(r"blocks\.input\.ln", "ln_pre"),
    *_layer_norm(r"blocks\.output\.ln", "ln_post"),
)
CLIP_TEXT: tuple[Rule, ...] = (
    *CLIP_BLOCKS,
    Rule(r"blocks\.input\.w_voc", "token_embedding"),
    *_layer_norm(r"blocks\.output\.ln", "ln_final"),
)


def clip_model(options: Mapping[str, Any], where: str) -> dict:
    """Keyword arguments of the `CLIP` of noised images from the options of glide-text2im (`clip/config.yaml`)
    that differ from the public network's.

    Raises:
      ValueError: naming the first option that our network cannot have.
    """
    taken = CLIP_SETTINGS.take(dict(options), where)
    size = lambda half: {
        "width": taken[f"n_head_{half}"] * taken[f"n_head_state_{half}"],
        "layers": taken[f"n_xf_blocks_{half}"],
        "heads": taken[f"n_head_{half}"],
        "key_bias": False,
    }
    image = {"image_size": taken["image_size"], "patch_size": taken["patch_size"], **size("image")}
    image |= {"mean": [m / 255 for m in MEANS], "std": [d / 255 for d in DEVIATIONS]}
    image["noise_steps"] = taken["n_timesteps"]
    text = {"vocab_size": taken["n_vocab"], "length": taken["max_text_len"], **size("text")}
    return {"embed_dim": taken["n_embd"], "activation": "gelu", "image": image, "text": text}


def _clip(path: Path, files: list[Path], place: Place) -> Callable[[], Part]:
    beside = path / "clip.json"
    own = read_json(beside) if beside.is_file() else {}
    model = clip_model(own, str(beside if own else path / "clip"))
    rows = model["text"]["vocab_size"]
    tokenizer = ClipTokenizer(model["text"]["length"], min(rows, VOCAB_SIZE))
    config = {"kind": "clip", "model": model, "tokenizer": tokenizer.config()}

    def make() -> Part:
        shapes, params = clip_shapes(model), {}
        for file, half, rules in zip(files, ("image_tower", "text_tower"), (CLIP_IMAGE, CLIP_TEXT)):
            params[half] = convert(_open(file), rules, shapes[half], str(file), _under(half, place))
        params["logit_scale"] = place("logit_scale", np.float32(np.log(100)))
        return Part(config, params)

    return make


def _under(half: str, place: Place) -> Place:
    return lambda path, value: place(f"{half}/{path}", value)


# ------------------------------------------------------------------------------------------- reading
def _open(file: Path) -> Mapping:
    return open_file(file) if file.suffix == ".safetensors" else open_torch(file)


def _file(path: Path, stem: str) -> Path | None:
    files = (path / f"{stem}{ending}" for ending in (".safetensors", ".pt"))
    return next((file for file in files if file.is_file()), None)


def recognises(path: Path) -> bool:
    """Whether a folder holds a file of GLIDE by its published name, and is nothing else."""
    if not path.is_dir() or any((path / name).exists() for name in ("model_index.json", "bundle.json")):
        return False
    return any(_file(path, stem) is not None for stem in FILES)


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder as a bundle of the system `glide`; see `providers.Provider`."""
    makers: dict[str, Callable[[], Part]] = {}
    sampling: dict[str, dict] = {}
    for stem, differing in FILES.items():
        file = _file(path, stem)
        if file is not None:
            name, config = _describe(path, stem, differing)
            makers[name] = lambda file=file, config=config: _part(file, config, place)
            sampling[name] = SAMPLING[stem] if config["diffusion"]["num_steps"] == 1000 else {"steps": 10}
    halves = [file for stem in CLIP_FILES if (file := _file(path, stem)) is not None]
    if len(halves) == 1:
        raise InputError(f"{halves[0]} is half of a CLIP: put {' and '.join(CLIP_FILES)} beside one another")
    if halves:
        makers["noised_clip"] = _clip(path, halves, place)
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, "glide", sampling, {"source": str(path)}, str(path))


def _describe(path: Path, stem: str, differing: dict[str, Any]) -> tuple[str, dict]:
    # The name and the configuration of the part that a file holds.
    beside = path / f"{stem}.json"
    own = read_json(beside) if beside.is_file() else {}
    where = str(beside if own else path / stem)
    options = (SUPER_RES if differing.get("super_res") else {}) | own | differing
    length = SETTINGS.take(dict(options), where)["text_ctx"]
    tokenizer = GlideTokenizer.from_folder(path, length)
    config = part_config(options, tokenizer.vocab_size, where) | {"tokenizer": tokenizer.config()}
    size, name = config["model"]["unet"]["image_size"], "glide"
    if differing.get("super_res"):
        base = path / "base.json"
        low = read_json(base).get("image_size", BASE_SIZE) if base.is_file() else BASE_SIZE
        if not isinstance(low, int) or low < 1 or size % low:
            raise InputError(f"{where}: {size} px is no multiple of the base network's {shown(low)}")
        config["factor"], name = size // low, f"glide_{size}"
    return f"{name}_inpaint" if differing.get("inpaint") else name, config


def _part(file: Path, config: dict, place: Place) -> Part:
    rules = (*TEXT, *unet(config["model"]["unet"]))
    return Part(config, convert(_open(file), rules, glide_shapes(config["model"]), str(file), place))
