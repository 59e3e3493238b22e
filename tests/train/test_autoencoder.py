"""The autoencoder's stage: its losses beside taming-transformers', and what its runs promise."""

import functools
import importlib
import json
import sys
import types

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.checkpoint.peers import randomize
from tests.helpers import param_count, random_params, struct
from tests.models.test_autoencoder import TINY, converted, images
from tests.runs import ROOT
from unclip_jax import sharding
from unclip_jax.checkpoint.check import check_config, check_shapes
from unclip_jax.checkpoint.load import load_part, load_trained
from unclip_jax.checkpoint.providers.autoencoder import diffusers_rules
from unclip_jax.cli.train import load_config
from unclip_jax.compile.step import train_step
from unclip_jax.generate.networks import Network
from unclip_jax.models.autoencoder import VQAutoencoder
from unclip_jax.models.discriminator import PatchDiscriminator
from unclip_jax.models.lpips import LPIPS
from unclip_jax.models.quantiser import init_averages
from unclip_jax.run import defaults
from unclip_jax.train import autoencoder


def taming(name):
    """A module of taming-transformers. Its losses import torchvision for LPIPS alone, so a stand-in does."""
    for missing in ("torchvision", "torchvision.models"):
        sys.modules.setdefault(missing, types.ModuleType(missing))
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    try:
        return importlib.import_module(f"taming.modules.{name}")
    finally:
        for missing in ("torchvision", "torchvision.models"):
            sys.modules.pop(missing)


def discriminator_variables(theirs, layers):
    """Their discriminator's weights and statistics in our names."""
    numbers = {0: 0} | {i: 3 * i - 1 for i in range(1, layers + 2)}
    # Copies: their training moves the statistics in place, while our program may still read them.
    state = {key: np.array(value) for key, value in theirs.state_dict().items()}
    params, stats = {}, {}
    for i, at in numbers.items():
        params[f"conv_{i}"] = {"kernel": state[f"main.{at}.weight"].transpose(2, 3, 1, 0)}
        if f"main.{at}.bias" in state:
            params[f"conv_{i}"]["bias"] = state[f"main.{at}.bias"]
        if 0 < i <= layers:
            norm = f"main.{at + 1}."
            params[f"norm_{i}"] = {"scale": state[f"{norm}weight"], "bias": state[f"{norm}bias"]}
            stats[f"norm_{i}"] = {"mean": state[f"{norm}running_mean"], "var": state[f"{norm}running_var"]}
    return params, stats


@pytest.mark.parametrize("layers, count, side", [(3, 2_765_633, 30), (2, 663_361, 62)])
def test_published_size_of_the_discriminator(layers, count, side):
    model = PatchDiscriminator(layers=layers)
    shapes = jax.eval_shape(model.init, jax.random.key(0), struct(1, 256, 256, 3))
    assert param_count(shapes["params"]) == count
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), shapes, struct(2, 256, 256, 3))
    assert logits.shape == (2, side, side)
    smallest = model.smallest()
    call = lambda side: jax.eval_shape(
        lambda v, x: model.apply(v, x, False), shapes, struct(1, side, side, 3)
    )
    assert call(smallest).shape == (1, 1, 1)
    assert 0 in call(smallest - 1).shape


def adversarial_config(start, layers=2, **quantiser):
    """The settings that the losses read."""
    config = load_config(str(ROOT / "configs/latent/autoencoder.py:vq-f8"))
    with config.unlocked():
        config.discriminator.update({"start": start, "weight": 0.7, "layers": layers, "channels": 16})
        config.quantiser = defaults.quantiser(**quantiser)
        config.model.codes = 48
        config.perceptual_weight = 0.0
    return config


