"""The update step: accumulation over parts of a batch, the first moment's dtype, projection, players."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax import sharding
from unclip_jax.run.optim import Optimizer, make_optimizer
from unclip_jax.run.stage import Player, Stage, without_extra
from unclip_jax.run.state import abstract_state, accumulated, create_state, make_update
from unclip_jax.sharding import BATCH, make_mesh

OPTIMIZER = {"learning_rate": 0.1, "steps": 100, "schedule": "constant"}
ONE_PLAYER = (Player(),)
RNG = np.random.default_rng(0)
BATCHES = [
    {"x": np.float32(RNG.normal(size=(16, 6))), "y": np.float32(RNG.normal(size=(16, 4)))} for _ in range(3)
]


def loss_of(params, rng, batch, *, frozen):
    """Least squares, with a metric."""
    error = jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ frozen - batch["y"])
    return jnp.mean(error), {"largest": jnp.mean(jnp.max(error, axis=1))}


def init(key):
    return {"w": jax.random.normal(key, (6, 4))}, {}


ALONE = (Player(),)


def stage_of(objective, init=init, players=ALONE):
    """A stage that has no more than an update needs."""
    return Stage("test", None, {}, init, None, objective, players)


def settings(count=1):
    """The settings that an update reads."""
    return SimpleNamespace(seed=0, ema_decay=0.5, grad_accumulation=count)


def train(mesh, count, **changes):
    """Applies three updates; returns the state and the metrics."""
    stage, optimizers = stage_of(without_extra(loss_of)), (make_optimizer(**OPTIMIZER | changes),)
    _, shardings = abstract_state(stage, optimizers, mesh)
    state = create_state(stage, optimizers, 0, shardings)
    update = make_update(stage, optimizers, shardings, mesh, settings(count))
    rows = []
    for batch in BATCHES:
        state, metrics = update(
            state, np.eye(4, dtype=np.float32), jax.device_put(batch, NamedSharding(mesh, BATCH))
        )
        rows.append(jax.device_get(metrics))
    return state, rows


@pytest.mark.parametrize(
    "shape, count", [({"data": 1}, 2), ({"data": 1}, 4), ({"data": 2, "fsdp": 4}, 2)], ids=str
)
def test_parts_of_a_batch_are_the_batch(shape, count, monkeypatch):
    """Accumulation gives the same losses and (sharded) parameters, on one device and on eight."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)
    devices = jax.devices()[: 1 if shape == {"data": 1} else 8]
    whole, expected = train(make_mesh({"data": 1}, jax.devices()[:1]), 1)
    state, metrics = train(make_mesh(shape, devices), count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, expected)
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-4, atol=1e-5)
    assert np.abs(whole.params["w"] - init(jax.random.key(0))[0]["w"]).max() > 0.1
    if len(devices) == 8:
        for tree in (state.params, state.ema_params, state.opt_state[1][0].mu):
            assert tree["w"].sharding.spec in (P(None, "fsdp"), P("fsdp", None))


def test_parts_have_keys_of_their_own():
    """Two parts with equal rows get different noise, and the same noise again at the same step."""
    drawn = lambda params, rng, batch, *, frozen: (jnp.sum(params["w"]) * jax.random.normal(rng), {})
    gradient = accumulated(without_extra(drawn), 2, make_mesh({"data": 1}, jax.devices()[:1]))
    batch, key = {"x": np.ones((4, 1), np.float32)}, jax.random.key(3)
    (_, _), grads = gradient({"w": np.ones(2, np.float32)}, {}, key, batch, 0, frozen=None)
    expected = np.mean([jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)])
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-6)


def test_what_accumulation_refuses():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        accumulated(without_extra(loss_of), 0, mesh)
    with pytest.raises(ValueError, match="grad_accumulation 3 does not divide the batch of 16"):
        train(mesh, 3)


