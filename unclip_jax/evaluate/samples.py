"""Measures what a bundle draws, with an independent CLIP as the judge, on the embedded emoji.

There are three splits. The generating parts were trained on `train` alone. `compose` has unseen combinations
of seen parts, and `val` has unseen names. The judge was trained on all three, so that it knows the names of
all, and it never guides a sample. `measure` draws the canonical captions of the first rows of each split and
compares three sets of pictures: the real ones, the samples, and a shuffled control, in which every caption
gets the sample of the caption before it.

| figure          | meaning                                                                                |
|-----------------|----------------------------------------------------------------------------------------|
| `caption_first` | how often the judge ranks a picture's own caption first in its group; chance 1 / group |
| `style`, `base` | how often the caption nearest to a picture, of all canonical captions of the dataset,  |
|                 | names the right style, and the right base name (a name without its skin tone)          |
| `fid`, `kid`    | distance to the other real rows of the split, by the judge's features                  |
| `copies`        | the share of pictures nearer to a training picture than 95 % of real held-out pictures |
|                 | are: by the judge's features, and by pixels at 32 x 32                                 |

Rates have 95 % intervals by bootstrap. FID and KID have none: equal rows, which a resample with replacement
contains, bias both. The figures of the guiding CLIP are under `guide`, where a prior of the bundle draws z_i.
They say how well the prior hits its target, and not how good the pictures are, because the same CLIP guides
the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data import ops
from unclip_jax.data.record import Record
from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import part_space
from unclip_jax.metrics.bootstrap import interval
from unclip_jax.metrics.fid import frechet_distance
from unclip_jax.metrics.kid import kernel_distance
from unclip_jax.metrics.memorisation import Nearest, copies, nearest
from unclip_jax.metrics.retrieval import first_in_group, mean_cosine, unit
from unclip_jax.sampling.edits.inversion import embed_captions, embed_images, square
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler
from unclip_jax.sampling.text_to_image import System, prior_of, system_of

SPLITS = ("train", "compose", "val")
GROUP = 100  # rows among which a caption has to be found
# The real pictures against which the copies of a split's samples are counted. The real pictures of `train`
# are the training pictures themselves, so `compose` stands in for them.
HELD_OUT = {"train": "compose", "compose": "compose", "val": "val"}
JUDGE = "judge"  # the shipped bundle
PIXELS = 32  # side at which pictures are compared by pixels
BATCH = 128
RATES = ("caption_first", "style", "base")


def check_rows(rows: int) -> None:
    """Raises a ValueError unless rows of every split form whole groups: 2 to 100 rows, or 200, 300, ..."""
    most = min(len(make_source({"name": "emoji", "split": split})) for split in SPLITS) // GROUP * GROUP
    if not 2 <= rows <= most or (rows > GROUP and rows % GROUP):
        raise InputError(
            f"rows must be between 2 and {GROUP}, or a multiple of {GROUP} up to {most}, got {rows}"
        )


class Pair(NamedTuple):
    """A sample, uint8 (S, S, 3), its caption, and the nearest training picture by the judge's features."""

    sample: np.ndarray
    caption: str
    nearest: np.ndarray
    nearest_caption: str


class Measured(NamedTuple):
    """figures: what `bundle.json` stores. pairs: {split: one Pair per sample, the nearest first}."""

    figures: dict
    pairs: dict[str, list[Pair]]


class _Seen(NamedTuple):
    # Pictures as the judge sees them, and as pixels.
    features: np.ndarray  # (N, D), of unit norm
    pixels: np.ndarray  # (N, PIXELS, PIXELS, 3) in [-1, 1]


def open_judge(bundle: Sampler | Bundle, judge: str = JUDGE) -> Sampler:
    """Loads the judge, a bundle with a CLIP.

    Raises:
      ValueError: if the judge is the CLIP of the bundle, which guides its samples.
      KeyError, FileNotFoundError: if it has no CLIP, or is missing.
    """
    opened = Sampler(load_bundle(judge))
    guide = as_sampler(bundle).bundle.parts.get("clip")
    own = params_hash(opened.bundle.part("clip").params)
    if guide is not None and own == params_hash(guide.params):
        raise InputError(f"{judge} holds the CLIP that guides the samples: choose another judge")
    return opened


