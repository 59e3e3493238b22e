"""The `unclip` command: fast help, verbs on tiny runs, and errors of one line with a non-zero status."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.cli import options
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override

ROOT = Path(__file__).resolve().parent.parent.parent


def unclip(*args, **env):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "unclip_jax.cli.main", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def test_help_is_fast_and_light():
    """The help takes less than a second (the best of three), and imports no TensorFlow, torch or JAX."""
    code = (
        "import sys\nfrom unclip_jax.cli.main import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'jax', 'tensorflow', 'torch', 'flax', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
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
    args = [
        "a red fox",
        "a blue heart",
        "--bundle",
        str(tiny_bundle),
        "--out",
        str(out),
        "--seed",
        "3",
        "--samples",
        "2",
    ]
    assert main(["sample", *args]) == 0
    assert str(out) in capsys.readouterr().out
    image = np.asarray(Image.open(out))
    assert image.ndim == 3 and image.std() > 10


def test_sample_writes_a_folder_for_a_benchmark(tiny_bundle, tmp_path, capsys):
    """The folder is whole after the second command too, which draws nothing."""
    (tmp_path / "p.txt").write_text("a red fox\na blue heart\n")
    args = ["sample", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"), "--steps", "2"]
    args += ["--bundle", str(tiny_bundle), "--prior", "null", "--layout", "folder", "--samples", "2"]
    for kept in (0, 2):
        assert main(args) == 0
        assert f"2 prompts in the layout of folder, {kept} of them drawn before" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert main([*args, "--guidance", "3"]) == 1
    assert "holds samples of other prompts, weights or options" in capsys.readouterr().err


def test_measure(tiny_bundle, tiny_judge, tmp_path, capsys):
    """A table for a prior, and a picture of the pairs; the judge must be another CLIP."""
    args = ["evaluate", "samples", "--bundle", str(tiny_bundle), "--rows", "2", "--prior", "null"]
    assert main([*args, "--judge", str(tiny_judge), "--pairs", str(tmp_path / "pairs.png")]) == 0
    out = capsys.readouterr().out
    assert "prior null, first 2 captions" in out and out.count("own caption first of 2  ") == 3
    assert Image.open(tmp_path / "pairs.png").width > 600
    assert main([*args, "--judge", str(tiny_bundle)]) == 1
    assert "holds the CLIP that guides the samples" in capsys.readouterr().err


def test_sample_compares_priors_and_scales(tiny_bundle, tmp_path, capsys):
    """A row for each combination."""
    out = tmp_path / "grid.png"
    args = ["a red fox", "a blue heart", "--bundle", str(tiny_bundle), "--out", str(out), "--steps", "2"]
    assert (
        main(["sample", *args, "--prior", "prior_ar,null", "--guidance", "1.5,3", "--prior-guidance", "2"])
        == 0
    )
    height, width = np.asarray(Image.open(out)).shape[:2]
    assert (height, width) == (8 + 4 * 206, 8 + 2 * 168)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sample", "x", "--bundle", "nowhere"], "nowhere is not a bundle"),
        (["sample", "x", "--steps", "0"], "steps must be between 1 and"),
        (["evaluate", "samples", "--rows", "1"], "--rows must be between 2 and"),
        (["evaluate", "samples", "--prior", "prior_diffusion,gan"], "unknown prior 'gan'"),
        (["sample", "x", "--guidance", "much"], "--guidance must be a finite number"),
        (["sample", "x", "--prior", "gan"], "unknown prior 'gan'"),
        (["sample", "x", "--samples", "0"], "--samples must be between 1 and"),
        (["sample", "x", "--seed", "-1"], "--seed must be between"),
        (["sample", "x", "--set", "decoder"], "is not KEY=VALUE"),
        (["sample", "x", "--set", "steps=3"], "is not PART.OPTION"),
        (["sample", "x", "--out", "."], "is a folder"),
        (["train", "nowhere.py", "--workdir", "w"], "no configuration file nowhere.py"),
        (["train", "configs/emoji/clip.py:huge", "--workdir", "w"], "unknown variant 'huge'"),
        (
            ["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "stepz=3"],
            "did you mean 'steps'",
        ),
        (
            ["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "steps=many"],
            "steps must be a whole number, got 'many'",
        ),
        (["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--clip", "emoji"], "no frozen CLIP"),
        (
            ["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "mesh.data=3"],
            "does not fit 8 devices",
        ),
        (
            ["train", "configs/emoji/clip.py:tiny", "--workdir", "w", "--set", "data.train.split=tset"],
            "unknown split 'tset'",
        ),
        (
            ["bundle", "nowhere", "--out", "b"],
            "nowhere has no run; train clip, prior_diffusion and decoder first",
        ),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [str(ROOT / a) if a.startswith("configs/") else a for a in args]
    assert main(args) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert list(tmp_path.rglob("*.png")) == [] and not (tmp_path / "b").exists()


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures, a mask of the first one's size, and a file that is not a picture."""
    rng = np.random.default_rng(0)
    for name, size in (("a", 24), ("b", 30), ("mask", 24)):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "cells"),
    [
        (["vary", "a.png", "--count", "2"], 3),
        (["vary", "a.png", "--count", "2", "--fresh"], 3),
        (["interpolate", "a.png", "b.png", "--count", "2"], 4),
        (["edit", "a.png", "--to", "a blue heart", "--count", "2"], 3),
        (["inpaint", "a.png", "mask.png", "a red fox", "--count", "1"], 3),
        (
            [
                "inpaint",
                "a.png",
                "mask.png",
                "a red fox",
                "--count",
                "1",
                "--method",
                "resample",
                "--resamples",
                "1",
            ],
            3,
        ),
        (["reconstruct", "a.png", "--dims", "3", "16"], 3),
    ],
)
def test_verbs_that_start_from_a_picture(args, cells, tiny_bundle, pictures, monkeypatch, capsys):
    """Each draws a labelled grid of the expected number of cells."""
    monkeypatch.chdir(pictures)
    assert main([*args, "--bundle", str(tiny_bundle), "--steps", "2", "--out", "new/grid.png"]) == 0
    assert "new/grid.png" in capsys.readouterr().out
    image = np.asarray(Image.open("new/grid.png"))
    assert image.shape[1] == 8 + cells * 168 and image.std() > 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["vary", "nowhere.png"], "no picture nowhere.png"),
        (["vary", "text.png"], "text.png: cannot decode image"),
        (["vary", "a.png", "--steps", "0"], "steps must be between 1 and 1000, got 0"),
        (["vary", "a.png", "--steps", "fast28"], "'fast28'"),
        (["vary", "a.png", "--eta", "2"], "eta must be in"),
        (["vary", "a.png", "--count", "0"], "--count must be between 1 and 10000, got 0"),
        (["vary", "a.png", "--out", "."], "is a folder"),
        (["vary", "a.png", "--bundle", "nowhere"], "nowhere is not a bundle"),
        (["interpolate", "a.png", "text.png"], "text.png: cannot decode image"),
        (["edit", "a.png", "--to", ""], "same to CLIP"),
        (["edit", "a.png", "--to", "x", "--theta", "0"], "max_theta must be in"),
        (["reconstruct", "a.png", "--dims", "17"], "between 1 and 16, got 17"),
        (["inpaint", "a.png", "b.png", "x"], "b.png is 30x30, but a.png is 24x24"),
        (["inpaint", "a.png", "mask.png", "x", "--resamples", "0"], "resamples must be between 1 and 1000"),
    ],
)
def test_bad_pictures_are_one_line(args, message, tiny_bundle, pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    assert main([*args, *([] if "--bundle" in args else ["--bundle", str(tiny_bundle)])]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (pictures / "grid.png").exists()


def test_a_missing_part_is_named(tiny_bundle, pictures, monkeypatch, capsys):
    """`vary` needs a decoder; the autoregressive prior and `reconstruct` need a codec."""
    import unclip_jax

    monkeypatch.chdir(pictures)
    bundle = unclip_jax.load_bundle(tiny_bundle)
    for missing, args in (
        ("decoder", ["vary", "a.png"]),
        ("codec", ["sample", "x", "--prior", "prior_ar"]),
        ("codec", ["reconstruct", "a.png"]),
    ):
        parts = {name: part for name, part in bundle.parts.items() if name != missing}
        unclip_jax.save_bundle(dataclasses.replace(bundle, parts=parts), pictures / "less")
        assert main([*args, "--bundle", "less"]) == 1
        assert f"has no part '{missing}'; it has clip, " in capsys.readouterr().err


def test_a_wrong_command_line_is_status_2():
    done = unclip("vary")
    assert done.returncode == 2 and "IMAGE" in done.stderr


def test_config_overrides():
    config = load_config(str(ROOT / "configs/emoji/decoder.py:tiny"))
    override(config, "optimizer.learning_rate", 1)
    assert config.optimizer.learning_rate == 1.0
    with pytest.raises(ValueError, match="is a group"):
        override(config, "optimizer", 3)
    with pytest.raises(AttributeError, match="locked"):
        config.unknown = 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "configs"))
)
def test_every_config_has_its_variants(path):
    """Full and :tiny variants of a configuration have the same keys; its docstring gives the command."""
    full, tiny = load_config(str(path)), load_config(f"{path}:tiny")
    assert full.stage == tiny.stage and set(full.to_dict()) == set(tiny.to_dict())
    assert tiny.steps < full.steps
    assert f"unclip train configs/{path.relative_to(ROOT / 'configs')}" in path.read_text()


