"""`unclip train CONFIG --workdir DIR`: trains one stage, or goes on where it stopped."""

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
    """Arguments of the verb."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a configuration file, with :VARIANT if wanted, e.g. configs/emoji/clip.py:quick",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's folder; a run found there is resumed"
    )
    parser.add_argument(
        "--init-from",
        metavar="BUNDLE",
        help="start from the weights of a bundle (or run) instead of fresh ones",
    )
    parser.add_argument(
        "--clip", metavar="DIR", help="the frozen CLIP: a bundle or a run (default: the config's, ../clip)"
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
        help="train on what `unclip embed` wrote, not on pictures; with a name, evaluate on it; where all is embedded no CLIP is needed",
    )
    parser.add_argument(
        "--profile", metavar="A:B", help="trace the steps from A to B of this process into WORKDIR/profile"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="join the other hosts first (cloud TPU pods, SLURM)"
    )


def load_config(spec: str):
    """Runs `get_config(variant)` of "path.py:variant".

    Raises:
      FileNotFoundError, ValueError: one line each.
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
    """Sets a dotted key that exists to a value of its type (int to float or text is fine).

    Raises:
      ValueError: on an unknown key (with the nearest known one) or another type.
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
    """Puts folders of embeddings, "DIR" or "NAME=DIR", in place of the training source or of the evaluation source NAME; where no picture
    is left, the training source's in place of the CLIP too, unless `keep_clip`.

    Raises:
      ValueError: for a stage that needs pictures, or an evaluation that the configuration does not have.
    """
    from unclip_jax.run.frozen import EMBEDDABLE

    if config.stage not in EMBEDDABLE:
        raise InputError(
            f"the {config.stage} stage needs pictures; embeddings are for the priors and the codec"
        )
    evaluations = config.data.get("eval", {})
    with config.unlocked():
        for item in folders:
            name, equals, folder = item.rpartition("=")
            if equals and name not in evaluations:
                raise InputError(
                    f"--embeddings {item}: there is no evaluation {name!r}; there are {', '.join(evaluations) or 'none'}"
                )
            # A ConfigDict keeps old keys where it is given a dict: the source is another one as a whole.
            where, key = (evaluations, name) if equals else (config.data, "train")
            del where[key]
            where[key] = {"name": "embeddings", "path": absolute(folder)}
        if not keep_clip and all(
            source.name == "embeddings" for source in (config.data.train, *evaluations.values())
        ):
            config.frozen.clip = config.data.train.path


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import join_hosts, parse_assignments, use_compilation_cache

    config = load_config(args.config)
    assignments = parse_assignments(args.assignments)
    if args.clip is not None:
        if "clip" not in config.frozen:
            raise InputError(f"the {config.stage} stage has no frozen CLIP; leave out --clip")
        # As typed on the command line, a relative path is relative to the current folder.
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
