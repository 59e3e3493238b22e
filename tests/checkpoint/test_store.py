"""Checkpoints where the disk does not take them."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import ROOT
from unclip_jax.checkpoint.store import CheckpointStore, load_run
from unclip_jax.cli.main import main
from unclip_jax.train.state import TrainState


def state_of(value):
    params = {"kernel": jnp.full((64, 64), value)}
    return TrainState(step=jnp.int32(value), params=params, ema_params=params, opt_state=())


def test_a_full_disk(tmp_path):
    """One line that names the newest whole checkpoint, whether the write fails in the background or at once; that one is read again, and
    where there is room again the next is written."""
    store, limits = CheckpointStore(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    store.save(1, state_of(1), {"name": "test"})
    store.manager.wait_until_finished()
    resource.setrlimit(resource.RLIMIT_FSIZE, (32, limits[1]))  # no file may grow longer than this: the write fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"could not be written in .*checkpoints: .*File too large; 1 is the newest whole one"):
            store.save(2, state_of(2), {"name": "test"})
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again, template = CheckpointStore(tmp_path), state_of(0)
    state, step = again.restore(template, jax.tree.map(lambda x: x.sharding, template))
    assert step == 1 and np.all(state.params["kernel"] == 1)
    again.save(2, state_of(2), {"name": "test"})
    again.close()
    assert load_run(tmp_path)[2] == 2


def test_what_is_out_of_reach_is_not_damaged(tmp_path, monkeypatch):
    """A store that does not answer ends the run, and nothing is removed; a damaged description is passed over like damaged values."""
    store, template = CheckpointStore(tmp_path), state_of(0)
    for step in (1, 2):
        store.save(step, state_of(step), {"name": str(step)})
    store.manager.wait_until_finished()
    shardings = jax.tree.map(lambda x: x.sharding, template)
    for error in (ValueError("UNAVAILABLE: Error reading: 503"), PermissionError(13, "Permission denied")):
        with monkeypatch.context() as patch:
            patch.setattr(store.manager, "restore", raising(error))
            with pytest.raises(OSError, match="checkpoint 2 in .* cannot be reached"):
                store.restore(template, shardings)
        assert sorted(store.manager.all_steps()) == [1, 2]
    meta = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-5])
    assert store.newest_meta()["name"] == "1"
    assert store.restore(template, shardings)[1] == 1 and store.manager.all_steps() == [1]
    store.close()


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    """One line, before anything is trained."""
    (tmp_path / "file").write_text("")
    command = ["train", str(ROOT / "configs/emoji/upsampler.py:tiny"), "--set", "data.backend=numpy"]
    assert main([*command, "--workdir", str(tmp_path / "file" / "run")]) == 1
    error = capsys.readouterr().err
    assert "unclip train: error: " in error and str(tmp_path / "file") in error and error.count("\n") == 1