def test_first_moment_in_half_the_memory():
    """bfloat16 moments give nearly the same parameters. Other dtypes are refused."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    half, full = train(mesh, 1, mu_dtype="bfloat16")[0], train(mesh, 1)[0]
    mu, nu = half.opt_state[1][0].mu["w"], half.opt_state[1][0].nu["w"]
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(half.params["w"], full.params["w"], atol=0.02)
    with pytest.raises(ValueError, match="unknown mu_dtype 'float8'"):
        train(mesh, 1, mu_dtype="float8")


def test_what_is_projected_stays_in_bounds():
    """The projection applies to the parameters and their average, after every update."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    clamp = lambda params, extra: jax.tree.map(lambda w: jnp.minimum(w, 0.5), params)
    up = without_extra(lambda params, rng, batch, *, frozen: (-jnp.sum(params["w"]), {}))
    stage, optimizers = stage_of(up, players=(Player(project=clamp),)), (make_optimizer(**OPTIMIZER),)
    _, shardings = abstract_state(stage, optimizers, mesh)
    state = create_state(stage, optimizers, 0, shardings)
    assert state.params["w"].max() > 0.5
    state, _ = make_update(stage, optimizers, shardings, mesh, settings())(
        state, None, {"x": np.zeros((1, 1))}
    )
    assert state.params["w"].max() == 0.5 and state.ema_params["w"].max() <= 0.5


def test_two_players_move_in_turn():
    """Each player trains its own parameters on its own objective.

    The second player sees the update of the first. `extra` is kept. Only the first one's are averaged.
    """
    mesh = make_mesh({"data": 1}, jax.devices()[:1])

    def first(params, extra, rng, batch, step, *, frozen):
        return jnp.sum(params["a"]) + 0 * jnp.sum(params["b"]), ({}, {"calls": extra["calls"] + 1})

    def second(params, extra, rng, batch, step, *, frozen):
        seen = jax.lax.stop_gradient(jnp.sum(params["a"]))
        return jnp.sum(params["b"]) * 2.0 + 0 * seen, ({"seen": seen}, extra)

    players = (Player("first", ("a",)), Player("second", ("b",), second))
    begin = lambda key: ({"a": jnp.zeros(3), "b": jnp.zeros(2)}, {"calls": jnp.zeros((), jnp.int32)})
    stage = stage_of(first, begin, players)
    optimizers = tuple(
        Optimizer(optax.chain(optax.scale_by_adam(), optax.scale(-rate)), lambda n: 0.0)
        for rate in (0.1, 0.01)
    )
    _, shardings = abstract_state(stage, optimizers, mesh)
    state = create_state(stage, optimizers, 0, shardings)
    update = make_update(stage, optimizers, shardings, mesh, settings())
    for _ in range(2):
        state, metrics = update(state, None, {"x": np.zeros((1, 1))})
    np.testing.assert_allclose(state.params["a"], -0.2, rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], -0.02, rtol=1e-5)
    np.testing.assert_allclose(metrics["second_seen"], 3 * -0.2, rtol=1e-5)
    assert set(state.ema_params) == {"a"} and np.all(np.abs(state.ema_params["a"]) < 0.2)
    assert (
        state.extra["calls"] == 2
        and set(state.opt_state) == {"first", "second"}
        and metrics["loss"] == metrics["first_loss"]
    )


def test_what_extra_decides():
    """A projection may set parameters from `extra`, and sets their averages to the same values."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])

    def objective(params, extra, rng, batch, step, *, frozen):
        return jnp.sum(params["a"]), ({}, {"mean": extra["mean"] + jnp.mean(batch["x"])})

    follow = lambda params, extra: params | {"codebook": jnp.full(2, extra["mean"])}
    begin = lambda key: ({"a": jnp.zeros(3), "codebook": jnp.zeros(2)}, {"mean": jnp.zeros(())})
    stage, optimizers = (
        stage_of(objective, begin, (Player(project=follow),)),
        (make_optimizer(**OPTIMIZER),),
    )
    _, shardings = abstract_state(stage, optimizers, mesh)
    state = create_state(stage, optimizers, 0, shardings)
    update = make_update(stage, optimizers, shardings, mesh, settings())
    for _ in range(2):
        state, _ = update(state, None, {"x": np.full((4, 1), 3.0)})
    for tree in (state.params, state.ema_params):
        np.testing.assert_array_equal(tree["codebook"], 6.0)


def test_a_player_whose_gradient_is_not_finite_stands_still():
    """Parameters, average and optimizer stay the same; only the step count advances."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    stage, optimizers = stage_of(without_extra(loss_of)), (make_optimizer(**OPTIMIZER),)
    _, shardings = abstract_state(stage, optimizers, mesh)
    before, state = (create_state(stage, optimizers, 0, shardings) for _ in range(2))
    batch = {k: np.full_like(v, np.nan) for k, v in BATCHES[0].items()}
    state, metrics = make_update(stage, optimizers, shardings, mesh, settings())(
        state, np.eye(4, dtype=np.float32), batch
    )
    assert metrics["skipped"] == 1 and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, state.replace(step=before.step), before)
