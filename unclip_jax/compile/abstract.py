"""Shapes in place of arrays: a stage's frozen networks and its batch, for programs that are only compiled."""

from __future__ import annotations

import functools
import io
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.checkpoint.convert import array, shapes_of
from unclip_jax.checkpoint.shapes import t5_shapes
from unclip_jax.data.record import Record
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.data.tokenizer import caption_arrays
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.codec import Codec
from unclip_jax.models.kinds import KINDS
from unclip_jax.models.lpips import LPIPS, SMALLEST
from unclip_jax.models.t5 import T5Encoder
from unclip_jax.run.frozen import EMPTY, captions_of, clip_tokenizer, text_tokenizer, wanted_roles
from unclip_jax.run.stage import Stage
from unclip_jax.sharding import BATCH, compute_dtype, infer_shardings, make_gather
from unclip_jax.train import STAGES


def abstract_clip(config: Any, mesh: Mesh, dtype: str, scan: bool, embedded: bool) -> Network:
    """The frozen CLIP of a `clip` configuration. Its parameters are shapes on the mesh.

    If a stage reads CLIP's embeddings (`embedded`), the CLIP has no module and no parameters.
    """
    clip = STAGES["clip"].stage(config, mesh, {})
    if embedded:
        return Network(None, {}, clip.part)
    module = clip.model.clone(dtype=compute_dtype(dtype, mesh), remat="none", scan=scan)
    return Network(module, placed(jax.eval_shape(clip.init, jax.random.key(0))[0], mesh), clip.part)


def abstract_codec(dim: int, mesh: Mesh) -> Network:
    """The codec of embeddings (D,). Its arrays are shapes on the mesh."""
    shapes = Codec(mean=(dim,), components=(dim, dim), eigenvalues=(dim,), low=(dim,), high=(dim,))
    replicated = NamedSharding(mesh, P())
    params = Codec(*(jax.ShapeDtypeStruct(shape, np.float32, sharding=replicated) for shape in shapes))
    return Network(None, params, {"kind": "codec", "embed_dim": dim, "dims": dim})


def abstract_lpips(mesh: Mesh, dtype: str) -> Network:
    """The network of LPIPS. Its parameters are shapes on the mesh."""
    module, image = LPIPS(dtype=compute_dtype(dtype, mesh)), array(1, SMALLEST, SMALLEST, 3)
    return Network(module, placed(shapes_of(module.init, image, image), mesh), {"kind": "lpips", "model": {}})


