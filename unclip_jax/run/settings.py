"""What every setting of a configuration may be, and the check of a whole configuration.

A table maps the names of a section's settings to rules, or to the tables of its subsections. The tables here
are those that stages share; a stage's own settings are in its file, as `SETTINGS`. `check_settings` compares
a configuration with its table before anything is loaded. The same rules say how `--set` reads text: the
setting's rule decides, and not what the text looks like.
"""

from __future__ import annotations

import difflib
import operator
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from unclip_jax.diffusion.schedule import SCHEDULES, schedule_of
from unclip_jax.errors import InputError
from unclip_jax.generate.options import OPTIONS, check_options, options_from
from unclip_jax.models.imagen import ATTENTIONS
from unclip_jax.models.layers import ACTIVATIONS, REMAT_POLICIES


# ------------------------------------------------------------------------------------ rules
class Rule(NamedTuple):
    """What a setting may be.

    kinds: its types. words: the same for messages. fits: whether a value of these types is in range.
    needed: whether a configuration must have the setting.
    """

    kinds: tuple[type, ...]
    words: str
    fits: Callable[[Any], bool] = lambda value: True
    needed: bool = True


class Group(NamedTuple):
    """A section that may be None or absent. table: its settings."""

    table: Mapping[str, Any]
    kinds: tuple[type, ...] = ()
    needed: bool = True


def interval(text: str) -> Callable[[float], bool]:
    """Whether a number lies in an interval, written as in mathematics: "[1, inf)" or "(0, 1]"."""
    low, high = map(float, text[1:-1].split(","))
    above = operator.ge if text[0] == "[" else operator.gt
    below = operator.le if text[-1] == "]" else operator.lt
    return lambda value: above(value, low) and below(value, high)


def whole(within: str) -> Rule:
    """A whole number in an `interval`."""
    return Rule((int,), f"a whole number in {within}", interval(within))


def number(within: str) -> Rule:
    """A number in an `interval`."""
    return Rule((float,), f"a number in {within}", interval(within))


def several(within: str, least: int = 1) -> Rule:
    """At least `least` whole numbers, each in an `interval`."""
    fits = interval(within)
    return Rule(
        (tuple,),
        f"{'at least one of ' if least else ''}whole numbers in {within}, as in (1, 2)",
        lambda values: len(values) >= least and all(is_a(value, (int,)) and fits(value) for value in values),
    )


def text(*choices: str) -> Rule:
    """A text that is not empty; one of `choices` if there are any."""
    words = f"one of {', '.join(choices)}" if choices else "a text"
    return Rule((str,), words, lambda value: value in choices if choices else bool(value))


FLAG = Rule((bool,), "true or false")


def maybe(rule: Rule | Mapping) -> Rule | Group:
    """The rule or table, or None."""
    if isinstance(rule, Mapping):
        return Group(rule, (types.NoneType,))
    return rule._replace(kinds=(*rule.kinds, types.NoneType), words=f"{rule.words}, or None")


def absent(rule: Rule | Group) -> Rule | Group:
    """The rule of a setting that a configuration may leave out."""
    return rule._replace(needed=False)


def is_a(value: Any, kinds: Sequence[type]) -> bool:
    """Whether a value is of one of the types.

    Whole numbers are numbers, truth values are not, and a list does for a tuple.
    """
    if isinstance(value, bool):
        return bool in kinds
    more = {float: (int, float), tuple: (tuple, list)}
    return any(isinstance(value, more.get(kind, kind)) for kind in kinds)


