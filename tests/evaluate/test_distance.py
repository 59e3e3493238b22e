"""`unclip evaluate FIGURE`: every figure equals the function of `metrics` on the features of the images."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import unclip_jax
from tests.evaluate.fake import FakeNetwork
from tests.evaluate.test_streaming import write_images
from unclip_jax.cli import figure
from unclip_jax.cli.main import main
from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.evaluate import distance, sets
from unclip_jax.metrics.clip_score import clip_score
from unclip_jax.metrics.cmmd import cmmd
from unclip_jax.metrics.fid import frechet_distance, frechet_distance_at_infinity
from unclip_jax.metrics.inception_score import inception_score
from unclip_jax.metrics.kid import kernel_inception_distance
from unclip_jax.metrics.precision_recall import prdc
from unclip_jax.run import features
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.sharding import make_mesh


@pytest.fixture
def networks(monkeypatch):
    """Opens a `FakeNetwork` in place of every network, and keeps what was asked for."""
    asked = []

    def open_network(name, weights=None, *, mesh=None, outputs=None):
        asked.append((name, weights))
        return FakeNetwork(name, resize="tf1-bilinear 299" if name == "inception" else "bicubic 224")

    monkeypatch.setattr(features, "open_network", open_network)
    return asked


@pytest.fixture
def run(networks, tmp_path, capsys):
    """Runs `unclip evaluate` with a working folder of its own -> what it printed, or its line of error."""

    def call(*words, status=0):
        code = main(["evaluate", *map(str, words), "--work", str(tmp_path / "work")])
        out, err = capsys.readouterr()
        assert code == status, err
        return out if status == 0 else out + next(line for line in err.splitlines() if "error:" in line)

    return call


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "a", 40), write_images(tmp_path / "b", 30, seed=1)


def raw(folder, name="inception"):
    images = sets.open_set(str(folder), None).images
    return FakeNetwork(name)([each.pixels for each in images.load(range(images.count))])


def test_the_command_knows_every_figure():
    assert list(figure.FIGURES) == list(distance.FIGURES)
    assert set(figure.ALONE) == {name for name, row in distance.FIGURES.items() if not row.reference}


def test_every_figure_equals_its_function(run, networks, folders, tmp_path):
    a, b = (raw(folder) for folder in folders)
    one, two = a["pool"], b["pool"]
    spatial = frechet_distance(a["spatial"], b["spatial"])
    line = frechet_distance_at_infinity(one, two, smallest=20)
    expected = {
        "fid": {"fid": frechet_distance(one, two), "sfid": spatial, "fid_infinity": line.distance},
        "kid": {"kid": kernel_inception_distance(one, two, subset_size=30).mean},
        "cmmd": {"cmmd": cmmd(raw(folders[0], "clip")["pool"], raw(folders[1], "clip")["pool"])},
        "prdc": prdc(two, one)._asdict(),
    }
    assert min(abs(value) for values in expected.values() for value in values.values()) > 1e-5
    for name, values in expected.items():
        words = ["--infinity"] if name == "fid" else []
        out = run(name, *folders, "--partial", "--json", tmp_path / "r.json", *words)
        found = json.loads((tmp_path / "r.json").read_text())
        assert set(found["values"]) == set(values)
        for key, value in values.items():
            assert found["values"][key]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9)
            assert f"{key:18}{value:.4f}" in out
        assert found["partial"] and f"(partial: 40 of {distance.FIGURES[name].least:,} images)" in out
        assert found["images"]["count"] == 40 and found["reference"]["count"] == 30
    out = run("inception-score", folders[0], "--partial")
    assert f"inception_score   {inception_score(a['logits']).mean:.4f} +- " in out
    assert {name for name, _ in networks} == {"inception", "clip"}


def test_clip_score_compares_each_image_with_its_caption(run, folders):
    folder = folders[0]
    for i in range(40):
        (folder / f"{i:04d}.txt").write_text(f"caption {i}\nanother")
    network = FakeNetwork("clip")
    images = raw(folder, "clip")["pool"]
    text = network.text([f"caption {i}" for i in range(40)])
    found = clip_score(images, text)
    out = run("clip-score", folder, "--weights", "somewhere")
    assert f"clip_score        {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]" in out
    assert "partial" not in out
    hessel = clip_score(images, text, hessel=True).mean
    assert f"clip_score_hessel {hessel:.4f}" in run("clip-score", folder, "--hessel")
    assert "has no caption" in run("clip-score", folders[1], status=1)


def test_statistics_stand_for_images(run, networks, folders, tmp_path):
    """A saved file gives the same figure, without a network; one of another recipe is refused before work."""
    whole = run("fid", *folders, "--partial", "--save-statistics", tmp_path / "a.npz")
    run("kid", folders[1], folders[0], "--partial", "--save-statistics", tmp_path / "b.npz")
    few = run("fid", folders[1], folders[0], "--partial", "--infinity", "--rows", 12)
    assert "; not to be trusted, as the smallest has no more images than features" in few
    assert "not to be trusted" not in run("fid", *folders, "--partial", "--infinity")
    asked = len(networks)
    numbers = lambda out: [line.split()[:2] for line in out.splitlines() if line.startswith(("fid", "sfid"))]
    values = numbers(whole)
    assert len(values) == 2 and "standard error by the delta method" in whole
    assert numbers(run("fid", tmp_path / "a.npz", folders[1], "--partial")) == values
    assert len(networks) == asked + 1
    both = run("fid", tmp_path / "a.npz", tmp_path / "b.npz", "--partial")
    assert numbers(both) == values
    assert len(networks) == asked + 1
    again = run("fid", tmp_path / "a.npz", tmp_path / "a.npz", "--partial")
    assert "fid               0.0000" in again
    error = run("fid", folders[0], tmp_path / "a.npz", "--crop", "center", "--partial", status=1)
    assert "were made differently: crop 'center' and 'none'" in error
    error = run("kid", tmp_path / "a.npz", folders[1], "--partial", status=1)
    assert "holds the mean and the covariance alone, and kid needs the features" in error
    assert "--infinity needs its images" in run(
        "fid", tmp_path / "a.npz", folders[1], "--partial", "--infinity", status=1
    )
    assert "--rows cannot choose" in run("fid", tmp_path / "a.npz", folders[1], "--rows", 5, status=1)


@pytest.mark.parametrize("name", ["inception-score", "clip-score"])
def test_statistics_without_the_outputs_that_a_figure_needs(run, folders, tmp_path, name):
    """A file of KID holds pooled features: neither logits nor captions."""
    run("kid", *folders, "--partial", "--save-statistics", tmp_path / "a.npz")
    error = run(name, tmp_path / "a.npz", "--partial", status=1)
    assert f"a.npz holds statistics, and {name} needs images" in error
    pool = raw(folders[1])["pool"].astype(np.float64)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=pool.mean(axis=0), sigma=np.cov(pool, rowvar=False))
    if name == "inception-score":
        assert "adm.npz, 40" in run(name, tmp_path / "adm.npz", "--made-by", "adm", "--partial")


def test_moments_on_a_number_of_devices_that_does_not_divide_a_block():
    mesh, x = (
        make_mesh({"data": 3}, jax.devices()[:3]),
        np.float32(np.random.default_rng(0).normal(size=(1500, 4))),
    )
    found = distance._accumulated(x, mesh)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-6)


def test_samples_depend_on_the_configuration_of_the_parts(tiny_bundle):
    """Another schedule draws other images with the same weights, so their features must not be reused."""
    bundle, drawing = unclip_jax.load_bundle(tiny_bundle), sets.Drawing(["a cat"], "null")
    part = bundle.part("decoder")
    config = part.config | {"diffusion": part.config["diffusion"] | {"steps": 7}}
    other = dataclasses.replace(
        bundle, parts=bundle.parts | {"decoder": dataclasses.replace(part, config=config)}
    )
    first, same, second = (sets.bundle_set(each, drawing).checksum for each in (bundle, bundle, other))
    assert first == same != second


def test_statistics_of_other_tools(run, folders, tmp_path):
    pool = raw(folders[1])["pool"].astype(np.float64)
    np.savez(tmp_path / "adm.npz", mu=pool.mean(axis=0), sigma=np.cov(pool, rowvar=False))
    words = ["fid", folders[0], tmp_path / "adm.npz", "--partial"]
    assert "does not say how its statistics were made" in run(*words, status=1)
    out = run(*words, "--made-by", "adm")
    assert out.split()[:2] == run("fid", *folders, "--partial").split()[:2]
    assert "adm.npz does not state the network hash" in out and "adm.npz, unknown number" in out
    assert "resize 'tf1-bilinear 299' and 'clean bicubic 299'" in run(
        *words, "--made-by", "clean-fid", status=1
    )
    assert "does not say how many images" in run(
        "fid", tmp_path / "adm.npz", folders[0], "--made-by", "adm", status=1
    )
    np.savez(tmp_path / "batch.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    assert "batch.npz, 9" in run("kid", tmp_path / "batch.npz", folders[0], "--partial")


def test_a_bundle_is_drawn_and_measured(run, tiny_bundle, networks, tmp_path):
    """The samples are those of `text_to_image`; captions come from a file, or from the reference."""
    source = make_source({"name": "emoji", "split": "val"})
    captions = [source.read(i).captions[0] for i in range(6)]
    (tmp_path / "c.txt").write_text("\n".join(captions))
    drawing = ["--prior", "null", "--steps", "2", "--seed", "4"]
    words = [f"bundle={tiny_bundle}", "name=emoji,split=val", "--partial", *drawing]
    out = run(
        "kid", *words, "--captions", tmp_path / "c.txt", "--reference-rows", "9", "--json", tmp_path / "j"
    )
    sampler = Sampler(unclip_jax.load_bundle(tiny_bundle))
    drawn = text_to_image(sampler, captions, seed=4, prior="null", options={"decoder": {"steps": 2}})
    samples = FakeNetwork()(list(drawn))["pool"]
    real = sets.some_of(sets.open_set("name=emoji,split=val", source_arguments).images, 9, 4)
    reference = FakeNetwork()([each.pixels for each in real.load(range(9))])["pool"]
    expected = kernel_inception_distance(samples, reference, subset_size=6).mean
    assert json.loads((tmp_path / "j").read_text())["values"]["kid"]["value"] == pytest.approx(expected)
    assert "drawn" in json.loads((tmp_path / "j").read_text())["images"]["stored"] and "samples of" in out
    first = run("clip-score", f"bundle={tiny_bundle}", "--captions", tmp_path / "c.txt", *drawing)
    text = FakeNetwork("clip").text(captions)
    assert f"{clip_score(FakeNetwork('clip')(list(drawn))['pool'], text).mean:.4f}" in first
    out = run("kid", *words, "--set", "prior_ar.candidates=2", status=1)
    assert "captions: the first one of each record of name=emoji,split=val" in out
    assert "prior_ar does not draw with the prior null" in out
    assert "say what the bundle draws" in run("clip-score", f"bundle={tiny_bundle}", status=1)


def source_arguments(words):
    return dict(word.split("=") for word in words)


def test_weights_that_lack_what_a_figure_needs(run, networks, folders, monkeypatch):
    """Inception without its classifier, as `unclip fetch inception` has it; CLIP without its text encoder."""
    monkeypatch.setattr(FakeNetwork, "outputs", {"pool": 6, "spatial": 5})
    error = run("inception-score", folders[0], "--partial", status=1)
    assert "needs the classifier, which these weights of inception lack" in error

    def no_text(self, captions):
        raise InputError("clip has no text encoder")

    monkeypatch.setattr(FakeNetwork, "text", no_text)
    (folders[0] / "0000.txt").write_text("a")
    assert "clip has no text encoder" in run("clip-score", folders[0], status=1)


def test_networks_and_weights(run, networks, folders):
    """`--network` and `--weights` reach the network; a figure has its own default."""
    run("prdc", *folders, "--network", "dinov2", "--weights", "there", "--partial")
    run("fd-dinov2", *folders, "--partial")
    assert networks == [("dinov2", "there"), ("dinov2", None)]


def test_what_is_odd_about_images_is_told(run, folders, tmp_path):
    """Constant images, one image, few images, other formats."""
    write_images(tmp_path / "one", 1)
    assert "fid needs at least two images, and" in run(
        "fid", tmp_path / "one", folders[0], "--partial", status=1
    )
    assert "is measured on 50,000 images (Heusel et al. 2017), and" in run("fid", *folders, status=1)
    np.savez(tmp_path / "grey.npz", arr_0=np.full((8, 8, 8, 3), 127, np.uint8))
    out = run("fid", tmp_path / "grey.npz", folders[0], "--partial")
    assert "all rows of features are equal, so the covariance is zero" in out
    assert "stored differently, array and png" in out