@pytest.mark.parametrize("step", [2, 3])
def test_losses_equal_taming(step):
    """Both players' losses, metrics and gradients, before the discriminator's start (3) and after it.

    The generator is diffusers' `VQModel`, the losses are taming's `VQLPIPSWithDiscriminator`.
    """
    from diffusers import VQModel

    losses_of = taming("losses.vqperceptual")
    theirs = randomize(
        VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, num_vq_embeddings=48,
        )
    )  # fmt: skip
    critic = taming("discriminator.model").NLayerDiscriminator(n_layers=2, ndf=16).train()
    torch.manual_seed(0)
    critic.apply(taming("discriminator.model").weights_init)
    loss_of = losses_of.VQLPIPSWithDiscriminator.__new__(losses_of.VQLPIPSWithDiscriminator)
    torch.nn.Module.__init__(loss_of)
    loss_of.discriminator, loss_of.disc_loss = critic, losses_of.hinge_d_loss
    for key, value in {
        "codebook_weight": 1.0, "pixel_weight": 1.0, "perceptual_weight": 0.0, "disc_conditional": False,
        "discriminator_iter_start": 3, "disc_factor": 1.0, "discriminator_weight": 0.7,
    }.items():  # fmt: skip
        setattr(loss_of, key, value)

    model = VQAutoencoder(**TINY, latent_channels=4, codes=48)
    params = converted(model, theirs, diffusers_rules(2))[0]["params"]
    judge, stats = discriminator_variables(critic, 2)
    params |= {"discriminator": judge}
    extra, config = {"discriminator": stats}, adversarial_config(3)
    x, x_torch = images(24, 28)
    ours = PatchDiscriminator(16, 2)
    shared = {"frozen": {}, "model": model, "critic": ours, "config": config}
    batch, key = {"image": x}, jax.random.key(0)

    # ---------------------------------------------------------------------------------------- generator
    objective = functools.partial(autoencoder.generator_loss, lpips=None, **shared)
    (loss, (metrics, extra)), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, extra, key, batch, step
    )
    latents = theirs.encode(x_torch).latents
    quantised, quantiser_loss, _ = theirs.quantize(latents)
    made = theirs.decode(quantised, force_not_quantize=True).sample
    expected, log = loss_of(quantiser_loss, x_torch, made, 0, step, last_layer=theirs.decoder.conv_out.weight)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    factor = log["train/disc_factor"].item()
    assert factor == (step >= 3)
    wanted = {
        "pixels": log["train/nll_loss"],
        "adversarial": log["train/g_loss"],
        "quantiser": log["train/quant_loss"],
        "adaptive_weight": factor * log["train/d_weight"],
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value.item(), rtol=2e-3, atol=1e-6, err_msg=name)
    kernel = lambda tensor: tensor.grad.numpy().transpose(2, 3, 1, 0)
    flat = traverse_util.flatten_dict(jax.device_get(gradient), sep="/")
    for name, tensor in (
        ("decoder/conv_out/kernel", theirs.decoder.conv_out.weight),
        ("encoder/conv_in/kernel", theirs.encoder.conv_in.weight),
    ):
        largest = np.abs(kernel(tensor)).max()
        np.testing.assert_allclose(flat[name], kernel(tensor), atol=5e-3 * largest, err_msg=name)
    np.testing.assert_allclose(flat["codebook"], theirs.quantize.embedding.weight.grad.numpy(), atol=1e-5)

    # ---------------------------------------------------------------------------------------- discriminator
    critic.zero_grad()
    judge_loss = functools.partial(autoencoder.discriminator_loss, **shared)
    (loss, (metrics, extra)), gradient = jax.jit(jax.value_and_grad(judge_loss, has_aux=True))(
        params, extra, key, batch, step
    )
    expected, log = loss_of(quantiser_loss.detach(), x_torch, made.detach(), 1, step)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    for name in ("real", "fake"):
        np.testing.assert_allclose(metrics[name], log[f"train/logits_{name}"].item(), rtol=1e-3, atol=1e-5)
    theirs_gradient = kernel(critic.main[2].weight)
    ours_gradient = gradient["discriminator"]["conv_1"]["kernel"]
    np.testing.assert_allclose(
        ours_gradient, theirs_gradient, atol=2e-3 * np.abs(theirs_gradient).max() + 1e-9
    )
    assert np.any(theirs_gradient) == (step >= 3)
    assert not np.any(np.asarray(gradient["decoder"]["conv_out"]["kernel"]))
    # Three calls have moved the running means: fake, real, fake. torch's variances are unbiased.
    np.testing.assert_allclose(
        extra["discriminator"]["norm_1"]["mean"], critic.main[3].running_mean.numpy(), atol=1e-5
    )


