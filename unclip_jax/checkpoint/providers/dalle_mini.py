"""dalle-mini and dalle-mega, and their VQGAN, as they were published: folders with `config.json` and Flax's
`flax_model.msgpack`; the first also has the tokenizer's `vocab.json` and `merges.txt`.

The two networks were published apart. They are read together from a folder that holds both folders, or from
that of dalle-mini with the folder of the VQGAN in it. A folder of a CLIP there becomes the part that ranks
candidates. The VQGAN's folder is read alone, too.

What versions of the published code take for granted differs, so the tensors say: whether the MLP has a gate,
which normalisations have a scale, and whether a file holds the layers one by one or stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, shapes_of
from unclip_jax.checkpoint.files import Place, read_json
from unclip_jax.checkpoint.flax_file import FILE, INDEX, FlaxWeights, open_flax
from unclip_jax.checkpoint.providers import clip
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.data.bart_tokenizer import BartTokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import VQAutoencoder
from unclip_jax.models.dalle_mini import DalleMini

NAME, CODER = "dalle_mini", "autoencoder"
GUIDANCE = 10.0  # of the published notebook
GROUPS = 32  # of the VQGAN's normalisations
WANTED = "dalle-mini's VQGAN (vqgan_imagenet_f16_16384)"
STACKED = {"FlaxBartEncoderLayers": "FlaxBartEncoderLayer_", "FlaxBartDecoderLayers": "FlaxBartDecoderLayer_"}
_RUN = (
    *("architectures", "transformers_version", "torch_dtype", "dtype", "num_resolutions", "model_type"),
    *("id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"),
)
SETTINGS = Settings(
    read={
        "d_model": (int, 1024),
        "encoder_layers": (int, 12),
        "decoder_layers": (int, 12),
        "encoder_attention_heads": (int, 16),
        "encoder_ffn_dim": (int, 4096),
        "max_text_length": (int, 64),
        "image_length": (int, 256),
        "encoder_vocab_size": (int, 50264),
        "image_vocab_size": (int, 16384),
        "decoder_start_token_id": (int | None, None),
        "normalize_text": (bool, False),
        "use_head_scale": (bool, False),
    },
    same={
        "model_type": ("dallebart",),
        "activation_function": ("gelu",),
        "ln_type": ("layernorm",),
        "ln_positions": ("normformer",),
        "use_bias": (False,),
        "scale_embedding": (False,),
        "use_cosine_attention": (False,),
        "use_absolute_position_embeddings": (True,),
        "use_swin_position_embeddings": (False,),
        "use_deepnet_scaling": (False,),
        "use_alibi": (False,),
        "sinkhorn_iters": (1,),
        "use_final_ln_encoder": (True,),
        "use_final_ln_decoder": (True,),
        "tie_word_embeddings": (False,),
        "is_encoder_decoder": (True,),
    },
    free=(
        *("dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "encoder_layerdrop"),
        *("decoder_layerdrop", "init_std", "tau_init", "gradient_checkpointing", "use_cache", "do_sample"),
        *("bos_token_id", "pad_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("min_length", "max_length", "use_scan", "use_glu", "force_ln_scale", "use_subln_init", *_RUN),
        *("decoder_attention_heads", "decoder_ffn_dim"),  # compared with the encoder's below
    ),
)
CODER_SETTINGS = Settings(
    read={
        "ch": (int, 128),
        "ch_mult": (tuple[int, ...], STATED),
        "num_res_blocks": (int, 2),
        "resolution": (int, 256),
        "attn_resolutions": (tuple[int, ...], (16,)),
        "z_channels": (int, 256),
        "embed_dim": (int, 256),
        "n_embed": (int, STATED),
    },
    same={
        "in_channels": (3,),
        "out_ch": (3,),
        "double_z": (False,),
        "resamp_with_conv": (True,),
        "give_pre_end": (False,),
    },
    free=("dropout", *_RUN),
)


# ------------------------------------------------------------------------------------------- names
def rules() -> tuple[Rule, ...]:
    """Rules of the names of dalle-mini, whose layers lie one by one."""
    found = [Rule(r"lm_head/kernel", "codes_out/kernel")]

    def norm(theirs: str, ours: str) -> None:
        found.extend(Rule(rf"{theirs}/{leaf}", f"{ours}/{leaf}") for leaf in ("scale", "bias"))

    for half in ("encoder", "decoder"):
        found.append(Rule(rf"model/{half}/embed_tokens/embedding", f"{half}/embedding/embedding"))
        found.append(Rule(rf"model/{half}/embed_positions/embedding", f"{half}/position/embedding"))
        norm(rf"model/{half}/layernorm_embedding", f"{half}/ln_in")
        norm(rf"model/{half}/final_ln", f"{half}/ln_out")
        at, to = rf"model/{half}/layers/FlaxBart{half.capitalize()}Layer_(\d+)", rf"{half}/block_\1"
        for n, name in enumerate(("attn", "attn_text") if half == "decoder" else ("attn",)):
            ends = ("ln1", "ln1_out") if n == 0 else ("ln_text", "ln_text_out")
            norm(rf"{at}/LayerNorm_{2 * n}", f"{to}/{ends[0]}")
            norm(rf"{at}/LayerNorm_{2 * n + 1}", f"{to}/{ends[1]}")
            attention = rf"{at}/FlaxBartAttention_{n}"
            for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                found.append(Rule(rf"{attention}/{theirs}/kernel", f"{to}/{name}/{ours}/kernel", "split_out"))
            found.append(Rule(rf"{attention}/out_proj/kernel", f"{to}/{name}/out/kernel", "split_in"))
            found.append(Rule(rf"{attention}/head_scale", f"{to}/{name}/head_scale", "vector"))
        for mlp, layers in (("GLU_0", ("gate", "fc1", "fc2")), ("FFN_0", ("fc1", "fc2"))):
            norm(rf"{at}/{mlp}/LayerNorm_0", f"{to}/ln2")
            norm(rf"{at}/{mlp}/LayerNorm_1", f"{to}/ln_hidden")
            for n, ours in enumerate(layers):
                found.append(Rule(rf"{at}/{mlp}/Dense_{n}/kernel", f"{to}/{ours}/kernel"))
    return tuple(found)


def coder_rules() -> tuple[Rule, ...]:
    """Rules of the names of the VQGAN."""
    found = [Rule(r"quantize/embedding/embedding", "codebook")]

    def both(theirs: str, ours: str, leaves: tuple[str, str] = ("kernel", "bias"), how: str = "same") -> None:
        first, bias = leaves
        found.extend(
            [Rule(rf"{theirs}/{first}", f"{ours}/{first}", how), Rule(rf"{theirs}/{bias}", f"{ours}/{bias}")]
        )

    def norm(theirs: str, ours: str) -> None:
        both(theirs, f"{ours}/norm", ("scale", "bias"))

    def res(theirs: str, ours: str) -> None:
        for n in "12":
            norm(rf"{theirs}/norm{n}", f"{ours}/norm{n}")
            both(rf"{theirs}/conv{n}", f"{ours}/conv{n}")
        both(rf"{theirs}/nin_shortcut", f"{ours}/skip")

    def attention(theirs: str, ours: str) -> None:
        norm(rf"{theirs}/norm", f"{ours}/norm")
        for name, target in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
            both(rf"{theirs}/{name}", f"{ours}/{target}", how="drop_ones")

    for half, side, sampler, ours in (
        ("encoder", "down", "downsample", "pool"),
        ("decoder", "up", "upsample", "expand"),
    ):
        both(rf"{half}/conv_in", f"{half}/conv_in")
        norm(rf"{half}/norm_out", f"{half}/norm_out")
        both(rf"{half}/conv_out", f"{half}/conv_out")
        level, to = rf"{half}/{side}_(\d+)", rf"{half}/{side}_\1"
        res(rf"{level}/block_(\d+)", rf"{to}_res_\2")
        attention(rf"{level}/attn_(\d+)", rf"{to}_attn_\2")
        both(rf"{level}/{sampler}/conv", f"{to}_{ours}/conv")
        for n in (1, 2):
            res(rf"{half}/mid/block_{n}", f"{half}/middle_res_{n - 1}")
        attention(rf"{half}/mid/attn_1", f"{half}/middle_attn")
    for name in ("quant_conv", "post_quant_conv"):
        both(name, name, how="drop_ones")
    return tuple(found)


# ------------------------------------------------------------------------------------------- configurations
def model_config(config: Mapping[str, Any], weights: FlaxWeights, name: str) -> dict:
    """`DalleBartConfig` and the tensors -> keyword arguments of `DalleMini`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    taken = SETTINGS.take(config, name)
    for key in ("attention_heads", "ffn_dim"):
        own = taken[f"encoder_{key}"]
        if config.get(f"decoder_{key}", own) != own:
            raise InputError(
                f"{name}: decoder_{key} is not {own}, as in the encoder; the network here has one"
            )
    side = math.isqrt(taken["image_length"])
    if side**2 != taken["image_length"]:
        raise InputError(f"{name}: image_length {taken['image_length']} is no square")
    codes = taken["image_vocab_size"]
    if taken["decoder_start_token_id"] is not None:
        codes = taken["decoder_start_token_id"]
    if not 1 <= codes <= taken["image_vocab_size"]:
        raise InputError(f"{name}: decoder_start_token_id {codes} is not behind the codes of the image")
    if taken["d_model"] % taken["encoder_attention_heads"]:
        raise InputError(
            f"{name}: d_model {taken['d_model']} is no multiple of its "
            f"{taken['encoder_attention_heads']} heads"
        )
    return {
        "width": taken["d_model"],
        "layers": taken["encoder_layers"],
        "decoder_layers": taken["decoder_layers"],
        "heads": taken["encoder_attention_heads"],
        "hidden": taken["encoder_ffn_dim"],
        "length": taken["max_text_length"],
        "vocab_size": taken["encoder_vocab_size"],
        "codes": codes,
        "rows": taken["image_vocab_size"] + 1,
        "side": side,
        "gated": any("/GLU_0/" in tensor for tensor in weights),
        "norm_scales": any(tensor.endswith("_0/LayerNorm_0/scale") for tensor in weights),
        "head_scale": taken["use_head_scale"],
    }


