"""Files of statistics: what describes a set of images, and how it was made.

A file is a NumPy archive (`.npz`). These layouts are read; the first is also written.

| layout                      | arrays                                                            |
|-----------------------------|-------------------------------------------------------------------|
| ours                        | `mu`, `sigma`, `about`, and maybe `mu_s`, `sigma_s` and `features` |
| ADM                         | `mu`, `sigma`, `mu_s`, `sigma_s`; or `arr_0`; or all              |
| clean-fid                   | `mu`, `sigma`; or `feats`, (N, D)                                 |
| torch-fidelity, pytorch-fid | `mu`, `sigma`                                                     |

`arr_0` holds images, uint8 (N, H, W, 3).
`mu` and `sigma` are the mean (D,) and the covariance (D, D) of the network's main features. `mu_s` and
`sigma_s` are those of Inception's spatial features. Ours are in the names of ADM, so that its evaluator and
pytorch-fid read our files too. `about` is JSON: it says how the features were made (`Recipe`) and of how many
images.

Two sets are compared only if their features were made in the same way. The files of other tools do not say
it. For these, the user names the tool (`MADE_BY`), which says what is known.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.errors import InputError, input_errors
from unclip_jax.metrics.moments import Moments, moments
from unclip_jax.paths import local_copy, write_whole

FORMAT_VERSION = 1
POOL, SPATIAL = "pool", "spatial"  # names of a network's outputs
MOMENTS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
ASYMMETRY = 1e-4  # largest difference of a covariance from its transpose, as a share of its largest value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How features were made. None means that a file does not say it.

    network: name of the network, see `features.NETWORKS`.
    network_hash: of the weights that make the features (`features.FeatureNetwork.features_hash`).
    resize: how images are resized to the network's input.
    crop: what is cut out of an image before that, and to which size it is brought.
    codec: how the pixels are encoded and decoded again before that.
    """

    network: str
    network_hash: str | None
    resize: str
    crop: str | None
    codec: str | None

    def words(self) -> str:
        """The recipe in one line."""
        hashed = "" if self.network_hash is None else f" {self.network_hash[:12]}"
        unknown = "not stated"
        return (
            f"network {self.network}{hashed}, resize {self.resize}, crop {self.crop or unknown}, "
            f"codec {self.codec or unknown}"
        )


