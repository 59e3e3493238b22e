"""The frozen networks under a stage: loads them onto the mesh and computes their outputs for a batch.

The update step takes their parameters as arguments and never closes over them. A checkpoint holds their
hashes. `load_frozen` returns the networks by role. Under the role `EMPTY` it adds the empty caption as the
stage sees it. That caption is embedded once, so that no step embeds it again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unclip_jax.checkpoint.fetch import fetched_folder, is_fetched
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.embeddings import Embedded, is_embedded, open_embedded
from unclip_jax.data.glide_tokenizer import GlideTokenizer
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays
from unclip_jax.data.tokenizers import AnyTokenizer
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.generate.text import TextConditioning, encode_text
from unclip_jax.models.codec import Codec
from unclip_jax.paths import user_path
from unclip_jax.run.batches import Data
from unclip_jax.run.resume import resolve
from unclip_jax.run.t5 import load_t5
from unclip_jax.sharding import Mesh, compute_dtype, gather_rest, infer_shardings, make_gather, replicate

EMPTY = "empty_caption"
# Stages that can train from embeddings alone.
EMBEDDABLE = ("prior_diffusion", "prior_ar", "codec", "latent", "stable_unclip", "pixelsnail", "dalle")
EMBEDDABLE += ("retrieval",)
EMBEDDED = ("retrieval",)  # stages that train from embeddings only
BESIDE_PICTURES = ("decoder", "retrieval")  # stages that can train from pictures with their embeddings
READ_STATES = ("imagen",)  # stages that can train from pictures with the states of their captions


def text_tokenizer(config: ConfigDict) -> AnyTokenizer | None:
    """The tokenizer of the stage's own text encoder; None if the stage takes another network's text states.

    It is CLIP's, cut to `vocab_size`; or GLIDE's from `text_tokenizer.folder`.

    Raises:
      ValueError: when the configuration has only one of `text_tokenizer` and `model.text`, or the folder's
        tokenizer has another `vocab_size`.
      FileNotFoundError: when the folder holds no tokenizer.
    """
    settings, text = config.get("text_tokenizer"), config.get("model", {}).get("text")
    if config.stage == "clip":
        return None
    if (settings is None) != (text is None):
        raise InputError(
            "text_tokenizer and model.text belong together: "
            "set both to give the stage its own text encoder, or neither"
        )
    if settings is None:
        return None
    folder, length = settings.get("folder"), settings["length"]
    if folder is None:
        return ClipTokenizer(length, settings["vocab_size"])
    tokenizer = GlideTokenizer.from_folder(user_path(folder), length)
    if tokenizer.vocab_size != settings["vocab_size"]:
        raise InputError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, not "
            f"text_tokenizer.vocab_size={settings['vocab_size']}; set it"
        )
    return tokenizer


def load_frozen(
    config: ConfigDict, workdir: str | os.PathLike, mesh: Mesh, roles: Mapping[str, str], data: Data | None
) -> dict[str, Network]:
    """Loads the frozen networks of a stage from the places that `config.frozen` names.

    Args:
      config: the run's configuration.
      workdir: the run's folder; relative paths ("../clip") start there.
      mesh: the devices that hold the parameters.
      roles: role -> kind; the stage file's `FROZEN`. A role whose path is None is left out.
      data: the sources, which must fit the networks; None if the stage reads no captions: then the sources
        are not checked.

    Returns:
      role -> Network. If `data` is given, the role `EMPTY` holds the empty caption.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line that names what is missing or does not fit.
    """
    frozen: dict[str, Network] = {}
    loaders = {
        "clip": _load_clip,
        "text": _load_text,
        "codec": _load_codec,
        "lpips": _load_lpips,
        "autoencoder": functools.partial(_load_image_coder, "autoencoder"),
        "vqvae": functools.partial(_load_image_coder, "vqvae"),
        "dvae": functools.partial(_load_image_coder, "dvae"),
        "t5": load_t5,
    }
    for role, kind in wanted_roles(config, roles).items():
        frozen[role] = loaders[kind](resolve(config.frozen[role], workdir), config, mesh)
    for role, network in frozen.items():
        for other, needed in network.config.get("frozen", {}).items():
            if other in frozen and frozen[other].hash != needed:
                raise InputError(
                    f"the {role} was fitted in the embedding space of {_display_name(other)} {needed}, "
                    f"but the {_display_name(other)} given is {frozen[other].hash}"
                )
    if "clip" in frozen and data is not None:
        clip, tokenizer = frozen[text_role(frozen)], text_tokenizer(config)
        check_sources(frozen["clip"], data, pictures=config.stage not in EMBEDDABLE or "text" in frozen)
        frozen[EMPTY] = Network(None, replicate(_empty_caption(clip, data, tokenizer, mesh), mesh), {})
    return frozen


def text_role(frozen: Mapping[str, Any]) -> str:
    """The role of the network that reads captions: `text` where there is one, and else `clip`."""
    return "text" if "text" in frozen else "clip"


def wanted_roles(config: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str]:
    """Role -> kind of the networks that a configuration names; one whose path is None is left out."""
    return {role: kind for role, kind in roles.items() if config["frozen"].get(role) is not None}


def arrays(frozen: Mapping[str, Network]) -> dict[str, Any]:
    """The parameters by role, as the update step takes them."""
    return {role: network.params for role, network in frozen.items()}


def hashes(frozen: Mapping[str, Network]) -> dict[str, str]:
    """The hashes of the networks by role, for the part's configuration."""
    return {role: network.hash for role, network in frozen.items() if network.hash}


