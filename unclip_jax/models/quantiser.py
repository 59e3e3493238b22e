"""Vector quantisation (van den Oord et al. 2017): a vector is replaced by the nearest of a codebook.

`quantise` finds the nearest vectors; its gradient passes straight through to the encoder (section 3.2). The
codebook learns in one of two ways:

    gradient   `quantiser_loss`: a codebook term moves the vectors to the encoder's outputs, and a commitment
               term keeps the outputs near the vectors (equation 3)
               A relaxation may take the place of the nearest vector (`quantise_softly`).
    averages   `Averages`: every vector is the mean of the outputs that chose it, over an exponential window
               (appendix A.1). The loss then has the commitment term alone.

All of it is float32. Sums over a batch are over the global batch: under `jit` on a mesh the devices add up
their counts and sums before the averages move, so that eight devices learn the codebook of one.

Shape letters: K codes, Z width of a vector, N vectors of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantised(NamedTuple):
    """What `quantise` returns.

    latents: (..., Z) the nearest vectors; the gradient passes straight through to the input.
    vectors: (..., Z) the same values, with the codebook's gradient.
    codes: (...) int32, the numbers of the vectors.
    """

    latents: jax.Array
    vectors: jax.Array
    codes: jax.Array


def init_codebook(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """(K, Z) uniform in [-1 / K, 1 / K), as taming-transformers and LDM begin."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The code of the vector with the smallest distance; the smaller code where two are equally near.

    Args:
      z: (..., Z).
      codebook: (K, Z).

    Returns:
      (...) int32 in [0, K).
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all e.
    inner = jnp.einsum("...z,kz->...k", z, codebook, precision="highest")
    return jnp.argmin(jnp.sum(jnp.square(codebook), axis=1) - 2.0 * inner, axis=-1).astype(jnp.int32)


def quantise(z: jax.Array, codebook: jax.Array) -> Quantised:
    """Vectors (..., Z) -> the nearest of the codebook (K, Z)."""
    z = z.astype(jnp.float32)
    codes = nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
    vectors = codebook.astype(jnp.float32)[codes]
    return Quantised(z + jax.lax.stop_gradient(vectors - z), vectors, codes)