# What is known about the features in a file that another tool made.
MADE_BY = {
    "adm": Recipe("inception", None, "tf1-bilinear 299", None, None),
    "torch-fidelity": Recipe("inception", None, "tf1-bilinear 299", None, None),
    "clean-fid-legacy-tensorflow": Recipe("inception", None, "tf1-bilinear 299", None, None),
    "clean-fid": Recipe("inception", None, "clean bicubic 299", None, None),
    "pytorch-fid": Recipe("inception", None, "pytorch-bilinear 299", None, None),
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What describes a set of images.

    name: what messages call the set.
    recipe: how the features were made.
    count: number of images; None if a file does not say it.
    moments: output of the network -> the mean and the covariance of its features.
    features: output -> (N, D), maybe memory-mapped. Empty if the set is described by moments alone.
    stored: formats in which the images were stored, e.g. ("jpeg", "png"). Empty if unknown.
    """

    name: str
    recipe: Recipe
    count: int | None
    moments: Mapping[str, Moments] = dataclasses.field(default_factory=dict)
    features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    stored: tuple[str, ...] = ()


def check_comparable(a: Statistics, b: Statistics) -> list[str]:
    """Checks that two sets were described in the same way.

    Returns:
      Notes to print beside the figure: what a file does not say, and images that were stored differently.

    Raises:
      ValueError: naming both ways, if they differ in the network, its weights, the resize, the crop or the
        codec.
    """
    notes = []
    for field in dataclasses.fields(Recipe):
        first, second = getattr(a.recipe, field.name), getattr(b.recipe, field.name)
        if first is None or second is None:
            silent = " and ".join(s.name for s, value in ((a, first), (b, second)) if value is None)
            notes.append(f"{silent} does not state the {field.name.replace('_', ' ')}")
        elif first != second:
            raise InputError(
                f"{a.name} and {b.name} were made differently: {field.name.replace('_', ' ')} {first!r} and "
                f"{second!r}. Make both in the same way"
            )
    if a.stored and b.stored and set(a.stored) != set(b.stored):
        notes.append(
            f"the images are stored differently, {'/'.join(a.stored)} and {'/'.join(b.stored)}, "
            "which moves the figure (--jpeg QUALITY encodes both alike)"
        )
    return notes


# ------------------------------------------------------------------------------------------ writing
def save_statistics(path: str | os.PathLike, statistics: Statistics, *, features: bool = False) -> None:
    """Writes statistics in our layout. The file appears complete or not at all.

    Args:
      path: the file, ending in .npz.
      statistics: with moments of the main output, or with its features, which give them.
      features: whether to write the main features as well; the figures but FID need them.
    """
    about = {
        "format": FORMAT_VERSION,
        "recipe": dataclasses.asdict(statistics.recipe),
        "count": statistics.count,
        "images": statistics.name,
        "stored": list(statistics.stored),
    }
    arrays: dict[str, Any] = {"about": np.asarray(json.dumps(about, sort_keys=True))}
    for output, names in MOMENTS.items():
        if output in statistics.moments or output in statistics.features:
            found = statistics.moments.get(output) or moments(statistics.features[output])
            arrays |= dict(zip(names, found[1:], strict=True))
    if features:
        arrays["features"] = np.asarray(statistics.features[POOL])
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(path, file.getvalue())


# ------------------------------------------------------------------------------------------ reading
@dataclasses.dataclass(frozen=True)
class StatisticsFile:
    """The content of a `.npz` file. It has statistics, images, or both.

    statistics: None if the file has images alone.
    images: uint8 (N, H, W, 3), memory-mapped if the archive is not compressed; None if there are none.
    checksum: identifies the images.
    """

    statistics: Statistics | None
    images: np.ndarray | None
    checksum: str


def read_statistics(path: str | os.PathLike, made_by: str | None = None) -> StatisticsFile:
    """Reads a file in one of the layouts of the module's docstring.

    Args:
      path: the file.
      made_by: one of `MADE_BY`, for a file that does not say how its features were made. It is ignored for
        files that say it, and for images.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, in no known layout, or does not say how it was made and `made_by` is None.
    """
    if made_by is not None and made_by not in MADE_BY:
        raise InputError(f"unknown maker {made_by!r} of statistics: choose one of {', '.join(MADE_BY)}")
    file, name = local_copy(path), os.fspath(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {name}")
    members = _members(file, name)
    images = _images(file, name, members) if "arr_0" in members else None
    checksum = json.dumps([[member.CRC, member.file_size] for _, member in sorted(members.items())])
    if not {"mu", "sigma"} <= set(members) and "feats" not in members:
        if images is None:
            layouts = "mu and sigma, feats, or arr_0"
            raise InputError(f"{name} holds {', '.join(sorted(members)) or 'nothing'}: expected {layouts}")
        return StatisticsFile(None, images, checksum)
    arrays = {key: _array(file, name, members, key) for key in members if key != "arr_0"}
    about = _about(name, arrays.pop("about", None), made_by, images is not None)
    moments = {}
    for output, (mean, cov) in MOMENTS.items():
        if mean in arrays and cov in arrays:
            moments[output] = _moments(name, about["count"], arrays[mean], arrays[cov])
    features = {}
    for key in ("features", "feats"):
        if key in arrays:
            features[POOL] = _features(name, key, arrays[key])
    count = about["count"] if about["count"] is not None else next((len(f) for f in features.values()), None)
    recipe = Recipe(**about["recipe"])
    return StatisticsFile(
        Statistics(name, recipe, count, moments, features, tuple(about["stored"])), images, checksum
    )


def _members(file: Any, name: str) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise OSError(f"{name} cannot be read: {error.strerror}") from None
        advice = ""
        if name.endswith((".pt", ".pth", ".pkl")):
            advice = ": a pickle is not read; save its mu and sigma with numpy.savez"
        raise InputError(f"{name} is no archive of NumPy (.npz), or it is cut off{advice}") from None


def _array(file: Any, name: str, members: Mapping[str, zipfile.ZipInfo], key: str) -> np.ndarray:
    # Reading checks the checksum that the archive holds. A pickled object is never loaded.
    try:
        with zipfile.ZipFile(file) as archive, archive.open(members[key]) as member:
            return np.lib.format.read_array(io.BytesIO(member.read()), allow_pickle=False)
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{name}: the array {key} is damaged ({str(error)[:100]})") from None


def _images(file: Any, name: str, members: Mapping[str, zipfile.ZipInfo]) -> np.ndarray:
    # Maps the images where they lie in the archive, as they may not fit into memory.
    info = members["arr_0"]
    if info.compress_type != zipfile.ZIP_STORED:
        images = _array(file, name, members, "arr_0")
    else:
        with input_errors(name, ValueError, EOFError), open(file, "rb") as opened:
            opened.seek(info.header_offset + 26)
            lengths = np.frombuffer(opened.read(4), "<u2")
            opened.seek(info.header_offset + 30 + int(lengths.sum()))
            version = np.lib.format.read_magic(opened)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(opened)
            if dtype.hasobject or fortran:
                raise InputError(f"{name}: arr_0 is no plain array")
            images = np.memmap(opened, dtype, "r", opened.tell(), shape)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise InputError(
            f"{name}: arr_0 must be images, uint8 (N, H, W, 3), got {images.dtype} {images.shape}"
        )
    return images


def _about(name: str, stored: np.ndarray | None, made_by: str | None, images: bool) -> dict:
    if stored is None:
        if made_by is None:
            also = ", or leave mu and sigma out and keep its images" if images else ""
            raise InputError(
                f"{name} does not say how its statistics were made: name the tool with --made-by "
                f"({', '.join(MADE_BY)}){also}"
            )
        return {"recipe": dataclasses.asdict(MADE_BY[made_by]), "count": None, "stored": []}
    with input_errors(f"{name}: about", ValueError, TypeError):
        about = json.loads(str(stored))
        if not isinstance(about, dict) or about.get("format") != FORMAT_VERSION:
            raise InputError(f"{name} is in another version of the format than {FORMAT_VERSION}")
    recipe, fields = about.get("recipe"), {field.name for field in dataclasses.fields(Recipe)}
    texts = isinstance(recipe, dict) and set(recipe) == fields
    texts = texts and all(value is None or isinstance(value, str) for value in recipe.values())
    formats, count = about.get("stored"), about.get("count")
    known = isinstance(formats, list) and all(isinstance(each, str) for each in formats)
    counted = count is None or (isinstance(count, int) and count >= 1)  # None where the file read had none
    if not texts or not known or not counted:
        raise InputError(f"{name}: about does not say how many images there were and how they were read")
    return about


def _moments(name: str, count: int | None, mean: np.ndarray, cov: np.ndarray) -> Moments:
    mean, cov = (_numbers(name, each) for each in (mean, cov))
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise InputError(f"{name}: a mean {mean.shape} and a covariance {cov.shape} do not belong together")
    if np.abs(cov - cov.T).max() > ASYMMETRY * np.abs(cov).max():
        raise InputError(f"{name}: the covariance is not symmetric")
    return Moments(count, mean, cov)


def _features(name: str, key: str, features: np.ndarray) -> np.ndarray:
    features = _numbers(name, features)
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"{name}: {key} must be (N, D), got {features.shape}")
    return features


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"{name} has values that are not finite numbers")
    return array.astype(np.float64)
