"""Zero-shot classification with CLIP (Radford et al. 2021, section 3.1): the nearest class name wins.

A class is the mean of its prompts' unit embeddings, made a unit vector again: the ensemble is formed in embedding space (section 3.1.4),
so that 80 prompts cost no more than one when images are classified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unclip_jax.data.tokenizer import IMAGENET_TEMPLATES_FILE
from unclip_jax.errors import InputError
from unclip_jax.metrics.retrieval import TIE, unit
from unclip_jax.paths import user_path

# name -> prompts with {} for the class; `imagenet` names the 80 that OpenAI published.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "emoji": (
        "an emoji of {}",
        "a 3d emoji of {}",
        "a flat emoji of {}",
        "a noto emoji of {}",
        "a blob emoji of {}",
    ),
    "emoji_style": ("a {} emoji", "an emoji in {} style", "a {} emoji of a face", "a {} emoji of a thing"),
}


def templates_of(name: str) -> tuple[str, ...]:
    """Prompt templates by name, or from a text file with one a line.

    Raises:
      ValueError: on an unknown name, or templates without the place for the class.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = IMAGENET_TEMPLATES_FILE if name == "imagenet" else user_path(name)
    if not path.is_file():
        raise InputError(
            f"unknown templates {name!r}; choose one of {', '.join(TEMPLATES)}, imagenet, or a file with one template a line"
        )
    templates = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates:
        raise InputError(
            f"{path}: every line must have one {{}} for the class" + (f", but not {bad[0]!r}" if bad else "")
        )
    return templates


def class_embeddings(
    embed: Callable[[Sequence[str]], np.ndarray], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Classes as unit vectors.

    Args:
      embed: captions -> embeddings (N, D).
      classes: K names.
      templates: prompts with one {} each.

    Returns:
      (K, D) float64.
    """
    prompts = [template.format(name) for name in classes for template in templates]
    z = unit(embed(prompts)).reshape(len(classes), len(templates), -1)
    return unit(z.mean(axis=1))


def top_k_accuracy(
    z_image: np.ndarray, classes: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Fraction of images (N, D) whose class, labels (N,) int, is among the k nearest of classes (K, D). Ties count against it.

    Raises:
      ValueError: when there are no images, labels are out of range, or k is not below the number of classes.
    """
    labels = np.asarray(labels)
    if (
        len(z_image) == 0
        or labels.shape != (len(z_image),)
        or labels.min() < 0
        or labels.max() >= len(classes)
    ):
        raise InputError(
            f"labels must be {len(z_image)} numbers in [0, {len(classes)}), one per image, and at least one"
        )
    if not all(1 <= k < len(classes) for k in ks):
        raise InputError(
            f"k must be at least 1 and below the number of classes {len(classes)}, got {', '.join(map(str, ks))}"
        )
    similarity = unit(z_image) @ unit(classes).T
    own = similarity[np.arange(len(labels)), labels]
    rank = np.sum(similarity >= own[:, None] - TIE, axis=1) - 1
    return {k: float(np.mean(rank < k)) for k in ks}
