"""Meshes, partition rules, batches, and a forward pass that is the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.helpers import random_params
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.sharding import (
    AXES,
    BATCH,
    infer_shardings,
    leaf_spec,
    make_gather,
    make_mesh,
    own_rows,
    path_name,
    replicate,
    shard_batch,
)


def test_mesh_shapes():
    """data, or an axis of size -1, takes the remaining devices; sizes may be partial."""
    sizes = lambda shape=None, devices=None: tuple(make_mesh(shape, devices).shape.values())
    assert jax.device_count() == 8
    assert sizes() == (8, 1, 1)
    assert sizes({"fsdp": 4}) == (2, 4, 1)
    assert sizes({"data": 2, "fsdp": -1, "tensor": 2}) == (2, 2, 2)
    assert sizes({"data": 1, "fsdp": 1}, jax.devices()[:1]) == (1, 1, 1)
    assert make_mesh().axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"fdsp": 8}, "unknown mesh axis fdsp; the axes are data, fsdp, tensor"),
        ({"data": 4}, "data=4 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ({"fsdp": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "does not fit 8 devices"),
        ({"data": 0}, "does not fit 8 devices"),
        ({"data": -2, "fsdp": -4}, "does not fit 8 devices"),
    ],
)
def test_mesh_errors(shape, message):
    """One line that names the axis, or the sizes and the devices."""
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_generic_rule_takes_the_largest_dimension_that_divides():
    """Small leaves are replicated, as is a leaf that no axis divides."""
    mesh = make_mesh({"fsdp": 8})
    assert leaf_spec("a/kernel", (64, 512), mesh) == P(None, "fsdp")
    assert leaf_spec("a/kernel", (512, 64), mesh) == P("fsdp", None)
    assert leaf_spec("a/kernel", (64, 513), mesh) == P("fsdp", None)
    assert leaf_spec("a/kernel", (3, 3, 64, 128), mesh) == P(None, None, None, "fsdp")
    assert leaf_spec("a/kernel", (129, 513), mesh) == P()
    assert leaf_spec("a/kernel", (8, 8), mesh) == P()
    assert leaf_spec("step", (), mesh) == P()
    assert leaf_spec("block_0/fc1/kernel", (64, 512), make_mesh()) == P()


def test_tensor_rules():
    """The rules shard first projections by output, and second projections by input.

    This holds for the transformer's blocks and the U-Net's attention. A leaf that a rule does not divide
    falls back to the generic rule.
    """
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert leaf_spec("transformer/block_3/attn/query/kernel", (64, 4, 16), mesh) == P("fsdp", "tensor", None)
    assert leaf_spec("transformer/block_3/attn/key/bias", (4, 16), mesh) == P("tensor", None)
    assert leaf_spec("transformer/block_3/attn/out/kernel", (4, 16, 64), mesh) == P("tensor", None, "fsdp")
    assert leaf_spec("unet/down_1_attn_0/out/kernel", (4, 16, 64), mesh) == P("tensor", None, "fsdp")
    assert leaf_spec("unet/middle_attn/context_value/kernel", (96, 4, 16), mesh) == P("fsdp", "tensor", None)
    assert leaf_spec("block_0/fc1/kernel", (64, 256), mesh) == P("fsdp", "tensor")
    assert leaf_spec("block_0/fc1/bias", (256,), mesh) == P("tensor")
    assert leaf_spec("block_0/fc2/kernel", (256, 64), mesh) == P("tensor", "fsdp")
    assert leaf_spec("time/fc1/kernel", (64, 512), mesh) == P(None, "fsdp")
    assert leaf_spec("block_0/attn/query/kernel", (512, 3, 64), mesh) == P("fsdp", None, None)
    assert leaf_spec("opt/mu/block_0/fc1/kernel", (64, 256), mesh) == P("fsdp", "tensor")


def test_path_names():
    """Dictionaries, tuples and named tuples of an optimizer's state."""
    import collections

    Pair = collections.namedtuple("Pair", "mu nu")
    names = [
        path_name(path)
        for path, _ in jax.tree_util.tree_flatten_with_path({"opt": (Pair({"w": 1}, {"w": 2}),)})[0]
    ]
    assert names == ["opt/0/mu/w", "opt/0/nu/w"]


