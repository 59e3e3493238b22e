"""PCA of CLIP image embeddings, the codec of the autoregressive prior (unCLIP section 2.2).

One sharded pass over the training images: sums of z and of z z^T are taken on the devices at the highest precision and gathered into
float64 on the host, batch by batch; the eigenvectors of the covariance follow. A second pass over as many rows finds the extremes of the
projections. All components are kept, in the order of their eigenvalues; whoever uses them takes the first ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.data import sources
from unclip_jax.models.prior_ar import Codec, project
from unclip_jax.sharding import make_mesh, shard_batch
from unclip_jax.train import common
from unclip_jax.train.clip import make_example
from unclip_jax.train.state import abstract_state, create_state


# ---------------------------------------------------------------------------------------------------------------------- fit
def principal_components(count: int, total: np.ndarray, outer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PCA from sums.

    Args:
      count: number of embeddings.
      total: (D,) float64, their sum; outer: (D, D) float64, the sum of z z^T.

    Returns:
      mean (D,), eigenvalues (D,) falling and not negative, components (D, D), row k the k-th direction, its largest entry positive.
    """
    mean = total / count
    values, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    components = vectors[:, ::-1].T
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1, keepdims=True), axis=1)
    return mean, np.maximum(values[::-1], 0.0), components * np.sign(largest)


def explained(eigenvalues: np.ndarray, dims: int) -> float:
    """Fraction of the variance in the first `dims` components; the rest is the relative mean squared error of reconstruction."""
    return float(np.sum(eigenvalues[:dims]) / max(np.sum(eigenvalues), 1e-30))


# ---------------------------------------------------------------------------------------------------------------------- training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Fits the codec and writes it as the run's only checkpoint; a finished run is left alone. Returns its figures.

    Args:
      config: see `configs/emoji/pca.py`.
      workdir: the run's folder.
      init_from: must be None: there is nothing to start from.

    Raises:
      ValueError: when there are fewer rows than `dims` asks for.
    """
    if init_from is not None:
        raise ValueError("the pca stage starts from nothing; leave out --init-from")
    # ------------------------------------------------------------------------------------------------------------------ mesh and data
    mesh = make_mesh(config.mesh)
    clip = common.frozen_clip(config.clip, workdir, mesh, config.dtype, captions=False)
    source = sources.make_source(config.data.train)
    clip = common.matched(clip, source)
    example = functools.partial(make_example, tokenizer=clip.tokenizer, size=clip.image_size, crop_scale=config.data.crop_scale)
    dim, rows = clip.embed_dim, config.steps * config.batch_size
    if not 1 <= config.dims <= dim:
        raise ValueError(f"dims must be between 1 and the embedding's {dim}, got {config.dims}")
    if rows <= dim:
        raise ValueError(f"{rows} rows (steps x batch_size) are too few for the covariance of {dim} dimensions; raise steps")

    # ------------------------------------------------------------------------------------------------------------------ restore
    store = CheckpointStore(workdir, config.keep)
    zeros = {"mean": (dim,), "components": (dim, dim), "eigenvalues": (dim,), "low": (dim,), "high": (dim,)}
    empty = lambda key: {k: jnp.zeros(shape) for k, shape in zeros.items()}  # noqa: E731
    _, shardings = abstract_state(empty, optax.identity(), mesh)
    state = create_state(empty, optax.identity(), config.seed, shardings)
    meta = {
        "name": "pca",
        "part": {"kind": "pca", "embed_dim": dim, "dims": config.dims, "clip": clip.hash},
        "tokenizer": clip.tokenizer.config(),
        "sampling": {},
        "config": common.config_json(config),
        "provenance": common.new_provenance(source.checksum),
    }
    state, meta, done, _ = common.restore_or_init(store, state, shardings, meta, None)
    if done:
        eigenvalues = np.asarray(jax.device_get(state.params["eigenvalues"]), np.float64)
        store.close()
        return {"explained_variance": explained(eigenvalues, config.dims)}

    # ------------------------------------------------------------------------------------------------------------------ passes
    @jax.jit
    def sums(params, batch):
        z = clip.image(params, batch).astype(jnp.float32)
        return jnp.sum(z, axis=0), jnp.einsum("bi,bj->ij", z, z, precision="highest")

    @jax.jit
    def extremes(params, codec, batch):
        y = project(codec, clip.image(params, batch), dim)
        return jnp.min(y, axis=0), jnp.max(y, axis=0)

    logger = common.Logger(workdir, start=0, total=2 * config.steps, batch_size=config.batch_size, every=config.log_every, name="pca")
    with common.closing(store, logger), common.stop_signals() as stop:
        total, outer = np.zeros(dim), np.zeros((dim, dim))
        low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
        codec = None
        for second in (False, True):
            batches = common.batches(config, source, example, mesh, 0)
            with common.closing(batches):
                for step in range(1, config.steps + 1):
                    batch = shard_batch(next(batches), mesh)
                    if second:
                        least, most = jax.device_get(extremes(clip.params, codec, batch))
                        low, high = np.minimum(low, least), np.maximum(high, most)
                    else:
                        batch_total, batch_outer = jax.device_get(sums(clip.params, batch))
                        total, outer = total + batch_total, outer + batch_outer
                    logger.step(second * config.steps + step, {})
                    if stop:
                        common.leave_if_stopped(stop)
            if not second:
                mean, eigenvalues, components = principal_components(rows, total, outer)
                codec = Codec(*(jnp.asarray(a, jnp.float32) for a in (mean, components, eigenvalues, 0 * mean, 0 * mean)))
        figures = {f"explained_variance_{k}": explained(eigenvalues, k) for k in sorted({*config.report, config.dims}) if k <= dim}
        params = {"mean": mean, "components": components, "eigenvalues": eigenvalues, "low": low, "high": high}
        params = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, np.float32), s), params, shardings.params)
        copy = jax.tree.map(lambda a: a + 0.0, params)
        store.save(
            config.steps, state.replace(step=state.step + config.steps, params=params, ema_params=copy), common.with_time(meta, logger)
        )
        logger.record(2 * config.steps, figures)
        common.say("pca: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return figures | {"explained_variance": explained(eigenvalues, config.dims)}
