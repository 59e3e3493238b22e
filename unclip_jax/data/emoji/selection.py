"""Which drawings the embedded emoji keep, and the split of each; `build` says what the splits hold."""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from unclip_jax.data.emoji import names as emoji_names
from unclip_jax.data.emoji.packages import (
    blob_codepoints,
    icon_codepoints,
    read_icons,
    read_names,
    read_renders,
)

STYLES = ("3d", "flat", "noto", "blob")
SEED = "emoji-1"  # part of every hash: another value changes every split

VAL_FRACTION = 0.087  # of the ideas: about 120
STYLE_HOLDOUT_FRACTION = 0.085  # of (style, name) pairs
TONE_HOLDOUT_FRACTION = 0.06  # of (person, skin tone) pairs
TONED_PEOPLE = {
    "3d": 1.0,
    "flat": 0.16,
    "noto": 0.16,
    "blob": 0.0,
}  # the fraction of people kept in all five skin tones, to save space
SAME_DRAWING = (
    4.0  # a blob that differs less from noto's drawing (mean absolute difference, of 255) is the same drawing
)


@dataclass
class Emoji:
    """One captioned image.

    `phrase` has neither article nor skin tone. `group` names the idea, without skin tone and gender; `base`
    is the phrase of the group.
    """

    style: str
    codepoints: str
    tone: str | None
    phrase: str
    group: str
    base: str
    keywords: list[str]
    image: np.ndarray = field(repr=False)  # (64, 64, 3) uint8
    split: str = "train"
    holdout: str | None = None

    @property
    def key(self) -> str:
        return f"{self.style}/{self.codepoints}"

    @property
    def name(self) -> str:
        return emoji_names.with_tone(self.phrase, self.tone)


def _chance(*parts: str) -> float:
    """A number in [0, 1) that depends only on the parts and the seed."""
    return emoji_names.stable_hash(SEED, *parts) / 2**64


def collect(archives: dict[str, tarfile.TarFile], log: Callable[[str], None]) -> list[Emoji]:
    """All images that are kept, in a fixed order: by style, then by number and value of the codepoints."""
    labels = read_names(archives)
    sources = {
        "3d": read_renders(archives["3d"]),
        "flat": read_icons(archives["flat"], icon_codepoints(archives["flat"])),
        "noto": read_icons(archives["noto"], icon_codepoints(archives["noto"])),
        "blob": read_icons(archives["blob"], blob_codepoints(archives, labels)),
    }
    kept: list[Emoji] = []
    noto: dict[str, np.ndarray] = {}
    for style in STYLES:
        seen_images: set[bytes] = set()
        seen_names: set[str] = set()
        dropped: Counter[str] = Counter()
        for codepoints in sorted(sources[style], key=lambda text: (text.count("-"), text)):
            toneless, tones = emoji_names.split_tone(codepoints)
            if toneless not in labels or not emoji_names.is_depictable(codepoints, labels[toneless][0]):
                dropped["no name" if toneless and toneless not in labels else "not depictable"] += 1
                continue
            group = emoji_names.group_of(codepoints)
            if tones and _chance("toned", group) >= TONED_PEOPLE[style]:
                dropped["skin tone, for size"] += 1
                continue
            label, keywords = labels[toneless]
            phrase = emoji_names.phrase(label)
            tone = tones[0] if tones else None
            name = emoji_names.with_tone(phrase, tone)
            image = sources[style][codepoints]()
            pixels = image.tobytes()
            if pixels in seen_images or name in seen_names or image.min() == 255:
                dropped["same image or name, or blank"] += 1
                continue
            if style == "noto":
                noto[codepoints] = image
            if style == "blob" and codepoints in noto and _difference(image, noto[codepoints]) < SAME_DRAWING:
                dropped["same drawing as noto"] += 1
                continue
            seen_images.add(pixels)
            seen_names.add(name)
            base = emoji_names.phrase(labels[group][0])
            chosen = emoji_names.pick_keywords(keywords, phrase)
            kept.append(Emoji(style, codepoints, tone, phrase, group, base, chosen, image))
        count = sum(emoji.style == style for emoji in kept)
        log(f"{style}: kept {count} of {len(sources[style])}, dropped {dict(dropped)}")
    return kept


def _difference(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(image.astype(np.float32) - other.astype(np.float32)).mean())


def assign_splits(emojis: list[Emoji]) -> None:
    """Sets `split` and `holdout` of every emoji, as the docstring of this module describes."""
    styles_of: dict[str, list[Emoji]] = defaultdict(list)  # the images of one name
    for emoji in emojis:
        if _chance("val", emoji.group) < VAL_FRACTION:
            emoji.split = "val"
        else:
            styles_of[emoji.name].append(emoji)

    for name, same in styles_of.items():
        person_tone = (same[0].group, same[0].tone or "")
        if same[0].tone and _chance("tone", *person_tone) < TONE_HOLDOUT_FRACTION:
            for emoji in same:
                emoji.split, emoji.holdout = "compose", "tone"
            continue
        by_chance = sorted(same, key=lambda emoji: _chance("style", emoji.style, name))
        for emoji in by_chance[:-1]:  # at least one style of each name stays in training
            if _chance("style", emoji.style, name) < STYLE_HOLDOUT_FRACTION:
                emoji.split, emoji.holdout = "compose", "style"

    # If a tone is held out, training must show the person in that style, without a tone or with another one.
    trained = {(emoji.style, emoji.phrase) for emoji in emojis if emoji.split == "train"}
    for emoji in emojis:
        if emoji.holdout == "tone" and (emoji.style, emoji.phrase) not in trained:
            for other in styles_of[emoji.name]:
                other.split, other.holdout = "train", None


def in_order(emojis: list[Emoji], split: str) -> list[Emoji]:
    """The emoji of a split in their fixed, shuffled order.

    The first rows of `val` and of `compose` all show different ideas.
    """
    of_split = [emoji for emoji in emojis if emoji.split == split]
    rows = sorted(of_split, key=lambda emoji: _chance("order", emoji.key))
    if split == "train":
        return rows
    turn: Counter[str] = Counter()
    turns = []
    for emoji in rows:
        turns.append(turn[emoji.group])
        turn[emoji.group] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (turns[i], i))]
