"""Tiny training runs for tests: the emoji recipes' `:tiny` variants, run in this process."""

import json
import os
import signal

from unclip_jax.cli.train import load_config, override
from unclip_jax.train import clip, common, decoder, prior_diffusion, upsampler

STAGES = {
    "clip": (clip, "configs/emoji/clip.py:tiny"),
    "prior": (prior_diffusion, "configs/emoji/prior_diffusion.py:tiny"),
    "decoder": (decoder, "configs/emoji/decoder.py:tiny"),
    "upsampler_16": (upsampler, "configs/emoji/upsampler.py:tiny"),
}
STEPS = 24


def tiny_config(name, root, **changes):
    """The stage's tiny configuration, long enough to see a loss fall; `changes` use __ for dots."""
    config = load_config(str(root / STAGES[name][1]))
    settings = {
        "steps": STEPS,
        "eval_every": STEPS,
        "checkpoint_every": STEPS,
        "data.backend": "numpy",
        "optimizer.eps": 1e-6,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 2,
    }
    for key, value in {**settings, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        override(config, key, value)
    return config


def losses(workdir):
    """The loss of every step, as metrics.jsonl tells it."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


class Signalling:
    """Training batches that send this process SIGTERM while the `at`-th one is handed out."""

    def __init__(self, inner, at):
        self.inner, self.at, self.count = inner, at, 0

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.inner)

    def close(self):
        self.inner.close()


class Repeating:
    """The first training batch, again and again."""

    def __init__(self, inner):
        self.inner, self.first = inner, None

    def __next__(self):
        if self.first is None:
            self.first = next(self.inner)
        return self.first

    def close(self):
        self.inner.close()


def wrap_batches(monkeypatch, wrapper):
    """Every stage's training batches go through `wrapper`."""
    original = common.batches
    monkeypatch.setattr(common, "batches", lambda *args: wrapper(original(*args)))
