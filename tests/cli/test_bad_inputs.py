"""Every verb refuses bad inputs in one line, shows no traceback, and leaves nothing behind.

The rows are in `tests/cli/bad_inputs`. All run in this process, so a refusal must come before any real work.
"""

import contextlib
import io
import os
from importlib import import_module, util
from pathlib import Path

import pytest

from unclip_jax.cli.main import main

ALL = ("train", "weights", "data", "sampling", "figures", "kandinsky", "dalle_mini")
KINDS = [kind for kind in ALL if util.find_spec(f"tests.cli.bad_inputs.{kind}")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Returns a function, kind -> (the folder with its bad files, its rows), that makes each kind once."""
    made = {}

    def make(kind):
        if kind not in made:
            box = tmp_path_factory.mktemp(kind)
            made[kind] = box, import_module(f"tests.cli.bad_inputs.{kind}").rows(box)
        return made[kind]

    return make


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of everything below a folder; links are not followed."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            there = os.lstat(path := f"{root}/{name}")
            found[path] = there.st_size, there.st_mtime_ns
    return found


def run(argv: list[str]) -> tuple[int, str]:
    """Runs the command in this process: its exit status, and what it wrote to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(argv)
        except SystemExit as left:
            status = left.code
    return status, err.getvalue()


def fault(status: int, err: str, says: str, before: dict, after: dict) -> str | None:
    """What is wrong with the end of a command that got a bad input; None if nothing is."""
    if status == 0:
        return "exit status 0"
    if "Traceback" in err:
        return f"a traceback: {err.strip().splitlines()[-2]}"
    if len(err.splitlines()) != 1:
        return f"{len(err.splitlines())} lines: {err!r}"
    if says not in err:
        return f"says {err!r}, not {says!r}"
    if before != after:
        return f"left or changed {sorted(set(before.items()) ^ set(after.items()))}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs_are_refused_in_one_line(kind, table, monkeypatch):
    monkeypatch.delenv("UNCLIP_DEBUG", raising=False)
    box, rows = table(kind)
    monkeypatch.chdir(box)
    faults, before = [], files(box)
    for row in rows:
        status, err = run(row.argv)
        after = files(box)
        wrong, before = fault(status, err, row.says, before, after), after
        if wrong is not None:
            faults.append(f"{row.name}: unclip {' '.join(row.argv)}: {wrong}")
    assert not faults, "\n" + "\n".join(faults)


def test_there_are_many_and_no_two_are_the_same(table):
    rows = [(kind, row) for kind in KINDS for row in table(kind)[1]]
    assert (
        len({(kind, row.name) for kind, row in rows})
        == len({tuple(row.argv) for _, row in rows})
        == len(rows)
    )
    assert len(rows) >= 200
