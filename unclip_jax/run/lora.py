"""Training of adapters (LoRA, Hu et al. 2021) in place of a network's own weights.

A matrix W (in, out) of an attention layer becomes W + down @ up, with down (in, r) and up (r, out). `down` is
drawn at random, `up` begins at zero, so that training begins at the network as it is. The state holds the
two matrices alone: the weights W are an argument of the step, like any frozen network, under the role `BASE`.
So the optimizer, the averages and the checkpoints are as small as the adapters.

    trained, frozen, init_from = adapted(trained, config, mesh, frozen, init_from)
    network = Network(trained.model, whole(params, frozen), trained.part)     # params: the adapters
    write_adapters(run, workdir)                              # lora.safetensors and peft/, in peft's names
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save

from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.lora import adapted_layers, as_matrix, lora_tensors, peft_adapter
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.errors import InputError
from unclip_jax.paths import user_path, write_whole
from unclip_jax.run.hosts import on_every_host, print_once
from unclip_jax.run.stage import Fit, Stage
from unclip_jax.sharding import Mesh, gather_rest, infer_shardings

BASE = "base"  # the role of the weights that the adapters change
FILE = "lora.safetensors"
PEFT = "peft"  # the folder for peft's own loader


def adapted(
    stage: Stage,
    config: ConfigDict,
    mesh: Mesh,
    frozen: Mapping[str, Any],
    init_from: str | None,
    load: Callable = load_part,
) -> tuple[Stage, dict[str, Any], str | None]:
    """The stage as the configuration wants it: itself, or one that trains adapters of rank `config.lora`.

    Args:
      stage: the stage.
      config: the run's configuration.
      mesh: the devices.
      frozen: the parameters of the frozen networks by role.
      init_from: where the weights are that the adapters change.
      load: function that reads them.

    Returns:
      The stage, the parameters by role, and what the run itself starts from: None for adapters, which start
      anew.

    Raises:
      ValueError: when there is no `init_from`, the weights are of another network, or the rank is larger than
        a matrix.
    """
    rank = config.get("lora")
    if rank is None:
        return stage, dict(frozen), init_from
    if init_from is None:
        raise InputError("adapters change weights that are there: name them with --init-from")
    part, _ = load(init_from, stage.name)
    shapes = _flat(jax.eval_shape(lambda key: stage.init(key)[0], jax.random.key(0)))
    given = {path: np.shape(value) for path, value in _flat(part.params).items()}
    wanted = {path: value.shape for path, value in shapes.items()}
    if given != wanted:
        differing = sorted(k for k in given.keys() | wanted.keys() if given.get(k) != wanted.get(k))
        raise InputError(
            f"{init_from} holds another {stage.name} than this configuration: "
            f"{len(differing)} parameters differ, {differing[0]} first"
        )
    paths = list(adapted_layers(stage.name, stage.part, wanted))
    small = [path for path in paths if rank > min(as_matrix(path, wanted[path]))]
    if small:
        smallest = min(min(as_matrix(path, wanted[path])) for path in small)
        raise InputError(f"lora={rank} is larger than the smallest matrix, {small[0]}, of rank {smallest}")

    def init(key):
        made = {}
        for i, path in enumerate(paths):
            rows, columns = as_matrix(path, wanted[path])
            bound = 1 / math.sqrt(rows)  # as peft draws it
            down = jax.random.uniform(jax.random.fold_in(key, i), (rows, rank), minval=-bound, maxval=bound)
            made[path] = {"down": down, "up": jnp.zeros((rank, columns))}
        return traverse_util.unflatten_dict(made, sep="/"), {}

    def objective(params, extra, rng, batch, step, *, frozen):
        frozen = {**frozen, BASE: gather_rest(frozen[BASE], mesh)}
        return stage.objective(whole(params, frozen), extra, rng, batch, step, frozen=frozen)

    base = jax.device_put(part.params, infer_shardings(part.params, mesh))
    digest = part.hash or params_hash(part.params)
    described = stage.part | {"frozen": stage.part.get("frozen", {}) | {BASE: digest}, "lora": {"rank": rank}}
    fit = stage.fit
    if fit is not None:  # the network keeps what was measured for it
        missing = [key for key in fit.keys if key not in part.config]
        if missing:
            raise InputError(f"{init_from} does not say {missing[0]!r} of its {stage.name}")
        kept = {key: part.config[key] for key in fit.keys}
        fit = Fit(lambda run: kept, fit.arrays, fit.keys)
    print_once(f"{stage.name}: adapters of rank {rank} for {len(paths)} matrices of {init_from}")
    made = stage._replace(name=f"{stage.name}_lora", part=described, init=init, objective=objective, fit=fit)
    return made, {**frozen, BASE: base}, None


def whole(params: Any, frozen: Mapping[str, Any]) -> Any:
    """The parameters of the network: the base with the adapters `params` merged into it.

    Where there is no base, they are `params` themselves.
    """
    if BASE not in frozen:
        return params
    merged = _flat(frozen[BASE])
    for path, (down, up) in _pairs(params).items():
        merged[path] = merged[path] + (down @ up).reshape(merged[path].shape)
    return traverse_util.unflatten_dict(merged, sep="/")


def write_adapters(run: Any, workdir: str | os.PathLike) -> None:
    """Writes the averaged adapters of a run as `lora.safetensors` and, for peft's own loader, as the folder
    `peft` (`checkpoint.lora`).

    It does nothing for a run that trains no adapters, and on all hosts but the first.
    """
    if "lora" not in run.part:
        return
    pairs = jax.tree.map(on_every_host, _pairs(run.state.ema_params))
    if jax.process_index() == 0:
        name = run.stage.name.removesuffix("_lora")
        file = user_path(workdir) / FILE
        tensors = lora_tensors(name, run.part, pairs)
        write_whole(file, save(tensors))
        renamed, config = peft_adapter(tensors)
        write_whole(file.parent / PEFT / "adapter_model.safetensors", save(renamed))
        write_whole(file.parent / PEFT / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        print_once(f"{file}: {len(pairs)} adapters, for --lora; {PEFT}/ for peft")


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _pairs(params: Any) -> dict[str, tuple[Any, Any]]:
    # The path of each changed parameter -> its two matrices.
    flat = _flat(params)
    paths = [path.removesuffix("/down") for path in flat if path.endswith("/down")]
    return {path: (flat[f"{path}/down"], flat[f"{path}/up"]) for path in paths}
