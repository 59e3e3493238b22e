"""Starts from other weights: what they were not trained for is said, and kept."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.run.resume import restore_or_init, start_changes
from unclip_jax.run.state import TrainState

EPS = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "eps"}


@pytest.mark.parametrize(
    "before, now, words",
    [
        ({"diffusion": EPS}, {"diffusion": EPS | {"beta_ends": None, "zero_snr": False}}, []),
        ({"diffusion": EPS | {"beta_ends": [0.00085, 0.012]}}, {"diffusion": EPS}, []),
        (
            {"diffusion": EPS},
            {"diffusion": EPS | {"prediction": "v"}},
            ["predict eps, and this run trains v"],
        ),
        ({"diffusion": EPS}, {"diffusion": EPS | {"zero_snr": True}}, ["num_steps=1000, zero_snr=True"]),
        (
            {"diffusion": EPS},
            {"diffusion": EPS | {"num_steps": 500}},
            ["and this run's schedule=scaled_linear"],
        ),
        (
            {"diffusion": EPS, "frozen": {"clip": "a", "other": "c"}},
            {"diffusion": EPS | {"schedule": "cosine", "prediction": "x0"}, "frozen": {"clip": "b"}},
            [
                "trains x0",
                "their noise schedule is schedule=scaled_linear",
                "with the clip a, and this run has b",
            ],
        ),
        ({"frozen": {"clip": ""}}, {"frozen": {"clip": "b"}}, []),  # a file that does not say
        ({}, {"diffusion": EPS}, []),
    ],
)
def test_changes(before, now, words):
    changes = start_changes(before, now)
    assert len(changes) == len(words)
    for change, word in zip(changes, words):
        assert word in change


def test_a_start_says_what_changes(capsys):
    """It is printed and kept; the weights are taken."""
    params = {"kernel": np.ones(3, np.float32)}
    zeros = jax.tree.map(np.zeros_like, params)
    state = TrainState(step=0, params=zeros, ema_params=zeros, opt_state=(), extra={})
    placed = {"kernel": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    store = SimpleNamespace(latest=lambda: None)
    load = lambda path, name: (Part({"diffusion": EPS}, params), {"provenance": {"step": 7}})
    meta = {"name": "latent", "part": {"diffusion": EPS | {"prediction": "v"}}, "provenance": {}}
    for now, lines in ((EPS, 1), (EPS | {"prediction": "v"}, 2)):
        meta["part"] = {"diffusion": now}
        start = restore_or_init(store, state, SimpleNamespace(ema_params=placed), meta, "sd", load)
        np.testing.assert_array_equal(start.state.params["kernel"], 1)
        assert start.meta["provenance"]["initialised_from"] == {"step": 7}
        assert len(start.meta["provenance"].get("start_changes", [])) == lines - 1
        assert len(capsys.readouterr().err.strip().splitlines()) == lines
