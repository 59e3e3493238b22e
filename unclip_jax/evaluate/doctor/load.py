"""Opens what the doctor examines: a bundle whose parts may be damaged, or a training run, and its data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.checkpoint.bundle import Bundle, Part, check_frozen, read_description, read_part
from unclip_jax.checkpoint.load import bundle_path, load_bundle, load_part, load_trained
from unclip_jax.checkpoint.store import folder, params_hash, read_items
from unclip_jax.data import ops
from unclip_jax.data.embeddings import is_embedded
from unclip_jax.data.record import Source
from unclip_jax.errors import InputError, UserError, one_line
from unclip_jax.evaluate.clip import captions_of, usable_rows
from unclip_jax.evaluate.doctor.report import FAULT, Finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.evaluate.sets import chosen_rows
from unclip_jax.models.clip import CLIP
from unclip_jax.paths import store_errors
from unclip_jax.run.resume import resolve
from unclip_jax.sampling.programs import Progress, Sampler
from unclip_jax.sampling.text_to_image import SYSTEMS
from unclip_jax.sharding import path_name, placer

LEAST_ROWS = 16  # fewer tell nothing
# Two copies of a tower's tensor differ by less, in parts of its root mean square: bfloat16 rounds by 0.002.
ROUNDED = 0.005


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


def with_clip(opened: Opened, path: str | os.PathLike) -> Opened:
    """The same parts with the image tower that a CLIP elsewhere has: a bundle, public weights, or a run.

    Its image embeddings lie in the space of the parts if it is the CLIP that they were trained with. A bundle
    that holds a text tower (Karlo) shows this by the tower's weights, other parts by the hash of their CLIP.

    Raises:
      FileNotFoundError, ValueError, KeyError: one line, when there is no CLIP with both towers, it is another
        one, or the parts need none.
    """
    bundle = opened.bundle
    own, place = bundle.parts.get("clip"), None if bundle.mesh is None else placer(bundle.mesh)
    if own is not None and own.config["model"].get("image") is not None:
        raise InputError(f"{bundle.path} has CLIP's image tower already: leave out --clip")
    if own is None and not any("clip" in part.config.get("frozen", {}) for part in bundle.parts.values()):
        raise InputError(f"no part of {bundle.path} was trained with a CLIP: leave out --clip")
    given, _ = load_part(path, "clip")
    for tower in ("image", "text"):
        if given.config["model"].get(tower) is None:
            raise InputError(f"--clip {path} has no {tower} tower: name a CLIP with both")
    params = given.params
    if place is not None:
        params = jax.tree_util.tree_map_with_path(lambda where, x: place(path_name(where), x), params)
    if own is None:
        clip = Part(given.config, params, given.hash or params_hash(given.params))
        check_frozen(bundle.parts | {"clip": clip})
    else:
        difference = _other_text_tower(own, given)
        if difference:
            raise InputError(
                f"--clip {path} makes image embeddings in another space than that of "
                f"{bundle.path}: {difference}"
            )
        model = own.config["model"] | {"image": given.config["model"]["image"]}
        towers = {name: params[name] for name in ("image_tower", "logit_scale")}
        clip = Part(own.config | {"model": model}, own.params | towers, own.hash)
    return opened._replace(bundle=dataclasses.replace(bundle, parts=bundle.parts | {"clip": clip}))


def _other_text_tower(own: Part, given: Part) -> str:
    # In which way the text towers of two CLIPs differ, in words; "" if they are the same up to rounding.
    wanted, found = (part.config["model"].get("activation", CLIP.activation) for part in (own, given))
    if found != wanted:
        return f"its activation is {found}, not {wanted}"
    ours, theirs = (
        {path_name(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(params["text_tower"])}
        for params in (own.params, given.params)
    )
    if ours.keys() != theirs.keys():
        return "its text tower has other layers"
    for name, leaf in ours.items():
        if np.shape(leaf) != np.shape(theirs[name]):
            return f"{name} of its text tower has the shape {np.shape(theirs[name])}, not {np.shape(leaf)}"
        leaf, other = np.asarray(leaf, np.float64), np.asarray(theirs[name], np.float64)
        apart = np.sqrt(np.mean(np.square(leaf - other)) / max(np.mean(np.square(leaf)), 1e-20))
        if not apart <= ROUNDED:
            return f"{name} of its text tower differs by {apart:.2g} of its root mean square"
    return ""


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
