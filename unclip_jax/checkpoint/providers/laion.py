"""The diffusion prior that LAION trained with DALLE2-pytorch: a file of torch's with `prior_config.json`
beside it.

The library changed its networks under the same names. Which network a file holds, its version says:

before 1.5    the usual attention, no null embeddings
1.5 to 1.8    attention by cosines
from 1.9      attention by cosines, and null embeddings, which have tensors of their own

Checkpoints of its trainer hold their version. A bare state dictionary does not: its configuration must then
say "version". Configurations are those of the library's `TrainDiffusionPriorConfig`, or their part "prior".

Of a trainer's checkpoint the averaged weights are read where there are any (`ema_model`).

Decoders of the library are recognised and refused, because no network here represents their U-Nets. Residual
blocks attend to the condition inside (`cross_attn`); a learned key and value (`null_kv`) stand in every
attention; the first layer may be three convolutions of the sizes 3, 7 and 15 (`init_conv.convs`). The tensors
tell how many U-Nets there are, how wide they are, and whether they read captions. They tell neither the
number of heads nor which of the library's two attentions it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, shapes_of
from unclip_jax.checkpoint.files import Place, read_json
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.checkpoint.torch_file import TorchTensors, open_torch
from unclip_jax.checkpoint.torch_pickle import Inert
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.models.prior_laion import BUCKETS, ROTARY, LaionPrior
from unclip_jax.typed import check_value, shown

NAME, CONFIG, ENDINGS = "prior_diffusion", "prior_config.json", (".pth", ".pt")
# What lies beside the tensors: the library's version, as a class of `packaging`.
_VERSIONS = ("Version", "_Version", "_BaseVersion")
INERT = (
    *(f"packaging.version.{name}" for name in _VERSIONS),
    *(f"packaging._structures.{name}" for name in ("InfinityType", "NegativeInfinityType")),
)
COSINE, NULLS, FIRST = (1, 5), (1, 9), (1, 0)  # the versions that brought them, and the first that is known
PREFIXES = ("ema_model.", "model.", "")  # of a trainer's checkpoint, and of a bare state dictionary

NET = Settings(
    read={
        "dim": (int, STATED),
        "depth": (int, STATED),
        "max_text_len": (int, 256),
        "num_timesteps": (int, STATED),
        "dim_head": (int, 64),
        "heads": (int, 8),
        "ff_mult": (int, 4),
        "norm_in": (bool, False),
        "norm_out": (bool, True),
        "final_proj": (bool, True),
        "normformer": (bool, False),
        "rotary_emb": (bool, True),
    },
    same={
        "num_time_embeds": (1,),
        "num_image_embeds": (1,),
        "num_text_embeds": (1,),
        "self_cond": (False,),
    },
    free=("attn_dropout", "ff_dropout"),
)
PRIOR = Settings(
    read={
        "image_embed_dim": (int, STATED),
        "timesteps": (int, 1000),
        "sample_timesteps": (int | None, None),
        "beta_schedule": (str, "cosine"),
        "image_embed_scale": (float | None, None),
    },
    same={
        "predict_x_start": (True,),
        "predict_v": (False,),
        "condition_on_text_encodings": (True,),
        "sampling_clamp_l2norm": (False,),
        "sampling_final_clamp_l2norm": (False,),
        "init_image_embed_l2norm": (False,),
    },
    free=(
        *(
            "clip",
            "net",
            "image_size",
            "image_channels",
            "cond_drop_prob",
            "text_cond_drop_prob",
            "loss_type",
        ),
        *("image_cond_drop_prob", "training_clamp_l2norm"),
    ),
)
SAMPLING = {"steps": 64, "sampler": "ddim", "eta": 1.0, "guidance_scale": 1.0, "clip": None}

_LAYER, _BLOCK = r"causal_transformer\.layers\.(\d+)\.", r"block_\1"
RULES: tuple[Rule, ...] = (
    Rule(r"null_text_(?:embed|encodings)", "null_text_states", "drop_ones"),
    Rule("null_text_embeds", "null_text_embed", "drop_ones"),
    Rule("null_image_embed", "null_image_embed", "drop_ones"),
    Rule("learned_query", "query"),
    Rule(r"to_time_embeds\.0\.weight", "time_embedding"),
    Rule(r"causal_transformer\.rel_pos_bias\.relative_attention_bias\.weight", "distance_bias"),
    Rule(rf"{_LAYER}0\.rotary_emb\.freqs", ()),
    Rule(rf"{_LAYER}0\.null_kv", f"{_BLOCK}/null_key_value"),
    Rule(rf"{_LAYER}0\.norm\.g", f"{_BLOCK}/norm1/gain"),
    Rule(rf"{_LAYER}0\.to_out\.1\.g", f"{_BLOCK}/norm_out/gain"),
    Rule(rf"{_LAYER}1\.0\.g", f"{_BLOCK}/norm2/gain"),
    Rule(rf"{_LAYER}1\.3\.g", f"{_BLOCK}/norm_hidden/gain"),
    *linear(rf"{_LAYER}0\.to_q", f"{_BLOCK}/query"),
    *linear(rf"{_LAYER}0\.to_kv", f"{_BLOCK}/key_value"),
    *linear(rf"{_LAYER}0\.to_out\.0", f"{_BLOCK}/out"),
    *linear(rf"{_LAYER}1\.1", f"{_BLOCK}/fc1"),
    *linear(rf"{_LAYER}1\.5", f"{_BLOCK}/fc2"),
    Rule(r"causal_transformer\.init_norm\.g", "norm_in/gain"),
    Rule(r"causal_transformer\.norm\.g", "norm_out/gain"),
    *linear(r"causal_transformer\.project_out", "z_out"),
)


# ------------------------------------------------------------------------------------------- files
def recognises(path: Path) -> bool:
    """Whether a path is a file of DALLE2-pytorch, or a folder with the configuration of its prior."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    if path.suffix not in ENDINGS:
        return False
    try:
        return _kind(open_torch(path, inert=INERT)) is not None
    except (InputError, OSError):
        return False  # other providers read files of torch too, and say what is wrong with this one


