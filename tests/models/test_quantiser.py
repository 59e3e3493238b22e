"""The quantiser: nearest vectors, gradients, losses, and codebooks of averages, on one device and eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.models.quantiser import (
    averaged_codebook,
    init_averages,
    init_codebook,
    nearest,
    quantise,
    quantiser_loss,
    restart_dead,
    trained_averages,
    update_averages,
    usage,
)
from unclip_jax.sharding import BATCH, make_mesh

RNG = np.random.default_rng(0)
K, Z = 12, 5
CODEBOOK = RNG.normal(size=(K, Z)).astype(np.float32)
OUTPUTS = RNG.normal(size=(4, 16, 3, Z)).astype(np.float32)


def test_the_nearest_vector():
    """The code has the smallest distance; a vector of the codebook has its own code."""
    distances = np.linalg.norm(OUTPUTS[..., None, :] - CODEBOOK, axis=-1)
    np.testing.assert_array_equal(nearest(OUTPUTS, CODEBOOK), distances.argmin(-1))
    np.testing.assert_array_equal(nearest(CODEBOOK, CODEBOOK), np.arange(K))
    twice = np.concatenate([CODEBOOK, CODEBOOK])
    assert nearest(OUTPUTS, twice).max() < K  # the smaller of two equal ones


def test_gradient_passes_straight_through():
    """The gradient of what follows reaches the encoder unchanged, and not the codebook."""
    weight = RNG.normal(size=OUTPUTS.shape).astype(np.float32)
    follow = lambda z, codebook: jnp.sum(quantise(z, codebook).latents * weight)
    to_z, to_codebook = jax.grad(follow, argnums=(0, 1))(OUTPUTS, CODEBOOK)
    np.testing.assert_array_equal(to_z, weight)
    np.testing.assert_array_equal(to_codebook, np.zeros_like(CODEBOOK))
    found = quantise(OUTPUTS, CODEBOOK)
    np.testing.assert_allclose(found.latents, CODEBOOK[found.codes], atol=1e-6)


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_equals_diffusers(legacy):
    """Value and both gradients, with the weights as trained and as intended."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    theirs = VectorQuantizer(K, Z, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data = torch.from_numpy(CODEBOOK.copy())
    z = torch.from_numpy(OUTPUTS.transpose(0, 3, 1, 2).copy()).requires_grad_()
    _, loss, _ = theirs(z)
    loss.backward()
    ours = lambda z, codebook: quantiser_loss(z, quantise(z, codebook).vectors, 0.25, legacy)
    value, (to_z, to_codebook) = jax.value_and_grad(ours, argnums=(0, 1))(OUTPUTS, CODEBOOK)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(to_z, z.grad.numpy().transpose(0, 2, 3, 1), atol=1e-7)
    np.testing.assert_allclose(to_codebook, theirs.embedding.weight.grad.numpy(), atol=1e-6)


def moving_averages(debias, decay, epsilon=1e-5, steps=4):
    """Codebooks by the papers' formulas, in float64 loops: Sonnet's (debiased), or rosinality's."""
    counts, sums = np.zeros(K), np.zeros((K, Z)) if debias else CODEBOOK.astype(np.float64)
    codebook = CODEBOOK.astype(np.float64)
    for step in range(1, steps + 1):
        z = OUTPUTS.reshape(-1, Z).astype(np.float64) + step
        codes = np.linalg.norm(z[:, None] - codebook, axis=-1).argmin(1)
        for k in range(K):
            counts[k] = decay * counts[k] + (1 - decay) * np.sum(codes == k)
            sums[k] = decay * sums[k] + (1 - decay) * z[codes == k].sum(0)
        bias = 1 - decay**step if debias else 1.0
        n = counts / bias
        n = (n + epsilon) / (n.sum() + K * epsilon) * n.sum()
        codebook = sums / bias / n[:, None]
    return codebook


