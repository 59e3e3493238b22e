"""Folders of samples as the tools of other benchmarks read them.

| layout          | prompts                                     | files                                     |
|-----------------|---------------------------------------------|-------------------------------------------|
| `geneval`       | `evaluation_metadata.jsonl` of GenEval      | `00000/metadata.jsonl`,                   |
|                 |                                             | `00000/samples/0000.png`                  |
| `dpg`           | the folder of texts of DPG-Bench            | `NAME.png` for `NAME.txt`, 2 x 2 samples  |
| `t2i-compbench` | a text of T2I-CompBench, one prompt a line  | `samples/PROMPT_000000.png`               |
| `folder`        | captions, one a line, or a source           | `000000.png`, `000000.txt`: a source      |

Samples are drawn batch by batch. A file appears complete or not at all, and files that are there are kept, so
that the same call continues a stopped one. A file beside the folder, `OUT.plan.json`, says what draws them,
because a tool such as DPG-Bench's reads every file inside the folder.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.data.record import json_checksum
from unclip_jax.errors import InputError
from unclip_jax.evaluate.sets import Drawing, bundle_set, is_source, read_captions, read_lines
from unclip_jax.paths import store_errors, user_path, write_json, write_whole
from unclip_jax.run.hosts import leave_if_stopped, stop_signals
from unclip_jax.sampling.programs import Progress, Sampler

LONGEST_NAME = 255  # bytes of a file's name


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and where its samples go.

    text: what is drawn.
    files: the files of its samples, relative to the folder. One file with several samples is a grid.
    beside: texts to write as well, by file.
    """

    text: str
    files: tuple[str, ...]
    beside: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of the module's docstring.

    samples: number of samples of a prompt that the benchmark asks for.
    read: (prompts as the user names them, samples, reader of a source's arguments) -> the prompts.
    grid: whether the samples of a prompt form one picture.
    """

    samples: int
    read: Callable[[str, int, Callable], list[Prompt]]
    grid: bool = False


# ------------------------------------------------------------------------------------------ layouts
def _geneval(path: str, samples: int, source_options: Callable) -> list[Prompt]:
    prompts = []
    for i, line in enumerate(read_lines(path, "prompts")):
        try:
            metadata = json.loads(line)
        except ValueError:
            raise InputError(f"{path}: line {i + 1} is not JSON; GenEval's prompts are JSON lines") from None
        text = metadata.get("prompt") if isinstance(metadata, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}: line {i + 1} has no text 'prompt'")
        files = tuple(f"{i:05d}/samples/{j:04d}.png" for j in range(samples))
        prompts.append(Prompt(text, files, {f"{i:05d}/metadata.jsonl": json.dumps(metadata)}))
    return prompts


def _dpg(path: str, samples: int, source_options: Callable) -> list[Prompt]:
    if samples not in (1, 4):
        raise InputError(f"DPG-Bench reads 1 sample of a prompt, or a grid of 4, not {samples}")
    folder = user_path(path)
    with store_errors(path):
        if not folder.is_dir():
            raise InputError(f"{path} is no folder: DPG-Bench's prompts are a folder of texts")
        files = sorted(file for file in folder.iterdir() if file.name.endswith(".txt"))
    if not files:
        raise InputError(f"{path} has no texts (*.txt)")
    return [
        Prompt(" ".join(read_lines(os.fspath(file), "prompt")), (f"{file.name.removesuffix('.txt')}.png",))
        for file in files
    ]


def _t2i_compbench(path: str, samples: int, source_options: Callable) -> list[Prompt]:
    prompts = []
    for i, line in enumerate(read_lines(path, "prompts")):
        text = line.split("\t")[0].strip()
        files = tuple(f"samples/{text}_{i * samples + j:06d}.png" for j in range(samples))
        wrong = not text or any(letter in text for letter in "/_\0")
        if wrong or len(os.path.basename(files[0]).encode()) > LONGEST_NAME:
            raise InputError(
                f"{path}: line {i + 1} cannot be a file's name that T2I-CompBench reads: it is empty or too "
                "long, or has a / or a _"
            )
        prompts.append(Prompt(text, files))
    return prompts


def _folder(path: str, samples: int, source_options: Callable) -> list[Prompt]:
    if not is_source(path) and path.endswith(".jsonl"):
        texts = [prompt.text for prompt in _geneval(path, 1, source_options)]
    else:
        texts = read_captions(path, source_options)
    prompts = []
    for i, text in enumerate(texts):
        names = [f"{i * samples + j:06d}" for j in range(samples)]
        line = " ".join(text.split()) + "\n"
        prompts.append(Prompt(text, tuple(f"{n}.png" for n in names), {f"{n}.txt": line for n in names}))
    return prompts


LAYOUTS = {
    "geneval": Layout(4, _geneval),
    "dpg": Layout(4, _dpg, grid=True),
    "t2i-compbench": Layout(10, _t2i_compbench),
    "folder": Layout(1, _folder),
}


# ------------------------------------------------------------------------------------------ drawing
def read_prompts(
    layout: str, prompts: str, source_options: Callable[[list[str]], dict], samples: int | None = None
) -> list[Prompt]:
    """Reads the prompts of a layout.

    Args:
      layout: one of `LAYOUTS`.
      prompts: as the layout takes them: a file, a folder or a source.
      source_options: K=V texts -> the arguments of a source.
      samples: samples of a prompt; None means what the benchmark asks for.

    Raises:
      FileNotFoundError, ValueError: if there are none, or the benchmark could not read them.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout].read(prompts, samples or LAYOUTS[layout].samples, source_options)