def kinds_of(annotation: Any) -> tuple[type, ...]:
    """The types that a type annotation allows: `int | None` -> (int, NoneType).

    Sequences are tuples, and mappings dicts.
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(kind for part in typing.get_args(annotation) for kind in kinds_of(part))
    kind = typing.get_origin(annotation) or annotation
    if kind is str or not isinstance(kind, type):
        return (kind,)
    return (tuple if issubclass(kind, Sequence) else dict if issubclass(kind, Mapping) else kind,)


def _options(kind: str) -> dict[str, Rule]:
    # The sampling options of a part. `check_options` knows their ranges.
    hints = typing.get_type_hints(OPTIONS[kind])
    return {name: Rule(kinds_of(hint), _words(kinds_of(hint)), needed=False) for name, hint in hints.items()}


def _words(kinds: Sequence[type]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list"}
    return " or ".join(names.get(kind, "None") for kind in kinds)


# ------------------------------------------------------------------------------------ tables
SOURCE = Rule((Mapping,), "a source with a name", lambda value: isinstance(value.get("name"), str))
SOURCES = Rule(
    (Mapping,),
    "a source with a name, or sources by name",
    lambda value: (
        bool(value)
        and (
            isinstance(value.get("name"), str)
            or all(isinstance(value[key], Mapping) and SOURCE.fits(value[key]) for key in value)
        )
    ),
    needed=False,
)
DATA = {
    "train": SOURCE,
    "eval": SOURCES,
    "backend": text("auto", "tf", "numpy"),
    "max_bad_fraction": number("[0, 1]"),
}
CROPPED = DATA | {"crop_scale": number("(0, 1]")}
RUN = {
    "stage": text(),
    "frozen": {},
    "seed": whole("[0, 4294967296)"),
    "dtype": text("auto", "float32", "bfloat16"),
    "grad_accumulation": whole("[1, inf)"),
    "remat": text("none", "full", *REMAT_POLICIES),
    "scan_layers": FLAG,
    "mesh": {"data": whole("[-1, inf)"), "fsdp": whole("[-1, inf)"), "tensor": whole("[-1, inf)")},
    "log_every": whole("[1, inf)"),
    "eval_every": whole("[0, inf)"),
    "checkpoint_every": whole("[1, inf)"),
    "keep": whole("[1, inf)"),
    "keep_best": maybe(text()),
    "watchdog": number("[0, inf)"),
    "profile": maybe(text()),
    "track": {
        "tensorboard": FLAG,
        "mlflow": maybe(text()),
        "experiment": text(),
        "wandb": maybe(text()),
    },
    "steps": whole("[1, 2147483648)"),
    "batch_size": whole("[1, inf)"),
    "data": CROPPED,
}
OPTIMIZER = {
    "kind": absent(text("adamw", "adafactor")),
    "learning_rate": number("(0, inf)"),
    "warmup_steps": whole("[0, inf)"),
    "schedule": text("cosine", "constant"),
    "b1": number("[0, 1)"),
    "b2": number("[0, 1)"),
    "eps": number("(0, inf)"),
    "weight_decay": number("[0, inf)"),
    "clip_norm": maybe(number("(0, inf)")),
    "mu_dtype": maybe(text("float32", "bfloat16")),
}
TRAINED = RUN | {"optimizer": OPTIMIZER, "ema_decay": number("[0, 1)")}
# The rank of adapters that are trained in place of the network's weights; None trains the weights.
ADAPTERS = {"lora": absent(maybe(whole("[1, inf)")))}
# Ranking compares at least two rows.
RANKED = {
    "batch_size": whole("[1, inf)"),
    "rows": whole("[2, inf)"),
    "candidates": whole("[2, inf)"),
}
DRAWN = {
    "batch_size": whole("[1, inf)"),
    "rows": whole("[1, inf)"),
    "samples": whole("[1, inf)"),
    "fid_rows": absent(whole("[0, inf)")),
}
TOKENIZER = {"length": whole("[2, inf)"), "vocab_size": whole("[514, 49408]")}
# Of a network without CLIP: GLIDE's tokenizer in a folder, or else CLIP's.
GLIDE_TOKENIZER = {
    "length": whole("[2, inf)"),
    "vocab_size": whole("[257, inf)"),
    "folder": maybe(text()),
}
TRANSFORMER = {
    "width": whole("[1, inf)"),
    "layers": whole("[1, inf)"),
    "heads": whole("[1, inf)"),
}
BLOCKS = TRANSFORMER | {
    "mlp_ratio": absent(number("(0, inf)")),
    "activation": absent(text(*ACTIVATIONS)),
    "dropout": absent(number("[0, 1)")),
}
TOWER = TRANSFORMER | {"mlp_ratio": absent(number("(0, inf)"))}
# The stage's own text encoder.
OWN_TEXT = maybe(TRANSFORMER | {"dropout": absent(number("[0, 1)"))})
UNET = {
    "image_size": whole("[1, inf)"),
    "out_channels": whole("[3, 6]"),
    "channels": whole("[2, inf)"),
    "channel_mult": several("[1, inf)"),
    "res_blocks": whole("[1, inf)"),
    "attention_resolutions": absent(several("[1, inf)", least=0)),
    "middle_attention": absent(FLAG),
    "head_channels": absent(whole("[1, inf)")),
    "groups": absent(whole("[1, inf)")),
    "dropout": absent(number("[0, 1)")),
    "scale_shift": absent(FLAG),
}
# What an efficient U-Net has in place of `attention_resolutions` (`models.imagen`).
EFFICIENT = {
    "res_blocks": Rule(
        (int, tuple),
        "a whole number, or one for each level",
        lambda value: all(n >= 1 for n in (value if isinstance(value, (tuple, list)) else [value])),
    ),
    "attention": Rule(
        (tuple,), "none, self or cross for each level", lambda values: set(values) <= set(ATTENTIONS), False
    ),
}
DIFFUSION = {
    "schedule": text(*SCHEDULES),
    "num_steps": whole("[1, inf)"),
    "prediction": text("eps", "x0", "v"),
}
ENDS = Rule(
    (tuple,), "two numbers in (0, 1)", lambda values: len(values) == 2 and all(0 < v < 1 for v in values)
)
IMAGE_DIFFUSION = DIFFUSION | {"vb_weight": number("[0, inf)")}
SAMPLING = {kind: _options(kind) for kind in OPTIONS}
PART_KINDS = {"stable_unclip": "latent"}  # stages whose part is of another kind than their name


def frozen(roles: Mapping[str, str]) -> dict[str, Rule]:
    """The section `frozen` of a stage with these roles: a path for each."""
    return {role: text() for role in roles}


# ------------------------------------------------------------------------------------ the check
def check_settings(config: Mapping, table: Mapping[str, Any], figures: Sequence[str] = ()) -> None:
    """Checks a whole configuration: names, types and ranges of its settings, and whether they fit together.

    Args:
      config: the configuration.
      table: the stage's `SETTINGS`.
      figures: names of the figures of its evaluation; "{}" stands for the name of the evaluation source.

    Raises:
      ValueError: with one line that names the first setting that is wrong.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    _check_table(config, table, "")
    first = parse_profile(config["profile"])[:1]
    if first and first[0] >= config["steps"]:
        raise InputError(f"profile={config['profile']} begins after the last of steps={config['steps']}")
    _check_keep_best(config, figures)
    for name in table:
        if name.endswith("optimizer") and config[name]["warmup_steps"] >= config["steps"]:
            warmup, steps = config[name]["warmup_steps"], config["steps"]
            raise InputError(f"{name}.warmup_steps={warmup} must be fewer than steps={steps}")
    for name, section in _sections(config.get("model", {}), "model"):
        if "heads" in section and "width" in section and section["width"] % section["heads"]:
            width, heads = section["width"], section["heads"]
            raise InputError(f"{name}.width={width} must be a multiple of {name}.heads={heads}")
        if "attention_resolutions" in section or "channel_mult" in section and name.endswith("unet"):
            _check_unet(section, name, config["model"].get("latent_channels", 3))
    own = [name for name in ("text_tokenizer", "model.text") if _at(config, name) is not None]
    if len(own) == 1 and "text_tokenizer" in table:
        raise InputError(
            f"{own[0]} is set alone: set both text_tokenizer and model.text to give the stage its own text "
            "encoder, or neither"
        )
    if "eval" in table and config["eval_every"] and not evaluations(config):
        every = config["eval_every"]
        raise InputError(f"eval_every={every} needs data.eval; name a source, or set eval_every=0")
    held_out = config["data"].get("eval", {})
    for name, source in _sections(held_out, "data.eval"):
        if source.get("balance") is not None:
            raise InputError(f"{name}.balance repeats records, which only training wants: leave it out")
    if "candidates" in config.get("eval", {}) and config["eval"]["candidates"] > config["eval"]["rows"]:
        candidates, rows = config["eval"]["candidates"], config["eval"]["rows"]
        raise InputError(f"eval.candidates={candidates} must be at most eval.rows={rows}")
    if "diffusion" in table:
        schedule_of(config["diffusion"])
    if "sampling" in table:
        _check_sampling(config)


