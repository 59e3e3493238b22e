"""Bad inputs of the verbs that draw and of `evaluate`."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli.bad_inputs import Row


def rows(box: Path) -> list[Row]:
    """Makes the files and returns the rows."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(box / "good.png")
    (box / "broken.png").write_bytes((box / "good.png").read_bytes()[:40])
    (box / "words.png").write_text("no picture")
    (box / "empty.png").write_bytes(b"")
    (box / "folder").mkdir()
    fox = ["sample", "a fox"]
    return [
        Row("an unknown prior", [*fox, "--prior", "gan"], "unknown prior 'gan'"),
        Row("a second prior that is unknown", [*fox, "--prior", "prior_ar,foo"], "unknown prior 'foo'"),
        Row("a negative seed", [*fox, "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        Row("a seed beyond 32 bits", [*fox, "--seed", "4294967296"], "--seed must be between 0 and"),
        Row("no samples", [*fox, "--samples", "0"], "--samples must be between 1 and 10000, got 0"),
        Row("a folder as output", [*fox, "--out", "folder"], "--out folder is a folder"),
        Row("words as guidance", [*fox, "--guidance", "a,b"], "--guidance must be a finite number"),
        Row("an option without its part", [*fox, "--set", "steps=3"], "'steps' is not PART.OPTION"),
        Row("an option without a value", [*fox, "--set", "decoder.steps"], "is not KEY=VALUE"),
        Row("no bundle", [*fox, "--bundle", "nowhere"], "nowhere is not a bundle"),
        Row("no picture", ["vary", "nothing.png"], "no picture nothing.png"),
        Row("a broken picture", ["vary", "broken.png"], "broken.png: "),
        Row("words in place of a picture", ["vary", "words.png"], "words.png: "),
        Row("an empty picture", ["vary", "empty.png"], "empty.png: "),
    ]
