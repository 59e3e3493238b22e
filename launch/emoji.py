"""What launch/emoji runs: the stages of the emoji bundle in their order, within a limit of time.

Each call goes on where the last one stopped. Before it ends, it packs the runs into a few small files
(`--carry`), so that a call on another machine can go on from them (`checkpoint.carry`).
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unclip_jax.checkpoint import carry
from unclip_jax.checkpoint.store import folder
from unclip_jax.cli.options import parse_assignments
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.run.hosts import RESTART

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = {"decoder": {"eval": "compose"}, "prior": {"val": "val", "compose": "compose"}}
COMMAND = (sys.executable, "-m", "unclip_jax.cli.main")
RESERVE = 60  # seconds that a stage may take to save its state once it is asked to stop


class Stage(NamedTuple):
    """run: the run's folder. config: file and variant. embeddings: split of each source that is embedded."""

    run: str
    config: str
    embeddings: dict[str, str]
    init_from: str | None = None


def stages(variant: str) -> list[Stage]:
    """The stages in the order in which each finds what it needs."""
    named = lambda file, own="": f"{ROOT}/configs/emoji/{file}.py:{own or variant}".removesuffix(":")
    decoder = {"train": "train", **EVALUATIONS["decoder"]}
    prior = {"train": "train", **EVALUATIONS["prior"]}
    inpaint = [] if variant else [Stage("decoder_inpaint", named("decoder", "inpaint"), decoder, "decoder")]
    return [
        Stage("clip", named("clip"), {}),
        Stage("codec", named("codec"), {"train": "train"}),
        Stage("prior_diffusion", named("prior_diffusion"), prior),
        Stage("prior_ar", named("prior_ar"), prior),
        Stage("decoder", named("decoder"), decoder),
        *inpaint,
        Stage("upsampler_64", named("upsampler"), {}),
    ]


def settings_of(assignments: Sequence[str]) -> dict[str, dict[str, str]]:
    """The assignments "STAGE.KEY=VALUE" as {stage: {key: value}}."""
    chosen: dict[str, dict[str, str]] = {}
    for text in assignments:
        stage, dot, rest = text.partition(".")
        if not dot:
            raise InputError(f"--set {text} is not STAGE.KEY=VALUE")
        chosen.setdefault(stage, {}).update(parse_assignments([rest]))
    return chosen


def steps_done(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    found = folder(run)
    return max((int(p.name) for p in found.iterdir() if p.name.isdigit()), default=0) if found.is_dir() else 0


def train_command(stage: Stage, runs: Path, embeds: Path, clip: str | None, settings: dict) -> list[str]:
    """The arguments of `unclip train` for a stage."""
    command = ["train", stage.config, "--workdir", str(runs / stage.run), "--set", "data.backend=numpy"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    if clip is not None and stage.run not in ("clip", "upsampler_64"):
        command += ["--clip", clip]
    for name, split in stage.embeddings.items():
        command += ["--embeddings", f"{'' if name == 'train' else name + '='}{embeds / split}"]
    if stage.init_from is not None and not steps_done(runs / stage.run):
        command += ["--init-from", str(runs / stage.init_from)]
    return command


def unclip(arguments: list[str], deadline: float) -> bool:
    """Runs `unclip` until the deadline. Returns whether it finished; leaves the program when it failed."""
    process = subprocess.Popen([*COMMAND, *arguments])
    try:
        status = process.wait(max(deadline - time.time(), 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        if status in (RESTART, -signal.SIGTERM):
            return False
    if status:
        sys.exit(f"launch/emoji: unclip {arguments[0]} failed with status {status}")
    return True


def train(runs: Path, variant: str, clip: str | None, settings: dict, deadline: float) -> dict[str, int]:
    """Trains the stages until the deadline. Returns the steps of every stage's whole run."""
    chosen = [stage for stage in stages(variant) if clip is None or stage.run != "clip"]
    unknown = settings.keys() - {stage.run for stage in chosen}
    if unknown:
        known = ", ".join(stage.run for stage in chosen)
        raise InputError(f"--set names the stage {sorted(unknown)[0]!r}; there are {known}")
    steps = {}
    for stage in chosen:
        config = load_config(stage.config)
        for key, value in settings.get(stage.run, {}).items():
            override(config, key, value)
        steps[stage.run] = config.steps
    embeds = runs / "embeds"
    for stage in chosen:
        if steps_done(runs / stage.run) >= steps[stage.run]:
            continue
        for split in sorted(set(stage.embeddings.values())):
            source = ["--data", "name=emoji", "--data", f"split={split}", "--out", str(embeds / split)]
            made = (embeds / split / "manifest.json").exists()
            if not made and not unclip(
                ["embed", "--clip", clip or str(runs / "clip"), *source, "--states"], deadline
            ):
                return steps
        arguments = train_command(stage, runs, embeds, clip, settings.get(stage.run, {}))
        if not unclip(arguments, deadline):
            return steps
    return steps


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(prog="launch/emoji", description="Train the emoji bundle in calls.")
    parser.add_argument("--runs", default="runs/emoji", metavar="DIR", help="folder of the runs (runs/emoji)")
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="how long this call may take (9)"
    )
    parser.add_argument(
        "--carry", metavar="DIR", help="where the files to carry lie, and are written (nothing is carried)"
    )
    parser.add_argument("--variant", default="", metavar="V", help="quick or tiny (the shipped recipe)")
    parser.add_argument("--clip", metavar="BUNDLE", help="use the CLIP of this bundle and train none")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        dest="assignments",
        help="override a setting of a stage, e.g. decoder.steps=40000",
    )
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes - RESERVE
    if not deadline > time.time():
        sys.exit(f"launch/emoji: error: --minutes must be above {RESERVE / 60:g}, got {args.minutes:g}")
    runs = Path(args.runs).absolute()
    try:
        if args.carry is not None and Path(args.carry).is_dir():
            for name, step in carry.unpack(args.carry, runs).items():
                print(f"{name}: unpacked at step {step}", flush=True)
        steps = train(runs, args.variant, args.clip, settings_of(args.assignments), deadline)
        for name, whole in steps.items():
            print(f"{name}: {steps_done(runs / name)} of {whole} steps", flush=True)
        if args.carry is not None:
            for piece in carry.pack(runs, args.carry, steps):
                print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"launch/emoji: error: {error}")
    if all(steps_done(runs / name) >= whole for name, whole in steps.items()):
        base = f" --base {args.clip}" if args.clip else ""
        print(f"all stages are trained; next: unclip bundle {runs} --out {runs / 'bundle'}{base}")


if __name__ == "__main__":
    main()
