"""What the doctor examines: a bundle, real pictures with captions, and the programs that test it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import last_step, upsamplers
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate.captioned import caption_inputs, eight_bits, sample_captioned
from unclip_jax.generate.decoder import sample_decoder
from unclip_jax.generate.networks import image_size
from unclip_jax.generate.options import Options
from unclip_jax.generate.text import TextConditioning, Texts, encode_text, text_inputs
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.sampling import glide, imagen
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.programs import (
    Progress,
    Sampler,
    as_positions,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)
from unclip_jax.sampling.unclip import DECODER, UPSAMPLERS, draw_z_image, encode_captions

# The cascades whose networks draw pixels from captions alone, by the kinds of their parts.
CASCADES = {"glide": glide.CASCADE, "imagen": imagen.CASCADE, "imagen_upsampler": imagen.CASCADE}


@dataclass(eq=False)
class Subject:
    """A bundle's networks, and the pictures and captions to test them with.

    sampler: the bundle.
    pictures: uint8 (H, W, 3) each, any sizes. captions: one for each picture.
    drawn: how many of the captions are drawn as pictures where a check samples; the first ones. 0: none, and
      such checks are left out.
    seed: of all noise.
    raw: the weights that were trained, by part, where a run also holds their average. The bundle has the
      average.
    progress: called with (images done, total images) while pictures are drawn.
    broken: the parts whose weights are damaged.
    kept: what `once` has made.
    """

    sampler: Sampler
    pictures: Sequence[np.ndarray]
    captions: Sequence[str]
    drawn: int
    seed: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    broken: set[str] = field(default_factory=set)
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def noised(self) -> int:
        """For how many pictures one step is measured: the first quarter."""
        return -(-len(self.pictures) // 4)

    @property
    def embedded(self) -> int:
        """For how many captions a prior draws embeddings: the first half."""
        return -(-len(self.captions) // 2)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` returns, made once for a key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    # ------------------------------------------------------------------------------------ the bundle
    def names(self, *kinds: str) -> list[str]:
        """The parts of these kinds, in the bundle's order."""
        return [name for name, part in self.sampler.bundle.parts.items() if part.config["kind"] in kinds]

    def config(self, name: str) -> dict:
        """A part's configuration."""
        return self.sampler.bundle.part(name).config

    def tower(self, name: str) -> bool:
        """Whether the bundle's part `clip` has this tower, `image` or `text`."""
        held = self.sampler.bundle.parts
        return "clip" in held and held["clip"].config["model"].get(name) is not None

    # ------------------------------------------------------------------------------------ the data
    def images(self, size: int) -> np.ndarray:
        """The pictures, cropped to their centred squares: float32 (N, size, size, 3) in [-1, 1]."""
        return self.once(("images", size), lambda: ops.to_float(square(self.pictures, size)))

    @functools.cached_property
    def tokens(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The captions and the empty caption as arrays of tokens (`Sampler.captions`)."""
        return self.sampler.captions(self.captions), self.sampler.captions([""])

    @functools.cached_property
    def clip_size(self) -> int:
        """The side of the pictures that CLIP's image tower takes."""
        return self.config("clip")["model"]["image"]["image_size"]

    # ------------------------------------------------------------------------------------ CLIP
    def embed_images(self, images: np.ndarray, params: Any = None) -> np.ndarray:
        """Raw embeddings (N, D) of images (N, H, W, 3) in [-1, 1] of any size; `params` replace CLIP's."""
        clip = self.sampler.network("clip")
        if images.shape[1] != self.clip_size:
            images = np.stack([ops.resize(image, self.clip_size) for image in images])
        encode = self.sampler.program(
            "encode_image", lambda: lambda params, x: clip.with_params(params).apply(x, method="encode_image")
        )
        params = clip.params if params is None else params
        run = lambda rows: encode(params, self.sampler.rows(images, rows))
        return self.sampler.in_batches(run, len(images), ["clip"])

    def embed_captions(self, params: Any = None) -> TextConditioning:
        """The captions' conditioning, arrays of N rows; `params` replace CLIP's."""
        clip, (captions, _) = self.sampler.network("clip"), self.tokens
        params = clip.params if params is None else params
        encode = self.sampler.program(
            "doctor texts",
            lambda: lambda params, texts: encode_text(clip.with_params(params), texts),
        )
        run = lambda rows: encode(params, self.sampler.rows(captions, rows))
        made = ["clip"] * (3 + 2 * ("tokens" in captions))
        return self.sampler.in_batches(run, len(self.captions), made)

    @functools.cached_property
    def z_image(self) -> np.ndarray:
        """The pictures' raw image embeddings z_i, (N, D)."""
        return self.embed_images(self.images(self.clip_size))

    @functools.cached_property
    def texts(self) -> TextConditioning:
        """The captions' conditioning, with z_t; arrays of N rows."""
        return self.embed_captions()

    # ------------------------------------------------------------------------------------ one step
    def network_output(
        self, name: str, x: np.ndarray, t: np.ndarray, inputs: Mapping[str, Any], params: Any = None
    ) -> np.ndarray:
        """The raw output of a diffusion part for noised inputs x (M, ...) at time steps t (M,).

        inputs: arrays of M rows. params: replace the part's.
        """
        network = self.sampler.network(name)
        run = self.sampler.program(
            ("doctor step", name),
            lambda: lambda params, x, t, inputs: network.with_params(params).apply(x, t, **inputs),
        )
        params = self.sampler.params[name] if params is None else params

        def batch(rows):
            x_t, at, given = self.sampler.rows((x, t, inputs), rows)
            return run(params, x_t, at, given)

        return self.sampler.in_batches(batch, len(x), [name])

    def reader(self, name: str) -> str | None:
        """The part that reads the captions for a part whose kind is in CASCADES: itself, or Imagen's T5 or
        CLIP; None where that is missing."""
        parts, cascade = self.sampler.bundle.parts, CASCADES[self.config(name)["kind"]]
        if cascade.base == "glide":
            return name
        frozen = parts[cascade.base].config.get("frozen", {}) if cascade.base in parts else {}
        role = "clip" if "clip" in frozen else "t5"
        return role if cascade.base in parts and role in parts else None

    @functools.cached_property
    def words(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """As `tokens`, for the networks whose kinds are in CASCADES."""
        kind = next(config["kind"] for config in map(self.config, self.names(*CASCADES)))
        tower = CASCADES[kind].tower(self.sampler.bundle)
        return self.sampler.captions(self.captions, tower), self.sampler.captions([""], tower)

    def caption_inputs(self, name: str) -> dict[str, np.ndarray]:
        """The text arguments, for all captions, of a part whose kind is in CASCADES: its tokens, or the
        states that its `reader` makes."""

        def make():
            cascade = CASCADES[self.config(name)["kind"]]
            encode = lambda params, texts: caption_inputs(
                cascade.encode(self.sampler.with_params(params), texts)
            )
            run = self.sampler.program(("doctor captions", cascade.base), lambda: encode)
            batch = lambda rows: run(self.sampler.params, self.sampler.rows(self.words[0], rows))
            return self.sampler.in_batches(batch, len(self.captions), [self.reader(name)] * 2)

        return self.once(("captions", CASCADES[self.config(name)["kind"]].base), make)

    def text_inputs(self, name: str) -> dict[str, Any]:
        """A part's text arguments for all captions."""
        return text_inputs(self.sampler.network(name).module, self.texts)

    # ------------------------------------------------------------------------------------ whole stages
    def options(self, **overrides: Mapping[str, Any]) -> dict[str, Options]:
        """The bundle's sampling options, with overrides by part."""
        return self.sampler.options(overrides)

    def _noise(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        # The seeds and positions of rows (`row_keys`).
        return as_seeds(self.seed, count), as_positions(None, count)

    def draw_embeddings(self, prior: str, **overrides: Mapping[str, Any]) -> np.ndarray:
        """z_i (embedded, D) from a prior, a key of `unclip.PRIORS`, for the first captions."""
        static, scales = split_scales([self.options(**overrides)] * len(self.captions))

        def make():
            def run(params, scales, captions, empty, seeds, positions):
                networks, chosen = self.sampler.with_params(params), with_scales(static, scales)
                texts = encode_captions(networks["clip"], captions, empty)
                return draw_z_image(prior, networks, texts, row_keys(seeds, positions), chosen)

            return run

        run = self.sampler.program(("doctor prior", prior, *static.items()), make)
        captions, empty = self.tokens
        count = self.embedded

        def batch(rows):
            scale, texts, noise = self.sampler.rows((scales, captions, self._noise(count)), rows)
            return run(self.sampler.params, scale, texts, empty, *noise)

        return self.sampler.in_batches(batch, count, [prior])

    def draw_images(self, z_image: np.ndarray, **overrides: Mapping[str, Any]) -> np.ndarray:
        """The decoder's images (drawn, H, W, 3) in [-1, 1] for embeddings (drawn, D) and the captions."""
        static, scales = split_scales([self.options(**overrides)] * len(self.captions))

        def make():
            def run(params, scales, captions, empty, z, seeds, positions):
                networks, chosen = self.sampler.with_params(params), with_scales(static, scales)
                texts = encode_captions(networks["clip"], captions, empty)
                keys = fold_in(row_keys(seeds, positions), DECODER)
                return sample_decoder(networks["decoder"], z, texts, keys, chosen["decoder"])

            return run

        run = self.sampler.program(("doctor decoder", *static.items()), make)
        captions, empty = self.tokens
        z = np.asarray(z_image, np.float32)

        def batch(rows):
            given = scales, captions, z, self._noise(len(z))
            scale, texts, z_rows, noise = self.sampler.rows(given, rows)
            return run(self.sampler.params, scale, texts, empty, z_rows, *noise)

        return self.sampler.in_batches(batch, self.drawn, ["decoder"], self.progress)

    def enlarge(self, name: str, images: np.ndarray) -> np.ndarray:
        """One upsampler's output (N, H, W, 3) for images (N, h, w, 3), both in [-1, 1]."""
        if self.config(name)["kind"] in CASCADES:
            return self.draw_captioned(name, images)
        parts = self.sampler.bundle.parts
        options, number = self.options()[name], UPSAMPLERS + upsamplers(parts).index(name)
        final = last_step(parts, name)

        def make():
            def run(params, low_res, seeds, positions):
                networks = self.sampler.with_params(params)
                last = None if final is None else networks[final]
                keys = fold_in(row_keys(seeds, positions), number)
                return sample_upsampler(networks[name], low_res, keys, options, last)

            return run

        run = self.sampler.program(("doctor upsampler", name, options), make)

        def batch(rows):
            low_res, noise = self.sampler.rows((images, self._noise(len(images))), rows)
            return run(self.sampler.params, low_res, *noise)

        return self.sampler.in_batches(batch, len(images), [name], self.progress)

    def draw_captioned(self, name: str, images: np.ndarray | None = None) -> np.ndarray:
        """The images (N, H, W, 3) in [-1, 1] that a part whose kind is in CASCADES draws for the first N
        captions: for `drawn` of them, or from N small images (N, h, w, 3) of the same captions."""
        cascade, count = CASCADES[self.config(name)["kind"]], self.drawn if images is None else len(images)
        made = [cascade.base, *upsamplers(self.sampler.bundle.parts)]
        options, number = self.options()[name], made.index(name)

        def run(params, captions, empty, low_res, seeds, positions):
            networks = self.sampler.with_params(params)
            texts = Texts(cascade.encode(networks, captions), cascade.encode(networks, empty))
            if low_res is not None and cascade.rounds:
                low_res = eight_bits(low_res)
            keys = fold_in(row_keys(seeds, positions), number)
            return sample_captioned(networks[name], texts, keys, options, low_res=low_res)

        program = self.sampler.program(("doctor captioned", name, options), lambda: run)

        def batch(rows):
            given = self.words[0], images, self._noise(count)
            captions, low_res, noise = self.sampler.rows(given, rows)
            return program(self.sampler.params, captions, self.words[1], low_res, *noise)

        return self.sampler.in_batches(batch, count, [name], self.progress)

    # ------------------------------------------------------------------------------------ drawn once
    def drawn_base(self, name: str) -> np.ndarray:
        """The images (drawn, H, W, 3) of the part that an upsampler of small pictures enlarges, drawn once:
        the decoder's for true z_i, or those of a network that draws from captions."""
        if self.config(name)["kind"] == "decoder":
            return self.drawn_oracle
        return self.once(("base", name), lambda: self.draw_captioned(name))

    def drawn_embeddings(self, prior: str) -> np.ndarray:
        """z_i (embedded, D) from a prior, drawn once; "none" gives z_t."""
        return self.once(("embeddings", prior), lambda: self.draw_embeddings(prior))

    @property
    def drawn_oracle(self) -> np.ndarray:
        """The decoder's images for true z_i, at the bundle's guidance, drawn once."""
        return self.drawn_oracle_at(float(self.options()["decoder"].guidance_scale))

    def drawn_oracle_at(self, scale: float) -> np.ndarray:
        """The decoder's images for true z_i at a guidance scale, drawn once."""
        z = self.z_image[: self.drawn]
        draw = lambda: self.draw_images(z, decoder={"guidance_scale": scale})
        return self.once(("oracle", scale), draw)

    def drawn_from(self, prior: str) -> np.ndarray:
        """The decoder's images for a prior's z_i, drawn once."""
        return self.once(
            ("images", prior), lambda: self.draw_images(self.drawn_embeddings(prior)[: self.drawn])
        )

    def low_res(self, name: str) -> np.ndarray:
        """The pictures (N, h, w, 3) at the size that an upsampler enlarges."""
        config = self.config(name)
        return self.images(image_size(config) // config["factor"])

    def enlarged(self, name: str, source: str, images: np.ndarray) -> np.ndarray:
        """An upsampler's output for images of a source, drawn once for each source."""
        return self.once(("enlarged", name, source), lambda: self.enlarge(name, images))