def check_folder(out: str | os.PathLike, plan: dict | None = None) -> None:
    """Checks that a folder can take samples: it is empty or missing, or holds samples of the same plan.

    Args:
      out: the folder.
      plan: what draws; None if it is not known yet.

    Raises:
      ValueError: if it holds something else.
    """
    folder, file = user_path(out), _plan_file(out)
    with store_errors(out):
        there = folder.exists()
        if there and not folder.is_dir():
            raise InputError(f"{out} is a file; name a folder")
        begun = file.is_file()
        if there and not begun and any(True for _ in folder.iterdir()):
            raise InputError(f"{out} holds files that this command did not write; name another folder")
        if begun and plan is not None:
            try:
                before = json.loads(file.read_text())
            except ValueError:
                before = None
            if before != plan:
                raise InputError(
                    f"{out} holds samples of other prompts, weights or options ({file.name}); name another "
                    "folder"
                )


def _plan_file(out: str | os.PathLike) -> Any:
    return user_path(os.fspath(out).rstrip("/") + ".plan.json")


def draw_prompts(
    sampler: Sampler,
    layout: str,
    prompts: Sequence[Prompt],
    out: str | os.PathLike,
    drawing: Drawing,
    *,
    samples: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Draws all samples that are missing in a folder.

    Sample j of prompt i is drawn at position i * samples + j.

    Args:
      sampler: the bundle.
      layout: one of `LAYOUTS`.
      prompts: from `read_prompts`, with the same number of samples.
      out: the folder.
      drawing: how the bundle draws; its captions are not used.
      samples: as in `read_prompts`.
      progress: called with (prompts done, prompts in all).

    Returns:
      The number of pictures that were there already.

    Raises:
      ValueError: as `check_folder` and `sets.bundle_set`, before anything is drawn.
    """
    count, grid = samples or LAYOUTS[layout].samples, LAYOUTS[layout].grid
    captions = [prompt.text for prompt in prompts for _ in range(count)]
    images = bundle_set(sampler, dataclasses.replace(drawing, captions=captions))
    listed = [[prompt.text, prompt.files, prompt.beside] for prompt in prompts]
    plan = {"layout": layout, "samples": count, "prompts": json_checksum(listed), "drawn_by": images.checksum}
    check_folder(out, plan)
    write_json(_plan_file(out), plan)
    folder = user_path(out)
    with store_errors(out):
        missing = [i for i, p in enumerate(prompts) if not all((folder / file).is_file() for file in p.files)]
    ways = sampler.mesh.shape["data"] * sampler.mesh.shape["fsdp"]
    at_once, done = max(1, ways * 16 // count), len(prompts) - len(missing)
    with stop_signals() as stop:
        for first in range(0, len(missing), at_once):
            chosen = missing[first : first + at_once]
            rows = [i * count + j for i in chosen for j in range(count)]
            pixels = [picture.pixels for picture in images.load(rows)]
            for n, i in enumerate(chosen):
                _write(folder, prompts[i], pixels[n * count : (n + 1) * count], grid)
            if progress is not None:
                progress(done + first + len(chosen), len(prompts))
            if stop:
                break
    leave_if_stopped(stop)
    return done


def _write(folder: Any, prompt: Prompt, pixels: Sequence[np.ndarray], grid: bool) -> None:
    # The pictures come last: a prompt without them is drawn again.
    for file, text in prompt.beside.items():
        write_whole(folder / file, text)
    if grid and len(pixels) == 4:
        pixels = [np.concatenate([np.concatenate(pixels[:2], axis=1), np.concatenate(pixels[2:], axis=1)])]
    for file, image in zip(prompt.files, pixels, strict=True):
        if not (folder / file).is_file():
            data = io.BytesIO()
            Image.fromarray(image).save(data, format="PNG")
            write_whole(folder / file, data.getvalue())
