"""Meshes, partition rules, and the transfer of a host's batch onto the mesh.

The mesh has three axes: `data` (parameters are replicated), `fsdp` (parameters are sharded and gathered
before use) and `tensor` (the width is sharded). A batch is split over `data` and `fsdp`. Parameters follow an
ordered table of (path regex, PartitionSpec). The generic FSDP rule shards the parameters that no row matches:
along the largest dimension that is a multiple of the `fsdp` axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.backend import platform_of
from unclip_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
FSDP_MIN_SIZE = 2**14  # smaller leaves are replicated: gathering them costs more than keeping them
WEIGHTS_SHARE = 0.6  # share of a device's memory that weights may fill; activations need the rest
# Paths of the parameters that the models' `gather` hook gathers.
BLOCK = re.compile(r"(^|/)(block_\d+|(down|up)_\d+_[a-z]+(_\d+)?|middle_[a-z]+(_\d+)?)/")

Rules = Sequence[tuple[str, P]]

# Megatron's split: the first projections by output, the second ones by input. Paths are "a/b/c" of the
# parameter tree.
TENSOR_RULES: Rules = (
    (r"(query|key|value|context_key|context_value)/kernel$", P("fsdp", "tensor", None)),
    (r"(query|key|value|context_key|context_value)/bias$", P("tensor", None)),
    (r"attn.*/out/kernel$", P("tensor", None, "fsdp")),
    (r"block_\d+/(fc1|gate)/kernel$", P("fsdp", "tensor")),
    (r"block_\d+/fc1/bias$", P("tensor")),
    (r"block_\d+/fc2/kernel$", P("tensor", "fsdp")),
)


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them) with axes `data, fsdp, tensor`.

    Where only the data centre's network joins several slices, `data` runs over the slices first, so that no
    other axis crosses that network. On TPUs, neighbours along an axis are neighbours on the links.

    Args:
      shape: size of each axis. An absent axis is 1, except `data`, which takes all remaining devices. One
        axis may be -1: it then takes the remaining devices.

    Raises:
      ValueError: on an unknown axis, more than one -1, sizes whose product is not the number of devices, or a
        `data` that is not a multiple of the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    unknown = set(shape or {}) - set(AXES)
    if unknown:
        raise InputError(f"unknown mesh axis {', '.join(sorted(unknown))}; the axes are {', '.join(AXES)}")
    sizes.update(shape or {})
    free = [axis for axis in AXES if sizes[axis] == -1]
    known = math.prod(sizes[a] for a in AXES if sizes[a] != -1)
    bad = len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values())
    if bad or (free and len(devices) % known) or (not free and known != len(devices)):
        wanted = " x ".join(f"{a}={sizes[a]}" for a in AXES)
        raise InputError(
            f"a mesh of {wanted} does not fit {len(devices)} devices; "
            f"the sizes must multiply to {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    # On other platforms jax reports each host as a slice, but every axis may cross hosts.
    slices = (
        len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    )
    if sizes["data"] % slices:
        raise InputError(
            f"{slices} slices are joined by the data axis alone, "
            f"so data={sizes['data']} must be a multiple of {slices}"
        )
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices > 1:
        return Mesh(
            mesh_utils.create_hybrid_device_mesh(
                within, (slices, 1, 1), devices, allow_split_physical_axes=True
            ),
            AXES,
        )
    if devices[0].platform == "tpu":
        return Mesh(mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.asarray(devices).reshape(within), AXES)


def compute_dtype(name: str, mesh: Mesh | None = None) -> Any:
    """The dtype of a name: `auto` (bfloat16 on accelerators, float32 on CPU), `float32` or `bfloat16`.

    The platform is the mesh's. Without a mesh it is jax's default.

    Raises:
      ValueError: on another name.
    """
    platform = platform_of(mesh)
    choices = {
        "auto": jnp.float32 if platform == "cpu" else jnp.bfloat16,
        "float32": jnp.float32,
        "bfloat16": jnp.bfloat16,
    }
    if name not in choices:
        raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(choices)}")
    return choices[name]


def sampling_mesh(shape: Mapping[str, int] | None = None, weight_bytes: int = 0) -> Mesh:
    """A mesh to sample on.

    Without a shape, accelerators share the batch, and they share the weights too where one device cannot hold
    the weights and the activations. On CPU the mesh is one device, since all CPU devices are one machine.

    Args:
      shape: as in `make_mesh`.
      weight_bytes: size of all parameters in the dtype that sampling uses.

    Raises:
      ValueError: as `make_mesh`.
    """
    devices = jax.devices()
    if shape is None and devices[0].platform == "cpu":
        return make_mesh(devices=devices[:1])
    if shape is None:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
        shape = {"data": 1, "fsdp": -1} if limit and weight_bytes > WEIGHTS_SHARE * limit else None
    return make_mesh(shape, devices)


def path_name(path: tuple) -> str:
    """A jax key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    if len(spec) > len(shape):
        return False
    for size, axes in zip(shape, spec):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        if size % math.prod(mesh.shape[a] for a in names):
            return False
    return True


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = TENSOR_RULES) -> P:
    """The PartitionSpec of one leaf: that of the first rule that fits, or else the generic FSDP rule's.

    A rule fits when its regex is found in the path and its axes divide the shape.
    """
    if mesh.shape["tensor"] > 1:
        for pattern, spec in rules:
            if re.search(pattern, name) and _fits(spec, shape, mesh):
                return spec
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and math.prod(shape) >= FSDP_MIN_SIZE:
        for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if shape[axis] % fsdp == 0:
                return P(*("fsdp" if i == axis else None for i in range(len(shape))))
    return P()