def test_shard_batch():
    """The devices of data and fsdp get one piece each, with the rows in order.

    The error for a batch that does not divide names both numbers.
    """
    mesh = make_mesh({"fsdp": 2})
    batch = {"image": np.arange(48.0).reshape(16, 3), "tokens": np.arange(16)}
    arrays = shard_batch(batch, mesh)
    assert arrays["image"].sharding.spec == BATCH
    assert {shard.data.shape for shard in arrays["image"].addressable_shards} == {(2, 3)}
    for name, value in batch.items():
        np.testing.assert_array_equal(arrays[name], value)
    for refused in (lambda: shard_batch({"image": np.zeros((12, 3))}, mesh), lambda: own_rows(mesh, 12)):
        with pytest.raises(ValueError, match="a batch of 12 does not divide over data x fsdp = 8"):
            refused()
    np.testing.assert_array_equal(own_rows(mesh, 16), np.arange(16))
    assert replicate({"a": np.ones(3)}, mesh)["a"].sharding.is_fully_replicated


class Device:
    """A device that does not exist."""

    def __init__(self, number, host, slice_index=0, platform="tpu"):
        self.id, self.process_index, self.slice_index, self.platform = number, host, slice_index, platform
        self.coords, self.core_on_chip, self.device_kind = (number % 4, number // 4 % 4, 0), 0, "TPU v5 lite"


def test_rows_of_a_host():
    """A host reads the rows of its devices, wherever these are in the mesh.

    Hosts that share tensor axes read the same rows.
    """
    grid = lambda hosts, shape: Mesh(
        np.array([Device(i, host) for i, host in enumerate(hosts)]).reshape(shape), AXES
    )
    np.testing.assert_array_equal(own_rows(grid([0, 1, 0, 1], (2, 2, 1)), 8), [0, 1, 4, 5])
    np.testing.assert_array_equal(own_rows(grid([0, 1, 0, 1], (2, 1, 2)), 4), [0, 1, 2, 3])
    np.testing.assert_array_equal(own_rows(grid([1, 1, 0, 0], (2, 1, 2)), 4), [2, 3])


def test_slices_are_joined_by_data_alone():
    devices = [Device(i, i // 4, i // 16) for i in range(32)]
    mesh = make_mesh({"data": 4, "fsdp": 8}, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert sorted(d.id for d in mesh.devices.flat) == list(range(32))
    with pytest.raises(
        ValueError, match="2 slices are joined by the data axis alone, so data=1 must be a multiple of 2"
    ):
        make_mesh({"data": 1, "fsdp": 32}, devices)
    gpus = [Device(i, i // 8, i // 8, "gpu") for i in range(16)]  # every host a slice, by their own account
    assert make_mesh({"data": 1, "fsdp": 16}, gpus).shape["fsdp"] == 16


def test_gather_is_there_when_needed():
    """It acts only on parameters sharded over fsdp alone; its result is whole on every device."""
    assert make_gather(make_mesh()) is None
    assert make_gather(make_mesh({"fsdp": 4, "tensor": 2})) is None
    mesh = make_mesh({"fsdp": 8})
    sharded = jax.device_put(np.arange(16.0), jax.sharding.NamedSharding(mesh, P("fsdp")))
    whole = jax.jit(make_gather(mesh))({"w": sharded})["w"]
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, np.arange(16.0))


@pytest.fixture(scope="module")
def reference():
    """A prior with leaves large enough to be sharded, a batch of eight, and its answer on one device."""
    sizes = dict(embed_dim=16, length=4, width=64, layers=1, heads=2)
    rng = np.random.default_rng(0)
    batch = {
        "z": rng.normal(size=(8, 16)).astype(np.float32),
        "t": np.arange(8, dtype=np.int32) * 100,
        "text_embed": rng.normal(size=(8, 16)).astype(np.float32),
        "text_states": rng.normal(size=(8, 4, 16)).astype(np.float32),
        "text_mask": np.tile(np.arange(4) < 3, (8, 1)),
    }
    params = random_params(DiffusionPrior(**sizes), **batch)
    return (
        sizes,
        params,
        batch,
        jax.jit(lambda p, b: DiffusionPrior(**sizes).apply({"params": p}, **b))(params, batch),
    )


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_every_mesh_gives_the_single_device_answer(reference, shape):
    """With the gather hook where there is one; parameters and batch are really spread."""
    sizes, params, batch, expected = reference
    mesh = make_mesh(shape)
    shardings = infer_shardings(params, mesh)
    spread = [not s.is_fully_replicated for s in jax.tree.leaves(shardings)]
    assert any(spread) == (shape["data"] < 8) and not all(spread)
    model = DiffusionPrior(**sizes, gather=make_gather(mesh))
    out = jax.jit(lambda p, b: model.apply({"params": p}, **b))(
        jax.device_put(params, shardings), shard_batch(batch, mesh)
    )
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(expected).all()
