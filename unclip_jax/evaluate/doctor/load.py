"""Opens what the doctor examines: a bundle whose parts may be damaged, or a training run, and its data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from unclip_jax.checkpoint.bundle import Bundle, read_description, read_part
from unclip_jax.checkpoint.load import bundle_path, load_bundle, load_part, load_trained
from unclip_jax.checkpoint.store import folder, read_items
from unclip_jax.data import ops
from unclip_jax.data.embeddings import is_embedded
from unclip_jax.data.record import Source
from unclip_jax.errors import InputError, UserError, one_line
from unclip_jax.evaluate.clip import captions_of, usable_rows
from unclip_jax.evaluate.doctor.report import FAULT, Finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.evaluate.sets import chosen_rows
from unclip_jax.paths import store_errors
from unclip_jax.run.resume import resolve
from unclip_jax.sampling.programs import Progress, Sampler
from unclip_jax.sampling.text_to_image import SYSTEMS

LEAST_ROWS = 16  # fewer tell nothing


class Opened(NamedTuple):
    """bundle: the parts that can be read. raw: weights before averaging, by part. read: a fault for each part
    that cannot be read."""

    bundle: Bundle
    raw: Mapping[str, Any]
    read: tuple[Finding, ...] = ()


def open_patient(path: str | os.PathLike, mesh: Mesh | None = None) -> Opened:
    """Reads a bundle, public weights, or a training run with the networks that stand frozen under it.

    Parts of a bundle that are damaged are left out and reported.

    Raises:
      FileNotFoundError, ValueError: when nothing can be read, or parts do not belong together.
    """
    with store_errors(path):
        trained = folder(path).is_dir()
    opened = _open_run(path) if trained else _open_bundle(path, mesh)
    if opened.bundle.system not in SYSTEMS:
        raise InputError(
            f"{path} is of the system {opened.bundle.system!r}; the doctor knows {', '.join(SYSTEMS)}"
        )
    return opened


def _open_bundle(path: str | os.PathLike, mesh: Mesh | None) -> Opened:
    try:
        return Opened(load_bundle(path, mesh=mesh), {})
    except UserError:
        opened = _readable(path)
        if not opened.read or not opened.bundle.parts:  # its parts do not belong together, or none is whole
            raise
        return opened


def _readable(path: str | os.PathLike) -> Opened:
    # The parts of a bundle that can be read, and a finding for each that cannot.
    found = read_description(bundle_path(path))
    whole, read = {}, []
    for name, place in found.folders.items():
        try:
            whole[name] = read_part(place, found.configs[name], found.top["parts"][name]["hash"])
        except (UserError, OSError) as error:
            read.append(Finding(name, "weights that can be read", None, "all", FAULT, one_line(error)))
    top = found.top
    return Opened(
        Bundle(whole, top["system"], top["sampling"], top["provenance"], str(path)), {}, tuple(read)
    )


def _open_run(path: str | os.PathLike) -> Opened:
    trained, meta, _ = load_trained(path)
    name, config = meta["name"], meta["config"]
    parts = {}
    for role, where in (config.get("frozen") or {}).items():
        where = resolve(where, path)
        if not is_embedded(where):  # embeddings stand in for the CLIP that made them
            parts[role] = load_part(where, role)[0]
    sampling = {name: meta["sampling"]} if meta["sampling"] else {}
    bundle = Bundle({**parts, name: trained}, sampling=sampling, path=str(path))
    if trained.config["kind"] == "codec":  # it is fitted, and has no average
        return Opened(bundle, {})
    _, items, _ = read_items(path, ("state",))
    return Opened(bundle, {name: items["state"]["params"]})


def make_subject(
    opened: Opened,
    source: Source,
    *,
    rows: int,
    drawn: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Subject:
    """The subject of an examination: the parts on a mesh, and rows of a source chosen at random.

    Args:
      opened: the parts.
      source: pictures with captions.
      rows: largest number of records. Checks that only embed take all; checks of pictures take fewer.
      drawn: how many captions are drawn at most.
      seed: of the choice and of all noise.
      mesh: where the parts go, unless they are placed already.
      progress: called with (images done, total images) while pictures are drawn.

    Raises:
      ValueError: when a chosen record cannot be used, or there are fewer than LEAST_ROWS.
    """
    if min(rows, len(source)) < LEAST_ROWS:
        raise InputError(
            f"the doctor needs {LEAST_ROWS} records of {source.name} or more, got {min(rows, len(source))}"
        )
    chosen, captions = usable_rows(source, chosen_rows(len(source), rows, seed), captions_of, False)
    pictures = [ops.decode_image(source.read(int(i)).image) for i in chosen]
    sampler = Sampler(opened.bundle, mesh if opened.bundle.mesh is None else None)
    drawn = min(drawn, len(chosen) // 2)
    return Subject(sampler, pictures, [c[0] for c in captions], drawn, seed, opened.raw, progress)
