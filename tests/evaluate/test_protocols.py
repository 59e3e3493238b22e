"""`unclip evaluate sweep` and `coco30k`: captions, references, tables, plots, and published figures."""

import json

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from tests.evaluate.fake import FakeNetwork
from tests.evaluate.test_streaming import write_images
from unclip_jax.cli import sweep
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.evaluate import protocols, sets
from unclip_jax.evaluate.distance import Result, Value
from unclip_jax.evaluate.plot import Panel, draw_panels, ticks
from unclip_jax.metrics.clip_score import clip_score
from unclip_jax.metrics.fid import frechet_distance
from unclip_jax.run import features
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image

STEPS = {"decoder": {"steps": 2}}


@pytest.fixture
def networks(monkeypatch):
    asked = []

    def open_network(name, weights=None, *, mesh=None, outputs=None):
        asked.append((name, weights))
        return FakeNetwork(name)

    monkeypatch.setattr(features, "open_network", open_network)
    return asked


@pytest.fixture
def coco(tmp_path):
    """A folder as MS-COCO is unpacked: 9 pictures with two captions each."""
    write_images(tmp_path / "coco" / "val2014", 9)
    (tmp_path / "coco" / "annotations").mkdir()
    listed = [{"id": i, "image_id": i // 2, "caption": f"caption {i} \n of a picture. "} for i in range(18)]
    file = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps({"images": [], "annotations": listed}))
    return tmp_path / "coco"


def test_coco30k_with_guidance_swept(coco, networks, tiny_bundle, tmp_path, capsys, monkeypatch):
    """Each scale draws the same random captions; the reference is every picture, cut to 256 px."""
    words = ["evaluate", "coco30k", f"bundle={tiny_bundle}", "--coco", str(coco), "--guidance", "1.5,3"]
    words += [
        "--prior",
        "null",
        "--steps",
        "2",
        "--seed",
        "5",
        "--clip",
        "b16",
        "--work",
        str(tmp_path / "w"),
    ]
    words += ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png"), "--rows", "8"]
    assert main(words) == 1
    assert "fid is measured on 30,000 images" in capsys.readouterr().err
    drawn_rows, draw = [], sets.text_to_image
    monkeypatch.setattr(
        sets, "text_to_image", lambda *args, **options: drawn_rows.extend(args[1]) or draw(*args, **options)
    )
    assert main([*words, "--partial"]) == 0
    assert len(drawn_rows) == 2 * 8  # once for all networks
    out = capsys.readouterr().out
    assert "partial: fid, 8 of 30,000 images" in out and out.splitlines()[0].split() == [
        "guidance", "fid", "sfid", "clip_score", "precision", "recall", "density", "coverage"
    ]  # fmt: skip
    captions = protocols.coco_captions(coco, 8, 5)
    assert len(set(captions)) == 8 and captions[0].endswith("of a picture.") and "\n" not in captions[0]
    assert captions == sorted(captions, key=lambda text: int(text.split()[1]))
    assert captions != protocols.coco_captions(coco, 8, 6)
    images = protocols.coco_reference(coco).images
    squares = [ops.resize(ops.center_crop_square(p.pixels), 256) for p in images.load(range(9))]
    real, sampler = FakeNetwork()(squares), Sampler(unclip_jax.load_bundle(tiny_bundle))
    points = json.loads((tmp_path / "r.json").read_text())["points"]
    for point, scale in zip(points, (1.5, 3.0)):
        options = {"decoder": {"steps": 2, "guidance_scale": scale}}
        drawn = text_to_image(sampler, captions, seed=5, prior="null", options=options)
        samples_seen = [ops.resize(image, 256) for image in drawn]
        samples = FakeNetwork()(samples_seen)
        found = point["results"]["fid"]["values"]
        assert found["fid"]["value"] == pytest.approx(
            frechet_distance(samples["pool"], real["pool"]), rel=1e-5
        )
        scored = clip_score(
            FakeNetwork("clip")(samples_seen)["pool"], FakeNetwork("clip").text(captions)
        ).mean
        assert point["results"]["clip-score"]["values"]["clip_score"]["value"] == pytest.approx(scored)
        assert f"{scale:<14g}{found['fid']['value']:>12.4f}" in out
    assert points[0]["results"]["fid"]["images"]["crop"] == "center 256 bicubic"
    assert points[0]["results"] != points[1]["results"]
    assert networks == [("inception", None), ("clip", "b16")]
    assert Image.open(tmp_path / "p.png").size == (3 * 360, 360)


def test_sweep_on_any_reference(networks, tiny_bundle, tmp_path, capsys):
    words = ["evaluate", "sweep", f"bundle={tiny_bundle}", "name=emoji,split=val", "--rows", "8", "--partial"]
    words += ["--reference-rows", "9", "--figures", "kid", "--prior", "null", "--steps", "2"]
    assert main([*words, "--work", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    (point,) = json.loads((tmp_path / "r.json").read_text())["points"]
    assert f"its own       {point['results']['kid']['values']['kid']['value']:12.4f}" in out
    assert point["variant"] == "its own" and point["results"]["kid"]["images"]["count"] == 8
    assert main([*words, "--plot", str(tmp_path / "p.png")]) == 1
    assert "--plot draws a line through several scales" in capsys.readouterr().err


def test_a_reference_made_in_another_way_is_refused_before_anything_is_drawn(
    networks, tiny_bundle, tmp_path, capsys, monkeypatch
):
    write_images(tmp_path / "real", 8)
    work = ["--work", str(tmp_path / "w"), "--partial"]
    real, saved = str(tmp_path / "real"), str(tmp_path / "real.npz")
    assert main(["evaluate", "fid", real, real, "--crop", "center", "--save-statistics", saved, *work]) == 0
    (tmp_path / "c.txt").write_text("a cat\na dog")
    monkeypatch.setattr("unclip_jax.evaluate.sets.text_to_image", lambda *_, **__: pytest.fail("drawn"))
    words = ["evaluate", "sweep", f"bundle={tiny_bundle}", saved, "--captions", str(tmp_path / "c.txt")]
    assert main([*words, "--figures", "fid", "--prior", "null", *work]) == 1
    assert "were made differently: crop 'none' and 'center'" in capsys.readouterr().err
    monkeypatch.setattr(FakeNetwork, "outputs", {"pool": 6, "spatial": 5})
    words[3] = real
    assert main([*words, "--figures", "fid,inception-score", "--prior", "null", *work]) == 1
    assert "inception-score needs the classifier" in capsys.readouterr().err


def test_each_partial_figure_is_named():
    images = type("Set", (), {"count": 9})()
    asked = {"fid": 50_000, "prdc": 10_000}
    results = {name: Result(name, {}, least, True, images, None, []) for name, least in asked.items()}
    points = [protocols.Point(variant, results) for variant in protocols.guidance_variants([1, 2])]
    assert protocols.table(points, "guidance")[3:] == [
        "partial: fid, 9 of 50,000 images",
        "partial: prdc, 9 of 10,000 images",
    ]


def made(fid, clip, scale):
    """A point with planted numbers."""
    values = {"fid": {"fid": Value(fid)}, "clip-score": {"clip_score": Value(clip)}}
    images = type("Set", (), {"count": 9})()
    results = {name: Result(name, row, 9, False, images, None, []) for name, row in values.items()}
    return protocols.Point(protocols.guidance_variants([scale])[0], results)


def test_published_figures_are_an_assertion():
    """Karlo's table is reached within the tolerance or the command fails, naming the numbers."""
    assert sweep.PUBLISHED == tuple(protocols.EXPECTED) and sweep.COCO_ROWS == protocols.COCO_ROWS
    lines = protocols.check_expected([made(15.3, 0.319, 8), made(14.2, 0.32, 8)], "karlo")
    assert len(lines) == 4 and "fid 14.2000, published 14.43" in lines[2]
    with pytest.raises(ValueError, match="are not reached: 50 steps: fid 16.0000, published 14.43") as error:
        protocols.check_expected([made(15.3, 0.319, 8), made(16.0, 0.32, 8)], "karlo")
    assert "25 steps" not in str(error.value)
    with pytest.raises(ValueError, match="not reached"):
        protocols.check_expected([made(float("nan"), 0.319, 8), made(14.4, 0.32, 8)], "karlo")
    options = protocols.EXPECTED["karlo"][1].variant.options
    assert options["prior_diffusion"] == {"steps": 25, "guidance_scale": 4.0}
    assert options["decoder"] == {"steps": 50, "guidance_scale": 8.0}


def test_panels_show_what_was_measured():
    points = [made(14.0, 0.30, 1), made(12.0, 0.31, 2), made(15.0, 0.32, 4)]
    by_guidance, front = protocols.panels(points)
    assert list(by_guidance.x) == [1, 2, 4] and list(by_guidance.y) == [14.0, 12.0, 15.0]
    assert list(front.x) == [0.30, 0.31, 0.32] and front.labels == ["1", "2", "4"]
    picture = np.asarray(draw_panels([by_guidance, front])).astype(int)
    blue = (picture[..., 2] - picture[..., 0]) > 100
    assert picture.shape == (360, 720, 3) and blue[:, :360].sum() > 300 and blue[:, 360:].sum() > 300
    low, high = (np.flatnonzero(blue[:, :360].any(axis=1))[i] for i in (0, -1))
    assert 25 < low < high < 320  # inside of the axes
    with pytest.raises(ValueError, match="not finite"):
        draw_panels([Panel("t", "x", "y", [0, 1], [0, np.inf], ["", ""])])
    with pytest.raises(ValueError, match="at least one panel"):
        draw_panels([])


@pytest.mark.parametrize("low, high", [(0, 1), (3, 3), (0, 0), (-5, 1e-3), (0.3081, 0.3192), (1e4, 1.2e4)])
def test_ticks_span_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_coco_that_is_not_there(tmp_path, coco):
    with pytest.raises(FileNotFoundError, match="unpack MS-COCO's annotations of 2014"):
        protocols.coco_captions(tmp_path, 2, 0)
    with pytest.raises(FileNotFoundError, match="unpack MS-COCO's validation images of 2014"):
        protocols.coco_reference(tmp_path)
    with pytest.raises(ValueError, match="has 18 captions, and 30,000 are wanted"):
        protocols.coco_captions(coco, 30_000, 0)
    file = coco / "annotations" / "captions_val2014.json"
    for text in ("no JSON", "[]", '{"annotations": [{"caption": 3}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="is not MS-COCO's list of captions"):
            protocols.coco_captions(coco, 2, 0)
