"""Every system of `SYSTEMS` with every verb: what works, and what is refused in one line."""

import asyncio
import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.systems import save_systems
from unclip_jax.checkpoint.bundle import Part
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import CheckpointStore
from unclip_jax.cli.main import main
from unclip_jax.errors import InputError
from unclip_jax.sampling.text_to_image import SYSTEMS, system_of_runs

ROOT = Path(__file__).resolve().parents[2]
# A verb that draws -> its words after the bundle; A and B are pictures, and MASK is a mask.
DRAWS = {
    "sample": ["a red fox"],
    "vary": ["A", "--count", "1", "--steps", "2"],
    "interpolate": ["A", "B", "--count", "2", "--steps", "2"],
    "mix": ["A", "a fox", "--count", "1"],
    "edit": ["A", "--to", "a cat", "--count", "2", "--steps", "2"],
    "reconstruct": ["A", "--steps", "2"],
    "inpaint": ["A", "MASK", "a fox", "--count", "1"],
    "img2img": ["A", "a fox", "--count", "1"],
    "upscale": ["A"],
    "complete": ["A", "a fox", "--count", "1"],
}
PICTURES = {
    "sample": 1,
    "vary": 2,
    "interpolate": 4,
    "mix": 2,
    "edit": 3,
    "inpaint": 3,
    "img2img": 2,
    "complete": 2,
}
OTHERS = ("evaluate samples", "doctor", "serve", "convert", "bundle")
VERBS = (*DRAWS, *OTHERS)
# What the system says of a verb that it does not have.
NO_EMBEDDING = "has no image embedding to edit"
REFUSED = {
    "vary": NO_EMBEDDING,
    "interpolate": NO_EMBEDDING,
    "mix": NO_EMBEDDING,
    "edit": "cannot change a picture by its caption",
    "reconstruct": "cannot draw a picture from its latents",
    "inpaint": "cannot draw a part of a picture anew",
    "img2img": "cannot draw from a picture",
    "upscale": "cannot enlarge pictures",
    "complete": "cannot complete a picture from its upper rows",
}
EMBEDS = ("vary", "interpolate", "mix")
EDITS = ("edit", "reconstruct", "inpaint", "img2img")
LACKS = {
    "unclip": ("complete",),
    "latent": (*EMBEDS, "complete"),
    "retrieval": (*EMBEDS, *EDITS, "upscale", "complete"),
    "stable_unclip": ("upscale", "complete"),
    "imagen": (*EMBEDS, "edit", "reconstruct", "inpaint", "complete"),
    "glide": (*EMBEDS, "edit", "reconstruct", "complete"),
    "kandinsky": ("upscale", "complete"),
    "dalle": (*EMBEDS, *EDITS, "upscale"),
    "dalle_mini": (*EMBEDS, *EDITS, "upscale"),
    "vqvae2": (*EMBEDS, *EDITS, "upscale", "complete"),
}
PAIRS = [(system, verb) for system in SYSTEMS for verb in VERBS]
WORKS = [pair for pair in PAIRS if pair[1] not in LACKS[pair[0]]]

MODEL = {"latent_channels": 4, "context_dim": 8, "levels": 3}
SEEN = {"latent": {}, "stable_unclip": {"augmentation": {}, "frozen": {"text": ""}}, "kandinsky": {}}
NEEDS = {
    "unclip": {"clip", "prior_diffusion", "decoder"},
    "latent": {"clip", "latent", "autoencoder"},
    "retrieval": {"clip", "retrieval", "autoencoder"},
    "stable_unclip": {"clip", "latent", "autoencoder", "text"},
    "imagen": {"t5", "imagen"},
    "glide": {"glide"},
    "kandinsky": {"clip", "prior_diffusion", "latent", "autoencoder"},
    "dalle": {"dalle", "dvae"},
    "dalle_mini": {"dalle_mini", "autoencoder"},
    "vqvae2": {"vqvae", "pixelsnail_0", "pixelsnail_1", "pixelsnail_2"},
}


def parts_of(system):
    """Parts without weights, of the names that runs of a system have."""
    kinds = {"latent": "kandinsky" if system == "kandinsky" else "latent"}
    more = SEEN.get(system, {})
    return {name: Part({"kind": kinds.get(name, name), "model": MODEL} | more, {}) for name in NEEDS[system]}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_system_of_runs(system):
    """The part that draws, or its twin, says the system, and the system what else must be there."""
    parts, draws = parts_of(system), SYSTEMS[system].draws
    name, needs = system_of_runs(parts)
    assert (name, set(needs)) == (system, NEEDS[system])
    alone = system_of_runs({f"{draws}_other": parts[draws]})
    assert alone[0] == system and draws in alone[1]
    assert system_of_runs(parts | {"decoder": Part({"kind": "decoder"}, {})})[0] == "unclip"


def test_runs_of_two_systems():
    assert system_of_runs({"clip": Part({"kind": "clip"}, {})}) == ("unclip", ("clip",))
    assert "decoder" in system_of_runs({"prior_diffusion": Part({"kind": "prior_diffusion"}, {})})[1]
    both = parts_of("latent") | parts_of("glide")
    with pytest.raises(InputError, match="of 2 systems, latent and glide"):
        system_of_runs(both)


# ------------------------------------------------------------------------------------------ the walk
@pytest.fixture(scope="session")
def box():
    """The folder of a bundle of each system, of a judge, and of pictures. All workers share it."""
    folder = Path(os.environ["UNCLIP_CACHE"]) / "systems"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "MASK.png").exists():
            save_systems(folder)
            rng = np.random.default_rng(0)
            for name in "AB":
                picture = rng.integers(0, 256, (20, 18, 3), np.uint8)
                Image.fromarray(picture).save(folder / f"{name}.png")
            mask = np.zeros((20, 18), np.uint8)
            mask[:, 9:] = 255
            Image.fromarray(mask).save(folder / "MASK.png")
    return folder


