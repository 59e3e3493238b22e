"""Compiles a train step ahead of time for devices that this machine need not have, and reports its needs.

Users learn how much memory and time a step needs before they rent devices. The step is the stage's own
(`stage`, `run.state.make_update`), applied to abstract arrays:

- Memory, buffers and collectives come from the compiler.
- Operations are counted in the traced program, where the number of turns of every loop is known.
- The time is a roofline: the longest of the times for arithmetic, memory and links, each at its peak. It is a
  lower bound, not a forecast.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.compile import hlo
from unclip_jax.compile.abstract import abstract_batch, abstract_frozen, placed, spread
from unclip_jax.errors import InputError, MemoryNeededError, MissingPackageError
from unclip_jax.generate.captioned import sample_captioned
from unclip_jax.generate.decoder import sample_decoder
from unclip_jax.generate.image_embeds import vector_inputs
from unclip_jax.generate.kandinsky import sample_decoder_latents
from unclip_jax.generate.latents import sample_latents
from unclip_jax.generate.networks import Network, image_size, sampling_model
from unclip_jax.generate.options import options_from
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import TextConditioning, Texts
from unclip_jax.generate.tokens import sample_grid, sample_tokens
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.run.batches import check_divides
from unclip_jax.run.frozen import (
    BESIDE_PICTURES,
    EMBEDDABLE,
    EMBEDDED,
    EMPTY,
    arrays,
)
from unclip_jax.run.hardware import CHIPS, Chip, flops
from unclip_jax.run.loop import count_operations
from unclip_jax.run.optim import make_optimizers
from unclip_jax.run.stage import FITTED, Stage
from unclip_jax.run.state import TrainState, abstract_state, make_update
from unclip_jax.run.text_reader import text_reader
from unclip_jax.sharding import BATCH, compute_dtype, make_mesh
from unclip_jax.train import STAGES

LARGEST_SLICE = 2**14  # chips; no slice has more
HELD = ("parameters", "averages", "optimizer", "frozen", "batch")  # what a device holds before a step


@dataclass(frozen=True)
class Report:
    """What a compiled train step needs. Bytes and counts are per device unless stated otherwise.

    For a sampler, a step is one call of it.

    devices: number of devices.
    chip: peak performance of a device; None if it is not known (CPU).
    mesh: axis -> number of devices along it.
    batch_size: rows of the global batch.
    parameters, averages, optimizer: bytes of the state's parts; state without gradients counts as parameters.
    frozen: bytes of the frozen networks.
    batch: bytes of the input.
    temporary: bytes of all intermediate results.
    flops: operations in a step, on all devices together.
    model_flops: the same without those that remat computes twice.
    traffic: bytes read from and written to main memory.
    collectives: kind -> (number of times, bytes that arrive), within a slice.
    between_slices: (number of times, bytes that arrive) from other slices.
    padding: share of a TPU's work that is padding to whole lanes (`hlo.Program.padding`).
    """

    devices: int
    chip: Chip | None
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    averages: int
    optimizer: int
    frozen: int
    batch: int
    temporary: int
    flops: float
    model_flops: float
    traffic: float
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    between_slices: tuple[int, int] = (0, 0)
    padding: float = 0.0

    @property
    def memory(self) -> int:
        """Bytes of memory in all."""
        return self.parameters + self.averages + self.optimizer + self.frozen + self.batch + self.temporary

    @property
    def seconds(self) -> dict[str, float]:
        """Resource -> seconds that a step needs of it at its peak; {} if the chip's peaks are not known."""
        if self.chip is None:
            return {}
        links, from_slices = sum(size for _, size in self.collectives.values()), self.between_slices[1]
        return {
            "arithmetic": self.flops / self.devices / self.chip.flops,
            "memory": self.traffic / self.chip.bandwidth,
            "links": links / self.chip.links,
            **({"network": from_slices / self.chip.network} if from_slices and self.chip.network else {}),
        }

    @property
    def limit(self) -> str:
        """The resource that needs the most time."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def mfu(self) -> float:
        """The model's operations, as a share of what the chips could compute in the roofline's time."""
        return self.model_flops / self.devices / self.chip.flops / self.seconds[self.limit]


# ------------------------------------------------------------------------------------------ devices
def topology(name: str) -> list[Any]:
    """The devices of a topology. This machine need not have them, except for "cpu:8".

    Args:
      name: "v5e:4x4" and the like; "2*v5e:4x4" for two such slices; or "cpu:8" for CPU devices.

    Raises:
      ValueError: on an unknown name, or more CPU devices than this process has.
      ImportError: when libtpu is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", shape):
        devices = jax.devices("cpu")
        if int(shape) > len(devices):
            raise InputError(
                f"{name}: {len(devices)} CPU devices are there; "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={shape}"
            )
        return devices[: int(shape)]
    # The compiler ends the process when it gets a size of zero.
    size = r"[1-9]\d{0,2}"
    parsed = re.fullmatch(rf"(?:([1-9]\d{{0,2}})\*)?(v\d{{1,2}}[a-z]*:({size}x{size}(?:x{size})?))", name)
    if parsed is None or math.prod(map(int, parsed[3].split("x"))) > LARGEST_SLICE:
        raise InputError(
            f"unknown topology {name!r}; write v5e:4x4, v5p:2x2x4, v6e:8x8, v4:2x2x2, 2*v5e:4x4 or cpu:8"
        )
    try:
        importlib.import_module("libtpu")
    except ImportError:
        raise MissingPackageError('the TPU compiler is in libtpu: pip install "unclip_jax[tpu]"') from None
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    # No process holds a chip, so several may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        slices = {"num_slices": int(parsed[1])} if parsed[1] else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=parsed[2], **slices).devices)
    except Exception as error:  # libtpu raises its own types
        raise InputError(
            f"libtpu knows no topology {name!r} ({' '.join(str(error).split())[:200]})"
        ) from None


