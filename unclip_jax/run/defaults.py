"""What every configuration starts from: the settings that no paper determines.

A configuration file states only what its paper says, and the choices where the paper is silent.

A configuration file has three parts:

1. `run(stage)` gives the settings of the run. The result is locked: a setting that does not exist raises.
2. Inside `with config.unlocked():` the file adds the settings of its method: the model, the optimizer, the
   data.
3. Its variants change settings that exist. `get_config` returns the locked result.

    def get_config(variant=""):
        defaults.check_variant(variant, VARIANTS, __file__)
        config = defaults.run("prior_diffusion")
        config.frozen = {"clip": "../clip"}
        with config.unlocked():
            config.steps = 600_000
            config.optimizer = defaults.adamw(learning_rate=1.1e-4, weight_decay=6e-2)
            ...
        if variant == "tiny":
            defaults.tiny(config)
            config.model.update({"width": 32, "layers": 1, "heads": 2})
        return config.lock()
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from unclip_jax.errors import InputError


def check_variant(variant: str, variants: Sequence[str], file: str) -> None:
    """Checks that a configuration file has a variant.

    Args:
      variant: the text after the colon in "configs/emoji/clip.py:tiny"; "" for the full configuration.
      variants: all that the file has; "" may be among them.
      file: path of the file, for the message.

    Raises:
      ValueError: when the file does not have the variant.
    """
    if variant and variant not in variants:
        names = ", ".join(name for name in variants if name)
        name = "/".join(Path(file).parts[-2:])
        raise InputError(f"unknown variant {variant!r} of {name}; choose one of {names}, or none")


# --------------------------------------------------------------------------------------------------- runs
def run(stage: str) -> ConfigDict:
    """The settings of a run, locked. They suit a large model on many chips; for one device, see `small_run`.

    setting            what it is
    stage              which training stage the configuration is for
    frozen             role -> run, bundle or public weights of each network that stands under the stage; a
                       path that starts with "." is relative to the run's folder
    seed               of the parameters, the data order and the noise
    dtype              the networks compute in it; "auto": bfloat16 on accelerators, float32 on CPUs
    grad_accumulation  number of parts of a batch whose gradients are added up; CLIP's loss compares all rows
                       of a batch, so its stage needs 1
    remat              which activations are computed again in the backward pass: "none", "full", or one of
                       the policies in `models/layers.py`
    scan_layers        whether a stack of equal layers compiles as one loop
    mesh               devices along each axis; -1: all that are left
    log_every          steps between two records in metrics.jsonl
    eval_every         steps between two evaluations; 0: none
    checkpoint_every   steps between two checkpoints
    keep               number of checkpoints that are kept
    keep_best          figure of the evaluation whose best checkpoint is kept as well, e.g. "val_cosine";
                       "-eval_loss": the lowest is the best; None: no such checkpoint
    watchdog           seconds without a finished step after which the process ends; 0: it never does
    profile            "10:20" traces these steps; None: no trace
    track              where the figures go besides metrics.jsonl
    """
    return ConfigDict(
        {
            "stage": stage,
            "frozen": {},
            "seed": 0,
            "dtype": "auto",
            "grad_accumulation": 1,
            "remat": "full",
            "scan_layers": True,
            "mesh": {"data": -1, "fsdp": 8, "tensor": 1},
            "log_every": 100,
            "eval_every": 10_000,
            "checkpoint_every": 2000,
            "keep": 3,
            "keep_best": None,
            "watchdog": 1800.0,
            "profile": None,
            "track": {"tensorboard": True, "mlflow": None, "experiment": "unclip_jax", "wandb": None},
        }
    ).lock()


def small_run(config: ConfigDict) -> ConfigDict:
    """Changes the settings of `run` for a small model that trains on one device, and returns them."""
    _one_device(config)
    config.log_every = 20
    config.checkpoint_every = 250
    config.keep = 2
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Changes a configuration to what all `:tiny` variants have in common, and returns it.

    A `:tiny` variant runs in seconds on a CPU, for tests: four steps on the embedded data. The configuration
    file itself makes the model small.

    Shards are replaced by the embedded data: the training source by the split "train", a single evaluation
    source by the split "compose", and evaluation sources with names by the splits of those names.
    """
    _one_device(config)
    config.steps = 4
    config.batch_size = 16
    config.log_every = 1
    config.eval_every = 4
    config.checkpoint_every = 2
    for name in ("optimizer", "discriminator_optimizer"):
        if name in config:
            config[name].warmup_steps = 1
    if config.data.train.name != "emoji":
        config.data.train = _emoji_split("train")
        evaluation = config.data.get("eval")
        if evaluation is not None:
            single = isinstance(evaluation.get("name"), str)
            splits = {name: _emoji_split(name) for name in evaluation}
            config.data.eval = _emoji_split("compose") if single else splits
    return config