def infer_shardings(tree: Any, mesh: Mesh, rules: Rules = TENSOR_RULES) -> Any:
    """NamedShardings for a tree of arrays or shapes.

    The path of an optimizer moment ends with its parameter's path, so the moment is sharded like the
    parameter.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(path_name(path), tuple(leaf.shape), mesh, rules)),
        tree,
    )


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """A function (path, array) that puts one parameter onto a mesh for sampling.

    It shards the parameter like `infer_shardings`. Matrices get the compute dtype (`compute_dtype`). Vectors
    (scales, shifts, biases) stay float32.
    """
    dtype = compute_dtype("auto", mesh)

    def place(name: str, value: np.ndarray) -> jax.Array:
        value = np.asarray(value, dtype if np.ndim(value) > 1 else None)
        return jax.device_put(value, NamedSharding(mesh, leaf_spec(name, value.shape, mesh)))

    return place


def make_gather(mesh: Mesh):
    """The models' `gather` hook for this mesh, or None.

    The hook gathers the parameters of one block just before use. In the backward pass their gradients are
    reduced and scattered into the shards. It is None when there is nothing to gather, or when `tensor` is in
    use (the partitioner then places the collectives).
    """
    if mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return None
    replicated = NamedSharding(mesh, P())

    @jax.custom_vjp
    def gather(params):
        return jax.lax.with_sharding_constraint(params, replicated)

    # Without this rule every device would reduce the full gradient, because it used the full parameters.
    def backward(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, infer_shardings(gradient, mesh)),)

    gather.defvjp(lambda params: (gather(params), None), backward)
    return gather


def gather_rest(params: Any, mesh: Mesh) -> Any:
    """The parameters, with those outside of blocks gathered: embeddings, first and last layers.

    If they stayed sharded, the partitioner would shard their outputs along the same axis, and every later
    block would have to move its inputs back.
    """
    gather = make_gather(mesh)
    if gather is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if BLOCK.search(path_name(path)) else gather(leaf), params
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are the same on every host -> arrays replicated over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def own_blocks(mesh: Mesh) -> list[int]:
    """The blocks of a batch that this host's devices hold, ascending.

    A batch is split into data x fsdp blocks of rows. Hosts that share a `tensor` axis hold the same blocks.
    """
    blocks = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return [
        i for i, devices in enumerate(blocks) if any(d.process_index == jax.process_index() for d in devices)
    ]


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold and that the host has to read, ascending.

    Raises:
      ValueError: when the batch size is not a multiple of data x fsdp.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    _check_divides(batch_size, ways)
    return np.arange(batch_size).reshape(ways, -1)[own_blocks(mesh)].reshape(-1)


def _check_divides(rows: int, ways: int) -> None:
    if rows % ways:
        raise InputError(
            f"a batch of {rows} does not divide over data x fsdp = {ways} devices; "
            "change batch_size or the mesh"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, whole: bool = False) -> dict[str, jax.Array]:
    """Explicitly transfers a batch's rows -> global arrays split over `data` and `fsdp`.

    Args:
      batch: this host's rows (`own_rows`) of every array.
      whole: the batch holds all rows instead, the same on every host.

    Raises:
      ValueError: when the batch size is not a multiple of data x fsdp.
    """
    sharding, ways = NamedSharding(mesh, BATCH), mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = list(range(ways)) if whole else own_blocks(mesh)
    rows = len(next(iter(batch.values()))) * ways // len(blocks)
    _check_divides(rows, ways)
    block_size = rows // ways

    def put(value: np.ndarray) -> jax.Array:
        def block(index: tuple[slice, ...]) -> np.ndarray:
            first = blocks.index((index[0].start or 0) // block_size) * block_size
            return value[first : first + block_size]

        return jax.make_array_from_callback((rows, *value.shape[1:]), sharding, block)

    return {name: put(np.asarray(value)) for name, value in batch.items()}
