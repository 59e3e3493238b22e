"""`Sampler`: a bundle, its weights on a mesh, its compiled programs; and functions that all cascades use.

A sampler pads each batch so that every device gets a power of two of rows, at most MAX_BATCH. A bundle
therefore compiles a fixed, small number of programs, however many calls follow. Each batch is split over the
devices of the mesh. The mesh's axes decide whether parameters are replicated or sharded.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.checkpoint.bundle import Bundle, Part, last_step_of, upsamplers
from unclip_jax.data.tokenizer import ClipTokenizer, caption_arrays, warn_of_cuts
from unclip_jax.data.tokenizers import AnyTokenizer, tokenizer_of
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.generate.networks import Network, sampling_model
from unclip_jax.generate.options import OPTIONS, Options, check_options, is_guided, options_from
from unclip_jax.models.kinds import KINDS
from unclip_jax.sharding import BATCH, compute_dtype, path_name, placer, replicate, sampling_mesh

MAX_BATCH = 16
Progress = Callable[[int, int], None]
Overrides = (
    Mapping[str, Mapping[str, Any]] | None
)  # of the bundle's sampling defaults: part -> option -> value


class Partial(NamedTuple):
    """What the decoder predicts on its way.

    image: float (B, h, w, 3) in [-1, 1], of the decoder's size. done: the share of its steps made so far.
    """

    image: np.ndarray
    done: float


class Sampler:
    """A bundle's networks on a mesh, and the programs compiled for them so far.

    Make one sampler and pass it to every call, so that the programs stay compiled. The functions of
    `sampling` also accept a plain bundle. They then make a sampler for that one call.

    Args:
      bundle: the networks.
      mesh: the devices to sample on. None means the mesh that the bundle was loaded onto or, if there is
        none, the mesh that `sharding.sampling_mesh` makes.

    Raises:
      ValueError: when the bundle was loaded onto another mesh.
    """

    def __init__(self, bundle: Bundle, mesh: Mesh | None = None):
        if bundle.mesh is not None and mesh not in (None, bundle.mesh):
            raise InputError(
                f"the bundle {bundle.path} lies on another mesh; load it again onto the mesh to sample on"
            )
        self.bundle = bundle
        self.mesh = bundle.mesh or mesh or _default_mesh(bundle.parts)
        place = None if bundle.mesh is not None else placer(self.mesh)
        self.networks = {name: self._network(part, place) for name, part in bundle.parts.items()}
        self.params = {name: network.params for name, network in self.networks.items()}
        self._programs: dict[Hashable, Program] = {}
        self._made: dict[Hashable, Any] = {}
        self._tokenizers: dict[str, ClipTokenizer] = {}
        self._compiling = threading.local()

    def _network(self, part: Part, place: Callable | None) -> Network:
        if part.config["kind"] == "codec":  # has no module, and is small
            return Network(None, replicate(part.params, self.mesh), part.config, part.hash)
        if KINDS[part.config["kind"]].module is None:  # stays on the host
            return Network(None, {}, part.config, part.hash)
        params = part.params
        if place is not None:
            params = jax.tree_util.tree_map_with_path(
                lambda path, value: place(path_name(path), value), params
            )
        return Network(sampling_model(part.config, self.mesh), params, part.config, part.hash)

    def network(self, name: str) -> Network:
        """The part's network. Raises a KeyError that names the part and the bundle if the bundle lacks it."""
        self.bundle.part(name)
        return self.networks[name]

    def with_params(self, params: Mapping[str, Any]) -> dict[str, Network]:
        """The networks with `params` in place of their parameters.

        params: a tree like `self.params`, which a program takes as an argument.
        """
        return {name: network.with_params(params[name]) for name, network in self.networks.items()}

    def program(self, key: Hashable, make: Callable[[], Callable]) -> Callable:
        """Jits the function that `make()` returns, once per key. All devices get its whole results.

        Inside `compiling` the result only compiles its program, and returns noise in place of results.
        """
        if key not in self._programs:
            self._programs[key] = Program(make(), NamedSharding(self.mesh, PartitionSpec()))
        used = getattr(self._compiling, "keys", None)
        if used is None:
            return self._programs[key]
        used.add(key)
        return self._programs[key].stand_in

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` returns, made once per key. A call with the same key gets the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def compiling(self, call: Callable[[], Any]) -> set[Hashable]:
        """Compiles the programs that `call()` uses and does not run them, while other threads may draw.

        Returns:
          The keys of these programs, for `forget`.
        """
        self._compiling.keys = used = set()
        try:
            call()
        finally:
            del self._compiling.keys
        return used

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Drops compiled programs, so that a process that serves many settings does not keep them all."""
        for key in keys:
            self._programs.pop(key, None)

    @functools.cached_property
    def tokenizer(self) -> ClipTokenizer:
        """CLIP's tokenizer."""
        return self.tokenizer_of("clip")

    def tokenizer_of(self, tower: str) -> ClipTokenizer:
        """The tokenizer of a part of the kind `clip`.

        Raises:
          ValueError: when the part has no text encoder.
        """
        if tower not in self._tokenizers:
            config = self.bundle.part(tower).config
            if "tokenizer" not in config:
                raise InputError(
                    f"the part {tower} of {self.bundle.path or 'the bundle'} has no text encoder"
                )
            self._tokenizers[tower] = ClipTokenizer.from_config(config["tokenizer"])
        return self._tokenizers[tower]

    @functools.cached_property
    def _text_encoder_tokenizer(self) -> AnyTokenizer | None:
        # The tokenizer of the parts with another text encoder than CLIP's; None if no part has one.
        parts = [part.config for name, part in self.bundle.parts.items() if part.config["kind"] != "clip"]
        configs = [config["tokenizer"] for config in parts if "tokenizer" in config]
        if any(config != configs[0] for config in configs):
            raise InputError(
                f"the parts of {self.bundle.path or 'the bundle'} have text encoders "
                "with different tokenizers"
            )
        return tokenizer_of(configs[0]) if configs else None

    def captions(
        self, captions: Sequence[str], tower: str | None = "clip", warns: bool = True
    ) -> dict[str, np.ndarray]:
        """Tokenizes captions for a text tower, and for the parts with a text encoder of their own (see
        `tokenizer.caption_arrays`).

        Args:
          captions: the texts.
          tower: a part of the kind `clip`; None for captions that no CLIP reads.
          warns: whether to log a warning with the words of captions that are too long for a network.

        Raises:
          ValueError: when the tower reads no text, or two parts have text encoders with different tokenizers.
        """
        tokenizer = None if tower is None else self.tokenizer_of(tower)
        if warns:
            warn_of_cuts(captions, tokenizer, self._text_encoder_tokenizer)
        return caption_arrays(captions, tokenizer, self._text_encoder_tokenizer)

    def rows(self, batch: Any, rows: np.ndarray) -> Any:
        """Takes `rows` of every array of a tree and splits them over the mesh."""
        return jax.device_put(jax.tree.map(lambda array: array[rows], batch), NamedSharding(self.mesh, BATCH))

    def options(self, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Options]:
        """The bundle's sampling options with overrides; see `stage_options`."""
        return stage_options(self.bundle, overrides)

    def row_options(self, overrides: Overrides | Sequence[Overrides], count: int) -> list[dict[str, Options]]:
        """The options of `count` rows: the same overrides for all of them, or a list with one per row.

        Raises:
          ValueError: as `options`, or when the list has another length.
        """
        if overrides is None or isinstance(overrides, Mapping):
            return [self.options(overrides)] * count
        if len(overrides) != count:
            raise InputError(f"expected options for {count} rows, got {len(overrides)}")
        read = {id(row): self.options(row) for row in {id(row): row for row in overrides}.values()}
        return [read[id(row)] for row in overrides]

    def in_batches(
        self,
        run: Callable[[np.ndarray], Any],
        count: int,
        parts: Sequence[str],
        progress: Progress | None = None,
        max_batch: int | None = None,
    ) -> Any:
        """Calls `run(rows)` on padded batches of row indices and joins the results.

        Args:
          run: a function of row indices that returns a tree of arrays with one entry per index. It gets a
            power of two of indices per device of the mesh; the last index is repeated as padding.
          count: number of rows, at least 1.
          parts: the parts that made the tree's arrays, one for each array, the first stage's first.
          progress: called with (rows done, total rows) after each batch.
          max_batch: largest number of rows at a time on each device. None means MAX_BATCH.

        Returns:
          The tree as NumPy arrays of `count` rows.

        Raises:
          NumericalError: naming the first part whose array has a value that is not finite.
        """
        ways, pieces = self.mesh.shape["data"] * self.mesh.shape["fsdp"], []
        largest = ways * (max_batch or MAX_BATCH)
        for first in range(0, count, largest):
            rows = np.arange(first, min(first + largest, count))
            leaves, tree = jax.tree.flatten(run(rows[0] + self.padded(len(rows))))
            pieces.append([np.asarray(a)[: len(rows)] for a in leaves])
            for part, made in zip(parts, pieces[-1], strict=True):
                self.check_finite(part, made)
            if progress is not None:
                progress(int(rows[-1]) + 1, count)
        return jax.tree.unflatten(tree, [np.concatenate(column) for column in zip(*pieces)])

    def padded(self, count: int) -> np.ndarray:
        """The indices of a batch of `count` rows: a power of two per device, the last one repeated."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return np.minimum(np.arange(ways << (-(-count // ways) - 1).bit_length()), count - 1)

    def check_finite(self, part: str, made: np.ndarray) -> None:
        """Raises a NumericalError that names the part unless all values that it made are finite."""
        if not np.isfinite(made).all():
            raise NumericalError(
                f"the part {part!r} of the bundle {self.bundle.path or '(unsaved)'} made values that are not "
                "finite (NaN or infinity): its weights are damaged, or a sampling option is too large"
            )


class Program:
    """A function, and the programs compiled from it so far: one for each set of its arguments' shapes.

    Threads may call it at the same time. The first one compiles, and the others wait for it.
    """

    def __init__(self, run: Callable, sharding: NamedSharding):
        self._jitted = jax.jit(run, out_shardings=sharding)
        self._compiled: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def compiled(self, *args: Any) -> Any:
        """The program for arguments of these shapes."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        with self._lock:
            if shapes not in self._compiled:
                self._compiled[shapes] = self._jitted.lower(*args).compile()
            return self._compiled[shapes]

    def __call__(self, *args: Any) -> Any:
        """Runs the program; compiles it first where it must."""
        return self.compiled(*args)(*args)

    def stand_in(self, *args: Any) -> Any:
        """Compiles the program, and returns noise of its results' shapes; False for truth values."""
        rng = np.random.default_rng(0)
        noise = lambda info: rng.normal(size=info.shape) * (info.dtype != np.bool_)
        return jax.tree.map(lambda info: noise(info).astype(info.dtype), self.compiled(*args).out_info)


def placed(bundle: Bundle, mesh: Mesh) -> Bundle:
    """A bundle on the host, placed onto a mesh as `load_bundle` does it."""
    place = placer(mesh)
    parts = {
        name: part
        if KINDS[part.config["kind"]].module is None
        else dataclasses.replace(
            part,
            params=jax.tree_util.tree_map_with_path(lambda path, v: place(path_name(path), v), part.params),
        )
        for name, part in bundle.parts.items()
    }
    return dataclasses.replace(bundle, parts=parts, mesh=mesh)


def as_sampler(bundle: Sampler | Bundle) -> Sampler:
    """Returns a sampler unchanged, and makes one for a plain bundle."""
    return bundle if isinstance(bundle, Sampler) else Sampler(bundle)


def _default_mesh(parts: Mapping[str, Part]) -> Mesh:
    sizes = (leaf.size for part in parts.values() for leaf in jax.tree.leaves(part.params))
    return sampling_mesh(weight_bytes=jnp.dtype(compute_dtype("auto")).itemsize * sum(sizes))


def stage_options(
    bundle: Bundle, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Options]:
    """The bundle's sampling defaults with overrides per part.

    Args:
      bundle: the parts and their sampling defaults.
      overrides: part -> option -> value, e.g. {"decoder": {"guidance_scale": 3.0, "steps": 50}}.

    Raises:
      ValueError: on an unknown part or option, or a value out of range.
    """
    upsampler_names = upsamplers(bundle.parts)
    base_names = [
        name
        for name, part in bundle.parts.items()
        if part.config["kind"] in OPTIONS and name not in upsampler_names and not last_step_of(part)
    ]
    names = [*base_names, *upsampler_names]
    unknown = set(overrides or {}) - set(names)
    if unknown:
        known = ", ".join(names)
        raise InputError(
            f"unknown part {', '.join(sorted(unknown))} in the sampling options; this bundle samples {known}"
        )
    options = {}
    for name in names:
        config = bundle.part(name).config
        settings = bundle.sampling.get(name, {})
        try:
            options[name] = options_from(settings, config["kind"], **(overrides or {}).get(name, {}))
            check_options(options[name], config)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return options


def split_scales(rows: Sequence[Mapping[str, Options]]) -> tuple[dict[str, Options], dict[str, np.ndarray]]:
    """Separates the guidance scales of rows from their other options.

    The options become part of a program's key; the scales become arguments of the program. The options keep
    only whether there is guidance (scale 0) or not (scale 1). Inside the program, `with_scale` puts the scale
    back into the options.

    Args:
      rows: the options of each row by part (`Sampler.row_options`).

    Returns:
      The options without their scales, and the scales as (B,) float32, both by part.

    Raises:
      ValueError: when rows differ in more than the scale of a part that is guided in all of them.
    """
    distinct = {id(row): row for row in rows}.values()
    static, *others = [
        {n: dataclasses.replace(o, guidance_scale=0.0 if is_guided(o) else 1.0) for n, o in row.items()}
        for row in distinct
    ]
    for other in others:
        for name in static:
            if other[name] != static[name]:
                raise InputError(
                    f"{name}: rows of one call may differ in their guidance scale, "
                    "but all of them must be guided, or none, and their other options must be equal"
                )
    scales = {name: np.array([row[name].guidance_scale for row in rows], np.float32) for name in static}
    return static, scales


def with_scale(options: Options, scale: jax.Array) -> Options:
    """Puts (traced) scales (B,) back into options from `split_scales`, if they are guided."""
    return dataclasses.replace(options, guidance_scale=scale) if is_guided(options) else options


def with_scales(options: Mapping[str, Options], scales: Mapping[str, jax.Array]) -> dict[str, Options]:
    """Calls `with_scale` for every part."""
    return {name: with_scale(options[name], scales[name]) for name in options}


def as_seed(seed: int, name: str = "seed") -> np.uint32:
    """A random seed for a program. `name` is what the error calls it.

    Raises:
      ValueError: unless it is a whole number that fits into 32 bits.
    """
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**32:
        raise InputError(f"{name} must be a whole number between 0 and {2**32 - 1}, got {seed!r}")
    return np.uint32(seed)


def as_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """The seeds of `count` rows, (count,) uint32: one for all of them, or a list with one per row.

    Raises:
      ValueError: unless they are whole numbers that fit into 32 bits, one or `count` of them.
    """
    if np.ndim(seed) == 0:
        return np.full(count, as_seed(seed))
    if np.ndim(seed) != 1 or len(seed) != count:
        raise InputError(f"expected one seed, or one per row, {count} in all, got {seed!r}")
    return np.array([as_seed(one) for one in seed], np.uint32)


def as_positions(positions: Sequence[int] | None, count: int) -> np.ndarray:
    """The positions of `count` rows (`row_keys`), (count,) uint32; 0 to count - 1 where they are None.

    Raises:
      ValueError: unless they are `count` whole numbers that fit into 32 bits.
    """
    if positions is None:
        return np.arange(count, dtype=np.uint32)
    if np.ndim(positions) != 1 or len(positions) != count:
        raise InputError(f"expected one position per row, {count} in all, got {positions!r}")
    return np.array([as_seed(position, "a position") for position in positions], np.uint32)


def row_keys(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One random key per row, so that a sample depends on (seed, position) and not on the rest of the batch.

    Args:
      seeds: (B,) uint32.
      positions: (B,) uint32, the rows' numbers.

    Returns:
      (B,) keys.
    """
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, positions)
