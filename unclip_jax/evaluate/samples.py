"""Measures a bundle on held-out rows of the embedded emoji, never on training rows.

There are two splits: `val` has unseen names, `compose` has unseen combinations of seen parts. The rows of a
split form groups. For each split, `measure` gives:

| figure                  | meaning                                                                          |
|-------------------------|----------------------------------------------------------------------------------|
| `retrieval`             | how often CLIP ranks an image's own caption first in its group; chance 1 / group |
| `caption_first`         | the same for images that the bundle sampled from the captions                    |
| `prior_cosine`          | mean cosine(z_hat, z_i) of the prior's embedding and the image's                 |
| `mean_embedding_cosine` | baseline for it: the mean training embedding in place of z_hat                   |
| `text_embedding_cosine` | baseline for it: z_t in place of z_hat                                           |
"""

from __future__ import annotations

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import part_space
from unclip_jax.metrics.retrieval import mean_cosine, retrieval_at_1
from unclip_jax.sampling.edits.inversion import embed_images
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler
from unclip_jax.sampling.unclip import sample_stages

SPLITS = ("val", "compose")
GROUP = 100  # rows among which a caption has to be found


def check_rows(rows: int) -> None:
    """Raises a ValueError unless rows of both splits form whole groups: 2 to 100 rows, or 200, 300, ..."""
    most = min(len(make_source({"name": "emoji", "split": split})) for split in SPLITS) // GROUP * GROUP
    if not 2 <= rows <= most or (rows > GROUP and rows % GROUP):
        raise InputError(
            f"rows must be between 2 and {GROUP}, or a multiple of {GROUP} up to {most}, got {rows}"
        )


def measure(
    bundle: Sampler | Bundle,
    *,
    rows: int = 100,
    seed: int = 0,
    prior: str = "prior_diffusion",
    progress: Progress | None = None,
) -> dict:
    """Measures all figures of the table above on the first `rows` rows of each split.

    Args:
      bundle: with clip, prior_diffusion, decoder, and the parts of `prior`.
      rows: a multiple of 100, the size of a group; or fewer than 100 rows, which form one group.
      seed: random seed of the samples.
      prior: as in `text_to_image`.
      progress: called with (images done, total images) of the current split.

    Returns:
      {"candidates": the group's size, "chance", "rows", "seed", and per split {figure: value}}, rounded to
      four digits.

    Raises:
      ValueError: if the rows do not form whole groups; otherwise as `unclip.sample_stages`.
    """
    check_rows(rows)
    group = min(rows, GROUP)
    sampler = as_sampler(bundle)
    space = part_space(sampler.network("prior_diffusion").config)
    figures: dict = {"candidates": group, "chance": round(1 / group, 4), "rows": rows, "seed": seed}
    for split in SPLITS:
        source = make_source({"name": "emoji", "split": split})
        records = [source.read(i) for i in range(rows)]
        captions = [record.captions[0] for record in records]
        z_image = embed_images(sampler, [ops.decode_image(record.image) for record in records])
        stages = sample_stages(sampler, captions, seed=seed, prior=prior, progress=progress)
        z_sample = embed_images(sampler, ops.to_uint8(stages.images[-1]))
        figures[split] = {
            "retrieval": retrieval_at_1(z_image, stages.z_text, group),
            "caption_first": retrieval_at_1(z_sample, stages.z_text, group),
            "prior_cosine": mean_cosine(stages.z_image, z_image),
            "mean_embedding_cosine": mean_cosine(z_image, np.asarray(space.mean)),
            "text_embedding_cosine": mean_cosine(stages.z_text, z_image),
        }
        figures[split] = {name: round(value, 4) for name, value in figures[split].items()}
    return figures


def describe(figures: dict) -> list[str]:
    """Formats the figures as a table, one line per figure."""
    lines = [
        f"{'held-out rows, ' + str(figures['rows']) + ' each':34}"
        + "".join(f"{s:>10}" for s in SPLITS)
        + f"{'chance':>10}"
    ]
    names = {
        "retrieval": (f"own caption first of {figures['candidates']}, images", figures["chance"]),
        "caption_first": (f"own caption first of {figures['candidates']}, samples", figures["chance"]),
        "prior_cosine": ("prior cosine(z_hat, z_i)", None),
        "mean_embedding_cosine": ("  baseline: mean embedding", None),
        "text_embedding_cosine": ("  baseline: text embedding", None),
    }
    for key, (words, chance) in names.items():
        lines.append(
            f"{words:34}"
            + "".join(f"{figures[s][key]:10.3f}" for s in SPLITS)
            + (f"{chance:10.3f}" if chance else "")
        )
    return lines
