"""Build the embedded emoji dataset: captioned 64x64 drawings of one idea in several styles.

    python -m unclip_jax.data.emoji.build --out DIR    write the shards and manifest.json into DIR
    python -m unclip_jax.data.emoji.build --check      build again and compare with the shards kept here

Styles (`selection.STYLES`): `3d` (Fluent renders), `flat` (Fluent drawings), `noto` (Noto's current drawings)
and `blob` (Noto's drawings until 2017). Names and keywords are Unicode's (CLDR, English). NOTICE.md beside
the shards holds the licences.

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

With the versions in `packages.PACKAGES` and `TOOLS`, on x86-64 Linux, every build gives the same bytes. It
takes about two minutes on one core. `npm` and `pip` fetch the packages. Requirements:

    pip install pillow==13.0.0 resvg-py==0.5.0
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from unclip_jax.data import tfrecord
from unclip_jax.data.emoji import names as emoji_names
from unclip_jax.data.emoji.packages import IMAGE_SIZE, PACKAGES, VOCAB_FILE, fetch_packages, fetch_vocabulary
from unclip_jax.data.emoji.selection import STYLES, Emoji, assign_splits, collect, in_order

HERE = Path(__file__).resolve().parent
VOCAB = HERE.parent / "vocab"
TOOLS = {"pillow": "13.0.0", "resvg-py": "0.5.0"}
SPLITS = ("train", "val", "compose")
WEBP_QUALITY = 82
SHARD_BYTES = 2_000_000


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
