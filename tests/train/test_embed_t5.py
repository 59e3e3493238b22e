"""`unclip embed --t5`: states of captions are those of T5, are resumed, and train Imagen as T5 does."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import random_params, randomize
from tests.models.test_t5 import write_pieces
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.data.pipeline import BadDataError
from unclip_jax.data.record import Record, Source
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.data.text_states import is_text_states, with_text_states
from unclip_jax.models.t5 import T5Encoder
from unclip_jax.run.batches import Data
from unclip_jax.run.frozen import load_frozen
from unclip_jax.run.t5 import check_text_states
from unclip_jax.sharding import make_mesh
from unclip_jax.train import embed_t5 as embed_module
from unclip_jax.train import imagen
from unclip_jax.train.embed_t5 import embed_t5

CAPTIONS = [("a red fox", "a fox"), (), ("a",), ("red, red, red, red, red, red",), ("a red", "red", "a, a")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A bundle of a small T5 at random weights."""
    folder = tmp_path_factory.mktemp("t5")
    write_pieces(folder)
    tokenizer = T5Tokenizer.from_folder(folder, 8)
    model = dict(vocab_size=16, width=12, layers=1, heads=2, head_dim=8, hidden=16, gated=True)
    params = random_params(T5Encoder(**model), *tokenizer(["a"]))
    part = Part({"kind": "t5", "model": model, "tokenizer": tokenizer.config()}, params)
    return save_bundle(Bundle({"t5": part}, "imagen"), folder / "bundle", np.float32), part, tokenizer


def source(checksum="one"):
    """Five records, of which the second has no caption; pictures of noise."""
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    fetch = lambda i: Record(str(i), images[i], CAPTIONS[i], {}, "made")
    return Source("made", checksum, 0, 5, fetch)


def mesh():
    return make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])


def test_states_are_those_of_t5(t5, tmp_path, monkeypatch):
    path, part, tokenizer = t5
    shared = dict(batch_size=3, shard_records=2)
    with pytest.raises(BadDataError, match="1 of 2 records cannot be used.*has no caption"):
        embed_t5(str(path), source(), tmp_path / "none", mesh(), max_bad_fraction=0.0, **shared)
    assert not (tmp_path / "none").exists()
    manifest = embed_t5(str(path), source(), tmp_path / "out", mesh(), **shared)
    assert (manifest["captions"], manifest["bad"], manifest["cut"]) == (7, 1, 1)
    assert is_text_states(tmp_path / "out") and not is_text_states(path)
    beside = with_text_states(source(), tmp_path / "out")
    apply = jax.jit(T5Encoder(**part.config["model"]).apply)
    for i, captions in enumerate(CAPTIONS):
        found = beside.read(i).embeds["text_states"]
        assert len(found) == len(captions)
        for caption, states in zip(captions, found):
            tokens, mask = tokenizer([caption])
            whole = apply({"params": part.params}, tokens, mask)[0]
            np.testing.assert_allclose(states, whole[mask[0]], atol=2e-3, rtol=2e-3)
    # A shard that was lost is made again, and no other.
    shutil.rmtree(tmp_path / "out" / "00001")
    made = []
    original = embed_module._shard
    monkeypatch.setattr(embed_module, "_shard", lambda s, r, *a: made.append(r) or original(s, r, *a))
    assert embed_t5(str(path), source(), tmp_path / "out", mesh(), **shared) == manifest
    assert made == [range(2, 4)]
    with pytest.raises(ValueError, match="made with other settings \\(shard_records\\)"):
        embed_t5(str(path), source(), tmp_path / "out", mesh(), batch_size=3, shard_records=3)
    with pytest.raises(ValueError, match="the states of another source than made"):
        with_text_states(source("two"), tmp_path / "out")
    changed = dataclasses.replace(source(), fetch=lambda i: Record(str(i), b"", ("other",), {}, "made"))
    with pytest.raises(ValueError, match="record 0 of made has other captions than its states"):
        with_text_states(changed, tmp_path / "out").read(0)


def test_imagen_trains_from_states(t5, tmp_path):
    """The loss from stored states equals that of T5 in the step, up to their rounding."""
    embed_t5(str(t5[0]), source(), tmp_path / "out", mesh(), batch_size=4)
    beside, losses = with_text_states(source(), tmp_path / "out"), []
    for data, where in ((source(), t5[0]), (beside, tmp_path / "out")):
        config = load_config("configs/imagen/imagen.py:tiny")
        override(config, "frozen.t5", str(where))
        networks = load_frozen(config, tmp_path, mesh(), imagen.FROZEN, None)
        check_text_states(networks["t5"], Data(data, {}))
        stage = imagen.stage(config, mesh(), networks)
        rows = [stage.example(data.read(i), np.random.default_rng(0), training=False) for i in (0, 4)]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        params = randomize(jax.jit(stage.init)(jax.random.key(0))[0])
        frozen = {role: network.params for role, network in networks.items()}
        loss = jax.jit(functools.partial(stage.objective, extra={}, rng=jax.random.key(2), step=0))
        losses.append(float(loss(params, batch=batch, frozen=frozen)[0]))
    assert abs(losses[0] / losses[1] - 1) < 1e-3
    with pytest.raises(ValueError, match="has no text_states, and the T5 given is a folder of states"):
        check_text_states(networks["t5"], Data(source(), {}))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "say what embeds: --clip DIR, or --t5 DIR"),
        (["--clip", "a", "--t5", "b"], "say what embeds"),
        (["--t5", "b", "--states"], "--t5 reads captions alone: leave out --states"),
    ],
)
def test_arguments(arguments, says, tmp_path, capsys):
    assert main(["embed", *arguments, "--data", "name=emoji", "--out", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