def test_errors_of_a_program_are_not_another_hosts(monkeypatch, capsys):
    """On several hosts, XLA's errors about a program end the run with status 1.

    Its other errors mean a lost host, and the status asks for a restart.
    """
    from unclip_jax.cli import train
    from unclip_jax.run.hosts import RESTART

    class Left(BaseException):
        pass

    def leave(status):
        raise Left(status)

    monkeypatch.setattr("os._exit", leave)
    command = ["train", "configs/emoji/clip.py:tiny", "--workdir", "unused", "--distributed"]
    for message, status in (
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm", 1),
        ("UNAVAILABLE: socket closed", RESTART),
    ):
        monkeypatch.setattr(
            train, "run", lambda args, text=message: (_ for _ in ()).throw(RuntimeError(text))
        )
        try:
            left = main(command)
        except Left as end:
            (left,) = end.args
        assert left == status and message in capsys.readouterr().err


def test_progress_lines_say_the_remaining_time(monkeypatch, capsys):
    """Work that was done before the command began does not count as fast work."""
    clock = iter([0.0, 0.0, 30.0, 90.0, 100.0, 100.0])
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    show = options.progress_bar("features")
    for done in (60, 70, 100, 5):  # the last one begins a new pass
        show(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "features: 60/100",
        "features: 70/100, 01:30 left",
        "features: 100/100",
        "features: 5/100",
    ]