def run(argv):
    """The command in this process: its exit status, and its lines on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in argv])
    return status, out.getvalue().splitlines(), err.getvalue().splitlines()


def command(box, system, verb, out):
    """The words of a verb with a system's bundle, which writes to `out`."""
    bundle = box / ("enlarging" if (system, verb) == ("latent", "upscale") else system)
    if verb in DRAWS:
        words = [box / f"{word}.png" if word in ("A", "B", "MASK") else word for word in DRAWS[verb]]
        return [verb, *words, "--bundle", bundle, "--out", out]
    if verb == "evaluate samples":
        return ["evaluate", "samples", "--bundle", bundle, "--rows", "2", "--judge", box / "judge"]
    if verb == "doctor":
        return ["doctor", bundle, "--rows", "16", "--drawn", "2", "--json", out]
    if verb == "bundle":
        return ["bundle", out.parent / "runs", "--base", bundle, "--rows", "0", "--out", out]
    return [verb, bundle, "--out", out]


@pytest.mark.parametrize("system, verb", [pair for pair in PAIRS if pair not in WORKS])
def test_refused(box, tmp_path, system, verb):
    """In one line, which names the system, and nothing is written."""
    status, _, err = run(command(box, system, verb, tmp_path / "out.png"))
    assert status == 1 and not list(tmp_path.iterdir())
    (line,) = err
    assert re.search(f"the system {system}\\b.* ?{REFUSED[verb]}", line)


@pytest.mark.parametrize("system", SYSTEMS)
def test_convert(box, tmp_path, system):
    status, out, _ = run(command(box, system, "convert", tmp_path / "out"))
    assert status == 0 and "MiB" in out[-1]
    made, given = load_bundle(tmp_path / "out"), load_bundle(box / system)
    assert made.system == system and set(made.parts) == set(given.parts)
    assert made.sampling == given.sampling


@pytest.mark.parametrize("system", SYSTEMS)
def test_bundle(box, tmp_path, system):
    """The run of the part that draws takes the place of that part."""
    given, name = load_bundle(box / system), SYSTEMS[system].draws
    meta = {"name": name, "part": given.parts[name].config, "sampling": given.sampling[name]}
    store = CheckpointStore(tmp_path / "runs" / name)
    with contextlib.closing(store):
        store.write(3, {"ema_params": given.parts[name].params}, meta | {"config": {}, "provenance": {}})
    status, _, err = run(command(box, system, "bundle", tmp_path / "out"))
    assert status == 0, err
    made = load_bundle(tmp_path / "out")
    assert made.system == system and made.provenance["training"][name]["step"] == 3
    assert set(made.parts) == set(given.parts)


@pytest.mark.slow
@pytest.mark.parametrize("system, verb", [pair for pair in WORKS if pair[1] in DRAWS])
def test_draws(box, tmp_path, system, verb):
    """The picture has a cell for each picture that was asked for, or the enlarged size."""
    status, _, err = run(command(box, system, verb, tmp_path / "out.png"))
    assert status == 0, err
    picture = Image.open(tmp_path / "out.png")
    if verb == "upscale":
        assert picture.size == (36, 40)
    elif verb in PICTURES:
        assert picture.width == 8 + 168 * PICTURES[verb] and picture.height > 160
    assert np.asarray(picture).std() > 1


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_doctor(box, tmp_path, system):
    """Random networks have faults; what counts is that every part is in the report."""
    status, out, err = run(command(box, system, "doctor", tmp_path / "out.json"))
    assert status in (0, 1) and not any("error" in line for line in err), err
    assert (tmp_path / "out.json").stat().st_size > 100 and out


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_evaluate_samples(box, tmp_path, system):
    status, out, err = run(command(box, system, "evaluate samples", tmp_path))
    assert status == 0, err
    assert sum(line.startswith(("train", "compose", "val")) for line in out) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_serve(box, system):
    """A picture of the bundle's size comes back; the model says what it can do."""
    import httpx2 as httpx

    from unclip_jax.serve.app import create_app
    from unclip_jax.serve.models import load_models
    from unclip_jax.serve.settings import Settings

    models = load_models([str(box / system)])
    app = create_app(Settings(compile=("generations",), batch=1), models)

    async def ask():
        transport = httpx.ASGITransport(app=app)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=200)
        async with app.router.lifespan_context(app), client:
            known = await client.get("/v1/models")
            prompt = {"prompt": "a fox", "response_format": "b64_json", "seed": 1}
            return known.json()["data"][0], await client.post("/v1/images/generations", json=prompt)

    known, answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    size = SYSTEMS[system].sizes(models.first.sampler.bundle)[-1]
    assert answer.json()["size"] == f"{size}x{size}" and known["system"] == system
    assert ("edits" in known["verbs"]) == ("inpaint" not in LACKS[system])
    assert ("variations" in known["verbs"]) == ("vary" not in LACKS[system])


# ------------------------------------------------------------------------------------------ the guide
def test_the_table_of_the_guide():
    """docs/family.md says of every system and verb what this table says."""
    lines = (ROOT / "docs" / "family.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| system | `sample`"))
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    verbs = [verb.strip("`") for verb in cells(lines[start])[1:]]
    assert verbs == list(VERBS)
    rows = {
        cells(line)[0].strip("`"): cells(line)[1:] for line in lines[start + 2 : start + 2 + len(SYSTEMS)]
    }
    assert list(rows) == list(SYSTEMS)
    said = {(system, verb) for system, row in rows.items() for verb, cell in zip(verbs, row) if cell}
    assert said == set(WORKS)