def test_intended_beta_and_averages():
    """The other codebooks give other losses; averages get no gradient, and move `extra`."""
    model = VQAutoencoder(**TINY, latent_channels=4, codes=48)
    x = images(16, 16)[0]
    params = model.init(jax.random.key(0), x)["params"]
    found = {}
    for name, settings in {
        "legacy": {}, "intended": {"legacy": False}, "averages": {"codebook": "averages", "decay": 0.9},
    }.items():  # fmt: skip
        config = adversarial_config(0, **settings)
        extra = {"averages": {"codebook": init_averages(params["codebook"])}} if name == "averages" else {}

        def loss(params, extra=extra, config=config):
            out = autoencoder.reconstruct(params, extra, jax.random.key(0), x, model=model, config=config)
            return out[2], out[4]

        (value, moved), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        found[name] = float(value), np.abs(np.asarray(gradient["codebook"])).max()
    assert moved["averages"]["codebook"].steps == 1 and moved["averages"]["codebook"].counts.sum() > 0
    distance = found["legacy"][0] / 1.25
    np.testing.assert_allclose(found["intended"][0], 1.25 * distance, rtol=1e-5)
    np.testing.assert_allclose(found["averages"][0], 0.25 * distance, rtol=1e-5)
    np.testing.assert_allclose(found["intended"][1], 4 * found["legacy"][1], rtol=1e-4)
    assert found["averages"][1] == 0


def test_batch_statistics_are_global():
    """Eight devices that share a batch normalise it like one."""
    model = PatchDiscriminator(8, 2)
    x = images(16, 16)[0][np.arange(8) % 2] * np.linspace(0.2, 1.0, 8)[:, None, None, None]
    variables = model.init(jax.random.key(0), x)
    run = jax.jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))
    one, stats = run(variables, x)
    mesh = sharding.make_mesh({"data": 8})
    spread = jax.device_put(x, NamedSharding(mesh, sharding.BATCH))
    eight, stats_of_eight = run(jax.device_put(variables, NamedSharding(mesh, P())), spread)
    np.testing.assert_allclose(one, eight, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stats, stats_of_eight)


def test_a_run_is_a_part(tiny_run, tmp_path):
    """It holds the autoencoder alone, described; the codebook is that of the averages; latents have scale."""
    part, meta, _ = load_trained(tiny_run("autoencoder"))
    check_config(part.config, "run")
    shapes = {path: a.shape for path, a in traverse_util.flatten_dict(part.params, sep="/").items()}
    check_shapes(part.config, shapes, "run")
    assert "discriminator" not in part.params
    model = VQAutoencoder(**part.config["model"])
    x = images(16, 16)[0]
    made, quantised = model.apply({"params": part.params}, x)
    assert made.shape == x.shape and quantised.codes.max() < 16
    assert part.config["scale_factor"] > 0 and part.config["scale_factor"] != 1.0
    figures = {"eval_psnr", "eval_l1", "eval_codes_used", "eval_perplexity"}
    rows = [json.loads(row) for row in (tiny_run("autoencoder") / "metrics.jsonl").read_text().splitlines()]
    assert figures <= set(rows[-1]) and 1 <= rows[-1]["eval_perplexity"] <= 16
    assert {"generator_adaptive_weight", "discriminator_real", "generator_codes_used"} <= set(rows[0])


def test_scale_factor_makes_unit_latents(tiny_run):
    """Scaled latents of the first training batch have the standard deviation 1."""
    from unclip_jax.data import pipeline, sources
    from unclip_jax.data.examples import picture_example

    part, meta = load_part(tiny_run("autoencoder"), "autoencoder")
    example = functools.partial(picture_example, size=16, crop_scale=meta["config"]["data"]["crop_scale"])
    source = sources.make_source(meta["config"]["data"]["train"])
    (batch,) = pipeline.train_batches(
        source, example, batch_size=16, seed=0, num_steps=1, workers=pipeline.Workers("numpy")
    )
    z = VQAutoencoder(**part.config["model"]).apply({"params": part.params}, batch["image"], method="encode")
    np.testing.assert_allclose(part.config["scale_factor"] * np.std(z), 1.0, rtol=1e-4)


