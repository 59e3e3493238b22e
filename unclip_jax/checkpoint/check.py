"""What the JSON files of a bundle may say, and whether its tensors are those of the networks they describe.

Every value is compared with the type that its dataclass or module declares, so that nothing of another type
reaches a network. `models.kinds` has the keys of each kind of network.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax.numpy as jnp
from flax import traverse_util

from unclip_jax.checkpoint.convert import array, shapes_of
from unclip_jax.checkpoint.files import list_names
from unclip_jax.checkpoint.shapes import glide_shapes, imagen_shapes, t5_shapes
from unclip_jax.data.retrieval_index import check_described
from unclip_jax.data.tokenizers import FIELDS, tokenizer_of
from unclip_jax.diffusion.embedding_space import KINDS as SPACES
from unclip_jax.diffusion.embedding_space import EmbeddingSpace
from unclip_jax.diffusion.process import PREDICTIONS
from unclip_jax.diffusion.schedule import SCHEDULES, schedule_of
from unclip_jax.errors import InputError, one_line
from unclip_jax.models.clip import CLIP, ImageTower, TextTower
from unclip_jax.models.codec import Codec
from unclip_jax.models.decoder import ClipConditioning
from unclip_jax.models.inception import SIZE as INCEPTION_SIZE
from unclip_jax.models.kandinsky import KandinskyDecoder
from unclip_jax.models.kinds import KINDS
from unclip_jax.models.latent_unet import RESAMPLES, LatentUNet
from unclip_jax.models.layers import ACTIVATIONS
from unclip_jax.models.lpips import SMALLEST
from unclip_jax.typed import check_fields, check_value, fields_of, listed, shown

NAME = re.compile(r"[a-z0-9_]+")
# Fields of modules that say how they are run, not what they are, and those that a module above gives.
HOOKS = ("parent", "name", "dtype", "gather", "remat", "scan", "winograd", "dense")
ABOVE = {ImageTower: ("embed_dim", "activation"), TextTower: ("embed_dim", "activation")}
ABOVE[ClipConditioning] = ("cond_dim",)
SCHEDULE = {
    "schedule": (str, True),
    "num_steps": (int, True),
    "beta_ends": (tuple[float, ...] | None, False),
    "zero_snr": (bool, False),
}
DIFFUSION = SCHEDULE | {"prediction": (str, True), "vb_weight": (float, False), "continuous": (bool, False)}
SPACE = {
    "kind": (str, True),
    "scale": (float | None, False),
    "mean": (tuple[float, ...] | None, False),
    "std": (tuple[float, ...] | None, False),
}
CHOICES = {"activation": tuple(ACTIVATIONS), "resize": ("cubic", "linear"), "resample": RESAMPLES}
# The largest values that a file may ask for. A larger one is a mistake, and would take all memory.
LARGEST = {"layers": 1000, "res_blocks": 100, "length": 8192, "image_size": 8192, "channel_mult": 1000}
LARGEST |= {"decoder_layers": 1000, "levels": 8, "halvings": 8, "side": 1024}  # side^2 codes
LARGE = 2**20
# The ends of the paths of tensors whose first axis is the size of the embeddings, or of the text states.
SEES = {
    "embeddings": ("text_embed_in/kernel", "null_image_embed"),
    "states": ("text_states_in/kernel", "conditioning/states_in/kernel", "block_0/attn/context_key/kernel"),
}
BUNDLE = {
    "format_version": (int, True),
    "system": (str, True),
    "parts": (dict, True),
    "sampling": (dict, True),
    "provenance": (dict, True),
}
SIZES = ("kind", "model", "embed_dim", "rows")  # keys of a part's config.json that its shapes depend on
LISTING = {"hash": (str, True), "parameters": (int, False)}


# ------------------------------------------------------------------------------------------- names and paths
def check_name(name: Any, where: str) -> None:
    """Raises an InputError if a name is no part's name: it becomes a folder's."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{where}: {shown(name)} is no name of a part; a name has small letters, digits and _ only"
        )


def check_inside(path: Path, folder: Path) -> None:
    """Raises an InputError if a file of a bundle lies outside its folder, by a symbolic link.

    The cache of the Hugging Face hub keeps the files of a repository beside its snapshots; they are inside.
    """
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":
        root = root.parent.parent
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise InputError(f"{path} is a symbolic link to {real}, outside the bundle; copy the file there")


