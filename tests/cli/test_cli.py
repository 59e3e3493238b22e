"""The `unclip` command: fast help, real work on tiny runs, and one line with a non-zero status on bad input."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override

ROOT = Path(__file__).resolve().parent.parent.parent


def unclip(*args, **env):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "unclip_jax.cli.main", *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )


def test_help_is_fast_and_light():
    """Under a second (the best of three), without TensorFlow, torch or jax."""
    code = (
        "import sys\nfrom unclip_jax.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'jax', 'tensorflow', 'torch', 'flax', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.splitlines()[-1] == "[]" and "--init-from" in out
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = unclip("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(verb in done.stdout for verb in ("train", "bundle", "sample"))
    assert min(times) < 1.0


def test_sample_draws_a_grid(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    args = ["a red fox", "a blue heart", "--bundle", str(tiny_bundle), "--out", str(out), "--seed", "3", "--samples", "2"]
    assert main(["sample", *args]) == 0
    assert str(out) in capsys.readouterr().out
    image = np.asarray(Image.open(out))
    assert image.ndim == 3 and image.std() > 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sample", "x", "--bundle", "nowhere"], "nowhere is not a bundle"),
        (["sample", "x", "--steps", "0"], "steps must be between 1 and"),
        (["sample", "x", "--samples", "0"], "--samples must be at least 1"),
        (["sample", "x", "--seed", "-1"], "--seed must be between"),
        (["sample", "x", "--set", "decoder"], "is not KEY=VALUE"),
        (["sample", "x", "--set", "steps=3"], "is not PART.OPTION"),
        (["sample", "x", "--out", "."], "is a folder"),
        (["train", "nowhere.py", "--workdir", "w"], "no configuration file nowhere.py"),
        (["train", "configs/emoji/clip.py:huge", "--workdir", "w"], "unknown variant 'huge'"),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "stepz=3"], "did you mean 'steps'"),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "steps=many"], "is a int, got 'many'"),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--clip", "emoji"], "no frozen CLIP"),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "mesh.data=3"], "does not fit 8 devices"),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "data.train.split=tset"], "unknown split 'tset'"),
        (["bundle", "nowhere", "--out", "b"], "has no run of clip, prior, decoder"),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [str(ROOT / a) if a.startswith("configs/") else a for a in args]
    assert main(args) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert list(tmp_path.rglob("*.png")) == [] and not (tmp_path / "b").exists()


def test_a_wrong_command_line_is_status_2():
    done = unclip("sample")
    assert done.returncode == 2 and "CAPTION" in done.stderr


def test_config_overrides():
    config = load_config(str(ROOT / "configs/emoji/decoder.py:tiny"))
    override(config, "optimizer.learning_rate", 1)
    assert config.optimizer.learning_rate == 1.0
    with pytest.raises(ValueError, match="is a group"):
        override(config, "optimizer", 3)
    with pytest.raises(AttributeError, match="locked"):
        config.unknown = 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_has_its_variants(path):
    """Each configuration has a full and a :tiny variant of the same keys, and its docstring gives the command."""
    full, tiny = load_config(str(path)), load_config(f"{path}:tiny")
    assert full.stage == tiny.stage and set(full.to_dict()) == set(tiny.to_dict())
    assert tiny.steps < full.steps
    assert f"unclip train configs/{path.relative_to(ROOT / 'configs')}" in path.read_text()