def gumbel_softmax(logits: jax.Array, key: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """A relaxed draw from a categorical distribution (Jang et al. 2017, equation 2).

    Args:
      logits: (..., K).
      key: random.
      temperature: above 0. Near 0 the draws are one-hot; the gradient's variance then grows.

    Returns:
      (..., K) float32, positive, sums of 1.
    """
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return jax.nn.softmax((logits.astype(jnp.float32) + noise) / temperature, axis=-1)


def quantise_softly(
    z: jax.Array, codebook: jax.Array, key: jax.Array, temperature: jax.Array | float
) -> Quantised:
    """Vectors (..., Z) -> mixtures of the codebook's (K, Z): relaxed draws with logits -|z - e|^2.

    The gradient reaches the encoder and the codebook through the mixture. `codes` are the nearest vectors'.
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    inner = jnp.einsum("...z,kz->...k", z, codebook, precision="highest")
    logits = 2.0 * inner - jnp.sum(jnp.square(codebook), axis=1)  # |z|^2 is the same for all
    share = gumbel_softmax(logits, key, temperature)
    codes = nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
    return Quantised(jnp.einsum("...k,kz->...z", share, codebook), codebook[codes], codes)


def annealed(step: jax.Array, start: float, end: float, steps: int) -> jax.Array:
    """A value () that goes from `start` to `end` along half a cosine in `steps` steps, and stays there."""
    share = jnp.clip(step / steps, 0.0, 1.0)
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))


def quantiser_loss(z: jax.Array, vectors: jax.Array, beta: float = 0.25, legacy: bool = True) -> jax.Array:
    """The loss of a codebook that learns by gradient, a mean over all elements -> ().

    The paper weights the commitment term by beta. taming-transformers and LDM weight the codebook term
    instead: their authors call it a mistake and keep it, and public models were trained with it.

    Args:
      z: (..., Z) the encoder's outputs.
      vectors: (..., Z) their nearest vectors, with the codebook's gradient (`Quantised.vectors`).
      beta: weight of the one term; the other's is 1.
      legacy: True weights the codebook term by beta (as trained), False the commitment term (as intended).
    """
    commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(vectors) - z))
    codebook = jnp.mean(jnp.square(vectors - jax.lax.stop_gradient(z)))
    return commitment + beta * codebook if legacy else beta * commitment + codebook


class Usage(NamedTuple):
    """How a batch uses a codebook: `perplexity` (), in [1, K], and `used` (), the share of codes chosen."""

    perplexity: jax.Array
    used: jax.Array


def usage(codes: jax.Array, size: int) -> Usage:
    """The usage of a codebook of `size` vectors by codes of any shape."""
    counts = _counts(codes, size)
    share = counts / jnp.sum(counts)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-10)))
    return Usage(jnp.exp(entropy), jnp.mean(counts > 0))


def _counts(codes: jax.Array, size: int) -> jax.Array:
    return jnp.zeros(size, jnp.float32).at[codes.reshape(-1)].add(1.0)


class Averages(NamedTuple):
    """The moving averages behind a codebook, float32.

    counts: (K,) how many outputs choose each code in a step.
    sums: (K, Z) the sum of those outputs.
    steps: () int32, updates so far.
    """

    counts: jax.Array
    sums: jax.Array
    steps: jax.Array


def init_averages(codebook: jax.Array, debias: bool = True) -> Averages:
    """The averages before the first update.

    Args:
      codebook: (K, Z) the vectors to begin with.
      debias: True: both averages begin at zero and are divided by 1 - decay^n, as in Sonnet. False: the
        sums begin at the codebook and the counts at zero, as in rosinality's VQ-VAE-2. Both have the same
        fixed point; they differ in about the first 500 steps.
    """
    codebook = codebook.astype(jnp.float32)
    sums = jnp.zeros_like(codebook) if debias else codebook
    return Averages(jnp.zeros(len(codebook)), sums, jnp.zeros((), jnp.int32))


def trained_averages(codebook: jax.Array, outputs: int) -> Averages:
    """The averages of a codebook that is trained already, as if its codes had been chosen equally often.

    Vectors that the next batches do not choose stay where they are. `init_averages` would forget them.

    Args:
      codebook: (K, Z).
      outputs: number of the encoder's outputs in a batch.
    """
    counts = jnp.full(len(codebook), outputs / len(codebook), jnp.float32)
    begun = jnp.full((), 10**6, jnp.int32)  # nothing is left of a bias
    return Averages(counts, codebook.astype(jnp.float32) * counts[:, None], begun)


def update_averages(averages: Averages, z: jax.Array, codes: jax.Array, decay: float = 0.99) -> Averages:
    """Moves the averages by one batch.

    Args:
      averages: those before.
      z: (..., Z) the encoder's outputs of the global batch.
      codes: (...) the codes that they chose.
      decay: the share that stays, in [0, 1).
    """
    size = len(averages.counts)
    z = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, z.shape[-1])
    sums = jnp.zeros_like(averages.sums).at[codes.reshape(-1)].add(z)
    return Averages(
        decay * averages.counts + (1.0 - decay) * _counts(codes, size),
        decay * averages.sums + (1.0 - decay) * sums,
        averages.steps + 1,
    )


def averaged_codebook(
    averages: Averages, decay: float = 0.99, debias: bool = True, epsilon: float = 1e-5
) -> jax.Array:
    """The codebook (K, Z) that the averages stand for, after at least one update.

    Counts are smoothed (Laplace): N^ = (N + epsilon) / (sum N + K epsilon) * sum N. A code that no output
    chose keeps a finite vector.

    Args:
      averages: after an update.
      decay: that of the updates.
      debias: as in `init_averages`.
      epsilon: of the smoothing.
    """
    correction = 1.0 - decay ** averages.steps.astype(jnp.float32) if debias else 1.0
    counts, sums = averages.counts / correction, averages.sums / correction
    total = jnp.sum(counts)
    smoothed = (counts + epsilon) / (total + len(counts) * epsilon) * total
    return sums / smoothed[:, None]


def restart_dead(
    averages: Averages,
    z: jax.Array,
    key: jax.Array,
    threshold: float = 1.0,
    *,
    decay: float = 0.99,
    debias: bool = True,
) -> Averages:
    """Gives codes that are hardly chosen a new vector, an output of this batch drawn at random.

    Without this a vector far from all outputs is never chosen, and so never moves (Dhariwal et al. 2020,
    Jukebox, section 3.1).

    Args:
      averages: after this batch's update.
      z: (..., Z) the encoder's outputs of the global batch.
      key: random.
      threshold: a code whose average count is below it is dead; 0: none is.
      decay, debias: those of the averages.
    """
    z = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, z.shape[-1])
    drawn = z[jax.random.randint(key, (len(averages.counts),), 0, len(z))]
    correction = 1.0 - decay ** averages.steps.astype(jnp.float32) if debias else 1.0
    dead = averages.counts / correction < threshold
    # The new code counts as if it had been chosen `threshold` times a step, so that it is not dead at once.
    return averages._replace(
        counts=jnp.where(dead, threshold * correction, averages.counts),
        sums=jnp.where(dead[:, None], drawn * threshold * correction, averages.sums),
    )
