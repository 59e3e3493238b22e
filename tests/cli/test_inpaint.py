"""`unclip inpaint IMAGE [MASK] CAPTION`: how it reads the words, and what it keeps of the picture."""

import types

import numpy as np
import pytest
from PIL import Image

from unclip_jax.cli import options
from unclip_jax.cli.main import build_parser, main
from unclip_jax.sampling import text_to_image

LEFT = np.repeat([[True] * 8 + [False] * 16], 24, axis=0)  # what the masks below draw anew


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Fills the current folder with pictures of 24x24: opaque, cut out, and masks of both conventions."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (24, 24, 3), np.uint8)
    layer = np.where(LEFT, 0, 255).astype(np.uint8)
    named = {
        "picture": picture,
        "cut": np.dstack([picture, layer]),
        "faint": np.dstack([picture, np.full_like(layer, 200)]),
        "white": np.where(LEFT, 255, 0).astype(np.uint8),
        "black": np.zeros_like(layer),
        "clear": np.dstack([np.zeros_like(picture), layer]),
        "large": np.full((30, 20), 255, np.uint8),
    }
    for name, array in named.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    return named


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a.png", "m.png", "a fox"], ("a.png", "m.png", "a fox", 6)),
        (["a.png", "a fox"], ("a.png", None, "a fox", 6)),
        (["--count", "2", "a.png", "a fox"], ("a.png", None, "a fox", 2)),
        (["a.png", "m.png", "a fox", "--count", "2"], ("a.png", "m.png", "a fox", 2)),
        (["a.png", "--count", "2", "m.png", "a fox"], ("a.png", "m.png", "a fox", 2)),
        (["a.png", "--count", "2", "a fox"], ("a.png", None, "a fox", 2)),
        (["a.png", "--", "-a fox"], ("a.png", None, "-a fox", 6)),
    ],
)
def test_the_words_are_an_image_a_mask_and_a_caption(args, expected):
    parsed = build_parser().parse_args(["inpaint", *args])
    assert (parsed.image, parsed.mask, parsed.caption, parsed.count) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.png"], "[MASK] CAPTION"),
        (["a.png", "m.png", "a", "fox", "runs"], "expected IMAGE [MASK] CAPTION, got 2 more"),
    ],
)
def test_a_wrong_command_line_is_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["inpaint", *args])
    shown = capsys.readouterr().err
    assert left.value.code == 2 and message in shown and shown.count("\n") == 1


def test_an_option_between_mask_and_caption_is_no_other_reading(capsys):
    with pytest.raises(SystemExit) as left:
        main(["inpaint", "a.png", "m.png", "--count", "2", "a fox"])
    assert left.value.code == 2 and "unrecognized arguments: a fox" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["picture.png", "white.png"], ["picture.png", "clear.png"], ["cut.png"]])
def test_what_is_kept_is_what_the_mask_does_not_draw_anew(words, pictures, monkeypatch):
    """The verb keeps the mask's complement, of the picture that `decode_image` composites on white."""
    given = {}

    def draw(sampler, images, masks, captions, **_):
        given.update(image=images[0], kept=masks[0], caption=captions[0])
        return np.zeros((len(images), 24, 24, 3), np.uint8)

    empty = types.SimpleNamespace(bundle=types.SimpleNamespace(parts={}))
    task = options.ImageTask(empty, [], None, lambda done, total: None, "grid.png")
    monkeypatch.setattr(options, "image_task", lambda args: task)
    system = types.SimpleNamespace(inpaint=draw)
    monkeypatch.setattr(text_to_image, "system_of", lambda bundle: system)
    monkeypatch.setattr(text_to_image, "drawing_parts", lambda bundle: [])
    assert main(["inpaint", *words, "a fox", "--count", "1"]) == 0
    assert given["kept"].dtype == np.bool_ and given["caption"] == "a fox"
    np.testing.assert_array_equal(given["kept"], ~LEFT)
    picture = pictures["picture"]
    on_white = np.where(LEFT[..., None], 255, picture) if words == ["cut.png"] else picture
    np.testing.assert_array_equal(given["image"], on_white)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["picture.png"], "picture.png: the picture is opaque: give a mask"),
        (["faint.png"], "faint.png: nothing is to be drawn anew: no pixel has an alpha below 128"),
        (["picture.png", "black.png"], "black.png: nothing is to be drawn anew: the mask is opaque"),
        (["picture.png", "text.png"], "text.png: cannot decode image"),
        (["picture.png", "nowhere.png"], "no picture nowhere.png"),
        (["picture.png", "large.png"], "large.png is 20x30, but picture.png is 24x24"),
    ],
)
def test_bad_masks_are_one_line(words, message, pictures, tmp_path, capsys):
    assert main(["inpaint", *words, "a fox", "--bundle", "nowhere"]) == 1
    shown = capsys.readouterr().err.strip()
    assert message in shown and "\n" not in shown
    assert not (tmp_path / "grid.png").exists()


def test_a_forgotten_caption_is_not_drawn(pictures, capsys):
    assert main(["inpaint", "cut.png", "white.png"]) == 1
    assert "white.png is a file, and no caption; give the caption after it" in capsys.readouterr().err