@pytest.mark.parametrize("debias", [True, False], ids=["Sonnet", "rosinality"])
@pytest.mark.parametrize("devices", [1, 8])
def test_codebook_of_averages(debias, devices):
    """Four updates follow the formulas. Eight devices that share the batch learn the codebook of one."""
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    decay = 0.9

    @jax.jit
    def step(averages, codebook, z):
        averages = update_averages(averages, z, nearest(z, codebook), decay)
        return averages, averaged_codebook(averages, decay, debias)

    replicated = NamedSharding(mesh, P())
    averages, codebook = jax.device_put((init_averages(CODEBOOK, debias), CODEBOOK), replicated)
    for n in range(1, 5):
        z = jax.device_put(OUTPUTS.reshape(32, 6, Z) + n, NamedSharding(mesh, BATCH))
        averages, codebook = step(averages, codebook, z)
    assert codebook.dtype == jnp.float32 and averages.steps == 4
    expected = moving_averages(debias, decay)
    used = np.asarray(averages.counts) > 0.01  # codes without outputs divide two tiny numbers
    assert used.sum() > 3
    np.testing.assert_allclose(np.asarray(codebook)[used], expected[used], rtol=1e-4, atol=1e-5)


def test_first_codebook_is_the_mean_of_its_outputs():
    """With debiasing, one update is the k-means step, whatever the decay."""
    codes = nearest(OUTPUTS, CODEBOOK)
    averages = update_averages(init_averages(CODEBOOK), OUTPUTS, codes, 0.99)
    codebook = averaged_codebook(averages, 0.99, epsilon=1e-9)
    for k in np.unique(codes):
        np.testing.assert_allclose(codebook[k], OUTPUTS[np.asarray(codes) == k].mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("debias", [True, False])
def test_dead_codes_start_again(debias):
    """A vector that is far from everything becomes an output of the batch; the others stay."""
    codebook = CODEBOOK.copy()
    codebook[3] = 100.0
    codes = nearest(OUTPUTS, codebook)
    averages = update_averages(init_averages(codebook, debias), OUTPUTS, codes, 0.9)
    restarted = restart_dead(averages, OUTPUTS, jax.random.key(0), 0.5, decay=0.9, debias=debias)
    share = averages.counts / (0.1 if debias else 1.0)
    alive = np.asarray(share) >= 0.5
    assert not alive[3] and alive.sum() > 3
    np.testing.assert_array_equal(restarted.counts[alive], averages.counts[alive])
    np.testing.assert_array_equal(restarted.sums[alive], averages.sums[alive])
    vector = averaged_codebook(restarted, 0.9, debias, epsilon=1e-9)[3]
    assert np.abs(OUTPUTS.reshape(-1, Z) - vector).sum(1).min() < 1e-3
    same = restart_dead(averages, OUTPUTS, jax.random.key(0), 0.0, decay=0.9, debias=debias)
    jax.tree.map(np.testing.assert_array_equal, same, averages)


@pytest.mark.parametrize("debias", [True, False])
def test_a_trained_codebook_goes_on(debias):
    """Its averages stand for it; vectors that a batch does not choose stay, and the others move a little."""
    codebook = CODEBOOK.copy()
    codebook[3] = 100.0
    averages = trained_averages(jnp.asarray(codebook), OUTPUTS[..., 0].size)
    np.testing.assert_allclose(averaged_codebook(averages, 0.9, debias, 1e-9), codebook, rtol=1e-5)
    codes = nearest(OUTPUTS, codebook)
    moved = averaged_codebook(update_averages(averages, OUTPUTS, codes, 0.9), 0.9, debias, 1e-9)
    chosen = np.isin(np.arange(K), codes)
    assert not chosen[3] and chosen.sum() > 3
    np.testing.assert_allclose(moved[~chosen], codebook[~chosen], rtol=1e-4)
    assert np.all(np.abs(moved - codebook)[chosen].max(1) > 1e-3)


def test_usage_of_a_codebook():
    """Equal use of all codes has the perplexity K; one code has 1."""
    even, single = usage(jnp.arange(24) % 8, 8), usage(jnp.zeros((3, 4), jnp.int32), 8)
    np.testing.assert_allclose([even.perplexity, even.used], [8.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([single.perplexity, single.used], [1.0, 1 / 8], rtol=1e-6)
    half = usage(jnp.array([0, 0, 1, 2]), 4)  # entropy 1.5 bits
    np.testing.assert_allclose([half.perplexity, half.used], [2**1.5, 0.75], rtol=1e-6)


def test_first_codebook_is_small():
    """Uniform in [-1/K, 1/K), as in the peers."""
    codebook = init_codebook(jax.random.key(0), (64, 32))
    assert np.abs(codebook).max() <= 1 / 64 and codebook.std() > 0.5 / 64
