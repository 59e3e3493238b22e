"""launch/emoji: its commands are those of `unclip train`, and short calls train every stage."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unclip_jax.cli.main import build_parser
from unclip_jax.cli.train import load_config, override, use_embeddings
from unclip_jax.train import STAGES

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def emoji():
    spec = importlib.util.spec_from_file_location("launch_emoji", ROOT / "launch" / "emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["", "tiny", "quick"])
def test_commands_parse_and_their_settings_exist(emoji, variant, tmp_path):
    """Stages with a CLIP read embeddings; the decoder that inpaints starts from the other one."""
    for stage in emoji.stages(variant):
        command = emoji.train_command(stage, tmp_path, tmp_path / "e", "emoji", {"steps": "40"})
        args = build_parser().parse_args(command)
        config = load_config(args.config)
        for assignment in args.assignments:
            override(config, *assignment.split("=", 1))
        assert config.steps == 40 and config.stage in STAGES and config.data.backend == "numpy"
        if args.embeddings:
            use_embeddings(config, args.embeddings, keep_frozen=args.clip is not None)
        assert bool(args.embeddings) == bool(args.clip) == (stage.run not in ("clip", "upsampler_64"))
        assert (args.init_from is not None) == (stage.run == "decoder_inpaint")


def test_a_stage_that_does_not_finish_in_time_is_stopped(emoji, monkeypatch):
    """It gets SIGTERM at the deadline. A failure ends the program."""
    waits = ["-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(emoji, "COMMAND", [sys.executable])
    start = time.time()
    assert not emoji.unclip(waits, start + 0.5) and time.time() - start < 30
    assert emoji.unclip(["-c", "pass"], time.time() + 30)
    with pytest.raises(SystemExit, match="failed with status 3"):
        emoji.unclip(["-c", "raise SystemExit(3)"], time.time() + 30)


def test_bad_arguments_are_one_line(tmp_path):
    for arguments, words in (
        (["--minutes", "0.5"], "--minutes must be above 1, got 0.5"),
        (["--set", "steps=3"], "is not STAGE.KEY=VALUE"),
        (["--set", "dekoder.steps=3"], "names the stage 'dekoder'; there are clip, codec"),
    ):
        command = [sys.executable, f"{ROOT}/launch/emoji.py", "--runs", str(tmp_path / "r"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.returncode and len(lines) == 1 and words in lines[0], done.stderr
        assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_every_stage_in_calls_on_fresh_machines(tmp_path):
    """Each call starts with an empty folder of runs and the files that the last call left."""
    carried = tmp_path / "carried"
    for call in range(12):
        command = [str(ROOT / "launch" / "emoji"), "--runs", str(tmp_path / str(call)), "--variant", "tiny"]
        command += ["--carry", str(carried), "--minutes", "1.7"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        if "all stages are trained" in done.stdout:
            break
    assert "all stages are trained" in done.stdout and call > 0
    assert sum(piece.stat().st_size for piece in carried.iterdir()) < 60 * 2**20
