"""What launch/quickstart runs once the environment stands."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = (
    "a 3d emoji of a red heart",
    "a 3d emoji of a blue heart",
    "a noto emoji of a fox",
    "a flat emoji of a green apple",
    "a 3d emoji of a smiling face with sunglasses",
    "a flat emoji of the sun",
    "a noto emoji of a rainbow",
    "a 3d emoji of an orange square",
    "a 3d emoji of a woman with dark skin tone",
    "a blob emoji of an angry face",
    "a 3d emoji of a pizza",
    "a flat emoji of a yellow circle",
)
STAGES = (
    ("clip", "clip"),
    ("prior_diffusion", "prior_diffusion"),
    ("codec", "codec"),
    ("prior_ar", "prior_ar"),
    ("decoder", "decoder"),
    ("upsampler", "upsampler_64"),
)


def train(runs: Path) -> None:
    """Trains all stages with their `:quick` configurations and bundles them. A stopped stage resumes."""
    from unclip_jax.cli.main import main

    for config, name in STAGES:
        status = main(["train", f"{ROOT}/configs/emoji/{config}.py:quick", "--workdir", str(runs / name)])
        if status:
            sys.exit(status)
    status = main(["bundle", str(runs), "--out", str(runs / "bundle")])
    if status:
        sys.exit(status)


def trained_for(made: Mapping) -> tuple[int, float]:
    """The images that a part saw in training and the seconds, with those of the runs that it started from."""
    images, seconds = made["step"] * made["config"]["batch_size"], made["seconds"]
    if "initialised_from" in made:
        before = trained_for(made["initialised_from"])
        return images + before[0], seconds + before[1]
    return images, seconds


def going_on(training: Mapping[str, Mapping]) -> list[str]:
    """What the full recipe of each stage takes, at the rate of `training` (a bundle's provenance)."""
    from unclip_jax.cli.train import load_config

    lines = [f"{'stage':16}{'images here':>12}{'full recipe':>12}{'time':>10}  command"]
    for config, name in STAGES:
        made, recipe = training[name], load_config(f"{ROOT}/configs/emoji/{config}.py")
        (seen, seconds), wanted = trained_for(made), recipe.steps * recipe.batch_size
        minutes = seconds * wanted / seen / 60
        command = f"unclip train configs/emoji/{config}.py --workdir runs/emoji/{name}"
        lines.append(f"{name:16}{seen:12,}{wanted:12,}{minutes:6.0f} min  {command}")
    return [*lines, "unclip bundle runs/emoji --out runs/emoji/bundle"]


def draw(bundles: dict[str, str], captions: list[str], out: Path) -> Mapping[str, Mapping]:
    """Samples the captions from each bundle into one grid and prints the bundles' figures.

    Returns:
      How the parts of the last bundle were trained.
    """
    import numpy as np

    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.cli.options import progress_bar, use_compilation_cache
    from unclip_jax.evaluate.samples import summarise
    from unclip_jax.grid import save_grid
    from unclip_jax.sampling.text_to_image import text_to_image

    use_compilation_cache()
    images, labels, reports = [], [], []
    for name, where in bundles.items():
        bundle = load_bundle(where)
        images.append(
            text_to_image(bundle, captions, seed=0, progress=progress_bar(f"sampling the {name} bundle"))
        )
        labels += [f"{name}: {caption}" if len(bundles) > 1 else caption for caption in captions]
        if "figures" in bundle.provenance:
            reports.append((name, summarise(bundle.provenance["figures"])))
    save_grid(
        out,
        np.concatenate(images),
        labels,
        columns=min(4, len(captions)) if len(bundles) == 1 else min(6, len(captions)),
    )
    for name, lines in reports:
        print(f"\nfigures of the {name} bundle\n  " + "\n  ".join(lines))
    print(f"\npicture: {out}")
    return bundle.provenance["training"]


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="launch/quickstart", description="Draw emoji from captions with the shipped bundle."
    )
    parser.add_argument(
        "captions", nargs="*", metavar="CAPTION", help="what to draw (default: a dozen examples)"
    )
    parser.add_argument(
        "--train", action="store_true", help="train all stages from nothing first, and draw both bundles"
    )
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    started = time.time()
    captions = args.captions or list(CAPTIONS)
    bundles, out = {"shipped": "emoji"}, Path.cwd() / "out" / "quickstart.png"
    if not args.captions:
        out = ROOT / "out" / "quickstart.png"
    if args.train:
        runs = ROOT / "runs" / "quickstart"
        train(runs)
        bundles["trained"] = str(runs / "bundle")
        out = out.with_name("quickstart_trained.png")
    try:
        training = draw(bundles, captions, out)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"launch/quickstart: error: {error}")
    print(f"took {time.time() - started:.0f} s after installation\n\nnext:")
    print(f'  {ROOT}/.venv/bin/unclip sample "a flat emoji of a fox" --samples 4 --out fox.png')
    if args.train:
        print("\nto train for longer, at the rate of this machine (CLIP's full recipe has a larger network):")
        print("  " + "\n  ".join(going_on(training)))
    else:
        print(f"  {ROOT}/launch/quickstart --train      trains all stages from nothing")
    print(f"  {ROOT}/.venv/bin/unclip train --help")


if __name__ == "__main__":
    main()