def _display_name(role: str) -> str:
    return "CLIP" if role == "clip" else role


# ------------------------------------------------------------------------------------------ loading
def _load_clip(path: str, config: ConfigDict, mesh: Mesh) -> Network:
    # A folder of embeddings replaces the CLIP that made them: there is nothing left to embed.
    if is_embedded(path):
        embedded = open_embedded(path)
        model = {"embed_dim": embedded.embed_dim, "image": None, "text": None}
        return Network(
            None, {}, {"kind": "clip", "model": model, "tokenizer": embedded.tokenizer}, embedded.clip
        )
    return clip_network(path, mesh, config.dtype, scan=config.get("scan_layers", False))


def _load_text(path: str, config: ConfigDict, mesh: Mesh) -> Network:
    # The text tower of a latent U-Net: the part `text` where there is one, or a CLIP's.
    try:
        return clip_network(path, mesh, config.dtype, config.get("scan_layers", False), "text")
    except KeyError:
        return clip_network(path, mesh, config.dtype, config.get("scan_layers", False))


def clip_network(path: str, mesh: Mesh, dtype: str, scan: bool = False, name: str = "clip") -> Network:
    """Loads the CLIP of a run, a bundle or public weights onto a mesh.

    Args:
      dtype: dtype of the computation (`sharding.compute_dtype`).
      scan: whether its layers run in one loop (`Transformer`).
      name: of the part, of kind `clip`.
    """
    part, _ = load_part(path, name)
    module = build_model(part.config, compute_dtype(dtype, mesh), scan=scan, gather=make_gather(mesh))
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    return Network(module, params, part.config, params_hash(part.params))


def _load_codec(path: str, config: ConfigDict, mesh: Mesh) -> Network:
    part, _ = load_part(path, "codec")
    return Network(None, replicate(Codec(**part.params), mesh), part.config, params_hash(part.params))


def _load_lpips(path: str, config: ConfigDict, mesh: Mesh) -> Network:
    if path == "lpips":  # by its name: what `unclip fetch` has downloaded
        if not is_fetched(path):
            raise FileNotFoundError(
                "the network of LPIPS is not there: run `unclip fetch lpips` once, or name its folder with "
                "--set frozen.lpips=DIR"
            )
        path = str(fetched_folder(path))
    part, _ = load_part(path, "lpips")
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    module = build_model(part.config, compute_dtype(config.dtype, mesh))
    return Network(module, params, part.config, params_hash(part.params))


def _load_image_coder(name: str, path: str, config: ConfigDict, mesh: Mesh) -> Network:
    # Networks that turn images into latents or codes, and back.
    part, _ = load_part(path, name)
    params = jax.device_put(part.params, infer_shardings(part.params, mesh))
    module = build_model(part.config, compute_dtype(config.dtype, mesh))
    return Network(module, params, part.config, params_hash(part.params))


def check_pictures(data: Data) -> None:
    """Raises ValueError when a source holds embeddings and no pictures."""
    for source in (data.train, *data.held_out.values()):
        if not source.pictures:
            raise InputError(
                f"{source.name} holds no pictures, which this stage needs: "
                "give the source from which the embeddings were made"
            )


