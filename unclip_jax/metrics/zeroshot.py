"""Zero-shot classification with CLIP (Radford et al. 2021, section 3.1): the nearest class name wins.

The embedding of a class is the normalised mean of its prompts' unit embeddings. As this ensemble is formed in
embedding space (section 3.1.4), classifying an image costs the same with 80 prompts as with one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unclip_jax.data.tokenizer import IMAGENET_TEMPLATES_FILE
from unclip_jax.errors import InputError, input_errors
from unclip_jax.metrics.retrieval import TIE, unit
from unclip_jax.paths import user_path

# Name -> prompts with {} for the class. The name `imagenet` stands for the 80 prompts that OpenAI published.
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
    """Prompt templates by name, or from a text file with one template per line.

    Raises:
      ValueError: on an unknown name, no template, or a template without exactly one {}.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = IMAGENET_TEMPLATES_FILE if name == "imagenet" else user_path(name)
    if not path.is_file():
        raise InputError(
            f"unknown templates {name!r}; choose one of {', '.join(TEMPLATES)}, imagenet, "
            "or a file with one template a line"
        )
    with input_errors(str(path), UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    templates = tuple(line.strip() for line in lines if line.strip())
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates:
        raise InputError(
            f"{path}: every line must have one {{}} for the class" + (f", but not {bad[0]!r}" if bad else "")
        )
    return templates


def class_embeddings(
    embed: Callable[[Sequence[str]], np.ndarray], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Embeds classes as unit vectors.

    Args:
      embed: captions -> embeddings (N, D).
      classes: K names.
      templates: prompts with one {} each.

    Returns:
      (K, D) float64.
    """
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    z = unit(embed(prompts)).reshape(len(classes), len(templates), -1)
    return unit(z.mean(axis=1))


def top_k_accuracy(
    z_image: np.ndarray, classes: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Fraction of images whose class is among the k nearest. A tie counts as a miss.

    Args:
      z_image: (N, D) image embeddings.
      classes: (K, D) class embeddings.
      labels: (N,) int in [0, K), the class of each image.
      ks: the numbers of nearest classes, each at least 1 and below K.

    Returns:
      {k: fraction}.

    Raises:
      ValueError: when there are no images, labels are out of range, or a k is out of range.
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
            f"k must be at least 1 and below the number of classes {len(classes)}, "
            f"got {', '.join(map(str, ks))}"
        )
    similarity = unit(z_image) @ unit(classes).T
    true_similarity = similarity[np.arange(len(labels)), labels]
    rank = np.sum(similarity >= true_similarity[:, None] - TIE, axis=1) - 1
    return {k: float(np.mean(rank < k)) for k in ks}
