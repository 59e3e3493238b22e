"""What `unclip evaluate samples` measures, with tiny random networks and with planted pictures."""

import jax
import numpy as np
import pytest

import unclip_jax
from tests.sampling.test_dalle import random_dalle
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate import samples
from unclip_jax.metrics.retrieval import unit
from unclip_jax.sampling.dalle import sample_stages as sample_dalle
from unclip_jax.sampling.edits.inversion import embed_captions, embed_images
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import SYSTEMS
from unclip_jax.sampling.unclip import Stages, sample_stages

ROWS = 8


def records(split, count=ROWS):
    source = make_source({"name": "emoji", "split": split})
    return [source.read(i) for i in range(count)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Sampler(unclip_jax.load_bundle(tiny_bundle))


@pytest.fixture(scope="module")
def judge(bundle, tiny_judge):
    return samples.open_judge(bundle, tiny_judge)


def test_figures_equal_those_computed_again(bundle, judge):
    """Real pictures and samples, by the judge and by the guiding CLIP, computed again from the embeddings."""
    measured = samples.measure(bundle, judge, rows=ROWS, prior="none")
    figures = measured.figures
    assert figures["chance"] == 0.125 and set(figures["splits"]) == {"train", "compose", "val"}
    for split, found in figures["splits"].items():
        rows = records(split)
        captions, real = [r.captions[0] for r in rows], [ops.decode_image(r.image) for r in rows]
        drawn = list(ops.to_uint8(sample_stages(bundle, captions, prior="none").images[-1]))
        for name, pictures in {"real": real, "samples": drawn, "shuffled": [drawn[-1], *drawn[:-1]]}.items():
            cosines = unit(embed_images(judge, pictures)) @ unit(embed_captions(judge, captions)).T
            expected = np.mean([np.argmax(row) == i for i, row in enumerate(cosines)])
            rate = found[name]["caption_first"]
            assert rate["value"] == pytest.approx(expected, abs=1e-3)
            assert rate["low"] <= rate["value"] <= rate["high"]
        z_image, z_text = embed_images(bundle, real), embed_captions(bundle, captions)
        cosine = np.mean(np.sum(unit(z_image) * unit(z_text), axis=1))
        assert found["guide"]["text_embedding_cosine"] == pytest.approx(cosine, abs=2e-3)
        assert found["guide"]["prior_cosine"] == found["guide"]["text_embedding_cosine"]
    table = samples.describe(figures)
    value = figures["splits"]["val"]["real"]["caption_first"]["value"]
    assert any(
        line.startswith("val      own caption first of 8") and f"{value:.2f} [" in line for line in table
    )


def test_planted_copies_are_found(bundle, judge, monkeypatch):
    """Samples that are training pictures count as copies; they are paired with the pictures they copy.

    Each planted picture shows its caption's real picture for `train`, and training pictures for the rest.
    """
    training = np.stack([ops.decode_image(r.image) for r in records("train")])

    def planted(sampler, captions, **_):
        z = embed_captions(sampler, captions)
        return Stages(z, z, [ops.to_float(training)])

    monkeypatch.setattr(samples, "system_of", lambda _: SYSTEMS["unclip"]._replace(sample=planted))
    measured = samples.measure(bundle, judge, rows=ROWS)
    for split, found in measured.figures["splits"].items():
        assert found["copies"]["features"]["share"] == found["copies"]["pixels"]["share"] == 1
        assert found["copies"]["pixels"]["samples"] == 0 < found["copies"]["pixels"]["held_out"]
        for pair in measured.pairs[split]:
            np.testing.assert_array_equal(pair.sample, pair.nearest)
    train = measured.figures["splits"]["train"]
    assert train["samples"] == train["real"]
    assert train["fid"]["samples"] == pytest.approx(train["fid"]["real"], rel=1e-4)
    assert all(pair.caption == pair.nearest_caption for pair in measured.pairs["train"])
    images, labels = samples.pair_grid(measured.pairs["train"])
    assert len(images) == len(labels) == 2 * ROWS and labels[1].startswith("training: ")


def test_style_and_base_of_the_nearest_caption(bundle, judge, monkeypatch):
    """A judge that knows the right style but no names, played by embeddings that hold only the style."""
    styles = {"3d": 0, "noto": 1, "flat": 2, "blob": 3}
    z_captions = lambda _, captions, **__: np.eye(4)[[styles[c.split()[1]] for c in captions]]
    monkeypatch.setattr(samples, "embed_captions", z_captions)
    z_images = lambda _, pictures, **__: np.tile(np.eye(4)[1], (len(pictures), 1))
    monkeypatch.setattr(samples, "embed_images", z_images)
    drawn = Stages(np.eye(4)[[1] * ROWS], np.eye(4)[[1] * ROWS], [np.zeros((ROWS, 8, 8, 3))])
    sampled = SYSTEMS["unclip"]._replace(sample=lambda *_, **__: drawn)
    monkeypatch.setattr(samples, "system_of", lambda _: sampled)
    monkeypatch.setattr(samples, "part_space", lambda _: type("Space", (), {"mean": np.ones(4)}))
    found = samples.measure(bundle, judge, rows=ROWS).figures["splits"]["train"]
    noto = np.mean([r.meta["style"] == "noto" for r in records("train")])
    assert 0 < noto < 1 and found["samples"]["style"]["value"] == found["real"]["style"]["value"] == noto
    assert found["samples"]["caption_first"]["value"] == 0  # captions of one style tie


def test_a_system_without_a_prior(tiny_judge, tmp_path, capsys, monkeypatch):
    """DALL-E's samples are measured. The CLIP that ranks them may not judge; there is no prior to choose."""
    bundle = random_dalle()
    folder = str(save_bundle(bundle, tmp_path / "dalle"))
    evaluate = ["evaluate", "samples", "--bundle", folder, "--rows", "4", "--judge"]
    measure, kept = samples.measure, []
    monkeypatch.setattr(samples, "measure", lambda *a, **k: kept.append(measure(*a, **k)) or kept[0])
    assert main([*evaluate, str(tiny_judge)]) == 0
    table = capsys.readouterr().out
    assert "train    own caption first of 4" in table and "FID to the other real rows" in table
    assert "prior" not in table and "guiding CLIP" not in table
    judge, figures = samples.open_judge(bundle, tiny_judge), kept[0].figures
    assert figures["prior"] is None and "guide" not in figures["splits"]["val"]
    captions = [record.captions[0] for record in records("val", 4)]
    drawn = ops.to_uint8(sample_dalle(bundle, captions).images[0])
    cosines = unit(embed_images(judge, list(drawn))) @ unit(embed_captions(judge, captions)).T
    found = figures["splits"]["val"]["samples"]["caption_first"]["value"]
    assert found == pytest.approx(np.mean(np.argmax(cosines, axis=1) == np.arange(4)), abs=1e-3)
    for wrong, words in (
        ([*evaluate, str(tiny_judge), "--prior", "prior_ar"], "the system dalle has no prior"),
        ([*evaluate, folder], "holds the CLIP that guides the samples"),
    ):
        assert main(wrong) == 1
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("rows", [1, 150, 700])
def test_rows_out_of_range(bundle, judge, rows):
    with pytest.raises(ValueError, match="rows must be between 2 and 100, or a multiple of 100 up to 600"):
        samples.measure(bundle, judge, rows=rows)


def test_the_shipped_judge():
    """It knows the names of every split, and it is small, alone, and not the guide of the shipped bundle."""
    judge = unclip_jax.load_bundle("judge")
    assert set(judge.parts) == {"clip"}
    clip = judge.parts["clip"]
    assert judge.provenance["training"]["clip"]["config"]["data"]["train"]["split"] == "all"
    samples.open_judge(unclip_jax.load_bundle("emoji"))
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(clip.params)) < 4e6
    rows = records("val", 100)
    z_image = embed_images(judge, [ops.decode_image(r.image) for r in rows])
    z_text = embed_captions(judge, [r.captions[0] for r in rows])
    assert np.mean(np.argmax(unit(z_image) @ unit(z_text).T, axis=1) == np.arange(100)) >= 0.9


def test_summary_of_older_figures():
    """Figures of an older format give one line of advice."""
    assert "measured by an older version" in samples.summarise({"val": {"retrieval": 1.0}})[0]
