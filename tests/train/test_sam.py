"""SAM on a small contrastive model: its limits, its definition by groups, and independence of lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.train.clip import contrastive_loss
from unclip_jax.train.sam import sam_gradient

B, D = 12, 5
RNG = np.random.default_rng(0)
PARAMS = {
    "image": RNG.normal(size=(4, D)).astype(np.float32),
    "text": RNG.normal(size=(3, D)).astype(np.float32),
    "scale": np.float32(1.5),
}
BATCH = {
    "image": RNG.normal(size=(B, 4)).astype(np.float32),
    "text": RNG.normal(size=(B, 3)).astype(np.float32),
}


def embed(params, rows):
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    return {name: unit(jnp.tanh(rows[name] @ params[name])) for name in ("image", "text")}


def loss(params, features):
    value, accuracy = contrastive_loss(features["image"], features["text"], params["scale"])
    return value, {"accuracy": accuracy}


def plain(params, batch=BATCH):
    return jax.grad(lambda p: loss(p, embed(p, batch))[0])(params)


def sam(rho, group_size, lanes=1):
    return jax.jit(lambda p, b: sam_gradient(embed, loss, p, b, rho=rho, group_size=group_size, lanes=lanes))(
        PARAMS, BATCH
    )


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b)


def moved(gradient, rho):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda p, g: p + rho / norm * g, PARAMS, gradient)


@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_without_a_perturbation_it_is_the_plain_gradient(group_size):
    (value, metrics), gradient = sam(0.0, group_size)
    np.testing.assert_allclose(value, loss(PARAMS, embed(PARAMS, BATCH))[0], rtol=1e-5)
    assert set(metrics) == {"accuracy"}
    assert_trees_close(gradient, plain(PARAMS))


def test_one_group_is_the_published_algorithm():
    """The gradient is that at w + rho g / |g|; the loss is that at w."""
    (value, _), gradient = sam(0.3, B)
    assert_trees_close(gradient, plain(moved(plain(PARAMS), 0.3)))
    np.testing.assert_allclose(value, loss(PARAMS, embed(PARAMS, BATCH))[0], rtol=1e-5)
    assert np.abs(np.asarray(gradient["image"]) - plain(PARAMS)["image"]).max() > 1e-3


def test_groups_are_perturbed_on_their_own():
    """Compares with the definition, computed group by group, with the other groups' features constant."""
    rho, size = 0.3, 4
    parts = [jax.tree.map(lambda a, r=r: a[r : r + size], BATCH) for r in range(0, B, size)]
    join = lambda features: jax.tree.map(lambda *f: jnp.concatenate(f), *features)

    def through(r, features, weights):
        def loss_through_group(p):
            scale = p["scale"] / 3 + jax.lax.stop_gradient(p["scale"] * 2 / 3)
            return loss(
                {"scale": scale}, join([embed(p, parts[r]) if i == r else f for i, f in enumerate(features)])
            )[0]

        return jax.grad(loss_through_group)(weights)

    features = [embed(PARAMS, part) for part in parts]
    weights = [moved(through(r, features, PARAMS), rho) for r in range(3)]
    features = [embed(w, part) for w, part in zip(weights, parts)]
    expected = jax.tree.map(lambda *g: sum(g), *[through(r, features, w) for r, w in enumerate(weights)])
    (_, _), gradient = sam(rho, size)
    assert_trees_close(gradient, expected)
    assert (
        np.abs(np.asarray(gradient["image"]) - sam(rho, B)[1]["image"]).max() > 1e-3
    )  # it is not one large group


@pytest.mark.parametrize("lanes", [2, 3, 6])
def test_lanes_change_nothing(lanes):
    (one, _), gradient = sam(0.2, 2)
    (many, _), other = sam(0.2, 2, lanes)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    assert_trees_close(gradient, other)


@pytest.mark.parametrize("group_size, lanes", [(5, 1), (4, 2)])
def test_what_does_not_divide_is_refused(group_size, lanes):
    with pytest.raises(
        ValueError, match=f"12 rows does not divide into groups of {group_size} in {lanes} lanes"
    ):
        sam(0.1, group_size, lanes)
