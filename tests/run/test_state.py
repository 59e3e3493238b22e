"""The update step: parts of a batch, the first moment's type, what is kept where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax import sharding
from unclip_jax.sharding import BATCH, make_mesh
from unclip_jax.train.optim import make_optimizer
from unclip_jax.train.state import abstract_state, accumulated, create_state, make_update

OPTIMIZER = {"learning_rate": 0.1, "steps": 100, "schedule": "constant"}
RNG = np.random.default_rng(0)
BATCHES = [{"x": np.float32(RNG.normal(size=(16, 6))), "y": np.float32(RNG.normal(size=(16, 4)))} for _ in range(3)]


def loss_of(params, rng, batch, frozen):
    """Least squares, with a metric."""
    error = jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ frozen - batch["y"])
    return jnp.mean(error), {"largest": jnp.mean(jnp.max(error, axis=1))}


def init(key):
    return {"w": jax.random.normal(key, (6, 4))}


def train(mesh, count, **changes):
    """Three updates; the parameters after, and the metrics."""
    optimizer = make_optimizer(**OPTIMIZER | changes)
    _, shardings = abstract_state(init, optimizer[0], mesh)
    state = create_state(init, optimizer[0], 0, shardings)
    update = make_update(accumulated(loss_of, count, mesh), optimizer, shardings, seed=0, ema_decay=0.5)
    rows = []
    for batch in BATCHES:
        state, metrics = update(state, np.eye(4, dtype=np.float32), jax.device_put(batch, NamedSharding(mesh, BATCH)))
        rows.append(jax.device_get(metrics))
    return state, rows


@pytest.mark.parametrize("shape, count", [({"data": 1}, 2), ({"data": 1}, 4), ({"data": 2, "fsdp": 4}, 2)], ids=str)
def test_parts_of_a_batch_are_the_batch(shape, count, monkeypatch):
    """Losses, metrics and parameters, on one device and on eight; the parameters stay in their shards."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)
    devices = jax.devices()[: 1 if shape == {"data": 1} else 8]
    whole, expected = train(make_mesh({"data": 1}, jax.devices()[:1]), 1)
    state, metrics = train(make_mesh(shape, devices), count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, expected)
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-4, atol=1e-5)
    assert np.abs(whole.params["w"] - init(jax.random.key(0))["w"]).max() > 0.1
    if len(devices) == 8:
        for tree in (state.params, state.ema_params, state.opt_state[1][0].mu):
            assert tree["w"].sharding.spec in (P(None, "fsdp"), P("fsdp", None))


def test_parts_have_keys_of_their_own():
    """Two parts with equal rows get different noise, and the same noise again at the same step."""
    drawn = lambda params, rng, batch, frozen: (jnp.sum(params["w"]) * jax.random.normal(rng), {})
    gradient = accumulated(drawn, 2, make_mesh({"data": 1}, jax.devices()[:1]))
    batch, key = {"x": np.ones((4, 1), np.float32)}, jax.random.key(3)
    (_, _), grads = gradient({"w": np.ones(2, np.float32)}, key, None, batch)
    expected = np.mean([jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)])
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-6)


def test_what_accumulation_refuses():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        accumulated(loss_of, 0, mesh)
    with pytest.raises(ValueError, match="grad_accumulation 3 does not divide the batch of 16"):
        train(mesh, 3)


def test_first_moment_in_half_the_memory():
    """bfloat16 moments train to nearly the same parameters; another type is refused."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    half, full = train(mesh, 1, mu_dtype="bfloat16")[0], train(mesh, 1)[0]
    mu, nu = half.opt_state[1][0].mu["w"], half.opt_state[1][0].nu["w"]
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(half.params["w"], full.params["w"], atol=0.02)
    with pytest.raises(ValueError, match="unknown mu_dtype 'float8'"):
        train(mesh, 1, mu_dtype="float8")


def test_what_is_projected_stays_in_bounds():
    """Parameters and their average, after every update."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    tx = optax.sgd(1.0)
    _, shardings = abstract_state(init, tx, mesh)
    up = lambda params, rng, frozen, batch: ((jnp.float32(0), {}), jax.tree.map(lambda w: -jnp.ones_like(w), params))
    clamp = lambda params: jax.tree.map(lambda w: jnp.minimum(w, 0.5), params)
    update = make_update(up, (tx, lambda count: 0.0), shardings, seed=0, ema_decay=0.5, project=clamp)
    state = create_state(init, optax.sgd(1.0), 0, shardings)
    assert state.params["w"].max() > 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_jax.train.state.updates_applied", lambda opt_state: 0)
        state, _ = update(state, None, None)
    assert state.params["w"].max() == 0.5 and state.ema_params["w"].max() <= 0.5
