"""Measurements that several stages share: the held-out loss, a grid of samples, and a prior's figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unclip_jax.metrics.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.run.batches import Data, eval_batches, joined_rows
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
