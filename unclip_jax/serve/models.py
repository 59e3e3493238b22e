"""The bundles that a server draws with, and the tasks that requests become."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.data import ops
from unclip_jax.errors import InputError, MissingError, UserError, one_line
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.programs import Partial, Sampler, split_scales
from unclip_jax.sampling.text_to_image import System, overrides_of, system_of
from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.worker import Shown, Task

ALIAS = "dall-e-2"  # what clients of OpenAI send: the first bundle stands for it
WARM = "a photo"  # the caption that programs are compiled for; its words do not matter


class Model:
    """A bundle that draws.

    name: what requests call it. sampler: the bundle on its devices. system: its row of `SYSTEMS`.
    base: sampling options of every request.
    sizes: the sides in pixels that its stages draw, ascending. priors: those whose parts the bundle has.
    """

    def __init__(self, name: str, sampler: Sampler, no_filter: bool = False):
        self.name, self.sampler = name, sampler
        self.system: System = system_of(sampler.bundle)
        self.sizes = self.system.sizes(sampler.bundle)
        parts = sampler.bundle.parts
        self.base = {self.system.draws: {"filter": False}} if no_filter and "safety" in parts else {}
        self.priors = [
            prior for prior, needed in self.system.priors.items() if all(name in parts for name in needed)
        ]

    def describe(self) -> dict[str, Any]:
        """What `/v1/models` says of it, beside what all models have."""
        options = self.sampler.options()
        return {
            "system": self.sampler.bundle.system,
            "sizes": [f"{size}x{size}" for size in self.sizes],
            "priors": self.priors,
            "verbs": self.verbs,
            "parts": list(self.sampler.bundle.parts),
            "defaults": {
                name: {
                    field: getattr(chosen, field)
                    for field in ("steps", "sampler", "guidance_scale", "eta", "candidates")
                    if hasattr(chosen, field)
                }
                for name, chosen in options.items()
            },
        }

    # ------------------------------------------------------------------------------------------- requests
    def options(self, values: Mapping[str, Any], prior: str) -> dict[str, dict[str, Any]]:
        """Sampling options from the fields of a request.

        Raises:
          ApiError: 400, where a field is out of range for the bundle.
        """
        names = ("steps", "guidance_scale", "prior_guidance_scale", "eta", "candidates")
        given = {name: values[name] for name in names if values.get(name) is not None}
        if values.get("negative_prompt"):
            if "negative" not in self.system.options:
                system = self.sampler.bundle.system
                raise ApiError(400, f"the system {system} takes no negative prompt", "negative_prompt")
            given["negative"] = values["negative_prompt"]
        try:
            chosen = overrides_of(self.sampler.bundle, prior, given)
            for part, settings in self.base.items():
                chosen[part] = {**settings, **chosen.get(part, {})}
            self.sampler.options(chosen)
        except UserError as error:
            param = next(iter(given)) if len(given) == 1 else None
            raise ApiError(400, one_line(error), param=param) from None
        return chosen

    def prior(self, values: Mapping[str, Any]) -> str | None:
        """The prior that a request asks for, or the system's first that the bundle has; None without priors.

        Raises:
          ApiError: 400, where the bundle does not have it.
        """
        asked = values.get("prior")
        if asked is None:
            return self.priors[0] if self.priors else None
        if asked not in self.priors:
            known = ", ".join(self.priors) or "none"
            raise ApiError(400, f"the model {self.name} has no prior {asked!r}; it has {known}", "prior")
        return asked

    def own_size(self, size: int | None) -> int:
        """The place in `sizes` of the size that is nearest to the one that a request asks for."""
        if size is None:
            return len(self.sizes) - 1
        return int(np.argmin([abs(np.log(own / size)) for own in self.sizes]))

    # ---------------------------------------------------------------------------------------------- tasks
    def _key(
        self, verb: str, *settings: Any, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> tuple:
        static, _ = split_scales([self.sampler.options(options)])
        for part, chosen in static.items():
            # A negative caption is an argument of the program, as captions are.
            if getattr(chosen, "negative", ""):
                static[part] = dataclasses.replace(chosen, negative="")
        return (verb, self.name, *settings, *static.items())

    def _drawing(
        self,
        key: tuple,
        rows: Sequence[tuple],
        call: Callable[[list[tuple]], tuple[tuple, dict[str, Any]]],
        plain: Callable[..., Any],
        stream: Callable[..., Any] | None,
        results: Callable[[Any], list[Any]],
    ) -> Task:
        """A task that draws pictures with a function of the system.

        Args:
          key: of the task; its first item is the verb.
          rows: of the task.
          call: rows -> arguments and keyword arguments of both functions.
          plain: draws the rows.
          stream: the same as a generator of `Partial`s and then the pictures; None if there is none.
          results: what the functions make -> one result per row.
        """
        verb, sampler = key[0], self.sampler

        def draw(rows: list[tuple]) -> list[Any]:
            args, settings = call(rows)
            return results(plain(sampler, *args, **settings))

        def shows(count: int) -> Task:
            def draw(rows: list[tuple]) -> Iterator[Shown | list[Any]]:
                args, settings = call(rows)
                for made in stream(sampler, *args, partials=count, **settings):
                    on_the_way = isinstance(made, Partial)
                    yield Shown(list(ops.to_uint8(made.image))) if on_the_way else results(made)

            name = f"stream {verb}"
            return Task(sampler, (name, *key[1:]), rows, draw, self.name, name, count)

        return Task(sampler, key, rows, draw, self.name, verb, shows=shows if stream else None)

    def generate(
        self, prompt: str, n: int, seed: int, prior: str | None, options: dict[str, dict[str, Any]]
    ) -> Task:
        """Pictures of a caption. Picture i is that of `unclip sample` at (seed, position i).

        Each result is a list of uint8 pictures (H, W, 3), one per size.
        """

        def call(rows: list[tuple]) -> tuple[tuple, dict[str, Any]]:
            prompts, seeds, positions, overrides = (list(column) for column in zip(*rows))
            settings = {"seed": seeds, "positions": positions, "options": overrides}
            return (prompts,), settings | ({} if prior is None else {"prior": prior})

        rows = [(prompt, seed, position, options) for position in range(n)]
        key = self._key("generate", prior, options=options)
        results = lambda stages: by_row(stages.images)
        return self._drawing(key, rows, call, self.system.sample, self.system.stream, results)

    def inpaint(
        self,
        pictures: Sequence[tuple[np.ndarray, np.ndarray]],
        prompt: str,
        n: int,
        seed: int,
        prior: str | None,
        options: dict[str, dict[str, Any]],
    ) -> Task:
        """Pictures whose unknown part is drawn anew, n of each; `pictures` are pairs of `inpaint_rows`.

        Each result is a uint8 picture (H, W, 3) of the largest size.
        """

        def call(rows: list[tuple]) -> tuple[tuple, dict[str, Any]]:
            images, masks, prompts, seeds, positions, overrides = (list(column) for column in zip(*rows))
            settings = {"seed": seeds, "positions": positions, "options": overrides}
            return (images, masks, prompts), settings | ({} if prior is None else {"prior": prior})

        repeated = [pair for pair in pictures for _ in range(n)]
        rows = [(*pair, prompt, seed, position, options) for position, pair in enumerate(repeated)]
        key = self._key("inpaint", prior, options=options)
        trained = "decoder_inpaint" in self.sampler.bundle.parts
        stream = self.system.stream_inpaint if trained else None
        return self._drawing(key, rows, call, self.system.inpaint, stream, list)

    def encode(self, images: Sequence[np.ndarray], steps: int | None, scale: float | None) -> Task:
        """The latents of images: each result is a pair (z_i, x_T)."""
        shared = {"steps": steps or inversion.STEPS}
        rows = [(image, 1.0 if scale is None else scale) for image in images]

        def draw(rows: list[tuple]) -> list[tuple[np.ndarray, np.ndarray]]:
            images, scales = (list(column) for column in zip(*rows))
            found = coder_of(self.sampler).encode(self.sampler, images, guidance_scale=scales, **shared)
            return list(zip(*found))

        static = self._edit(rows[0][1], 0.0, **shared)
        return Task(self.sampler, ("encode", self.name, static), rows, draw, self.name, "encode")

    def decode(
        self,
        latents: Sequence[tuple[np.ndarray, np.ndarray]],
        seed: int,
        positions: Sequence[int],
        steps: int | None,
        scale: float | None,
        eta: float,
    ) -> Task:
        """Pictures of latents. Each result is a list of uint8 pictures (H, W, 3), one per size."""
        shared = {"steps": steps or inversion.STEPS, "eta": eta}
        scale = 1.0 if scale is None else scale

        def call(rows: list[tuple]) -> tuple[tuple, dict[str, Any]]:
            z_image, x_T, seeds, positions, scales = (list(column) for column in zip(*rows))
            given = inversion.Latents(np.stack(z_image), np.stack(x_T))
            return (given,), {"seed": seeds, "positions": positions, "guidance_scale": scales, **shared}

        rows = [(*pair, seed, position, scale) for pair, position in zip(latents, positions)]
        key = ("decode", self.name, self._edit(scale, **shared))
        decode = coder_of(self.sampler).decode
        return self._drawing(key, rows, call, decode, self.system.stream_decode, by_row)

    def _edit(self, scale: float, eta: float, steps: int) -> Any:
        # What is the same for all rows of a batch of an edit.
        try:
            chosen = coder_of(self.sampler).check_edit(self.sampler, steps, scale, eta=eta)
        except UserError as error:
            raise ApiError(400, one_line(error)) from None
        return split_scales([{"decoder": chosen}])[0]["decoder"]

    def embed_captions(self, captions: Sequence[str]) -> Task:
        """Raw text embeddings (D,)."""
        draw = lambda rows: list(inversion.embed_captions(self.sampler, rows))
        key = "embed_captions", self.name
        return Task(self.sampler, key, list(captions), draw, self.name, "embed_captions")

    def embed_images(self, images: Sequence[np.ndarray]) -> Task:
        """Raw image embeddings (D,)."""
        draw = lambda rows: list(inversion.embed_images(self.sampler, rows))
        key = "embed_images", self.name
        return Task(self.sampler, key, list(images), draw, self.name, "embed_images")

    def first(self) -> Task:
        """The task whose program is compiled first: a picture of a caption."""
        return self.generate(WARM, 1, 0, self.prior({}), self.base)

    def announced(self) -> dict[str, list[Task]]:
        """The tasks that a server of this bundle compiles before they are asked for, by verb."""
        prior, side = self.prior({}), self.sizes[0]
        tasks = {"generations": [self.first()]}
        if tasks["generations"][0].shows:
            tasks["stream"] = [tasks["generations"][0].shows(1)]
        image = np.zeros((side, side, 3), np.uint8)
        if "edits" in self.verbs:
            mask = np.arange(side) < np.full((side, 1), side // 2)
            tasks["edits"] = [self.inpaint([(image, mask)], WARM, 1, 0, prior, self.base)]
        if "variations" in self.verbs:
            tasks["variations"] = [self.encode([image], None, None)]
            z_image = np.zeros(self.sampler.network("clip").config["model"]["embed_dim"], np.float32)
            noise = np.zeros(coder_of(self.sampler).noise_shape(self.sampler), np.float32)
            tasks["variations"] += [
                self.decode([(z_image, noise)], 0, [0], None, None, eta) for eta in (1.0, 0.0)
            ]
        return tasks

    @property
    def verbs(self) -> list[str]:
        """What the bundle can do: generations, stream, edits, variations and the verbs of /v1/unclip."""
        system, parts = self.system, self.sampler.bundle.parts
        verbs = ["generations", *(["stream"] if system.stream else [])]
        if system.inpaint:
            verbs.append("edits")
        clip = parts["clip"].config["model"] if "clip" in parts else {}
        if system.coder and clip.get("image"):
            verbs += ["variations", "interpolate", "text_diff"]
            verbs += ["reconstruct"] if "codec" in parts else []
        return verbs


def by_row(images: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Pictures by size, each (B, H, W, 3) in [-1, 1] -> for each row, a list of uint8 pictures by size."""
    return [list(pictures) for pictures in zip(*map(ops.to_uint8, images))]