def measure(
    bundle: Sampler | Bundle,
    judge: Sampler,
    *,
    rows: int = 100,
    seed: int = 0,
    prior: str | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measures all figures of the table above on the first `rows` rows of each split.

    Args:
      bundle: of a system that draws from captions.
      judge: from `open_judge`.
      rows: a multiple of 100, the size of a group; or fewer than 100 rows, which form one group.
      seed: random seed of the samples.
      prior: as in `text_to_image`.
      progress: called with (images done, total images) of the current split.

    Returns:
      The figures, rounded to four digits, and the pairs of samples and training pictures.

    Raises:
      ValueError: if the rows do not form whole groups, or the bundle reads no captions; otherwise as
        `text_to_image`.
    """
    check_rows(rows)
    sampler, group = as_sampler(bundle), min(rows, GROUP)
    system, prior = check_draws(sampler.bundle, prior)
    chosen_prior = {"prior": prior} if system.priors else {}
    records = {split: _records(split) for split in SPLITS}
    real = {split: _see(judge, [ops.decode_image(r.image) for r in records[split]]) for split in SPLITS}
    listed = [record for split in SPLITS for record in records[split]]
    z_captions = unit(embed_captions(judge, [record.captions[0] for record in listed], max_batch=BATCH))
    ends = np.cumsum([len(records[split]) for split in SPLITS])
    z_own = dict(zip(SPLITS, np.split(z_captions, ends[:-1]), strict=True))
    figures: dict = {
        "judge": params_hash(judge.bundle.part("clip").params),
        "prior": prior,
        "rows": rows,
        "seed": seed,
        "candidates": group,
        "chance": round(1 / group, 4),
        "splits": {},
    }
    pairs = {}
    nearest_real = {split: _nearest(_head(real[split], rows), real["train"]) for split in ("compose", "val")}
    for split in SPLITS:
        chosen, rest = records[split][:rows], real[split].features[rows:]
        captions = [record.captions[0] for record in chosen]
        stages = system.sample(sampler, captions, seed=seed, progress=progress, **chosen_prior)
        pictures = list(ops.to_uint8(stages.images[-1]))
        drawn, true = _see(judge, pictures), _head(real[split], rows)
        sets = {"real": true.features, "samples": drawn.features, "shuffled": np.roll(drawn.features, 1, 0)}
        found = _nearest(drawn, real["train"])
        held_out = nearest_real[HELD_OUT[split]]
        figures["splits"][split] = {
            **{
                name: _rates(features, z_own[split][:rows], chosen, z_captions, listed, group)
                for name, features in sets.items()
            },
            "fid": {name: _round(frechet_distance(sets[name], rest)) for name in ("real", "samples")},
            "kid": {name: _round(kernel_distance(sets[name], rest)) for name in ("real", "samples")},
            "copies": {way: _copies(found[way], held_out[way]) for way in found},
        }
        if _has_guide(sampler.bundle, stages):
            figures["splits"][split]["guide"] = _guide(sampler, chosen, pictures, stages, group)
        order = np.argsort(found["features"].distance)
        pairs[split] = [_pair(pictures[i], chosen[i], records["train"], found, i) for i in order]
    return Measured(figures, pairs)


def check_draws(bundle: Bundle, prior: str | None) -> tuple[System, str | None]:
    """The system of a bundle that can be measured, and the prior that it draws with (`prior_of`).

    Raises:
      ValueError, KeyError: as `prior_of`; and if the bundle reads no captions.
    """
    system = system_of(bundle)
    if system.reads(bundle) != "captions":
        raise InputError(
            f"{bundle.path or 'the bundle'} reads no captions, and samples are measured with captions: "
            "`unclip evaluate fid` compares its pictures with others"
        )
    return system, prior_of(bundle, prior)


def _has_guide(bundle: Bundle, stages: Any) -> bool:
    # Whether the figures of the guiding CLIP can be made: z_t and z_i of its two towers, and a prior.
    if not (hasattr(stages, "z_text") and hasattr(stages, "z_image") and "prior_diffusion" in bundle.parts):
        return False
    model = bundle.parts["clip"].config["model"]
    return model.get("image") is not None and model.get("text") is not None


def _records(split: str) -> list[Record]:
    source = make_source({"name": "emoji", "split": split})
    return [source.read(i) for i in range(len(source))]


def _see(judge: Sampler, pictures: Sequence[np.ndarray]) -> _Seen:
    features = unit(embed_images(judge, pictures, max_batch=BATCH))
    return _Seen(features, ops.to_float(square(pictures, PIXELS)))


def _head(seen: _Seen, rows: int) -> _Seen:
    return _Seen(seen.features[:rows], seen.pixels[:rows])


def _nearest(seen: _Seen, training: _Seen) -> dict[str, Nearest]:
    return {way: nearest(getattr(seen, way), getattr(training, way)) for way in _Seen._fields}


def _round(value: float) -> float:
    return round(float(value), 4)


def _rate(hits: np.ndarray) -> dict[str, float]:
    # A share and its interval.
    low, high = interval([hits])
    return {"value": _round(np.mean(hits)), "low": _round(low), "high": _round(high)}


def _rates(
    features: np.ndarray,
    z_own: np.ndarray,
    chosen: Sequence[Record],
    z_captions: np.ndarray,
    listed: Sequence[Record],
    group: int,
) -> dict[str, dict[str, float]]:
    # RATES of pictures (N, D) whose captions are z_own (N, D); z_captions (M, D) are those of `listed`. All
    # are of unit norm.
    best = np.argmax(features @ z_captions.T, axis=1)
    same = {
        field: np.array([r.meta[field] == listed[j].meta[field] for r, j in zip(chosen, best)])
        for field in ("style", "base")
    }
    hits = {"caption_first": first_in_group(features, z_own, group), **same}
    return {name: _rate(hits[name]) for name in RATES}


def _copies(found: Nearest, held_out: Nearest) -> dict[str, float]:
    return {
        "share": _round(copies(found.distance, held_out.distance)),
        "samples": _round(np.median(found.distance)),
        "held_out": _round(np.median(held_out.distance)),
    }


def _guide(sampler: Sampler, chosen: Sequence[Record], pictures, stages, group: int) -> dict[str, float]:
    # What the guiding CLIP itself says, and how near the prior comes to z_i.
    space = part_space(sampler.network("prior_diffusion").config)
    z_image = embed_images(sampler, [ops.decode_image(record.image) for record in chosen])
    z_sample = embed_images(sampler, pictures)
    values = {
        "caption_first_real": np.mean(first_in_group(z_image, stages.z_text, group)),
        "caption_first_samples": np.mean(first_in_group(z_sample, stages.z_text, group)),
        "prior_cosine": mean_cosine(stages.z_image, z_image),
        "mean_embedding_cosine": mean_cosine(z_image, np.asarray(space.mean)),
        "text_embedding_cosine": mean_cosine(stages.z_text, z_image),
    }
    return {name: _round(value) for name, value in values.items()}


def _pair(picture: np.ndarray, record: Record, training: Sequence[Record], found: dict, i: int) -> Pair:
    other = training[int(found["features"].row[i])]
    image = square([ops.decode_image(other.image)], picture.shape[0])[0]
    return Pair(picture, record.captions[0], image, other.captions[0])


# ------------------------------------------------------------------------------------------ words
def describe(figures: dict) -> list[str]:
    """Formats the figures as a table: one line per figure and split."""
    names = {
        "caption_first": f"own caption first of {figures['candidates']}",
        "style": "right style",
        "base": "right base name",
    }
    drawn = "" if figures["prior"] is None else f"prior {figures['prior']}, "
    lines = [
        f"judge {figures['judge']}, {drawn}first {figures['rows']} captions of each "
        f"split, seed {figures['seed']}",
        f"{'by the judge':38}{'real':>18}{'samples':>18}{'shuffled':>18}",
    ]
    for split, found in figures["splits"].items():
        for rate, words in names.items():
            cells = (_interval(found[name][rate]) for name in ("real", "samples", "shuffled"))
            lines.append(f"{split:9}{words:29}" + "".join(f"{cell:>18}" for cell in cells))
        for name in ("fid", "kid"):
            words = f"{name.upper()} to the other real rows"
            values = (f"{found[name][column]:.4f}" for column in ("real", "samples"))
            lines.append(f"{split:9}{words:29}" + "".join(f"{value:>18}" for value in values))
    columns = ("median, held out", "median, samples", "copies")
    lines += ["", f"{'nearest training picture':38}" + "".join(f"{column:>18}" for column in columns)]
    for split, found in figures["splits"].items():
        for way, copied in found["copies"].items():
            values = f"{copied['held_out']:18.4f}{copied['samples']:18.4f}{copied['share']:18.2f}"
            lines.append(f"{split:9}{'by ' + way:29}{values}")
    if not all("guide" in found for found in figures["splits"].values()):
        return lines
    lines += ["", f"{'the guiding CLIP itself':38}" + "".join(f"{split:>10}" for split in figures["splits"])]
    for key, words in {
        "caption_first_real": f"own caption first of {figures['candidates']}, real",
        "caption_first_samples": f"own caption first of {figures['candidates']}, samples",
        "prior_cosine": "prior cosine(z_hat, z_i)",
        "mean_embedding_cosine": "  baseline: mean training embedding",
        "text_embedding_cosine": "  baseline: text embedding",
    }.items():
        values = (found["guide"][key] for found in figures["splits"].values())
        lines.append(f"{words:38}" + "".join(f"{value:10.3f}" for value in values))
    return lines


def summarise(figures: dict) -> list[str]:
    """The judge's main figure in one line per split; one line of advice for figures of an older format."""
    if "splits" not in figures:
        return ["measured by an older version: `unclip evaluate samples --bundle DIR` measures it again"]
    return [
        f"{split:8} own caption first of {figures['candidates']}, by the judge: "
        f"samples {found['samples']['caption_first']['value']:.2f}, "
        f"real pictures {found['real']['caption_first']['value']:.2f}, chance {figures['chance']:.2f}"
        for split, found in figures["splits"].items()
    ]


def _interval(rate: dict[str, float]) -> str:
    return f"{rate['value']:.2f} [{rate['low']:.2f}-{rate['high']:.2f}]"


def pair_grid(pairs: Sequence[Pair]) -> tuple[np.ndarray, list[str]]:
    """Each sample beside its nearest training picture: images uint8 (2 N, S, S, 3) and their labels."""
    images = np.stack([picture for pair in pairs for picture in (pair.sample, pair.nearest)])
    labels = [
        text for pair in pairs for text in (f"sample: {pair.caption}", f"training: {pair.nearest_caption}")
    ]
    return images, labels
