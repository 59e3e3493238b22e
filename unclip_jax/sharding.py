"""Meshes, partition rules, and the way of a host's batch onto the mesh.

The mesh has three axes: `data` (replicated parameters), `fsdp` (parameters sharded, gathered before use) and `tensor` (width
sharded). A batch is split over `data` and `fsdp`. Parameters follow an ordered table of (path regex, PartitionSpec) per model; what no
row matches is sharded by the generic FSDP rule: the largest dimension that the axis divides.
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

from unclip_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
FSDP_MIN_SIZE = 2**14  # smaller leaves are replicated: gathering them costs more than keeping them
WEIGHTS_SHARE = 0.6  # of a device's memory that weights may fill; the rest is for what is computed
BLOCK = re.compile(
    r"(^|/)(block_\d+|(down|up)_\d+_[a-z]+(_\d+)?|middle_[a-z]+(_\d+)?)/"
)  # what the models' `gather` hook is called on

Rules = Sequence[tuple[str, P]]

# Megatron's split: first projections by output, second ones by input. Paths are "a/b/c" of the parameter tree.
TENSOR_RULES: Rules = (
    (r"(query|key|value|context_key|context_value)/kernel$", P("fsdp", "tensor", None)),
    (r"(query|key|value|context_key|context_value)/bias$", P("tensor", None)),
    (r"attn.*/out/kernel$", P("tensor", None, "fsdp")),
    (r"block_\d+/fc1/kernel$", P("fsdp", "tensor")),
    (r"block_\d+/fc1/bias$", P("tensor")),
    (r"block_\d+/fc2/kernel$", P("tensor", "fsdp")),
)


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them) with axes `data, fsdp, tensor`.

    Where the devices are several slices, joined by the data centre's network alone, `data` runs over the slices first, so that no other
    axis crosses it. On TPUs, neighbours along an axis are neighbours on the links.

    Args:
      shape: size of each axis; absent axes are 1, but for `data`, which by default takes what is left. One axis may be -1.

    Raises:
      ValueError: on an unknown axis, more than one -1, sizes whose product is not the number of devices, or a `data` that is not a multiple
        of the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    unknown = set(shape or {}) - set(AXES)
    if unknown:
        raise InputError(f"unknown mesh axis {', '.join(sorted(unknown))}; the axes are {', '.join(AXES)}")
    sizes.update(shape or {})
    free = [a for a in AXES if sizes[a] == -1]
    known = math.prod(sizes[a] for a in AXES if sizes[a] != -1)
    bad = len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values())
    if bad or (free and len(devices) % known) or (not free and known != len(devices)):
        wanted = " x ".join(f"{a}={sizes[a]}" for a in AXES)
        raise InputError(
            f"a mesh of {wanted} does not fit {len(devices)} devices; the sizes must multiply to {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    # Elsewhere hosts are said to be slices, but every axis may cross them.
    slices = (
        len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    )
    if sizes["data"] % slices:
        raise InputError(
            f"{slices} slices are joined by the data axis alone, so data={sizes['data']} must be a multiple of {slices}"
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
    """`auto` (bfloat16 on accelerators, float32 on CPU), `float32` or `bfloat16`; the platform is the mesh's, or the default one.

    Raises:
      ValueError: on another name.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    choices = {
        "auto": jnp.float32 if platform == "cpu" else jnp.bfloat16,
        "float32": jnp.float32,
        "bfloat16": jnp.bfloat16,
    }
    if name not in choices:
        raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(choices)}")
    return choices[name]


def sampling_mesh(shape: Mapping[str, int] | None = None, weight_bytes: int = 0) -> Mesh:
    """A mesh to sample on. Without a shape: every device gets its share of the batch and, where one device cannot hold the weights and
    what it computes, of them too; on CPU, whose devices are one machine, one device.

    Args:
      shape: as in `make_mesh`.
      weight_bytes: of all parameters as they will lie there.

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
    """The PartitionSpec of one leaf: the first rule whose regex is found in its path and that divides its shape, else generic FSDP."""
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
    """NamedShardings for a tree of arrays or shapes. Optimizer moments have their parameter's path as a suffix and follow it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(path_name(path), tuple(leaf.shape), mesh, rules)),
        tree,
    )


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """A function that puts one parameter, by its path, onto a mesh to sample with: sharded as `infer_shardings` says, matrices in the
    compute dtype (`compute_dtype`), vectors (scales, shifts, biases) in float32."""
    dtype = compute_dtype("auto", mesh)

    def place(name: str, value: np.ndarray) -> jax.Array:
        value = np.asarray(value, dtype if np.ndim(value) > 1 else None)
        return jax.device_put(value, NamedSharding(mesh, leaf_spec(name, value.shape, mesh)))

    return place


def make_gather(mesh: Mesh):
    """The models' `gather` hook for this mesh: parameters sharded over `fsdp` alone are gathered block by block before use, and their
    gradients go back into the shards as they are reduced.

    None when there is nothing to gather, or when `tensor` is in use (the partitioner then places the collectives).
    """
    if mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return None
    replicated = NamedSharding(mesh, P())

    @jax.custom_vjp
    def gather(params):
        return jax.lax.with_sharding_constraint(params, replicated)

    def backward(
        _, gradient
    ):  # without it the gradient would be reduced whole on every device, as the parameters were needed
        return (jax.lax.with_sharding_constraint(gradient, infer_shardings(gradient, mesh)),)

    gather.defvjp(lambda params: (gather(params), None), backward)
    return gather


def gather_rest(params: Any, mesh: Mesh) -> Any:
    """Parameters with those outside of blocks gathered: embeddings, first and last layers. Left sharded by some axis of theirs, they would
    make what they compute sharded so too, and every block after them would move it back."""
    gather = make_gather(mesh)
    if gather is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if BLOCK.search(path_name(path)) else gather(leaf), params
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, the same on every host -> arrays replicated over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def own_blocks(mesh: Mesh) -> list[int]:
    """A batch is split into data x fsdp blocks of rows; these of them lie on this host's devices, ascending. Hosts that share a `tensor`
    axis hold the same blocks."""
    blocks = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return [
        i for i, devices in enumerate(blocks) if any(d.process_index == jax.process_index() for d in devices)
    ]


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this host's devices hold, ascending: what the host has to read.

    Raises:
      ValueError: when the rows do not divide over the devices.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    _check_divides(batch_size, ways)
    return np.arange(batch_size).reshape(ways, -1)[own_blocks(mesh)].reshape(-1)


def _check_divides(rows: int, ways: int) -> None:
    if rows % ways:
        raise InputError(
            f"a batch of {rows} does not divide over data x fsdp = {ways} devices; change batch_size or the mesh"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, whole: bool = False) -> dict[str, jax.Array]:
    """A batch's `own_rows` (or, if `whole`, all of its rows, the same on every host) -> global arrays split over `data` and `fsdp`: an
    explicit transfer.

    Raises:
      ValueError: when the rows do not divide over the devices.
    """
    sharding, ways = NamedSharding(mesh, BATCH), mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = list(range(ways)) if whole else own_blocks(mesh)
    rows = len(next(iter(batch.values()))) * ways // len(blocks)
    _check_divides(rows, ways)
    each = rows // ways

    def put(value: np.ndarray) -> jax.Array:
        def block(index: tuple[slice, ...]) -> np.ndarray:
            first = blocks.index((index[0].start or 0) // each) * each
            return value[first : first + each]

        return jax.make_array_from_callback((each * ways, *value.shape[1:]), sharding, block)

    return {name: put(np.asarray(value)) for name, value in batch.items()}