def _kind(names: Mapping[str, Any]) -> str | None:
    # The network that a file's tensors are of: "prior", "decoder", or None for none of the library's.
    found = {
        "prior": r"(?:ema_model\.|model\.)?net\.causal_transformer\.",
        "decoder": r"(?:ema_model\.|model\.)?unets\.\d+\.",
    }
    return next((kind for kind, at in found.items() if any(re.match(at, name) for name in names)), None)


def _decoder(weights: TorchTensors) -> str:
    # A decoder in words: what its tensors say, and why no network here is it.
    at = re.compile(r"(?:ema_model\.|model\.)?unets\.(\d+)\.(.*)")
    found = [(match[1], match[2], name) for name in weights if (match := at.fullmatch(name))]
    count = len({number for number, _, _ in found})
    widths = [weights.shape(name) for number, own, name in found if own == "to_time_hiddens.1.weight"]
    words = f"a decoder of DALLE2-pytorch, {count} U-Net{'s' if count > 1 else ''}"
    if widths and all(len(shape) == 2 for shape in widths):
        words += f" of {', '.join(str(shape[1]) for shape in widths)} channels"
    reads = any(own.startswith("text_to_cond.") for _, own, _ in found)
    seen = "z_i and to captions" if reads else "z_i"
    inside = next((own for _, own, _ in found if ".cross_attn." in own), None)
    if inside is None:
        return f"{words}, which are not unCLIP's U-Nets: no network here has their layers"
    return f"{words}. No network here attends to {seen} inside residual blocks, as they do ({inside})"


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(file for ending in ENDINGS for file in path.glob(f"*{ending}"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files)
        words = f"holds {found}: name the one to read" if files else "holds no .pth file: copy it there"
        raise InputError(f"{path} {words}")
    return files[0]


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a prior as a bundle of the one part `prior_diffusion`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    file = _file(path)
    weights = open_torch(file, inert=INERT)
    kind = _kind(weights)
    if kind == "decoder":
        raise InputError(f"{file} holds {_decoder(weights)}. Its prior alone is read here")
    if kind is None:
        raise InputError(f"{file} holds no prior of DALLE2-pytorch, which alone is read here")
    beside = [name for name in (file.with_suffix(".json"), file.parent / CONFIG) if name.is_file()]
    if not beside:
        raise InputError(
            f"{file} does not say what its network is: copy its configuration beside it, as {CONFIG}"
        )
    config = read_json(beside[0])
    version = _version(weights.value, config, file, beside[0])
    prefix = next(p for p in PREFIXES if any(name.startswith(f"{p}net.") for name in weights))
    own = weights.under(f"{prefix}net.")
    model, part, sampling = _described(config, str(beside[0]))
    model |= {"cosine": version >= COSINE, "null_embeds": version >= NULLS}
    _check_null_embeds(own, version, file)
    _check_tables(weights, prefix, part["diffusion"], model, file)
    dim, length = model["embed_dim"], model["length"]
    texts = {"text_embed": array(1, dim), "text_states": array(1, length, dim)}
    mask = array(1, length, dtype=bool)
    shapes = shapes_of(LaionPrior(**model).init, array(1, dim), array(1), **texts, text_mask=mask)
    params = convert(own, RULES, shapes, f"{file}: LAION's prior", place)
    made = Part({"kind": "prior_laion", "model": model} | part, params)
    notes = {"source": str(path), "version": ".".join(map(str, version))}
    return Bundle({NAME: made}, sampling={NAME: sampling}, provenance=notes, path=str(path))


# ------------------------------------------------------------------------------------------- description
def _version(value: Any, config: Mapping[str, Any], file: Path, beside: Path) -> tuple[int, ...]:
    # The library's version, of which the first two numbers count.
    said = value.get("version") if isinstance(value, dict) else None
    if isinstance(said, Inert):
        said = _released(said)
    said = config.get("version") if said is None else said
    match = re.match(r"(\d{1,4})\.(\d{1,4})", said) if isinstance(said, str) else None
    if match is None:
        raise InputError(
            f"{file} does not say by which version of DALLE2-pytorch it was trained, and its attention "
            f'depends on it: write "version": "1.1.0", say, into {beside}'
        )
    version = int(match[1]), int(match[2])
    if not FIRST <= version < (2, 0):
        raise InputError(f"{file} is of version {said} of DALLE2-pytorch; known here are 1.0 to 1.15")
    return version


def _released(version: Inert) -> str | None:
    # The numbers of a `packaging.version.Version`. Its state differs between versions of that library.
    waiting, seen = [version], 0
    while waiting and seen < 100:
        one, seen = waiting.pop(), seen + 1
        if isinstance(one, str) and re.match(r"\d+\.\d+", one):
            return one
        if isinstance(one, tuple) and len(one) > 1 and all(isinstance(number, int) for number in one):
            return ".".join(map(str, one))
        if isinstance(one, Inert):
            waiting += [one.state, one.args]
        elif isinstance(one, (tuple, dict)):
            waiting += list(one.values() if isinstance(one, dict) else one)[::-1]
    return None


def _described(config: Mapping[str, Any], name: str) -> tuple[dict, dict, dict]:
    # Keyword arguments of `LaionPrior`, the rest of the part's configuration, and the sampling defaults.
    config = config.get("prior", config)
    check_value(config, dict, f"{name}: prior")
    check_value(config.get("net"), dict, f"{name}: net")
    taken = PRIOR.take({k: v for k, v in config.items() if k != "version"}, name)
    net = NET.take(config["net"], f"{name}: net")
    dim, steps = net["dim"], taken["timesteps"]
    if taken["image_embed_dim"] != dim or net["num_timesteps"] != steps:
        raise InputError(
            f"{name}: the network works on embeddings of {dim} and {net['num_timesteps']} steps, "
            f"and the prior on {taken['image_embed_dim']} and {steps}"
        )
    if taken["beta_schedule"] not in ("cosine", "linear"):
        raise InputError(f"{name}: beta_schedule is {shown(taken['beta_schedule'])}; known: cosine, linear")
    scale = dim**0.5 if taken["image_embed_scale"] is None else float(taken["image_embed_scale"])
    if scale <= 0:
        raise InputError(f"{name}: image_embed_scale must be positive, not {scale}")
    model = {
        "embed_dim": dim,
        "length": net["max_text_len"],
        "num_steps": steps,
        "layers": net["depth"],
        "heads": net["heads"],
        "head_dim": net["dim_head"],
        "hidden": net["ff_mult"] * dim,
        "normformer": net["normformer"],
        "rotary": net["rotary_emb"],
        "norm_in": net["norm_in"],
        "norm_out": net["norm_out"],
        "final_projection": net["final_proj"],
    }
    part = {
        "diffusion": {"schedule": taken["beta_schedule"], "num_steps": steps, "prediction": "x0"},
        "embedding_space": {"kind": "scaled", "scale": scale, "mean": None, "std": None},
    }
    return model, part, SAMPLING | {"steps": taken["sample_timesteps"] or min(SAMPLING["steps"], steps)}


def _check_null_embeds(names: Any, version: tuple[int, ...], file: Path) -> None:
    # The tensors must be those of the version that the file states.
    has = "null_image_embed" in names
    if has != (version >= NULLS):
        theirs = "the null embeddings" if has else "no null embeddings"
        raise InputError(
            f"{file} has {theirs}, which versions of DALLE2-pytorch have from 1.9 on, but states "
            f"{version[0]}.{version[1]}: the version or the file is another one's"
        )


def _check_tables(
    weights: TorchTensors, prefix: str, diffusion: Mapping[str, Any], model: Mapping[str, Any], file: Path
) -> None:
    # The buffers that a file holds must be those that are computed here.
    betas = f"{prefix}noise_scheduler.betas"
    if betas in weights:
        found, ours = np.asarray(weights[betas], np.float64), schedule_of(diffusion).betas
        if found.shape != ours.shape or not np.allclose(found, ours, rtol=1e-3, atol=1e-6):
            raise InputError(f"{file} was trained with another noise schedule than its configuration says")
    channels = min(ROTARY, model["head_dim"])
    frequencies = 10_000.0 ** (-np.arange(0, channels, 2) / channels)
    for name in weights:
        if name.startswith(prefix) and name.endswith(".rotary_emb.freqs"):
            found = np.asarray(weights[name], np.float64)
            if found.shape != frequencies.shape or not np.allclose(found, frequencies, rtol=1e-4):
                raise InputError(f"{file}: {name} are other frequencies than those of its rotary embeddings")
    bias = f"{prefix}net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"
    if bias in weights and weights.shape(bias) != (BUCKETS, model["heads"]):
        raise InputError(f"{file}: its heads are {weights.shape(bias)[1:]}, not {model['heads']}")
