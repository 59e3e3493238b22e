"""The compiled train step: counts of operations and collectives, and what tiny networks move on a mesh."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config
from unclip_jax.compile import abstract, step

ROOT = Path(__file__).resolve().parents[2]


def count(function, *shapes):
    return step.flops(
        jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    )


def test_operations():
    """Products, convolutions (also strided, and their gradients), loops, and the repeated work of remat."""
    product = 2 * 8 * 16 * 32
    matmul = lambda a, b: a @ b
    assert count(matmul, (8, 16), (16, 32)) == product
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 8, 16), (5, 16, 32)) == 5 * product
    assert (
        count(lambda a, b: jax.lax.scan(lambda c, _: (c, (c @ b)), a, None, length=7)[1], (8, 16), (16, 32))
        == 7 * product
    )
    conv = lambda stride: (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    forward = 2 * 2 * 8 * 8 * 3 * 3 * 4 * 6
    assert count(conv(1), (2, 8, 8, 4), (3, 3, 4, 6)) == forward
    assert count(conv(2), (2, 8, 8, 4), (3, 3, 4, 6)) == forward / 4
    for stride in (1, 2):
        convolved = conv(stride)
        squares = lambda x, k, convolved=convolved: jnp.sum(convolved(x, k) ** 2)
        gradients = count(jax.grad(squares, argnums=(0, 1)), (2, 8, 8, 4), (3, 3, 4, 6))
        assert gradients == pytest.approx(3 * forward / stride**2, rel=0.05)
    layer = lambda a, b: jnp.sum(jnp.tanh(a @ b) ** 2)
    plain, again = (
        count(jax.grad(f, argnums=(0, 1)), (8, 16), (16, 32)) for f in (layer, jax.checkpoint(layer))
    )
    assert (plain, again) == (3 * product, 4 * product)


def tiny(name, mesh, **changes):
    config = load_config(str(ROOT / f"configs/dalle2/{name}.py:tiny"))
    with config.unlocked():
        config.update(changes)
    clip = load_config(str(ROOT / "configs/dalle2/clip.py:tiny")) if "clip" in config.frozen else None
    return step.compile_step(config, clip, step.make_abstract_mesh("cpu:8", mesh))[0]


@pytest.mark.parametrize(
    "name, changes",
    [("upsampler_256", {}), ("prior_diffusion", {}), ("prior_diffusion", {"scan_layers": True})],
)
def test_fsdp_moves_parameters_and_nothing_else(name, changes, monkeypatch):
    """Parameters are gathered before use and gradients are reduced; no activation moves between devices.

    The cases are a U-Net, and a transformer with CLIP.
    """
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 256)
    report = tiny(name, {"data": 2, "fsdp": 4}, **changes)
    assert set(report.collectives) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert report.collectives["all-gather"][0] > 10
    # Gradients, shares of them, and scalars are reduced. Only what forward and backward need is gathered.
    reduced = sum(report.collectives.get(kind, (0, 0))[1] for kind in ("all-reduce", "reduce-scatter"))
    whole = 4 * report.parameters
    assert reduced < 3 * whole and report.collectives["all-gather"][1] < 3 * (whole + 4 * report.frozen)
    assert report.averages == report.parameters and report.optimizer >= 2 * report.parameters
    assert report.model_flops == report.flops > 0


@pytest.mark.parametrize(
    "name", ["clip", "prior_diffusion", "prior_ar", "decoder", "upsampler_256", "upsampler_1024"]
)
def test_nothing_large_is_replicated(name):
    """At the paper's sizes, each of eight devices holds an eighth of every large array.

    These are parameters, averages and moments with more than a million elements.
    """
    config = load_config(str(ROOT / f"configs/dalle2/{name}.py"))
    with config.unlocked():
        config.batch_size = 8
        if "sam" in config:
            config.sam.group_size = 1
    clip = load_config(str(ROOT / "configs/dalle2/clip.py")) if "clip" in config.frozen else None
    compiled = step.train_step(config, clip, sharding.make_mesh({"data": 1, "fsdp": 8}))
    large = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path((compiled.state, compiled.frozen))[0]:
        if np.prod(leaf.shape) > 1e6 and "codec" not in sharding.path_name(path):
            large += 1
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == np.prod(leaf.shape), (
                sharding.path_name(path)
            )
    assert large > 50


def test_the_command(capsys, tmp_path):
    """The command prints its figures, and one line for every mistake."""
    arguments = ["compile", str(ROOT / "configs/dalle2/upsampler_256.py:tiny"), "--topology", "cpu:8"]
    arguments += ["--set", "model.unet.channel_mult=(1,)"]
    assert main([*arguments, "--mesh", "data=8", "--batch", "16", "--save", str(tmp_path / "step")]) == 0
    out = capsys.readouterr().out
    assert (
        "8 devices of cpu:8, mesh data=8 x fsdp=1 x tensor=1, batch 16" in out
        and "all-reduce:" in out
        and "operations a step" in out
    )
    assert (tmp_path / "step").stat().st_size > 1000
    for change, message in (
        (["--mesh", "data=3"], "does not fit 8 devices"),
        (["--batch", "9"], "a batch of 9 does not divide over data x fsdp = 8 devices"),
        (["--topology", "v5e"], "unknown topology 'v5e'"),
        (["--topology", "cpu:64"], "8 CPU devices are there"),
        (["--set", "model.unet.chanels=3"], "did you mean 'channels'"),
    ):
        assert main([*arguments, *change]) == 1
        assert message in capsys.readouterr().err
    assert main(["compile", str(ROOT / "configs/dalle2/codec.py"), "--topology", "cpu:8"]) == 1
    assert "no train step" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prior_diffusion", "prior_ar"])
def test_a_step_that_reads_embeddings(name, capsys):
    """A prior's step on embeddings needs no frozen CLIP. Stages that need pictures refuse `--embeddings`."""
    arguments = [
        "compile",
        str(ROOT / f"configs/dalle2/{name}.py:tiny"),
        "--topology",
        "cpu:8",
        "--embeddings",
    ]
    assert main(arguments) == 0
    assert "operations a step" in capsys.readouterr().out
    config, clip = (load_config(str(ROOT / f"configs/dalle2/{part}.py:tiny")) for part in (name, "clip"))
    networks = abstract.abstract_frozen(config, clip, sharding.make_mesh(), embedded=True)
    assert (
        networks["clip"].module is None
        and networks["clip"].params == {}
        and ("codec" in networks) == (name == "prior_ar")
    )
    assert main([*arguments, "--sample"]) == 1 and "is for a train step" in capsys.readouterr().err
    assert main([arguments[0], str(ROOT / "configs/dalle2/upsampler_256.py:tiny"), *arguments[2:]]) == 1
    assert "the upsampler stage reads no embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prior_diffusion", "prior_ar", "decoder", "upsampler_256"])