def _one_device(config: ConfigDict) -> None:
    config.remat = "none"
    config.scan_layers = False
    config.mesh.fsdp = 1


# ----------------------------------------------------------------------------------------------- the data
def shards(evaluation: str | Sequence[str] | None, source: str = "tfrecord") -> ConfigDict:
    """The `data` section of a recipe that trains on shards. The configuration adds how its stage crops.

    The shards of a split are the files `data/SPLIT/*.tfrecord`; training takes the split "train". The option
    `--set data.train.pattern=...` names others.

    Args:
      evaluation: the split of a single evaluation source; a sequence of splits for evaluation sources with
        these names; None if the stage does not evaluate.
      source: "tfrecord" or "webdataset" (files `data/SPLIT/*.tar`).

    Raises:
      ValueError: on another source.
    """
    endings = {"tfrecord": "tfrecord", "webdataset": "tar"}
    if source not in endings:
        raise InputError(f"shards are of {' or '.join(endings)}, got {source!r}")

    def split(name: str) -> dict[str, str]:
        return {"name": source, "pattern": f"data/{name}/*.{endings[source]}"}

    return _data(split, evaluation, max_bad_fraction=0.05)


def emoji(evaluation: str | Sequence[str] | None) -> ConfigDict:
    """The `data` section of a recipe that trains on the embedded emoji; `evaluation` is as in `shards`."""
    return _data(_emoji_split, evaluation, max_bad_fraction=0.01)


def _emoji_split(name: str) -> dict[str, str]:
    return {"name": "emoji", "split": name}


def _data(split, evaluation: str | Sequence[str] | None, max_bad_fraction: float) -> ConfigDict:
    """`max_bad_fraction` is the share of records that cannot be read above which a run stops."""
    data = {"train": split("train")}
    if evaluation is not None:
        single = isinstance(evaluation, str)
        data["eval"] = split(evaluation) if single else {name: split(name) for name in evaluation}
    return ConfigDict(data | {"backend": "auto", "max_bad_fraction": max_bad_fraction})


# -------------------------------------------------------------------------------------------- the optimizer
def adamw(
    learning_rate: float,
    *,
    warmup_steps: int = 5000,
    schedule: str = "constant",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    mu_dtype: str | None = None,
) -> ConfigDict:
    """The `optimizer` section: AdamW.

    Args:
      learning_rate: at its peak.
      warmup_steps: over which the rate rises from zero.
      schedule: of the rate after that: "constant" or "cosine" (to zero at the run's end).
      b1, b2, eps, weight_decay: AdamW's.
      clip_norm: the global norm to which gradients are clipped; None: they are not.
      mu_dtype: in which Adam keeps the first moment; None: float32.

    Raises:
      TypeError: on an unknown setting.
    """
    return ConfigDict(
        {
            "learning_rate": learning_rate,
            "warmup_steps": warmup_steps,
            "schedule": schedule,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "mu_dtype": mu_dtype,
        }
    )


# ------------------------------------------------------------------------------------------- the codebook
def quantiser(
    *,
    codebook: str = "gradient",
    weight: float = 1.0,
    beta: float = 0.25,
    legacy: bool = True,
    decay: float = 0.99,
    debias: bool = True,
    restart: float = 0.0,
) -> ConfigDict:
    """The `quantiser` section of a stage with a codebook (`models.quantiser`).

    Args:
      codebook: how it learns: by "gradient", or as "averages" of the encoder's outputs.
      weight: of the quantiser's loss.
      beta: of the commitment term; with a gradient and `legacy`, of the codebook term.
      legacy: with a gradient: beta weights the codebook term, as public models were trained; False weights
        the commitment term, as intended.
      decay: of the averages.
      debias: averages begin as Sonnet's (True) or as rosinality's (False).
      restart: with averages: a code chosen less often than this in a step, on average, is given a new vector;
        0: none is.

    Raises:
      TypeError: on an unknown setting.
    """
    return ConfigDict(
        {
            "codebook": codebook,
            "weight": weight,
            "beta": beta,
            "legacy": legacy,
            "decay": decay,
            "debias": debias,
            "restart": restart,
        }
    )