# ------------------------------------------------------------------------------------------ the step


@dataclass(frozen=True)
class TrainStep:
    """A stage, its jitted update, and the update's abstract arguments: state, frozen networks, batch."""

    stage: Stage
    update: Any
    state: TrainState
    frozen: dict
    batch: dict


def _check(config: Any, mesh: Mesh) -> None:
    trained = [name for name in STAGES if name != "codec"]
    if config.stage not in trained:
        raise InputError(
            f"the {config.stage} stage has no train step to compile; choose one of {', '.join(trained)}"
        )
    STAGES[config.stage].check(config)
    check_divides(config, mesh)


def train_step(config: Any, clip_config: Any, mesh: Mesh, embedded: bool = False) -> TrainStep:
    """The update step of a stage's configuration, as its `train_and_evaluate` makes it.

    Args:
      config: the stage's configuration.
      clip_config: the configuration of its frozen CLIP; None for stages without one.
      mesh: the devices.
      embedded: whether the stage reads CLIP's embeddings (`unclip embed`).

    Raises:
      ValueError: when the stage has no update step or reads no embeddings, or the batch does not divide over
        the mesh.
    """
    _check(config, mesh)
    if embedded and config.stage not in EMBEDDABLE + BESIDE_PICTURES:
        readers = ", ".join(EMBEDDABLE + BESIDE_PICTURES)
        raise InputError(f"the {config.stage} stage reads no embeddings; these stages do: {readers}")
    networks = abstract_frozen(config, clip_config, mesh, embedded or config.stage in EMBEDDED)
    stage = STAGES[config.stage].stage(config, mesh, networks)
    optimizers = make_optimizers(config, stage.players)
    shapes, shardings = abstract_state(stage, optimizers, mesh)
    update = make_update(stage, optimizers, shardings, mesh, config)
    frozen = arrays(networks)
    if stage.fit is not None:
        frozen[FITTED] = placed(stage.fit.arrays(stage.part), mesh)
    batch = abstract_batch(stage, networks, config.batch_size, mesh, config.data.get("label", "caption"))
    return TrainStep(stage, update, placed(shapes, mesh, shardings), frozen, batch)


