"""Runs packed into small files: what is kept, what resumes, and what is refused."""

import jax
import numpy as np
import pytest

from tests.runs import STEPS, losses, tiny_config
from unclip_jax.checkpoint import carry
from unclip_jax.checkpoint.store import load_run, params_hash, read_items
from unclip_jax.train import clip


@pytest.fixture
def runs(tiny_run):
    return tiny_run("clip").parent


def test_an_unfinished_run_resumes_on_a_fresh_machine(runs, tmp_path):
    """Parameters and the step are exact; averages and moments are rounded to bfloat16, never to zero."""
    carry.pack(runs, tmp_path / "out", {"clip": STEPS + 2})
    assert carry.unpack(tmp_path / "out", tmp_path / "fresh") == {"clip": STEPS}
    assert carry.unpack(tmp_path / "out", tmp_path / "fresh") == {}  # a run as new is left alone
    (_, before, _), (meta, after, step) = (
        read_items(path, ("state", "ema_params")) for path in (runs / "clip", tmp_path / "fresh" / "clip")
    )
    assert step == STEPS and meta["name"] == "clip"
    jax.tree.map(np.testing.assert_array_equal, before["state"]["params"], after["state"]["params"])
    for name in ("ema_params", "state"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), before[name], after[name])
    config = tiny_config("clip", steps=STEPS + 2, eval_every=99, checkpoint_every=99)
    clip.train_and_evaluate(config, str(tmp_path / "fresh" / "clip"))
    assert len(losses(tmp_path / "fresh" / "clip")) == 2


def test_a_finished_run_keeps_its_hash(runs, tmp_path):
    """Its averaged weights have the precision of a release, so that parts trained on it still fit."""
    carry.pack(runs, tmp_path / "out", {"clip": STEPS})
    carry.unpack(tmp_path / "out", tmp_path / "fresh")
    before, after = load_run(runs / "clip")[1], load_run(tmp_path / "fresh" / "clip")[1]
    assert params_hash(before) == params_hash(after)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float16(a), b), before, after)


def test_pieces(runs, tmp_path, monkeypatch):
    """An archive is cut; a missing piece is an error, and so is an archive that is too large."""
    monkeypatch.setattr(carry, "PIECE", 100_000)
    pieces = carry.pack(runs, tmp_path / "out", {"clip": STEPS})
    assert len(pieces) > 1 and all(piece.stat().st_size <= 100_000 for piece in pieces)
    assert carry.unpack(tmp_path / "out", tmp_path / "fresh") == {"clip": STEPS}
    pieces[0].unlink()
    with pytest.raises(ValueError, match="lacks pieces: it has carried-01-of-"):
        carry.unpack(tmp_path / "out", tmp_path / "other")
    monkeypatch.setattr(carry, "TOTAL", 1000)
    with pytest.raises(ValueError, match="can be carried"):
        carry.pack(runs, tmp_path / "none", {"clip": STEPS})
    assert carry.unpack(tmp_path / "none", tmp_path / "other") == {}