def check_latents(autoencoder: Network, data: Data, side: int, crop_scale: float) -> None:
    """Checks that every source without pictures holds latents of this autoencoder.

    Args:
      side: of the latents that the stage trains on.
      crop_scale: the stage's; latents are of the centred square.

    Raises:
      ValueError: naming the source, and what does not fit.
    """
    for source in (data.train, *data.held_out.values()):
        if source.pictures:
            continue
        latents = source.embedded.latents
        if latents is None:
            raise InputError(f"{source.name} holds no latents: embed with --latents and --size")
        if latents["autoencoder"] != autoencoder.hash:
            raise InputError(
                f"{source.name} holds latents of autoencoder {latents['autoencoder']}, but the one given is "
                f"{autoencoder.hash}: embed again, or give that autoencoder"
            )
        found = latents["shape"][0]
        if found != side:
            raise InputError(
                f"{source.name} holds latents of the side {found}, and model.image_size is {side}"
            )
        if crop_scale < 1:
            raise InputError(
                f"data.crop_scale={crop_scale} crops at random, and latents are of the centred square: "
                "set it to 1, or train from the pictures"
            )


def check_codes(coder: Network, data: Data, size: int, crop_scale: float) -> None:
    """Checks that every source without pictures holds codes of this network, of images of the side `size`.

    Raises:
      ValueError: naming the source, and what does not fit.
    """
    for source in (data.train, *data.held_out.values()):
        if source.pictures:
            continue
        codes = source.embedded.codes
        if codes is None:
            raise InputError(f"{source.name} holds no codes: embed with --codes and --size")
        if codes["coder"] != coder.hash:
            raise InputError(
                f"{source.name} holds codes of {codes['coder']}, but the network given is {coder.hash}: "
                "embed again, or give that network"
            )
        if codes["size"] != size:
            raise InputError(
                f"{source.name} holds codes of images of {codes['size']} px, and image_size is {size}"
            )
        if crop_scale < 1:
            raise InputError(
                f"data.crop_scale={crop_scale} crops at random, and codes are of the centred square: "
                "set it to 1, or train from the pictures"
            )


def codes_of(coder: Network, batch: Mapping[str, jax.Array], size: int) -> list[jax.Array]:
    """The codes (B, h, w) int32 of each level of a batch, the bottom's first.

    A batch that holds `codes` (B, N) keeps them; otherwise its `image`s of the side `size` are encoded.
    """
    if "codes" not in batch:
        return list(coder.apply(batch["image"], method="encode_codes"))
    sides = coder.module.sides(size)
    ends = np.cumsum([side**2 for side in sides])[:-1]
    parts = jnp.split(batch["codes"], ends, axis=1)
    return [part.reshape(-1, side, side) for part, side in zip(parts, sides, strict=True)]


def check_sources(clip: Network, data: Data, pictures: bool) -> None:
    """Checks that every source fits the CLIP.

    Args:
      pictures: whether the stage needs pictures and cannot train from embeddings.

    Raises:
      ValueError: when a source holds embeddings of another CLIP, holds embeddings although the stage needs
        pictures, or holds pictures although only a folder of embeddings was given as the CLIP.
    """
    if pictures:
        check_pictures(data)
    for source in (data.train, *data.held_out.values()):
        embedded = source.embedded
        if embedded is None and clip.module is None:
            raise InputError(
                f"{source.name} holds pictures, and the CLIP given is a folder of embeddings: "
                "give the CLIP itself"
            )
        if embedded is not None and embedded.clip != clip.hash:
            raise InputError(
                f"{source.name} was made with CLIP {embedded.clip}, but the CLIP given is {clip.hash}: "
                "embed again, or give that CLIP"
            )


# ------------------------------------------------------------------------------------------ the empty caption
def _empty_caption(
    clip: Network, data: Data, tokenizer: ClipTokenizer | None, mesh: Mesh
) -> TextConditioning:
    # A stage that trains on embeddings takes the empty caption that they hold.
    embedded = data.train.embedded
    if embedded is not None and (tokenizer is not None or embedded.states):
        return _embedded_empty(embedded, clip_tokenizer(clip), tokenizer)
    if clip.module is None:
        raise InputError(
            f"{embedded.path} holds no text states, which this stage needs: "
            "embed with --states, or give the CLIP itself"
        )
    replicated = NamedSharding(mesh, PartitionSpec())
    tokens = caption_arrays([""], clip_tokenizer(clip), tokenizer)
    encode = jax.jit(functools.partial(captions_of, clip, mesh, tokenizer is None), out_shardings=replicated)
    text = encode(clip.params, tokens)
    return jax.tree.map(lambda value: np.asarray(value.addressable_data(0)), text)