def test_samplers(name, capsys):
    """The samplers of all stages that draw compile on a mesh that shards their parameters.

    The default batch has one row for each device. No training state is held.
    """
    arguments = [
        "compile",
        str(ROOT / f"configs/dalle2/{name}.py:tiny"),
        "--topology",
        "cpu:8",
        "--mesh",
        "data=4,fsdp=2",
        "--sample",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "mesh data=4 x fsdp=2 x tensor=1, batch 8" in out and "parameters" in out and "optimizer" not in out
    )


def test_a_sampler_costs_its_steps():
    config = load_config(str(ROOT / "configs/dalle2/upsampler_256.py:tiny"))
    operations = []
    for steps in (2, 6):
        with config.unlocked(), config.ignore_type():
            config.sampling.steps, config.batch_size = steps, 8
        draw, *arguments = step.sampler(config, None, sharding.make_mesh())
        operations.append(step.flops(jax.make_jaxpr(draw)(*arguments)))
    assert operations[1] == pytest.approx(3 * operations[0], rel=0.05)


def test_clip_has_no_sampler(capsys):
    assert (
        main(["compile", str(ROOT / "configs/dalle2/clip.py:tiny"), "--topology", "cpu:8", "--sample"]) == 1
    )
    assert "the clip stage draws nothing" in capsys.readouterr().err


def test_without_the_compiler(capsys, monkeypatch):
    if importlib.util.find_spec("libtpu"):
        monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main(["compile", str(ROOT / "configs/dalle2/upsampler_256.py:tiny"), "--topology", "v5e:2x2"]) == 1
    assert 'pip install "unclip_jax[tpu]"' in capsys.readouterr().err


