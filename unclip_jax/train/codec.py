"""The codec of the autoregressive prior: PCA of CLIP image embeddings (unCLIP section 2.2).

1. A sharded pass over the training images computes the sums of z and of z z^T of each batch on the devices,
   at the highest precision. The host adds them up in float64.
2. The host computes the eigenvectors of the covariance.
3. A second pass over as many rows finds the extremes of the projections.

The codec keeps all components, in the order of their eigenvalues; the prior uses the first ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.examples import clip_example
from unclip_jax.errors import InputError
from unclip_jax.models.codec import Codec, project
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import (
    arrays,
    check_sources,
    clip_image_size,
    clip_tokenizer,
    hashes,
    images_of,
    load_frozen,
)
from unclip_jax.run.loop import Run
from unclip_jax.run.stage import Stage
from unclip_jax.sharding import make_mesh

FROZEN = {"clip": "clip"}
SETTINGS = settings.RUN | {
    "frozen": settings.frozen(FROZEN),
    "dims": settings.whole("[1, inf)"),
    "report": settings.several("[1, inf)", least=0),
}


# ------------------------------------------------------------------------------------ fit
def principal_components(
    count: int, total: np.ndarray, outer: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PCA from sums.

    Args:
      count: number of embeddings z.
      total: (D,) float64, the sum of z.
      outer: (D, D) float64, the sum of z z^T.

    Returns:
      mean: (D,).
      eigenvalues: (D,), in descending order and not negative.
      components: (D, D); row k is the k-th direction, with a positive sign of its largest entry.
    """
    mean = total / count
    values, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    components = vectors[:, ::-1].T
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1, keepdims=True), axis=1)
    return mean, np.maximum(values[::-1], 0.0), components * np.sign(largest)


def explained(eigenvalues: np.ndarray, dims: int) -> float:
    """The fraction of the variance in the first `dims` components.

    The remaining fraction is the relative mean squared error of the reconstruction.
    """
    return float(np.sum(eigenvalues[:dims]) / max(np.sum(eigenvalues), 1e-30))


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range."""
    settings.check_settings(config, SETTINGS)


def stage(config, mesh, frozen) -> Stage:
    """The stage as its configuration describes it, with its frozen CLIP. It is fitted, so it has no players.

    Raises:
      ValueError: as `check`; when there are too few rows for the covariance, or `dims` exceeds the
        embedding's dimensions.
    """
    check(config)
    clip, rows = frozen["clip"], config.steps * config.batch_size
    dim = clip.config["model"]["embed_dim"]
    if not 1 <= config.dims <= dim:
        raise InputError(f"dims must be between 1 and the embedding's {dim}, got {config.dims}")
    if rows <= dim:
        raise InputError(
            f"{rows} rows (steps x batch_size) are too few for the covariance of {dim} dimensions; "
            "raise steps"
        )
    shapes = {"mean": (dim,), "components": (dim, dim), "eigenvalues": (dim,), "low": (dim,), "high": (dim,)}
    return Stage(
        name="codec",
        model=None,
        part={"kind": "codec", "embed_dim": dim, "dims": config.dims, "frozen": hashes(frozen)},
        init=lambda key: ({name: jnp.zeros(shape) for name, shape in shapes.items()}, {}),
        example=functools.partial(
            clip_example,
            tokenizer=clip_tokenizer(clip),
            size=clip_image_size(clip),
            crop_scale=config.data.crop_scale,
        ),
        objective=None,
        players=(),
    )


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Fits the codec and writes it as the run's only checkpoint. A finished run stays as it is.

    Args:
      config: the run's configuration; see `configs/emoji/codec.py`.
      workdir: the run's folder.
      init_from: must be None, because a fit does not start from weights.

    Returns:
      The figures: fractions of the variance that the first components explain.

    Raises:
      ValueError: as `stage`, or when `init_from` is given.
    """
    check(config)
    if init_from is not None:
        raise InputError("the codec is fitted on embeddings and starts from nothing: leave out --init-from")
    # -------------------------------------------------------------------------------- mesh and data
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    networks = load_frozen(config, workdir, mesh, FROZEN, None)
    clip = networks["clip"]
    check_sources(clip, data, pictures=False)
    codec_stage = stage(config, mesh, networks)
    dim, rows = codec_stage.part["embed_dim"], config.steps * config.batch_size
    params = arrays(networks)["clip"]

    # -------------------------------------------------------------------------------- passes
    @jax.jit
    def sums(params, batch):
        z = images_of(clip, mesh, params, batch).astype(jnp.float32)
        return jnp.sum(z, axis=0), jnp.einsum("bi,bj->ij", z, z, precision="highest")

    @jax.jit
    def extremes(params, codec, batch):
        y = project(codec, images_of(clip, mesh, params, batch), dim)
        return jnp.min(y, axis=0), jnp.max(y, axis=0)

    run = Run(config, workdir, codec_stage, mesh, data)
    if run.start.step:
        run.store.close()
        eigenvalues = np.asarray(jax.device_get(run.state.params["eigenvalues"]), np.float64)
        return {"explained_variance": explained(eigenvalues, config.dims)}
    with run:
        total, outer = np.zeros(dim), np.zeros((dim, dim))
        low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
        for step, batch in run:
            batch_total, batch_outer = jax.device_get(sums(params, batch))
            total, outer = total + batch_total, outer + batch_outer
            run.log(step, {})
        if run.stopping:
            return run.figures
        mean, eigenvalues, components = principal_components(rows, total, outer)
        codec = Codec(
            *(jnp.asarray(a, jnp.float32) for a in (mean, components, eigenvalues, 0 * mean, 0 * mean))
        )
        for batch in run.measuring_batches(config.steps):
            least, most = jax.device_get(extremes(params, codec, batch))
            low, high = np.minimum(low, least), np.maximum(high, most)
            if run.stop:
                return run.figures
        fitted = {
            "mean": mean,
            "components": components,
            "eigenvalues": eigenvalues,
            "low": low,
            "high": high,
        }
        run.replace_parameters(
            {name: np.asarray(value, np.float32) for name, value in fitted.items()}, config.steps
        )
        run.save(config.steps)
        report = sorted({*config.report, config.dims})
        run.record(
            config.steps, {f"explained_variance_{k}": explained(eigenvalues, k) for k in report if k <= dim}
        )
    return run.figures | {"explained_variance": explained(eigenvalues, config.dims)}