def parse_profile(profile: str | None) -> tuple[int, ...]:
    """Parses the setting `profile`: "10:20" -> (10, 20); None -> ().

    Raises:
      ValueError: on any other text.
    """
    if profile is None:
        return ()
    parts = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", str(profile))
    if parts is None or not 0 < int(parts[1]) < int(parts[2]):
        raise InputError(
            f"profile must be FIRST:LAST, steps counted from 1, and FIRST less than LAST; got {profile!r}"
        )
    return int(parts[1]), int(parts[2])


def rule_of(table: Mapping[str, Any], key: str) -> Rule | None:
    """The rule of a dotted key; None if the table has none."""
    node: Any = table
    for name in key.split("."):
        node = node.table if isinstance(node, Group) else node
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Rule) else None


def unknown_setting(name: str, known: Sequence[str]) -> InputError:
    """The error about a setting that does not exist. It names the nearest known one."""
    near = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known)) or 'none'}"
    return InputError(f"unknown setting {name!r}; {hint}")


def _check_table(section: Mapping, table: Mapping[str, Any], prefix: str) -> None:
    for name in section:
        if name not in table:
            raise unknown_setting(f"{prefix}{name}", list(table))
    for name, rule in table.items():
        if name not in section:
            if isinstance(rule, Mapping) or rule.needed:
                raise InputError(f"the configuration lacks the setting {prefix}{name}")
        elif isinstance(rule, Rule):
            value = section[name]
            if not is_a(value, rule.kinds) or (value is not None and not rule.fits(value)):
                raise InputError(f"{prefix}{name} must be {rule.words}, got {_shown(value)}")
        elif not (section[name] is None and isinstance(rule, Group)):
            if not isinstance(section[name], Mapping):
                raise InputError(f"{prefix}{name} must be a group of settings, got {_shown(section[name])}")
            inner = rule.table if isinstance(rule, Group) else rule
            _check_table(section[name], inner, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    return repr(value)[:80] if not isinstance(value, Mapping) else f"a group of {', '.join(map(str, value))}"


def _at(config: Mapping, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _sections(section: Mapping, name: str) -> Iterator[tuple[str, Mapping]]:
    yield name, section
    for key in section:
        if isinstance(section[key], Mapping):
            yield from _sections(section[key], f"{name}.{key}")


def evaluations(config: Mapping) -> list[str]:
    """The names of the evaluation sources; that of a single source is `eval`."""
    found = config["data"].get("eval", {})
    return ["eval"] if isinstance(found.get("name"), str) else list(found)


def _check_keep_best(config: Mapping, figures: Sequence[str]) -> None:
    best = config["keep_best"]
    if best is None:
        return
    if not config["eval_every"]:
        raise InputError(f"keep_best={best} needs evaluations; set eval_every")
    names = [name.format(source) for source in evaluations(config) for name in figures]
    names = list(dict.fromkeys(names))
    if best.removeprefix("-") not in names:
        known = ", ".join(names) or "none"
        raise InputError(f"keep_best={best} names no figure of the evaluation; its figures are {known}")


def _check_unet(unet: Mapping, name: str, sample: int) -> None:
    # `sample`: channels of what the network draws.
    levels, side = len(unet["channel_mult"]), unet["image_size"]
    if side % 2 ** (levels - 1):
        raise InputError(
            f"{name}.image_size={side} must be a multiple of {2 ** (levels - 1)}, "
            f"to be halved {levels - 1} times"
        )
    if unet["out_channels"] not in (sample, 2 * sample):
        raise InputError(f"{name}.out_channels must be {sample}, or {2 * sample} with learned variance")
    sides, groups = [side // 2**level for level in range(levels)], unet.get("groups", 32)
    attention = set(unet.get("attention_resolutions", ()))
    if attention - set(sides):
        raise InputError(
            f"{name}.attention_resolutions has {min(attention - set(sides))}, but the U-Net's sides are "
            f"{', '.join(map(str, sides))}"
        )
    widths = [unet["channels"] * mult for mult in unet["channel_mult"]]
    attending = [width for width, side in zip(widths, sides, strict=True) if side in attention]
    if unet.get("middle_attention", True):
        attending.append(widths[-1])
    for width in {unet["channels"], *widths}:
        if width % groups:
            raise InputError(f"{width} channels of {name} must be a multiple of {name}.groups={groups}")
    for width in attending:
        if width % unet.get("head_channels", 64):
            head = unet.get("head_channels", 64)
            raise InputError(f"{width} channels of {name} must be a multiple of {name}.head_channels={head}")


def _check_sampling(config: Mapping) -> None:
    kind = PART_KINDS.get(config["stage"], config["stage"])
    options = options_from(dict(config["sampling"]), kind)
    part = {"diffusion": dict(config.get("diffusion", {})), "model": config["model"]}
    if kind != "pixelsnail":  # whether it is guided depends on the CLIP under it
        part["kind"] = kind
    if "augmentation" in config:
        part["augmentation"] = dict(config["augmentation"])
    if config["stage"].startswith("prior"):
        part["x0_error"] = ()  # a prior measures its errors in training
    check_options(options, part)