# ------------------------------------------------------------------------------------------- JSON
def check_top(top: Mapping[str, Any], where: str) -> None:
    """Checks what `bundle.json` holds, in format 2.

    Raises:
      ValueError: naming `where`, the key and the value at fault.
    """
    check_fields(top, BUNDLE, where)
    if not top["parts"]:
        raise InputError(f"{where} lists no parts")
    for name, part in top["parts"].items():
        check_name(name, where)
        check_fields(part, LISTING, f"{where}: part {name}")
    for name, options in top["sampling"].items():
        check_name(name, f"{where}: sampling")
        check_value(options, dict, f"{where}: sampling: {name}")
    training = top["provenance"].get("training", {})
    check_value(training, dict, f"{where}: provenance: training")
    for name, made in training.items():
        check_value(made, dict, f"{where}: provenance: training: {shown(name)}")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Checks a part's configuration, in format 2.

    Raises:
      ValueError: naming `where`, the key and the value at fault.
    """
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: unknown kind of network {shown(kind)}; known: {listed(KINDS)}")
    check_fields(config, KINDS[kind].keys, where)
    for role, digest in config.get("frozen", {}).items():
        check_name(role, f"{where}: frozen")
        check_value(digest, str, f"{where}: frozen: {role}")
    if "last_step_of" in config:
        check_name(config["last_step_of"], f"{where}: last_step_of")
    for key in ("embed_dim", "dims", "factor", "scale_factor", "neighbours"):
        _check_range(key, config.get(key), where)
    if "tokenizer" in config:
        check_fields(config["tokenizer"], FIELDS, f"{where}: tokenizer")
        if not 2 <= config["tokenizer"]["length"] <= LARGEST["length"]:
            raise InputError(f"{where}: tokenizer: length must be between 2 and {LARGEST['length']}")
        try:
            tokenizer_of(config["tokenizer"])
        except ValueError as error:
            raise InputError(f"{where}: tokenizer: {one_line(error)}") from None
    if KINDS[kind].module is not None:
        _check_model(config["model"], KINDS[kind].module, KINDS[kind].inner, f"{where}: model")
        if kind == "prior_diffusion" and config["model"].get("text") is not None:
            words = {"num_embeddings": (int, True)}
            check_fields(config["model"]["text"], words, f"{where}: model: text")
    if kind == "glide" and ("factor" in config) != bool(config["model"].get("upsamples")):
        raise InputError(f"{where}: a network that upsamples has a factor, and another one has none")
    _check_words(config, where)
    if "diffusion" in config:
        _check_diffusion(config["diffusion"], f"{where}: diffusion")
    if kind == "latent":
        _check_augmentation(config, where)
    check_described(config, where)
    if kind in ("prior_diffusion", "prior_laion"):
        _check_space(config["embedding_space"], config["model"]["embed_dim"], f"{where}: embedding_space")
    if kind == "prior_diffusion":
        errors = config.get("x0_error")
        if errors is not None and len(errors) != config["diffusion"]["num_steps"]:
            raise InputError(f"{where}: x0_error must have a number for each of the num_steps steps")
    if kind == "prior_ar":
        edges, bins = config["dot_edges"], config["model"]["dot_bins"]
        if len(edges) != bins - 1 or list(edges) != sorted(edges):
            raise InputError(f"{where}: dot_edges must be {bins - 1} ascending numbers for {bins} bins")


def _check_words(config: Mapping[str, Any], where: str) -> None:
    # The text encoder that a part owns reads the tokens that its tokenizer makes.
    text, tokens = config.get("model", {}).get("text"), config.get("tokenizer")
    text = config["model"] if config["kind"] in ("dalle", "dalle_mini") else text
    if text is None:
        return
    if tokens is None:
        raise InputError(f"{where} lacks 'tokenizer', which its text encoder needs")
    vocab_size = text["num_embeddings"] if config["kind"] == "prior_diffusion" else text["vocab_size"]
    length = config["model"]["length"] if config["kind"] == "prior_diffusion" else text["length"]
    image = config["model"].get("image")
    noised = isinstance(image, dict) and image.get("noise_steps")
    if noised or config["kind"] == "dalle_mini":  # these tables have rows that no token needs
        vocab_size = min(vocab_size, tokens["vocab_size"])
    if (vocab_size, length) != (tokens["vocab_size"], tokens["length"]):
        raise InputError(
            f"{where}: the text encoder reads {length} of {vocab_size} tokens, and the tokenizer makes "
            f"{tokens['length']} of {tokens['vocab_size']}"
        )


def _check_model(settings: Any, module: type, inner: Mapping[str, type], where: str) -> None:
    # Keyword arguments of a module, and of the modules whose arguments they hold.
    check_fields(settings, fields_of(module, HOOKS + ABOVE.get(module, ())), where)
    for key, value in settings.items():
        if key in inner and value is not None:
            _check_model(value, inner[key], {}, f"{where}: {key}")
        elif key in CHOICES and value not in CHOICES[key]:
            raise InputError(
                f"{where}: unknown {key} {shown(value)}; choose one of {', '.join(CHOICES[key])}"
            )
        else:
            _check_range(key, value, where)


def _check_range(key: str, value: Any, where: str) -> None:
    largest = LARGEST.get(key, LARGE)
    if key == "mean":
        return
    if key == "attention_levels":  # they count from 0
        value = [level + 1 for level in value]
    # 0 is ADM's attention; a discrete VAE, and the condition and output of a PixelSNAIL may have no blocks.
    if key in ("transformer_depth", "condition_blocks", "out_blocks", "code_blocks"):
        value = value + 1
    if key == "dropout":
        if not 0 <= value < 1:
            raise InputError(f"{where}: dropout must be in [0, 1), not {shown(value)}")
        return
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool) and not 0 < number <= largest:
            raise InputError(f"{where}: {key} must be between 1 and {largest}, not {shown(number)}")


def _check_augmentation(config: Mapping[str, Any], where: str) -> None:
    # A U-Net that sees a noised z_i says how it is noised and whitened; its vector is z_i and the level.
    found = [key for key in ("augmentation", "embedding_space") if key in config]
    if not found:
        return
    if len(found) == 1:
        raise InputError(f"{where} has {found[0]!r}; augmentation and embedding_space belong together")
    vector = config["model"].get("vector_dim")
    if vector is None or vector % 2:
        raise InputError(f"{where}: a U-Net with augmentation has an even vector_dim, not {shown(vector)}")
    check_fields(config["augmentation"], SCHEDULE, f"{where}: augmentation")
    _check_schedule(config["augmentation"], f"{where}: augmentation")
    _check_space(config["embedding_space"], vector // 2, f"{where}: embedding_space")


def _check_diffusion(diffusion: Any, where: str) -> None:
    check_fields(diffusion, DIFFUSION, where)
    if diffusion["prediction"] not in PREDICTIONS:
        wrong = shown(diffusion["prediction"])
        raise InputError(f"{where}: unknown prediction {wrong}; choose one of {listed(PREDICTIONS)}")
    _check_schedule(diffusion, where)


def _check_schedule(diffusion: Mapping[str, Any], where: str) -> None:
    if diffusion["schedule"] not in SCHEDULES:
        wrong = shown(diffusion["schedule"])
        raise InputError(f"{where}: unknown schedule {wrong}; choose one of {listed(SCHEDULES)}")
    if not 2 <= diffusion["num_steps"] <= 100_000:
        raise InputError(f"{where}: num_steps must be between 2 and 100000, not {diffusion['num_steps']}")
    ends = diffusion.get("beta_ends")
    if ends is not None and len(ends) != 2:
        raise InputError(f"{where}: beta_ends must be two numbers, not {len(ends)}")
    if diffusion.get("zero_snr") and diffusion.get("prediction") == "eps":
        raise InputError(f"{where}: a network that predicts eps cannot start without signal (zero_snr)")
    try:
        schedule_of(diffusion)
    except ValueError as error:
        raise InputError(f"{where}: {one_line(error)}") from None


def _check_space(space: Any, dim: int, where: str) -> None:
    check_fields(space, SPACE, where)
    if space["kind"] not in SPACES:
        raise InputError(f"{where}: unknown kind {shown(space['kind'])}; choose one of {listed(SPACES)}")
    scale = space.get("scale", EmbeddingSpace._field_defaults["scale"])
    if space["kind"] in ("unit", "scaled") and (scale is None or scale <= 0):
        raise InputError(f"{where}: scale must be positive, not {scale}")
    for key in ("mean", "std"):
        values = space.get(key)
        if space["kind"] == "whitened" and values is None:
            raise InputError(f"{where} lacks {key!r}")
        if values is not None and len(values) != dim:
            raise InputError(f"{where}: {key} has {len(values)} numbers, and the embeddings {dim}")
    if space.get("std") is not None and min(space["std"]) <= 0:
        raise InputError(f"{where}: std must be positive")


# ------------------------------------------------------------------------------------------- shapes
def check_shapes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks that a file holds the parameters of the network that a checked configuration describes.

    Args:
      config: the part's.
      shapes: the shapes of the file's tensors, by the parameters' paths.
      where: the part's folder, for messages.

    Raises:
      ValueError: naming what is missing, what has no use, and what has another shape.
    """
    kinds = (ValueError, TypeError, ArithmeticError, AssertionError, IndexError, flax.errors.FlaxError)
    described = json.dumps({key: config[key] for key in SIZES if key in config})
    try:
        wanted = _part_shapes(described, *(_first_size(shapes, seen) for seen in SEES.values()))
    except kinds as error:  # the values have the right types, but no network has them together
        raise InputError(f"{where}: its config.json describes no network: {one_line(error)}") from None
    unfit = [path for path in wanted.keys() & shapes.keys() if wanted[path] != tuple(shapes[path])]
    first = min(unfit, default=None)
    found = (
        (shapes.keys() - wanted.keys(), "tensors have no use"),
        (wanted.keys() - shapes.keys(), "parameters are missing"),
        (
            unfit,
            f"shapes differ ({first and shown(list(shapes[first]))} for {first and list(wanted[first])})",
        ),
    )
    problems = [f"{len(names)} {words}: {list_names(list(names))}" for names, words in found if names]
    if problems:
        raise InputError(
            f"{where} does not hold the network that its config.json describes: {'; '.join(problems)}"
        )