class Models:
    """The bundles of a server by their names."""

    def __init__(self, models: Sequence[Model]):
        self.by_name: dict[str, Model] = {}
        for model in models:
            if model.name in self.by_name:
                raise InputError(f"two bundles are called {model.name!r}: rename one folder")
            self.by_name[model.name] = model
        self.first = models[0]

    def find(self, name: str | None) -> Model:
        """The model of a request. Without a name, and for `dall-e-2`, it is the first bundle.

        Raises:
          ApiError: 404, naming the models there are.
        """
        if name in self.by_name:
            return self.by_name[name]
        if name in (None, "", ALIAS):
            return self.first
        known = ", ".join(self.by_name)
        raise ApiError(404, f"no model {name!r} here; there is {known}", "model", "model_not_found")


def load_models(
    bundles: Sequence[str], mesh: Mapping[str, int] | None = None, no_filter: bool = False
) -> Models:
    """Loads bundles onto the devices.

    Args:
      bundles: names or folders, as `load_bundle` takes them. A bundle is called like its folder.
      mesh: axes of the mesh, as `sharding.sampling_mesh` takes them.
      no_filter: keeps the pictures that a bundle's safety checker flags, which are black otherwise.

    Raises:
      ValueError, OSError: with one line.
    """
    from unclip_jax.checkpoint.load import load_bundle, stored_bytes
    from unclip_jax.sharding import sampling_mesh

    if not bundles:
        raise InputError("no bundle: name at least one with --bundle")
    models = []
    for name in bundles:
        bundle = load_bundle(name, mesh=sampling_mesh(mesh, stored_bytes(name)))
        if system_of(bundle).reads(bundle) != "captions":
            raise InputError(f"{name} reads no captions, so it cannot be served; unclip sample draws from it")
        short = name.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
        try:
            models.append(Model(short, Sampler(bundle), no_filter))
        except MissingError as error:
            raise InputError(f"{name} cannot draw pictures: {error}") from None
    return Models(models)