def abstract_t5(mesh: Mesh, dtype: str) -> Network:
    """The encoder of T5 1.1 XXL, for captions of 256 tokens. Its parameters are shapes on the mesh."""
    model = {"vocab_size": 32_128, "width": 4096, "layers": 24, "heads": 64, "head_dim": 64}
    model |= {"hidden": 10_240, "gated": True}
    module = T5Encoder(**model, dtype=compute_dtype(dtype, mesh), gather=make_gather(mesh))
    # Rows have its shape, whatever the vocabulary.
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    text = json.dumps({"version": "1.0", "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces}})
    tokenizer = T5Tokenizer(text).config()
    config = {"kind": "t5", "model": model, "tokenizer": tokenizer}
    return Network(module, placed(t5_shapes(model), mesh), config)


# Widths of the released KL autoencoders, by the channels of their latents (Rombach et al. 2022, table 8).
KL_WIDTHS = {3: (1, 2, 4), 4: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4)}


def _latent_channels(config: Any) -> int:
    # Of the autoencoder under a stage. A decoder of Kandinsky may make more channels than these.
    return config.model.get("latent_channels") or config.model.out_channels


def abstract_autoencoder(channels: int, mesh: Mesh, dtype: str) -> Network:
    """The released KL autoencoder with latents of so many channels. Its parameters are shapes on the mesh.

    Raises:
      ValueError: when none was released.
    """
    if channels not in KL_WIDTHS:
        known = ", ".join(map(str, KL_WIDTHS))
        raise InputError(f"no autoencoder with latents of {channels} channels is known here; known: {known}")
    model = {
        "latent_channels": channels,
        "channels": 128,
        "channel_mult": KL_WIDTHS[channels],
        "res_blocks": 2,
    }
    module = KLAutoencoder(**model, dtype=compute_dtype(dtype, mesh))
    params = placed(shapes_of(module.init, array(1, module.factor, module.factor, 3)), mesh)
    return Network(module, params, {"kind": "kl_autoencoder", "model": model, "scale_factor": 1.0})


def abstract_codes(kind: str, mesh: Mesh, dtype: str) -> Network:
    """The published network that turns images of 256 px into codes: `vqvae` or `dvae`. Its parameters are
    shapes on the mesh."""
    module = KINDS[kind].module(dtype=compute_dtype(dtype, mesh))
    params = placed(shapes_of(module.init, array(1, module.factor, module.factor, 3)), mesh)
    return Network(module, params, {"kind": kind, "model": {}})


def abstract_frozen(config: Any, clip_config: Any, mesh: Mesh, embedded: bool = False) -> dict[str, Network]:
    """The frozen networks of a stage by role, like those of `run.frozen.load_frozen`.

    Their parameters are shapes on the mesh.
    """
    frozen: dict[str, Network] = {}
    for role, kind in wanted_roles(config, STAGES[config.stage].FROZEN).items():
        if kind in ("clip", "text"):
            frozen[role] = abstract_clip(clip_config, mesh, config.dtype, config.scan_layers, embedded)
        elif kind == "lpips":
            frozen[role] = abstract_lpips(mesh, config.dtype)
        elif kind in ("vqvae", "dvae"):
            frozen[role] = abstract_codes(kind, mesh, config.dtype)
        elif kind == "autoencoder":
            frozen[role] = abstract_autoencoder(_latent_channels(config), mesh, config.dtype)
        elif kind == "t5":
            frozen[role] = abstract_t5(mesh, config.dtype)
        else:
            frozen[role] = abstract_codec(clip_config.model.embed_dim, mesh)
    if "clip" in frozen:
        # The empty caption has the shapes of the text tower, even if embeddings replace the CLIP.
        tower, tokenizer = (
            abstract_clip(clip_config, mesh, config.dtype, config.scan_layers, False),
            text_tokenizer(config),
        )
        tokens = caption_arrays([""], clip_tokenizer(tower), tokenizer)
        shapes = jax.eval_shape(
            functools.partial(captions_of, tower, mesh, tokenizer is None), tower.params, tokens
        )
        frozen[EMPTY] = Network(None, spread(shapes, 1, mesh, P()), {})
    return frozen


def placed(shapes: Any, mesh: Mesh, shardings: Any = None) -> Any:
    """Shapes on the mesh, sharded like parameters unless `shardings` says how."""
    shardings = infer_shardings(shapes, mesh) if shardings is None else shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def spread(tree: Any, count: int, mesh: Mesh, spec: P) -> Any:
    """The tree as shapes with `count` rows in every array."""
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=place), tree)


def abstract_batch(
    stage: Stage, frozen: dict[str, Network], batch_size: int, mesh: Mesh, label: str = "caption"
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes, with the rows that the stage's `example` makes.

    The row comes from a blank picture, or from a record of embeddings if there is no CLIP to embed a picture.
    label: where the stage finds a record's class.
    """
    from PIL import Image

    file, embeds = io.BytesIO(), None
    Image.new("RGB", (64, 64)).save(file, "PNG")
    clip = frozen.get("clip")
    if clip is not None and clip.module is None:
        empty = frozen[EMPTY].params
        embeds = {"text_embed": np.zeros(empty.embed.shape, np.float32)}
        embeds |= {} if empty.states is None else {"text_states": np.zeros(empty.states.shape, np.float32)}
        embeds["image_embed"] = np.zeros(clip.config["model"]["embed_dim"], np.float32)
        if "autoencoder" in frozen:
            side = stage.model.image_size
            embeds["latents"] = np.zeros((side, side, stage.model.out_channels), np.float16)
    if "neighbours" in stage.part:
        count, side = stage.part["neighbours"], stage.model.image_size
        embeds = {
            "neighbours": np.zeros((count, stage.model.context_dim), np.float16),
            "latents": np.zeros((side, side, stage.model.out_channels), np.float16),
        }
    name = stage.part.get("class_names", ["a"])[0]
    record = Record(f"{name}/0", file.getvalue(), (name,), {label: name}, "", embeds)
    row = stage.example(record, np.random.default_rng(0))
    sharding = NamedSharding(mesh, BATCH)
    return {
        k: jax.ShapeDtypeStruct((batch_size, *np.shape(v)), np.asarray(v).dtype, sharding=sharding)
        for k, v in row.items()
    }