def _first_size(shapes: Mapping[str, tuple[int, ...]], ends: tuple[str, ...]) -> int:
    found = (shape for path, shape in shapes.items() if path.endswith(ends) and len(shape) > 0)
    return int(next(found, (1,))[0])


@functools.lru_cache(maxsize=64)
def _part_shapes(described: str, embed_dim: int, width: int) -> dict[str, tuple[int, ...]]:
    # Path -> shape of the parameters of a part, from its configuration as JSON; see `part_tree`.
    tree = part_tree(json.loads(described), embed_dim, width)
    return {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def part_tree(config: Mapping[str, Any], embed_dim: int, width: int) -> Any:
    """The parameters' shapes of a part. Its configuration leaves the width of CLIP's embeddings (D) and of
    text states to the network's inputs."""
    kind = config["kind"]
    if kind == "codec":
        dims = [config["embed_dim"]] * 2
        return {name: array(*dims[: 1 + (name == "components")]) for name in Codec._fields}
    if kind == "index":
        return {"embedding": array(config["rows"], config["embed_dim"])}
    model = config["model"]
    if kind == "clip":
        return clip_shapes(model)
    module = KINDS[kind].module(**model)
    if kind in ("kl_autoencoder", "vq_autoencoder", "vqvae", "dvae", "dvae_strided"):
        return shapes_of(module.init, array(1, module.factor, module.factor, module.image_channels))
    if kind in ("dalle", "dalle_mini"):
        ids, codes = (array(1, count, dtype=jnp.int32) for count in (module.length, module.side**2))
        return shapes_of(module.init, ids, array(1, module.length, dtype=bool), codes)
    if kind == "pixelsnail":
        grid = lambda side: array(1, side, side, dtype=jnp.int32)
        given = {} if module.coarse_codes is None else {"coarse": grid(module.side // 2)}
        given |= {} if module.text_dim is None else {"text_embed": array(1, module.text_dim)}
        return shapes_of(module.init, grid(module.side), **given)
    if kind in ("inception", "dinov2"):
        side = INCEPTION_SIZE if kind == "inception" else module.positions * module.patch_size
        return shapes_of(module.init, array(1, side, side, 3))
    if kind == "lpips":
        return shapes_of(module.init, *[array(1, SMALLEST, SMALLEST, 3)] * 2)
    if kind in ("latent", "retrieval"):
        return latent_shapes(model)
    if kind == "kandinsky":
        return kandinsky_shapes(model)
    if kind == "safety":
        side = model["image"]["image_size"]
        return shapes_of(module.init, array(1, side, side, 3))
    if kind == "upsampler":
        return shapes_of(module.init, *_pixels(model), low_res=array(1, 1, 1, 3))
    if kind == "glide":
        return glide_shapes(model)
    if kind == "t5":
        return t5_shapes(model)
    if kind in ("imagen", "imagen_upsampler"):
        return imagen_shapes(model, width, kind == "imagen_upsampler")
    width = model["embed_dim"] if kind == "prior_laion" else width
    own = model.get("text")
    length = model["length"] if "length" in model else own["length"] if own else 1
    if kind in ("prior_diffusion", "prior_laion"):
        dim = model["embed_dim"]
        inputs = [array(1, dim), array(1)]
    elif kind == "prior_ar":
        dim = embed_dim
        inputs = [array(1, model["codes"], dtype=jnp.int32), array(1, dtype=jnp.int32)]
    else:
        dim, inputs = embed_dim, _pixels(model)
    texts = {"text_embed": array(1, dim)}
    if own is None or kind == "decoder":
        texts |= {"text_states": array(1, length, width), "text_mask": array(1, length, dtype=bool)}
    if own is not None:
        texts |= {
            "tokens": array(1, length, dtype=jnp.int32),
            "token_mask": array(1, length, dtype=bool),
        }
    if kind == "decoder":
        texts |= {"image_embed": array(1, dim), "drop_image": array(1, dtype=bool)}
        if model.get("inpaint"):
            texts |= {"known_image": inputs[0], "known": array(*inputs[0].shape[:3], 1, dtype=bool)}
    return shapes_of(module.init, *inputs, **texts)


def _pixels(model: Mapping[str, Any]) -> list:
    # An image and a time.
    side = model["unet"]["image_size"]
    return [array(1, side, side, 3), array(1)]


def latent_shapes(model: Mapping[str, Any]) -> Any:
    """The parameters' shapes of a `LatentUNet` with these keyword arguments."""
    module, side, given = LatentUNet(**model), 2 ** (len(model["channel_mult"]) - 1), {}
    if module.classes is not None:
        given["label"] = array(1, dtype=jnp.int32)
    elif module.context_dim is not None:
        given["context"] = array(1, 1, module.context_dim)
    if module.vector_dim is not None:
        given["vector"] = array(1, module.vector_dim)
    return shapes_of(module.init, array(1, side, side, module.in_channels), array(1), **given)


def kandinsky_shapes(model: Mapping[str, Any]) -> Any:
    """The parameters' shapes of a `KandinskyDecoder` with these keyword arguments."""
    module = KandinskyDecoder(**model)
    x = array(1, module.multiple, module.multiple, module.in_channels)
    return shapes_of(module.init, x, array(1), image_embed=array(1, module.embed_dim))


def clip_shapes(model: Mapping[str, Any]) -> Any:
    """The parameters' shapes of a `CLIP` with these keyword arguments; a half that is None has none."""
    module, image, text = CLIP(**model), model["image"], model["text"]
    side = image and image["image_size"]
    images = image and array(1, side, side, 3)
    tokens = text and array(1, text["length"], dtype=jnp.int32)
    noised = {"t": array(1, dtype=jnp.int32)} if image and image.get("noise_steps") else {}
    if image is not None and text is not None:
        return shapes_of(module.init, images, tokens, **noised)
    shapes: dict = {}
    if image is not None:
        embed = lambda key, x, **given: module.init(key, x, **given, method="encode_image")
        shapes |= shapes_of(embed, images, **noised)
    if text is not None:
        shapes |= shapes_of(lambda key, x: module.init(key, x, method="encode_text"), tokens)
    return shapes
