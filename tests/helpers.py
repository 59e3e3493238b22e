"""Parameter trees for tests, counted and filled without compiling an initialiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def fast_key(seed: int = 0):
    """A random key whose generator compiles faster than the default's; for initialisers and dropout."""
    return jax.random.key(seed, impl="unsafe_rbg")


def struct(*shape, dtype=jnp.float32):
    """A shape in place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def param_shapes(model, *args, **kwargs):
    """The parameters of a model as shapes. It computes nothing, so models may be of any size."""
    return jax.eval_shape(lambda a, k: model.init(jax.random.key(0), *a, **k), args, kwargs)["params"]


def param_count(params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def randomize(params, seed: int = 0, scale: float = 0.1):
    """Fills the all-zero leaves of a tree with normal noise.

    Zero-initialised outputs and biases would hide what they multiply.
    """
    rng = np.random.default_rng(seed)
    noise = lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree.map(lambda leaf: noise(leaf) if not np.any(leaf) else leaf, jax.device_get(params))


def random_params(model, *args, seed: int = 0, **kwargs):
    """Random parameters of the model's shapes, with no zero leaf.

    Kernels are scaled by their number of inputs, gains are about one, and the rest is small.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name == "kernel":
            noise *= math.prod(leaf.shape[:-1] if len(leaf.shape) != 3 else leaf.shape[:1]) ** -0.5
        else:
            noise = (name == "scale") + 0.2 * noise
        return np.asarray(noise, np.float32)

    return jax.tree_util.tree_map_with_path(fill, param_shapes(model, *args, **kwargs))
