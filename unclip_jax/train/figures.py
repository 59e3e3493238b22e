"""Measurements that several stages share: the held-out loss, samples, a prior's figures, FID and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.metrics.fid import frechet_distance
from unclip_jax.metrics.kid import kernel_inception_distance
from unclip_jax.metrics.precision_recall import prdc
from unclip_jax.metrics.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.run import features
from unclip_jax.run.batches import Data, eval_batches, joined_rows
from unclip_jax.run.hosts import on_every_host
from unclip_jax.run.loop import Run
from unclip_jax.run.stage import Stage
from unclip_jax.run.state import TrainState, step_rng

# The names of `prior_figures`; {} is the evaluation source.
PRIOR_FIGURES = (
    "{}_cosine",
    "{}_cosine_of_mean_embedding",
    "{}_cosine_of_text_embedding",
    "{}_retrieval_at_1",
)
# The names of `image_figures`.
IMAGE_FIGURES = ("fid", "kid", "precision", "recall")
LEAST_ROWS = 10  # a nearest neighbour of precision and recall needs a few
SUBSET = 1000  # rows of a subset of KID
Draw = Callable[[dict, jax.Array], jax.Array]


def held_out_loss(stage: Stage, config: Any, mesh: Any, data: Data) -> Callable[[TrainState, Any], float]:
    """Makes the function (state, frozen) -> held-out loss.

    The loss is the mean of the objective over the first `config.eval.rows` held-out rows, with the averaged
    parameters.
    """

    @jax.jit
    def loss_of(params, averages, extra, frozen, batch, rng):
        # With several players, the averages are of the first player's parameters alone.
        return stage.objective({**params, **averages}, extra, rng, batch, 0, frozen=frozen)[0]

    def measure(state: TrainState, frozen: Any) -> float:
        batches = eval_batches(
            data.held_out["eval"], stage.example, mesh, config.eval.batch_size, config.eval.rows
        )
        losses = [
            loss_of(state.params, state.ema_params, state.extra, frozen, batch, step_rng(config.seed, i))
            for i, (batch, _) in enumerate(batches)
        ]
        return float(np.mean(jax.device_get(losses)))

    return measure


def reconstruction_rows(image: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """The figures of reconstructions (B, H, W, 3) in [-1, 1], (B,) each: `psnr` in decibels, and `l1`."""
    error = jnp.mean(jnp.square(made - image), axis=(1, 2, 3))
    psnr = 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))  # an image's values have a range of 2
    return {"psnr": psnr, "l1": jnp.mean(jnp.abs(made - image), axis=(1, 2, 3))}


def held_out_rows(run: Run, measured: Callable[[Any], dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    """What `measured` (batch -> arrays with an entry per row) finds on the first `config.eval.rows` held-out
    rows, joined."""
    config = run.config.eval
    found = eval_batches(
        run.data.held_out["eval"], run.stage.example, run.mesh, config.batch_size, config.rows
    )
    rows = [
        {name: on_every_host(value)[:valid] for name, value in measured(batch).items()}
        for batch, valid in found
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def sample_grid(run: Run, step: int, draw: Callable[[dict, jax.Array], jax.Array]) -> None:
    """Samples images for the first `config.eval.samples` held-out rows, and writes a grid to `samples/`.

    Args:
      run: the run.
      step: the step; it names the file.
      draw: (batch, key) -> images (B, H, W, 3) in [-1, 1].
    """
    source, count = run.data.held_out["eval"], run.config.eval.samples
    batch, valid = next(eval_batches(source, run.stage.example, run.mesh, count, count))
    captions = [next(iter(source.read(i).captions), "") for i in range(min(count, len(source)))]
    run.logger.samples(step, draw(batch, step_rng(run.config.seed, step)), captions, valid)


def with_image_figures(config: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a stage's figures: `names`, and those of `image_figures` if `eval.fid_rows` is set."""
    return (*names, *(IMAGE_FIGURES if config.get("eval", {}).get("fid_rows") else ()))


def image_figures(
    stage: Stage, config: Any, mesh: Any, data: Data
) -> Callable[[Draw, int], dict[str, float]]:
    """Makes the function (draw, step) -> the figures of drawn images against the held-out images.

    It draws the first `config.eval.fid_rows` held-out rows, at the stage's own size, and compares them with
    the `image` of the same rows: FID, KID (mean over subsets of 1000), precision and recall, by Inception's
    features. With 0 rows, the function returns no figures. FID grows as the rows get fewer, so these numbers
    are for comparing steps and runs with the same rows, and not for papers (`unclip evaluate`).

    `draw` is (batch, key) -> images (B, H, W, 3) in [-1, 1].

    Raises:
      FileNotFoundError: if `unclip fetch inception` has not been run.
      ValueError: if there are too few rows, or they hold no pictures.
    """
    rows = config.get("eval", {}).get("fid_rows", 0)
    if not rows or not config.eval_every:
        return lambda draw, step: {}
    source, real = data.held_out["eval"], []
    if not LEAST_ROWS <= rows <= len(source):
        raise InputError(
            f"eval.fid_rows={rows} must be 0, or between {LEAST_ROWS} and the {len(source)} rows of "
            f"{source.name}"
        )
    if not source.pictures:
        raise InputError(
            f"eval.fid_rows={rows} compares with pictures, and {source.name} holds none: "
            "leave out --embeddings eval=DIR, so that the run evaluates on pictures"
        )
    network = features.open_network("inception", outputs=["pool"])

    def pooled(images: jax.Array, valid: int) -> np.ndarray:
        return network(list(ops.to_uint8(on_every_host(images)[:valid])))["pool"]

    def measure(draw: Draw, step: int) -> dict[str, float]:
        drawn, begun = [], not real
        for i, (batch, valid) in enumerate(
            eval_batches(source, stage.example, mesh, config.eval.batch_size, rows)
        ):
            if begun:  # the held-out images stay the same
                real.append(pooled(batch["image"], valid))
            key = jax.random.fold_in(step_rng(config.seed, step), i)
            drawn.append(pooled(draw(batch, key), valid))
        samples, reference = np.concatenate(drawn), np.concatenate(real)
        found = prdc(reference, samples)
        kid = kernel_inception_distance(samples, reference, subset_size=min(SUBSET, rows))
        values = (frechet_distance(samples, reference), kid.mean, found.precision, found.recall)
        return dict(zip(IMAGE_FIGURES, values, strict=True))

    return measure


def prior_figures(
    run: Run, predict: Callable[[dict, jax.Array], tuple], mean_embedding: np.ndarray
) -> dict[str, float]:
    """A prior's figures on each evaluation source: cosines with z_i, their baselines, and retrieval.

    Args:
      run: the run.
      predict: (batch, key) -> z_hat, z_image, z_text, each (B, D).
      mean_embedding: (D,) mean embedding of the training images, which is one of the two baselines.
    """
    figures, config = {}, run.config
    for name, source in run.data.held_out.items():
        batches = eval_batches(source, run.stage.example, run.mesh, config.eval.batch_size, config.eval.rows)
        z_hat, z_image, z_text = joined_rows(
            (predict(batch, step_rng(config.seed, i)), valid) for i, (batch, valid) in enumerate(batches)
        )
        figures |= {
            f"{name}_cosine": mean_cosine(z_hat, z_image),
            f"{name}_cosine_of_mean_embedding": mean_cosine(z_image, mean_embedding),
            f"{name}_cosine_of_text_embedding": mean_cosine(z_text, z_image),
            f"{name}_retrieval_at_1": retrieval_at_1(z_hat, z_image, config.eval.candidates),
        }
    return figures