def coder_config(config: Mapping[str, Any], name: str) -> dict:
    """`VQGANConfig` -> keyword arguments of `VQAutoencoder`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    taken = CODER_SETTINGS.take(config, name)
    mults = list(taken["ch_mult"])
    if not 1 <= len(mults) <= 8:
        raise InputError(f"{name}: ch_mult must have 1 to 8 numbers, not {len(mults)}")
    if taken["ch"] % GROUPS:
        raise InputError(f"{name}: ch must be a multiple of {GROUPS}, not {taken['ch']}")
    if taken["embed_dim"] != taken["z_channels"]:
        raise InputError(f"{name}: embed_dim must be z_channels, not {taken['embed_dim']}")
    sides = [taken["resolution"] // 2**level for level in range(len(mults))]
    return {
        "latent_channels": taken["z_channels"],
        "channels": taken["ch"],
        "channel_mult": mults,
        "res_blocks": taken["num_res_blocks"],
        "attention_levels": [i for i, side in enumerate(sides) if side in taken["attn_resolutions"]],
        "codes": taken["n_embed"],
        "unit_range": True,
    }


# ------------------------------------------------------------------------------------------- folders
def _kind(folder: Path) -> str | None:
    # The part that a folder of Flax's weights holds; None for another one.
    if not (folder / "config.json").is_file():
        return None
    if not any((folder / name).is_file() for name in (FILE, INDEX, "vocab.json")):
        return None
    config = read_json(folder / "config.json")
    if config.get("model_type") == "dallebart":
        return NAME
    return CODER if {"ch_mult", "n_embed"} <= config.keys() else None


def _folders(path: Path) -> dict[str, Path]:
    # Part -> its folder, of a path and the folders in it.
    if not path.is_dir() or (path / "bundle.json").is_file() or (path / "model_index.json").is_file():
        return {}
    found: dict[str, Path] = {}
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        kind = _kind(folder)
        if kind in found:
            raise InputError(
                f"{found[kind]} and {folder} hold the same kind of network: move one of them away"
            )
        if kind is not None:
            found[kind] = folder
    if NAME in found:
        rankers = [p for p in sorted(path.iterdir()) if p.is_dir() and clip.recognises(p)]
        found |= {"clip": rankers[0]} if rankers else {}
    return found


def recognises(path: Path) -> bool:
    """Whether a folder is dalle-mini's or its VQGAN's, or holds these folders."""
    return bool(_folders(path))


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads the folders as a bundle of the system `dalle_mini`, or the VQGAN's as a bundle of the one part
    `autoencoder`; see `providers.Provider`."""
    folders = _folders(path)
    if only is not None and only not in folders:
        raise no_part(path, only, folders)
    if only is None and NAME in folders and CODER not in folders:
        raise FileNotFoundError(f"{path} has no folder with {WANTED}: put it in, beside the weights")
    described = {name: f"{folder}/config.json" for name, folder in folders.items()}
    coder = None
    if CODER in folders:
        coder = coder_config(read_json(folders[CODER] / "config.json"), described[CODER])

    def network() -> Part:
        folder, where = folders[NAME], described[NAME]
        weights = open_flax(folder).unstacked(STACKED)
        model = model_config(read_json(folder / "config.json"), weights, where)
        normalises = read_json(folder / "config.json").get("normalize_text", False)
        tokenizer = BartTokenizer.from_folder(folder, model["length"], normalises, model["vocab_size"])
        if coder is not None and coder["codes"] != model["codes"]:
            raise InputError(
                f"{folders[CODER]} has {coder['codes']} codes, and {folder} draws {model['codes']}: take "
                f"{WANTED}"
            )
        tokens, codes = (array(1, size, dtype=np.int32) for size in (model["length"], model["side"] ** 2))
        shapes = shapes_of(DalleMini(**model).init, tokens, array(1, model["length"], dtype=bool), codes)
        params = convert(weights, rules(), shapes, f"{folder}: dalle-mini", place)
        return Part({"kind": NAME, "model": model, "tokenizer": tokenizer.config()}, params)

    def autoencoder() -> Part:
        module = VQAutoencoder(**coder)
        shapes = shapes_of(module.init, array(1, module.factor, module.factor, 3))
        folder = folders[CODER]
        params = convert(open_flax(folder), coder_rules(), shapes, f"{folder}: the VQGAN", place)
        return Part({"kind": "vq_autoencoder", "model": coder, "scale_factor": 1.0}, params)

    makers: dict[str, Callable[[], Part]] = {
        NAME: network,
        CODER: autoencoder,
        "clip": lambda: clip.read(folders["clip"], None, place).parts["clip"],
    }
    parts = {name: makers[name]() for name in folders if only in (None, name)}
    sampling = {NAME: {"guidance_scale": GUIDANCE}} if NAME in parts else {}
    system = NAME if NAME in folders else "unclip"
    return Bundle(parts, system, sampling, {"source": str(path)}, str(path))
