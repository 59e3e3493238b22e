"""Checkpoints: what they hold, those of before, and what happens where the disk does not take them."""

import json
import resource
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import CheckpointStore, folder, load_run
from unclip_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
# Orbax's reads and writes end before their event loops close: no "Event loop is closed" from a thread.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    """The fields of a training state that a checkpoint holds."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    extra: Any


def state_of(value, extra=None):
    """A state filled with a number."""
    params = {"kernel": jnp.full((64, 64), value)}
    return State(jnp.int32(value), params, params, (), {} if extra is None else extra)


def shardings_of(state):
    return jax.tree.map(lambda x: x.sharding, state)


def stored_names(workdir, step):
    """The top-level names in the item `state` of a checkpoint."""
    return {key.split("'")[1] for key in json.loads(tree_file(workdir, step).read_text())["tree_metadata"]}


def tree_file(workdir, step):
    return folder(workdir) / str(step) / "state" / "_METADATA"


def test_state_without_gradients(tmp_path):
    """`extra` is written and read with its values where it holds arrays, and only there."""
    with_codebook = lambda value: state_of(
        value, {"codebook": jnp.full((8,), float(value)), "count": jnp.int32(value)}
    )
    for name, make in (("with", with_codebook), ("without", state_of)):
        store = CheckpointStore(tmp_path / name)
        store.save(3, make(3), {"name": name})
        store.close()
        store, template = CheckpointStore(tmp_path / name), make(0)
        state, step = store.restore(template, shardings_of(template))
        store.close()
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, state, make(3))
    assert stored_names(tmp_path / "with", 3) == {"step", "params", "opt_state", "extra"}
    assert stored_names(tmp_path / "without", 3) == {"step", "params", "opt_state"}
    for name, template in (("with", state_of(0)), ("without", with_codebook(0))):
        store = CheckpointStore(tmp_path / name)
        with pytest.raises(ValueError, match="checkpoint 3 in .* does not fit this configuration"):
            store.restore(template, shardings_of(template))
        store.close()


def test_a_checkpoint_of_format_1(tmp_path):
    """One that was written without `extra`, with the names of before: its values are restored, and whoever
    reads its meta gets the names of now."""
    state = state_of(7)
    meta = {
        "name": "pca",
        "part": {"kind": "pca", "clip": "ab"},
        "tokenizer": {"kind": "clip_bpe"},
        "sampling": {},
        "config": {"clip": "../clip"},
        "provenance": {"seconds": 1.0},
    }
    items = {
        "state": {"step": state.step, "params": state.params, "opt_state": state.opt_state},
        "ema_params": state.ema_params,
    }
    with ocp.CheckpointManager(folder(tmp_path), item_names=("state", "ema_params", "meta")) as manager:
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(7, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved))
    store, template = CheckpointStore(tmp_path), state_of(0)
    restored, step = store.restore(template, shardings_of(template))
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    part = {"kind": "codec", "frozen": {"clip": "ab"}}
    for read in (store.meta(7), store.newest_meta(), load_run(tmp_path)[0]):
        assert (read["name"], read["part"], read["config"]) == ("codec", part, meta["config"])
        assert "tokenizer" not in read
    store.close()
    loaded, read = load_part(tmp_path, "codec")
    assert loaded.config == part and read["provenance"] == {"seconds": 1.0, "step": 7}
    with pytest.raises(KeyError, match="is a run of 'codec', not of 'pca'"):
        load_part(tmp_path, "pca")


def test_a_full_disk(tmp_path):
    """One line names the newest whole checkpoint, whether the write fails in the background or at once. That
    checkpoint can be read, and the next is written when there is room again."""
    store, limits = CheckpointStore(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    store.save(1, state_of(1), {"name": "test"})
    store.manager.wait_until_finished()
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (32, limits[1])
    )  # a longer file fails, as all do on a full disk
    message = r"could not be written in .*: .*(File too large|Failed writing).*; 1 is the newest whole one"
    try:
        with pytest.raises(OSError, match=message):
            store.save(2, state_of(2), {"name": "test"})
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again, template = CheckpointStore(tmp_path), state_of(0)
    state, step = again.restore(template, shardings_of(template))
    assert step == 1 and np.all(state.params["kernel"] == 1)
    again.save(2, state_of(2), {"name": "test"})
    again.close()
    assert load_run(tmp_path)[2] == 2


def test_what_is_out_of_reach_is_not_damaged(tmp_path, monkeypatch):
    """A store that does not answer ends the run, and nothing is removed. A checkpoint with a damaged
    description is passed over, as one with damaged values is."""
    store, template = CheckpointStore(tmp_path), state_of(0)
    for step in (1, 2):
        store.save(step, state_of(step), {"name": str(step)})
    store.manager.wait_until_finished()
    shardings = shardings_of(template)
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