def sampler(config: Any, clip_config: Any, mesh: Mesh) -> tuple[Any, Any, dict]:
    """The sampler of a stage, as `sampling` runs it on a mesh.

    It draws `config.batch_size` rows from inputs that CLIP has embedded already.

    Returns:
      The jitted function, and its abstract arguments: the parameters in the compute dtype, and the inputs by
      name.

    Raises:
      ValueError: when the stage draws nothing, or for the reasons of `train_step`.
    """
    if "sampling" not in config:
        raise InputError(
            f"the {config.stage} stage draws nothing; --sample is for priors, decoder and upsamplers"
        )
    _check(config, mesh)
    frozen = abstract_frozen(config, clip_config, mesh)
    stage = STAGES[config.stage].stage(config, mesh, frozen)
    part = stage.part
    if "diffusion" in part:
        part = part | {"x0_error": [0.1] * part["diffusion"]["num_steps"]}
    model, options, rows = (
        sampling_model(part, mesh),
        options_from(config.sampling, part["kind"]),
        config.batch_size,
    )
    shapes, dtype = jax.eval_shape(stage.init, jax.random.key(0))[0], compute_dtype("auto", mesh)
    params = placed(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype), shapes), mesh
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    given = {"keys": spread(keys, rows, mesh, BATCH)}
    if EMPTY in frozen:
        empty = frozen[EMPTY].params
        given |= {"text": spread(empty, rows, mesh, BATCH), "empty": empty}
        given["z_image"] = spread(empty.embed, rows, mesh, BATCH)
    if config.stage == "upsampler":
        size = image_size(part) // part["factor"]
        low_res = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        given["low_res"] = spread(low_res, rows, mesh, BATCH)
    if config.stage == "dalle":
        length = stage.model.length
        captions = {"tokens": np.zeros((1, length), np.int32), "token_mask": np.zeros((1, length), bool)}
        given |= {"captions": spread(captions, rows, mesh, BATCH), "blank": spread(captions, 1, mesh, P())}
    if config.stage == "pixelsnail" and stage.model.coarse_codes is not None:
        coarse = jax.ShapeDtypeStruct((1, *(stage.model.side // 2,) * 2), np.int32)
        given["coarse"] = spread(coarse, rows, mesh, BATCH)
    if config.stage == "latent":
        side, more = stage.model.image_size, stage.model.in_channels - stage.model.out_channels
        if more:
            beside = jax.ShapeDtypeStruct((1, side, side, more), np.float32)
            given["beside"] = spread(beside, rows, mesh, BATCH)
        if stage.model.classes is not None:
            given["label"] = spread(jax.ShapeDtypeStruct((1,), np.int32), rows, mesh, BATCH)
    if config.stage in ("glide", "imagen"):
        empty = text_reader(mesh, frozen).zeros if config.stage == "imagen" else None
        if empty is None:  # the stage's own text encoder
            length = part["tokenizer"]["length"]
            tokens, mask = (jax.ShapeDtypeStruct((1, length), kind) for kind in (np.int32, np.bool_))
            empty = TextConditioning(None, None, None, tokens, mask)
        given |= {"text": spread(empty, rows, mesh, BATCH), "empty": spread(empty, 1, mesh, P())}
        if config.factor is not None:
            size = image_size(part) // config.factor
            low_res = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
            given["low_res"] = spread(low_res, rows, mesh, BATCH)
    codec = {"codec": frozen["codec"].params} if "codec" in frozen else {}

    def draw(params, given):
        network = Network(model, params, part)
        if config.stage == "upsampler":
            return sample_upsampler(network, given["low_res"], given["keys"], options)
        if config.stage == "dalle":
            return sample_tokens(network, given["captions"], given["blank"], given["keys"], options)
        texts = Texts(given["text"], given["empty"]) if "text" in given else None
        if config.stage == "pixelsnail":
            return sample_grid(network, given["keys"], options, coarse=given.get("coarse"), texts=texts)
        if config.stage in ("glide", "imagen"):
            return sample_captioned(network, texts, given["keys"], options, low_res=given.get("low_res"))
        if config.stage == "retrieval":
            size, near = (stage.model.image_size,) * 2, texts.captions.embed[:, None]
            near = jnp.repeat(near, config.neighbours, axis=1)
            inputs = {"context": (near, jnp.zeros((1, 1, 1)))}
            return sample_latents(network, None, size, given["keys"], options, inputs=inputs, rows=rows)
        if config.stage == "latent":
            size = (stage.model.image_size,) * 2
            inputs = None
            if "label" in given:
                inputs = {"label": (given["label"], jnp.full(1, stage.model.classes, jnp.int32))}
            return sample_latents(
                network, texts, size, given["keys"], options, beside=given.get("beside"), inputs=inputs,
                rows=rows,
            )  # fmt: skip
        if config.stage == "kandinsky":
            size, nothing = (stage.model.image_size,) * 2, given["empty"].embed
            return sample_decoder_latents(network, given["z_image"], nothing, size, given["keys"], options)
        if config.stage == "stable_unclip":
            size, z_image = (stage.model.image_size,) * 2, given["z_image"]
            inputs = vector_inputs(network, z_image, len(z_image), given["keys"], options)
            return sample_latents(network, texts, size, given["keys"], options, inputs=inputs)
        if config.stage == "decoder":
            return sample_decoder(network, given["z_image"], texts, given["keys"], options)
        return sample_prior(network, texts, given["keys"], options, given.get("codec"))

    return jax.jit(draw, out_shardings=NamedSharding(mesh, P())), params, given | codec


def compile_step(config: Any, clip_config: Any, mesh: Mesh, embedded: bool = False) -> tuple[Report, Any]:
    """Compiles the update step for the mesh's devices.

    Returns:
      The report, and the compiled program.

    Raises:
      ValueError: as `train_step`.
      MemoryError: when the step does not fit the devices' memory. The message names the largest buffers.
    """
    step = train_step(config, clip_config, mesh, embedded)
    arguments = step.state, step.frozen, step.batch
    model_flops = count_operations(step.stage, config.grad_accumulation, mesh, *arguments)
    held = {
        "parameters": (step.state.params, step.state.extra),
        "averages": step.state.ema_params,
        "optimizer": step.state.opt_state,
    }
    held |= {"frozen": step.frozen, "batch": step.batch}
    return _compile(step.update, arguments, held, config.batch_size, mesh, model_flops)


def compile_sampler(config: Any, clip_config: Any, mesh: Mesh) -> tuple[Report, Any]:
    """Compiles the `sampler` for the mesh's devices. Results and errors are those of `compile_step`."""
    draw, params, given = sampler(config, clip_config, mesh)
    return _compile(
        draw, (params, given), {"parameters": params, "batch": given}, config.batch_size, mesh, None
    )


def _compile(
    program: Any,
    arguments: tuple,
    held: dict[str, Any],
    batch_size: int,
    mesh: Mesh,
    model_flops: float | None,
) -> tuple[Report, Any]:
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryNeededError(_buffers(str(error))) from None
    operations = flops(jax.make_jaxpr(program)(*arguments))
    moved = hlo.Program(compiled.as_text())
    report = Report(
        devices=mesh.size,
        chip=CHIPS.get(mesh.devices.flat[0].device_kind),
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        **{name: _held(held.get(name, ())) for name in HELD},
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        flops=operations,
        model_flops=operations if model_flops is None else model_flops,
        traffic=moved.traffic(),
        collectives=moved.collectives(),
        between_slices=moved.between_slices(),
        padding=moved.padding(),
    )
    return report, compiled


def make_abstract_mesh(name: str, shape: dict[str, int] | None) -> Mesh:
    """The mesh over a `topology`. `make_mesh` raises the error for a shape that does not fit."""
    return make_mesh(shape, topology(name))


def _held(tree: Any) -> int:
    # The tree's bytes on one device.
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _buffers(message: str) -> str:
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    summary = (
        f"the step needs {used[1]} of {used[2]} memory on a device"
        if used
        else "the step does not fit the devices' memory"
    )
    largest = re.findall(r"Size: ([\d.]+\w)(.*?)Shape: (\S+)", message, re.DOTALL)
    named = [(size, shape, re.search(r'op_name="([^"]*)"', between)) for size, between, shape in largest[:5]]
    listed = "; ".join(
        " ".join([size, shape] + ([where[1]] if where else [])) for size, shape, where in named
    )
    return summary + (f"; largest: {listed}" if listed else "")
