"""Zero-shot classes: the ensemble in embedding space, ties, the 80 prompts, and errors."""

import runpy
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.metrics.zeroshot import TEMPLATES, class_embeddings, templates_of, top_k_accuracy

RNG = np.random.default_rng(0)


def test_a_class_is_the_mean_of_its_unit_prompts():
    """Every prompt has the same weight, however long its vector.

    Classes come in order, as unit vectors.
    """
    table = {f"{t} {c}": RNG.normal(size=8) * RNG.uniform(0.1, 10) for c in "abc" for t in ("x", "y", "z")}
    seen = []

    def embed(prompts):
        seen.extend(prompts)
        return np.stack([table[p] for p in prompts])

    classes = class_embeddings(embed, "abc", ("x {}", "y {}", "z {}"))
    unit = lambda v: v / np.linalg.norm(v)
    for name, row in zip("abc", classes):
        np.testing.assert_allclose(row, unit(sum(unit(table[f"{t} {name}"]) for t in "xyz")), rtol=1e-12)
    assert sorted(seen) == sorted(table)


def test_accuracy():
    """The right class is first, second, or nowhere. A tie is a miss, and vector lengths do not matter."""
    classes = np.eye(4) * [[1], [5], [0.1], [2]]
    images = np.array([[3, 1, 0, 0], [3, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0]], float)
    assert top_k_accuracy(images, classes, [0, 0, 3, 2], (1, 2)) == {1: 0.75, 2: 0.75}
    assert top_k_accuracy(images, classes, [1, 1, 2, 0], (1, 2)) == {1: 0.0, 2: 1.0}
    for ks, labels in (((4,), [0, 0, 0, 0]), ((0,), [0, 0, 0, 0]), ((1,), [0, 0, 0, 4]), ((1,), [0, 0, 0])):
        with pytest.raises(ValueError, match="k must be|labels must be 4 numbers"):
            top_k_accuracy(images, classes, labels, ks)


def test_the_80_prompts_are_the_published_ones():
    """They are those of the reference's package, word for word and in the same order."""
    reference = runpy.run_path(
        str(Path(sysconfig.get_path("purelib")) / "open_clip" / "zero_shot_metadata.py")
    )
    assert templates_of("imagenet") == tuple(make("{}") for make in reference["OPENAI_IMAGENET_TEMPLATES"])
    assert len(set(templates_of("imagenet"))) == 80


def test_templates_by_name_or_from_a_file(tmp_path):
    """Every template has exactly one place for the class."""
    assert all(t.count("{}") == 1 for name in TEMPLATES for t in templates_of(name))
    (tmp_path / "own.txt").write_text("a drawing of {}\n\n  a {} on paper \n")
    assert templates_of(str(tmp_path / "own.txt")) == ("a drawing of {}", "a {} on paper")
    (tmp_path / "bad.txt").write_text("a drawing of {}\na drawing\n")
    with pytest.raises(ValueError, match="but not 'a drawing'"):
        templates_of(str(tmp_path / "bad.txt"))
    (tmp_path / "latin.txt").write_bytes("ein Bär {}".encode("latin-1"))
    with pytest.raises(InputError, match="latin.txt: 'utf-8' codec can't decode"):
        templates_of(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="every line must have one"):
        templates_of(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="unknown templates 'foto'; choose one of name, photo"):
        templates_of("foto")
