"""`unclip train CONFIG --workdir DIR`: trains one stage, or resumes its training."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax.errors import InputError, input_errors
from unclip_jax.paths import absolute, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments to its parser."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a configuration file, optionally with :VARIANT, e.g. configs/emoji/clip.py:quick",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="the run's folder; resumes a run that is already there",
    )
    parser.add_argument(
        "--init-from",
        metavar="BUNDLE",
        help="start from the weights of a bundle or a run instead of random ones",
    )
    parser.add_argument(
        "--clip", metavar="DIR", help="the frozen CLIP: a bundle or a run (the configuration's, ../clip)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="override a setting, e.g. optimizer.learning_rate=3e-4",
    )
    parser.add_argument(
        "--embeddings",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="train on the output of `unclip embed`, not on pictures (the decoder: on both); with NAME, use "
        "it for that evaluation. No CLIP is needed if every source has embeddings",
    )
    parser.add_argument(
        "--profile", metavar="A:B", help="profile the steps from A to B of this process, into WORKDIR/profile"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="join the other hosts first (cloud TPU pods, SLURM)"
    )


def load_config(spec: str):
    """Runs `get_config(variant)` of "path.py:variant" and returns its ConfigDict.

    Raises:
      FileNotFoundError, ValueError: with a message of one line.
    """
    from ml_collections import ConfigDict

    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    module_spec = importlib.util.spec_from_file_location("unclip_config", path)
    if module_spec is None:
        raise InputError(f"{path} is not a Python configuration file")
    module = importlib.util.module_from_spec(module_spec)
    with input_errors(path, Exception):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config function")
    with input_errors(path, Exception):
        config = module.get_config(variant)
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    return config


def override(config, key: str, value: Any) -> None:
    """Sets an existing dotted key to a value of its type. A float or text setting also accepts an int.

    Raises:
      ValueError: if the key is unknown (the message names the nearest known one), or the type is wrong.
    """
    *parents, last = key.split(".")
    node = config
    for name in [*parents, last]:
        if not hasattr(node, "keys") or name not in node:
            known = sorted(node.keys()) if hasattr(node, "keys") else []
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"unknown setting {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}")
            )
        parent, node = node, node[name]
    if hasattr(node, "keys"):
        raise InputError(f"setting {key!r} is a group; set one of {', '.join(sorted(node.keys()))}")
    if isinstance(node, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(node, str) and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if node is not None and value is not None and type(node) is not type(value):
        raise InputError(f"setting {key!r} is a {type(node).__name__}, got {value!r}")
    with config.unlocked():
        parent[last] = value


def use_embeddings(config, folders: Sequence[str], keep_clip: bool) -> None:
    """Lets a stage read folders of embeddings: in place of its pictures, or beside them for the decoder.

    If every source has embeddings, the training source's folder also replaces the CLIP.

    Args:
      config: the configuration to change.
      folders: "DIR" is for the training source; "NAME=DIR" for the evaluation NAME. The name of a single
        evaluation is `eval`.
      keep_clip: never replace the CLIP.

    Raises:
      ValueError: if the stage reads no embeddings, or the configuration has no evaluation NAME.
    """
    from unclip_jax.run.frozen import BESIDE_PICTURES, EMBEDDABLE

    if config.stage not in EMBEDDABLE + BESIDE_PICTURES:
        readers = ", ".join(EMBEDDABLE + BESIDE_PICTURES)
        raise InputError(f"the {config.stage} stage reads no embeddings; these stages do: {readers}")
    evaluations = config.data.get("eval", {})
    single = isinstance(evaluations.get("name"), str)
    groups = {"train": config.data} | (
        {"eval": config.data} if single else {name: evaluations for name in evaluations}
    )
    with config.unlocked():
        for item in folders:
            name, equals, folder = item.rpartition("=")
            key = name if equals else "train"
            if key not in groups or (equals and key == "train"):
                known = ", ".join(name for name in groups if name != "train") or "none"
                raise InputError(f"--embeddings {item}: there is no evaluation {name!r}; there are {known}")
            if config.stage in BESIDE_PICTURES:
                groups[key][key].embeddings = absolute(folder)
                continue
            # A ConfigDict merges an assigned dict into the old value; delete that to replace all of it.
            del groups[key][key]
            groups[key][key] = {"name": "embeddings", "path": absolute(folder)}
        read = [groups[key][key] for key in groups]
        places = [
            source.path if source.name == "embeddings" else source.get("embeddings") for source in read
        ]
        if not keep_clip and all(places):
            config.frozen.clip = places[0]


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import join_hosts, parse_assignments, use_compilation_cache

    config = load_config(args.config)
    assignments = parse_assignments(args.assignments)
    if args.clip is not None:
        if "clip" not in config.frozen:
            raise InputError(f"the {config.stage} stage has no frozen CLIP; leave out --clip")
        # A relative path on the command line is relative to the current folder.
        assignments["frozen.clip"] = absolute(args.clip) if user_path(args.clip).exists() else args.clip
    if args.embeddings:
        use_embeddings(config, args.embeddings, keep_clip="frozen.clip" in assignments)
    if args.profile is not None:
        assignments["profile"] = args.profile
    for key, value in assignments.items():
        override(config, key, value)
    if args.distributed:
        join_hosts()
    use_compilation_cache()
    from unclip_jax.train import STAGES

    if config.stage not in STAGES:
        raise InputError(f"unknown stage {config.stage!r}; choose one of {', '.join(STAGES)}")
    STAGES[config.stage].train_and_evaluate(config, args.workdir, args.init_from)