def _embedded_empty(
    embedded: Embedded, tokenizer: ClipTokenizer, own_tokenizer: ClipTokenizer | None
) -> TextConditioning:
    embed = embedded.empty["text_embed"]
    if own_tokenizer is not None:
        tokens = caption_arrays([""], tokenizer, own_tokenizer)
        return TextConditioning(embed, None, None, tokens["tokens"], tokens["token_mask"])
    return TextConditioning(
        embed, np.float32(embedded.empty["text_states"]), embedded.empty["clip_token_mask"]
    )


# ------------------------------------------------------------------------------------------ in the step
def clip_tokenizer(clip: Network) -> ClipTokenizer:
    """The tokenizer of a CLIP's text tower."""
    return ClipTokenizer.from_config(clip.config["tokenizer"])


def clip_image_size(clip: Network) -> int:
    """The side in pixels of the pictures that a CLIP takes; 0 if a folder of embeddings replaces the CLIP."""
    image = clip.config["model"]["image"]
    return 0 if image is None else image["image_size"]


def captions_of(
    clip: Network, mesh: Mesh, keep_states: bool, params: Any, batch: Mapping[str, jax.Array]
) -> TextConditioning:
    """Embeds a batch's captions, without a gradient. A batch that holds embeddings keeps them as they are.

    Args:
      clip: the frozen CLIP.
      keep_states: False for a stage with its own text encoder, which needs only CLIP's embedding.
      params: the CLIP's parameters, as the update step receives them.
      batch: the batch on the mesh.
    """
    if "text_embed" in batch:
        names = ("text_embed", "text_states", "clip_token_mask", "tokens", "token_mask")
        text = TextConditioning(*map(batch.get, names))
    else:
        text = encode_text(clip.with_params(gather_rest(params, mesh)), batch)
    return jax.lax.stop_gradient(text if keep_states else text._replace(states=None, mask=None))


def images_of(clip: Network, mesh: Mesh, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Embeds a batch's `clip_image` (B, Hc, Wc, 3), in [-1, 1], without a gradient.

    Returns:
      Raw z_i (B, D). A batch that holds embeddings keeps them as they are.
    """
    if "image_embed" in batch:
        return batch["image_embed"]
    params = gather_rest(params, mesh)
    return jax.lax.stop_gradient(clip.with_params(params).apply(batch["clip_image"], method="encode_image"))


class ClipReader(NamedTuple):
    """What a stage reads with the CLIP under it.

    images: (params, batch) -> raw z_i (B, D). captions: (params, batch) -> `TextConditioning`. Neither has a
    gradient; `params` are CLIP's, as the step gets them.
    tokenizer: CLIP's; None where it has no text tower.
    own_tokenizer: of the stage's own text encoder, None without one.
    image_size: the side of CLIP's pictures; 0 where embeddings stand for the CLIP. embed_dim: D.
    zeros: one caption's conditioning with every value zero, to initialise networks with.
    """

    images: Callable[[Any, Mapping[str, jax.Array]], jax.Array]
    captions: Callable[[Any, Mapping[str, jax.Array]], TextConditioning]
    tokenizer: ClipTokenizer | None
    own_tokenizer: ClipTokenizer | None
    image_size: int
    embed_dim: int
    zeros: TextConditioning


def clip_reader(
    config: ConfigDict, mesh: Mesh, frozen: Mapping[str, Network], role: str = "clip"
) -> ClipReader:
    """The reader of a stage with a CLIP under it, in the role `role`.

    Raises:
      ValueError: as `text_tokenizer`.
    """
    clip, own = frozen[role], text_tokenizer(config)
    return ClipReader(
        images=functools.partial(images_of, clip, mesh),
        captions=functools.partial(captions_of, clip, mesh, own is None),
        tokenizer=clip_tokenizer(clip) if "tokenizer" in clip.config else None,
        own_tokenizer=own,
        image_size=clip_image_size(clip),
        embed_dim=clip.config["model"]["embed_dim"],
        zeros=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), frozen[EMPTY].params),
    )
