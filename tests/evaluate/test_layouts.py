"""Folders of samples for the tools of benchmarks: read here as those tools read them."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate import layouts
from unclip_jax.evaluate.layouts import draw_prompts, read_prompts
from unclip_jax.evaluate.sets import Drawing
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image

DRAWING = Drawing([], "null", 3, {"decoder": {"steps": 2}})
TEXTS = ["a red fox", "a blue heart", "a green pear"]


@pytest.fixture(scope="module")
def sampler(tiny_bundle):
    return Sampler(unclip_jax.load_bundle(tiny_bundle))


def draw(sampler, layout, prompts, out, samples=None):
    read = read_prompts(layout, str(prompts), lambda _: {}, samples)
    return draw_prompts(sampler, layout, read, out, DRAWING, samples=samples)


def expected(sampler, samples):
    """The pictures that the command draws: sample j of prompt i at position i * samples + j."""
    captions = [text for text in TEXTS for _ in range(samples)]
    drawn = text_to_image(sampler, captions, seed=3, prior="null", options=DRAWING.options)
    return drawn.reshape(len(TEXTS), samples, *drawn.shape[1:])


def test_geneval(sampler, tmp_path):
    """As `evaluation/evaluate_images.py` of GenEval reads it: digits, metadata.jsonl, samples/digits.png."""
    lines = [{"tag": "colors", "include": [{"class": "x", "count": 1}], "prompt": text} for text in TEXTS]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    draw(sampler, "geneval", tmp_path / "p.jsonl", tmp_path / "out")
    found, true = {}, expected(sampler, 4)
    for name in os.listdir(tmp_path / "out"):
        assert name.isdigit()
        with open(tmp_path / "out" / name / "metadata.jsonl") as file:
            metadata = json.load(file)
        for picture in os.listdir(tmp_path / "out" / name / "samples"):
            assert re.match(r"\d+\.png", picture)
            found[metadata["prompt"], int(picture[:-4])] = tmp_path / "out" / name / "samples" / picture
        assert metadata == lines[int(name)]
    assert len(found) == 12
    for (text, j), file in found.items():
        np.testing.assert_array_equal(np.asarray(Image.open(file)), true[TEXTS.index(text), j])


def test_dpg_bench(sampler, tmp_path):
    """As `compute_dpg_bench.py` reads it: every entry is a picture of a prompt's name, with four crops."""
    (tmp_path / "prompts").mkdir()
    for name, text in zip(("0", "101", "COCOval2014"), TEXTS):
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    draw(sampler, "dpg", tmp_path / "prompts", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["0.png", "101.png", "COCOval2014.png"]
    true = expected(sampler, 4)
    for i, name in enumerate(("0", "101", "COCOval2014")):
        picture, side = Image.open(tmp_path / "out" / f"{name}.png"), true.shape[2]
        corners = [(0, 0), (side, 0), (0, side), (side, side)]
        for j, (x, y) in enumerate(corners):
            np.testing.assert_array_equal(np.asarray(picture.crop((x, y, x + side, y + side))), true[i, j])
    with pytest.raises(ValueError, match="1 sample of a prompt, or a grid of 4, not 3"):
        read_prompts("dpg", str(tmp_path / "prompts"), None, 3)


def test_t2i_compbench(sampler, tmp_path):
    """As `BLIP_vqa.py` reads it: the prompt stands before `_`, the number of the question behind it."""
    (tmp_path / "color.txt").write_text("\n".join(f"{text}\tfox" for text in TEXTS))
    draw(sampler, "t2i-compbench", tmp_path / "color.txt", tmp_path / "out", 4)
    names = sorted(
        os.listdir(tmp_path / "out" / "samples"), key=lambda x: int(x.split("_")[-1].split(".")[0])
    )
    assert [name.split("_")[0] for name in names] == [text for text in TEXTS for _ in range(4)]
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(12))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out" / "samples" / names[5])), expected(sampler, 4)[1, 1]
    )
    for bad in ("a/b", "a_b", "x" * 260):
        (tmp_path / "bad.txt").write_text(f"a fox\n{bad}")
        with pytest.raises(ValueError, match="line 2 cannot be a file's name"):
            read_prompts("t2i-compbench", str(tmp_path / "bad.txt"), None)


def test_folder_is_a_source_and_a_stopped_command_continues(sampler, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    out, written = tmp_path / "out", []
    draw(sampler, "folder", tmp_path / "p.txt", out, 4)
    source = make_source({"name": "folder", "path": str(out)})
    captions = [source.read(i).captions for i in range(len(source))]
    assert captions == [(text,) for text in TEXTS for _ in range(4)]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "000005.png").unlink()
    (out / "000007.png").write_bytes(b"kept as it is")
    write = layouts.write_whole
    monkeypatch.setattr(
        layouts, "write_whole", lambda path, data: (written.append(path.name), write(path, data))
    )
    assert draw(sampler, "folder", tmp_path / "p.txt", out, 4) == 2
    assert written == ["000004.txt", "000005.txt", "000006.txt", "000007.txt", "000005.png"]
    assert (out / "000005.png").read_bytes() == before["000005.png"]
    assert (out / "000007.png").read_bytes() == b"kept as it is"
    (tmp_path / "p.txt").write_text("\n".join(TEXTS[:2]))
    with pytest.raises(ValueError, match="holds samples of other prompts, weights or options"):
        draw(sampler, "folder", tmp_path / "p.txt", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(ValueError, match="holds files that this command did not write"):
        draw(sampler, "folder", tmp_path / "p.txt", tmp_path / "mine")


def test_prompts_that_cannot_be_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\nno JSON')
    (tmp_path / "y.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "none").mkdir()
    for layout, path, says in (
        ("geneval", "x.jsonl", "line 2 is not JSON"),
        ("geneval", "y.jsonl", "line 2 has no text 'prompt'"),
        ("folder", "empty.txt", "has no captions"),
        ("dpg", "none", "has no texts"),
        ("dpg", "x.jsonl", "is no folder"),
        ("grid", "x.jsonl", "unknown layout 'grid'"),
    ):
        with pytest.raises(ValueError, match=says):
            read_prompts(layout, str(tmp_path / path), None)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        read_prompts("t2i-compbench", str(tmp_path / "nothing.txt"), None)