REFUSED = [
    ({"kl_weight": 1e-6}, "set kl_weight for a KL autoencoder or quantiser for a VQ"),
    ({"image_size": 15}, "image_size=15 must be a multiple of 2"),
    ({"model.groups": 3}, "must be multiples of model.groups=3"),
    ({"model.attention_levels": (2,)}, "must be below the 2 levels"),
    ({"perceptual_weight": 1.0}, "frozen.lpips names the network of LPIPS"),
    ({"discriminator.layers": 3}, "too small for discriminator.layers=3, which need 24"),
    ({"discriminator_optimizer.warmup_steps": 4}, "discriminator_optimizer.warmup_steps=4 must be fewer"),
    ({"quantiser.decay": 1.0}, "quantiser.decay must be a number in"),
    ({"model.codes": 1}, "model.codes must be a whole number"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[next(iter(row[0])) for row in REFUSED])
def test_settings_that_do_not_fit(changes, message):
    config = load_config(str(ROOT / "configs/emoji/autoencoder.py:tiny-vq"))
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        autoencoder.check(config)


def test_kl_losses_are_sums():
    """Without a discriminator: sums over pixels and latents / B, as published."""
    config = load_config(str(ROOT / "configs/latent/autoencoder.py:tiny"))
    with config.unlocked():
        config.discriminator, config.kl_weight = None, 0.5
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    stage = autoencoder.stage(config, mesh, {})
    assert [player.name for player in stage.players] == [""]
    x = images(16, 16)[0]
    params, extra = stage.init(jax.random.key(0))
    loss, (metrics, _) = jax.jit(functools.partial(stage.objective, frozen={}))(
        params, extra, jax.random.key(1), {"image": x}, 0
    )
    moments = stage.model.apply({"params": params}, x, method="encode")
    kl = 0.5 * np.sum(np.square(moments.mean) + np.exp(moments.logvar) - 1 - moments.logvar) / 2
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["pixels"], metrics["l1"] * 16 * 16 * 3, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["pixels"] + 0.5 * metrics["kl"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "tiny-vq"])
def test_lpips_is_added_to_every_value(kind):
    """An image's distance counts once for each of its values: in KL's sum, and once in VQ's mean."""
    config = load_config(str(ROOT / f"configs/latent/autoencoder.py:{kind}"))
    with config.unlocked():
        config.discriminator, config.perceptual_weight = None, 0.5
        config.frozen.lpips = "lpips"
    module, x = LPIPS(widths=(4,) * 5, convolutions=(1,) * 5), images(16, 16)[0]
    params = random_params(module, x, x)
    frozen = {"lpips": Network(module, params, {"kind": "lpips", "model": {}}, "0" * 16)}
    stage = autoencoder.stage(config, sharding.make_mesh(None, jax.devices()[:1]), frozen)
    assert stage.part["frozen"] == {"lpips": "0" * 16}
    begun, extra = stage.init(jax.random.key(0))
    loss, (metrics, _) = jax.jit(stage.objective)(
        begun, extra, jax.random.key(1), {"image": x}, 0, frozen={"lpips": params}
    )
    values = 1 if kind == "tiny-vq" else 16 * 16 * 3
    expected = values * (metrics["l1"] + 0.5 * metrics["lpips"])
    assert metrics["lpips"] != 0
    np.testing.assert_allclose(metrics["pixels"], expected, rtol=1e-5)


def test_the_papers_step_is_whole():
    """The update of kl-f8 at full size, by shapes: both players, LPIPS, and a part of the published size."""
    config = load_config(str(ROOT / "configs/latent/autoencoder.py:kl-f8"))
    with config.unlocked():
        config.mesh.fsdp, config.batch_size = 1, 2
    step = train_step(config, None, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    state, metrics = jax.eval_shape(step.update, step.state, step.frozen, step.batch)
    assert step.batch["image"].shape == (2, 256, 256, 3)
    assert param_count(state.ema_params) == 83_653_863
    assert param_count(state.params) == 83_653_863 + 2_765_633
    assert param_count(step.frozen) == 14_716_160
    assert {"loss", "generator_lpips", "generator_adaptive_weight", "discriminator_loss"} <= set(metrics)
