"""`launch/demo` starts a server that `unclip serve` accepts, wherever it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unclip_jax.cli.main import build_parser
from unclip_jax.serve.settings import Settings

DEMO = Path(__file__).resolve().parents[2] / "launch" / "demo"
COLAB = f"import runpy, sys; sys.modules['google.colab'] = sys; sys.argv[1:] = ['--show']; \
runpy.run_path({str(DEMO)!r}, run_name='__main__')"


@pytest.mark.parametrize(
    "call, variables, host, port, origins",
    [
        ([str(DEMO), "--show", "--batch", "2"], {}, "127.0.0.1", 8000, []),
        (
            [str(DEMO), "--show"],
            {"SPACE_ID": "me/unclip", "SPACE_HOST": "me-unclip.hf.space"},
            "0.0.0.0",
            7860,
            ["https://huggingface.co", "https://me-unclip.hf.space"],
        ),
        (["-c", COLAB], {}, "0.0.0.0", 8000, ["*"]),
    ],
)
def test_command(call, variables, host, port, origins):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPACE_")}
    made = subprocess.run(
        [sys.executable, *call], capture_output=True, text=True, check=True, env=environment | variables
    )
    python, *rest = made.stdout.split()
    assert python == sys.executable and rest[:2] == ["-m", "unclip_jax.cli.main"]
    args = build_parser().parse_args(rest[2:])
    assert (args.host, args.port, args.cors) == (host, port, origins)
    Settings(host=args.host, port=args.port, no_auth=args.no_auth, queue=args.queue).check()
