"""`unclip train CONFIG --workdir DIR`: trains one stage, or resumes its training."""

from __future__ import annotations

import argparse
import types
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
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters of this rank for the attention of the latent U-Net, the decoder or the "
        "diffusion prior of --init-from, whose own weights stay; writes WORKDIR/lora.safetensors",
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
    if Path(path).suffix != ".py":
        raise InputError(f"{path} is not a Python configuration file")
    module = types.ModuleType("unclip_config")
    module.__file__ = path
    # A file that leaves the process must not end this command without a word.
    with input_errors(path, Exception, SystemExit):
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)  # leaves no bytecode behind
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config function")
    with input_errors(path, Exception, SystemExit):
        config = module.get_config(variant)
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    return config


def override(config, key: str, value: Any) -> None:
    """Sets an existing dotted key to a value. Text is read as the setting's type (`options.read_text`).

    A setting for numbers also accepts a whole number. Ranges are checked later, for all settings together.

    Raises:
      ValueError: if the key is unknown (the message names the nearest known one), or the type is wrong.
    """
    from unclip_jax.cli.options import read_text, source_kinds
    from unclip_jax.run.settings import is_a, rule_of, unknown_setting
    from unclip_jax.train import STAGES

    *parents, last = key.split(".")
    node = config
    for name in [*parents, last]:
        if not hasattr(node, "keys") or name not in node:
            raise unknown_setting(key, list(node.keys()) if hasattr(node, "keys") else [])
        parent, node = node, node[name]
    if hasattr(node, "keys"):
        raise InputError(f"setting {key!r} is a group; set one of {', '.join(sorted(node.keys()))}")
    stage = STAGES.get(str(config.get("stage")))
    rule = rule_of(stage.SETTINGS, key) if stage else None
    kinds = rule.kinds if rule else (type(node),)
    names = key.split(".")
    if rule is None and names[0] == "data":  # an argument of a data source
        source, depth = config.data[names[1]], 2
        if not isinstance(source.get("name"), str):  # evaluation sources by name
            source, depth = source[names[2]], 3
        kinds = source_kinds(source.get("name"), ".".join(names[depth:]))
    if isinstance(value, str):
        value = read_text(key, value, kinds)
    elif not is_a(value, kinds):
        raise InputError(f"{key} must not be a {type(value).__name__}, got {value!r}")
    with config.unlocked(), config.ignore_type():
        parent[last] = value


def check_stage(config) -> None:
    """Checks a whole configuration, before anything is loaded. Raises ValueError with one line."""
    from unclip_jax.train import STAGES

    stage = config.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise InputError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES)}")
    STAGES[stage].check(config)


def use_embeddings(config, folders: Sequence[str], keep_frozen: bool) -> None:
    """Lets a stage read folders of embeddings: in place of its pictures, or beside them for the decoder.

    The stage `retrieval` reads them beside its pictures where they hold no latents.

    If every source has embeddings, the training source's folder also replaces the CLIP.

    Args:
      config: the configuration to change.
      folders: "DIR" is for the training source; "NAME=DIR" for the evaluation NAME. The name of a single
        evaluation is `eval`.
      keep_frozen: never replace the CLIP.

    Raises:
      ValueError: if the stage reads no embeddings, or the configuration has no evaluation NAME.
    """
    from unclip_jax.data.embeddings import has_latents
    from unclip_jax.run.frozen import BESIDE_PICTURES, EMBEDDABLE, READ_STATES

    known = (*EMBEDDABLE, *BESIDE_PICTURES, *READ_STATES)
    if config.get("stage") not in known:
        readers = ", ".join(known)
        raise InputError(f"the {config.get('stage')} stage reads no embeddings; these stages do: {readers}")
    if not hasattr(config.get("data"), "train"):
        raise InputError("the configuration lacks the setting data.train")
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
            alone = config.stage in EMBEDDABLE and (
                config.stage not in BESIDE_PICTURES or has_latents(folder)
            )
            if not alone:
                beside = "text_states" if config.stage in READ_STATES else "embeddings"
                groups[key][key][beside] = absolute(folder)
                continue
            # A ConfigDict merges an assigned dict into the old value; delete that to replace all of it.
            del groups[key][key]
            groups[key][key] = {"name": "embeddings", "path": absolute(folder)}
        read = [groups[key][key] for key in groups]
        places = [
            source.path if source.get("name") == "embeddings" else source.get("embeddings") for source in read
        ]
        if not keep_frozen and all(places) and config.frozen.get("clip") is not None:
            config.frozen.clip = places[0]
        if not keep_frozen and config.stage in READ_STATES and "text_states" in config.data.train:
            config.frozen.update({"t5": config.data.train.text_states, "clip": None})


def use_adapters(config, rank: int) -> None:
    """Lets a stage train adapters of a rank. Raises ValueError if the stage trains none."""
    from unclip_jax.train import STAGES

    able = [name for name, stage in STAGES.items() if "lora" in stage.SETTINGS]
    if config.get("stage") not in able:
        known = ", ".join(able)
        raise InputError(f"the {config.get('stage')} stage trains no adapters; these stages do: {known}")
    with config.unlocked():
        config.lora = rank


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from unclip_jax.cli.options import join_hosts, parse_assignments, use_compilation_cache
    from unclip_jax.train import STAGES

    config = load_config(args.config)
    assignments = parse_assignments(args.assignments)
    if args.clip is not None:
        if "clip" not in config.get("frozen", {}):
            raise InputError(f"the {config.get('stage')} stage has no frozen CLIP; leave out --clip")
        # A relative path on the command line is relative to the current folder.
        assignments["frozen.clip"] = absolute(args.clip) if user_path(args.clip).exists() else args.clip
    if args.embeddings:
        use_embeddings(
            config, args.embeddings, keep_frozen=bool(assignments.keys() & {"frozen.clip", "frozen.t5"})
        )
    if args.lora is not None:
        use_adapters(config, args.lora)
    if args.profile is not None:
        assignments["profile"] = args.profile
    for key, value in assignments.items():
        override(config, key, value)
    check_stage(config)
    if args.distributed:
        join_hosts()
    use_compilation_cache()
    STAGES[config.stage].train_and_evaluate(config, args.workdir, args.init_from)
