"""The rows of evaluations are read once before the first step."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from tests.runs import train_tiny
from unclip_jax.data import pipeline
from unclip_jax.data.examples import clip_example
from unclip_jax.data.sources import make_source
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.run.batches import Data, check_held_out


@pytest.mark.parametrize(
    "every, rows, samples, refused", [(5, 3, 0, False), (5, 4, 0, True), (5, 1, 4, True), (0, 9, 9, False)]
)
def test_a_bad_row_is_told_if_an_evaluation_reads_it(every, rows, samples, refused):
    source = make_source({"name": "emoji", "split": "val"})
    bare = lambda i: dataclasses.replace(source.fetch(i), captions=()) if i == 3 else source.fetch(i)
    data = Data(source, {"val": dataclasses.replace(source, fetch=bare)})
    config = ConfigDict({"eval_every": every, "eval": {"rows": rows, "samples": samples}})
    example = lambda record, rng, training: clip_example(
        record, rng, tokenizer=ClipTokenizer(8), size=16, training=training
    )
    if not refused:
        check_held_out(config, example, data)
        return
    with pytest.raises(InputError, match="cannot evaluate on record .*: the record has no caption"):
        check_held_out(config, example, data)


def test_a_run_that_cannot_be_evaluated_leaves_no_folder(tmp_path, monkeypatch):
    def told(*args, **options):
        raise InputError("cannot evaluate on record 3")

    monkeypatch.setattr(pipeline, "eval_batches", told)
    with pytest.raises(InputError, match="record 3"):
        train_tiny("clip", tmp_path / "runs" / "clip")
    assert not (tmp_path / "runs").exists()
