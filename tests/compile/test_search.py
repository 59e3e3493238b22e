"""A grid of compiled steps: which rows are on the front, what is kept on disk, and the command."""

from pathlib import Path

import jax
import pytest

from unclip_jax.cli.main import main
from unclip_jax.compile import search, step
from unclip_jax.errors import InputError, MemoryNeededError
from unclip_jax.run.hardware import Chip

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/dalle2/upsampler_256.py:tiny")


def row(memory, seconds, batch=8, fits=True):
    return search.Row({"batch_size": str(batch)}, batch, memory, seconds, "memory", 0.5, fits)


def test_the_front():
    """A row leaves it when another needs no more memory and no more time an example, and fits."""
    rows = [row(10, 2.0), row(5, 3.0), row(10, 3.0), row(7, 2.0), row(1, 1.0, fits=False), row(5, 3.0)]
    assert search.front(rows) == [1, 3]
    assert search.front([row(10, 2.0), row(10, 3.0, batch=16)]) == [1]  # twice the rows in less than twice
    assert search.front([row(1, 1.0, fits=False)]) == []


def test_chip_hours_and_price():
    """3,600 steps of 8 rows see 28,800 examples; a step of 2 s on 4 chips needs 8 chip-hours for them."""
    assert search.chip_hours(row(1, 2.0), devices=4, examples=28_800) == pytest.approx(8.0)
    lines = search.table([row(2**30, 2.0), row(2**31, 1.0, fits=False)], 4, 28_800, price=2.5).splitlines()
    assert lines[1].startswith("* batch_size=8") and lines[1].split()[-2:] == ["8", "20"]
    assert lines[2].endswith("it does not fit: 2.00 GiB a device")


def test_the_usual_grid():
    grid = search.usual_grid(16, 256)
    assert grid == {
        "mesh.fsdp": ["4", "8", "16"],
        "remat": ["none", "full"],
        "batch_size": ["128", "256", "512"],
    }
    assert len(search.combinations(grid)) == 18
    assert search.usual_grid(1, 1)["mesh.fsdp"] == ["1"] and "0" not in search.usual_grid(1, 1)["batch_size"]


def test_what_cannot_be_compiled_says_why():
    def fails():
        raise MemoryNeededError("the step needs 20G of 16G memory on a device")

    found = search.measure({"remat": "none"}, 8, fails)
    assert not found.fits and "20G of 16G" in found.reason and search.front([found]) == []


def test_rows_on_disk(tmp_path):
    """Rows come back; one that was cut off is left out and written over; another file is left as it is."""
    path, rows = tmp_path / "rows.jsonl", [row(1, 1.0), row(2, 0.5)]
    for key, made in zip("ab", rows):
        search.append_row(path, key, made)
    whole = path.read_bytes()
    assert search.read_rows(path) == dict(zip("ab", rows))
    path.write_bytes(whole[:-9])
    assert search.read_rows(path) == {"a": rows[0]}
    search.append_row(path, "b", rows[1])
    assert path.read_bytes() == whole
    for text in ("a letter", '{"key": "a", "memory": 1}\n', "[1]\n", whole.decode()[:-9] + "\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="not a row"):
            search.read_rows(path)
        assert path.read_text() == text


def test_the_command(capsys, monkeypatch, tmp_path):
    """Every combination is compiled once, and a second run reads the rows. What does not divide says so."""
    kind, rows = jax.devices()[0].device_kind, str(tmp_path / "rows.jsonl")
    monkeypatch.setitem(step.CHIPS, kind, Chip("test", 1e12, 2**30, 1e11, 1e11))
    compiled, original = [], step.compile_step
    monkeypatch.setattr(step, "compile_step", lambda *a: compiled.append(1) or original(*a))
    command = ["compile", CONFIG, "--topology", "cpu:8", "--set", "model.unet.channel_mult=(1,)"]
    command += ["--price", "1000000", "--rows", rows, "--search"]
    outputs = []
    for _ in range(2):
        assert main([*command, "batch_size=8,9"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and len(compiled) == 2
    head, fits, wrong = outputs[0].splitlines()
    assert head.endswith("price") and fits.startswith("* batch_size=8")
    assert wrong.strip().startswith("batch_size=9") and "does not divide over data x fsdp = 8" in wrong
    kept = {made.batch_size: made for made in search.read_rows(rows).values()}
    assert kept[8].fits and kept[8].seconds > 0 and kept[8].memory > 0 and not kept[9].fits
    assert main([*command, "batch_size=9"]) == 1
    assert "none of them fits" in capsys.readouterr().err and len(compiled) == 2