def test_a_step_too_large(capsys):
    """The command compares memory with the chip's, and reports the buffers when the compiler gives up."""
    from unclip_jax.cli.compile import describe, verdict

    chip = step.CHIPS["TPU v5 lite"]
    links = {"all-gather": (2, 10**9)}
    report = step.Report(
        4, chip, {"data": 4}, 8, *[int(4e9)] * 6, flops=4e12, model_flops=3e12, traffic=1e9, collectives=links
    )
    assert report.limit == "arithmetic" or report.seconds[report.limit] == max(report.seconds.values())
    assert report.mfu == pytest.approx(3e12 / 4 / chip.flops / max(report.seconds.values()))
    assert "memory a device: 22.35 of 14.9 GiB" in describe(report, "v5e:2x2")
    with pytest.raises(MemoryError, match="does NOT fit: raise mesh.fsdp"):
        verdict(report)
    crossing = replace(report, between_slices=(3, 10**9))
    assert crossing.limit == "network" and crossing.seconds["network"] == 10**9 / 3.125e9
    assert "between slices: 3 a step, 0.931 GiB arrive at a device\n" in describe(crossing, "2*v5e:2x1")
    unknown = replace(crossing, chip=step.CHIPS["TPU v4"])
    assert "network" not in unknown.seconds and "in a time that is not known" in describe(
        unknown, "2*v4:1x1x2"
    )
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.35G.\nLargest program allocations in hbm:\n"
        '  1. Size: 8.00G\n     Operator: op_name="jit(update)/x/dot"\n     Shape: f32[1,2]{1,0}\n'
    )
    summary = step._buffers(message)
    assert "needs 20.10G of 15.75G" in summary and "8.00G f32[1,2]{1,0} jit(update)/x/dot" in summary


TPU = """
import json, sys
from unclip_jax import sharding
from unclip_jax.cli.train import load_config
from unclip_jax.compile import step
sharding.FSDP_MIN_SIZE = 256
mesh = step.make_abstract_mesh("v5e:4x4", {"data": 2, "fsdp": 8})
for name, clip in (("upsampler_256", None), ("prior_diffusion", load_config("configs/dalle2/clip.py:tiny"))):
    report, _ = step.compile_step(load_config(f"configs/dalle2/{name}.py:tiny"), clip, mesh)
    figures = [report.chip.name, sorted(report.collectives), report.collectives["all-gather"][0]]
    print("REPORT", json.dumps(figures))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_with_the_tpu_compiler():
    """The real compiler, in separate processes: it reports on two slices, and FSDP moves only parameters and
    gradients."""
    command = [
        sys.executable,
        "-m",
        "unclip_jax.cli.main",
        "compile",
        "configs/dalle2/prior_diffusion.py:tiny",
        "--topology",
        "2*v5e:2x2",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--mesh", "data=2,fsdp=4"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for words in ("8 devices of 2*v5e:2x2", "between slices: ", "network", "it fits"):
        assert words in done.stdout
    done = subprocess.run([sys.executable, "-c", TPU], cwd=ROOT, env=env, capture_output=True, text=True)
    reports = [
        json.loads(line.removeprefix("REPORT "))
        for line in done.stdout.splitlines()
        if line.startswith("REPORT ")
    ]
    assert len(reports) == 2, done.stderr
    for chip, kinds, gathers in reports:
        assert chip == "v5e" and set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"} and gathers > 10


@pytest.mark.parametrize(
    "variant, beside", [("tiny-cin", {"label": (16,)}), ("tiny-sr", {"low_res": (16, 8, 8, 3)})]
)
def test_latent_diffusion_without_captions(variant, beside):
    """The step's batch and the sampler have what conditions the network."""
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    config = load_config(str(ROOT / f"configs/latent/latent.py:{variant}"))
    draw, params, given = step.sampler(config, None, mesh)
    assert jax.eval_shape(draw, params, given).shape == (16, 8, 8, 4)
    batch = step.train_step(config, None, mesh).batch
    assert {name: leaf.shape for name, leaf in batch.items()} == {"image": (16, 64, 64, 3)} | beside
