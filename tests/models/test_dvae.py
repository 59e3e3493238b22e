"""DALL-E's discrete VAE: published sizes, its losses, and the published pickles, which are read and not run.

The package that defines the published modules is on no registry, so the modules are derived again here in
torch, with the names that the pickles have.
"""

import functools
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import param_count, param_shapes, struct
from tests.runs import ROOT
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.dvae import DVAE, kl_to_uniform, logit_laplace, map_pixels, unmap_pixels
from unclip_jax.models.quantiser import gumbel_softmax
from unclip_jax.run.resume import config_json
from unclip_jax.sharding import make_mesh
from unclip_jax.train import dvae

CHANNELS, CODES, EMBED, LEVELS, BLOCKS = 8, 11, 6, 3, 2


# ------------------------------------------------------------------------------------ the published modules
class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.kw, self.device = kw, torch.device("cpu")
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(0.2 * torch.randn(n_out))

    def forward(self, x):
        return nn.functional.conv2d(x, self.w, self.b, padding=self.kw // 2)


class Block(nn.Module):
    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        self.post_gain = 1 / (LEVELS * BLOCKS) ** 2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, *[n_out // 4] * 3, n_out]
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Half(nn.Module):
    def __init__(self, n_in, widths, n_out, kernels, first, resample):
        super().__init__()
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(n_in, widths[0], first))
        for g, (before, after) in enumerate(zip(widths, widths[1:])):
            group = nn.Sequential()
            for i in range(BLOCKS):
                group.add_module(f"block_{i + 1}", Block(before if i == 0 else after, after, kernels))
            if g < LEVELS - 1:
                group.add_module("pool", resample)
            self.blocks.add_module(f"group_{g + 1}", group)
        output = nn.Sequential()
        output.add_module("relu", nn.ReLU())
        output.add_module("conv", Conv2d(widths[-1], n_out, 1))
        self.blocks.add_module("output", output)

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The halves, and a folder with their pickles; the classes have the names of the published package."""
    torch.manual_seed(0)
    widths = [CHANNELS * 2**i for i in range(LEVELS)]
    encoder = Half(3, [CHANNELS, *widths], CODES, (3, 3, 3, 1), 7, nn.MaxPool2d(2))
    decoder = Half(
        CODES, [EMBED, *widths[::-1]], 6, (1, 3, 3, 3), 1, nn.Upsample(scale_factor=2, mode="nearest")
    )
    folder = tmp_path_factory.mktemp("dalle")
    package = types.ModuleType("dall_e")
    with pytest.MonkeyPatch.context() as patch:
        for module in (Conv2d, Block, Half):
            patch.setattr(module, "__module__", "dall_e")
            setattr(package, module.__name__, module)
        patch.setitem(sys.modules, "dall_e", package)
        torch.save(encoder, folder / "encoder.pkl")
        torch.save(decoder, folder / "decoder.pkl", _use_new_zipfile_serialization=False)
    return encoder.eval(), decoder.eval(), folder


def test_equals_the_published_modules(published):
    """Logits, codes and images, read from both formats of torch's pickles."""
    encoder, decoder, folder = published
    part = load_bundle(folder).parts["dvae"]
    assert part.config["model"] == {
        "channels": CHANNELS, "levels": LEVELS, "level_blocks": BLOCKS, "codes": CODES, "embed_dim": EMBED,
        "image_channels": 3,
    }  # fmt: skip
    model, variables = build_model(part.config), {"params": part.params}
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = 0.8 * (torch.from_numpy(x).movedim(-1, 1) + 1) / 2 + 0.1
        logits = encoder(pixels)
        codes = logits.argmax(1)
        stats = decoder(nn.functional.one_hot(codes, CODES).movedim(-1, 1).float())
        image = torch.clamp((torch.sigmoid(stats[:, :3]) - 0.1) / 0.8, 0, 1)
    ours = jax.jit(functools.partial(model.apply, method="encode"))(variables, x)
    np.testing.assert_allclose(ours, logits.movedim(1, -1).numpy(), atol=1e-4)
    np.testing.assert_array_equal(model.apply(variables, x, method="encode_codes")[0], codes.numpy())
    made = model.apply(variables, codes.numpy(), method="decode_codes")
    np.testing.assert_allclose(made, 2 * image.movedim(1, -1).numpy() - 1, atol=1e-4)
    assert len(np.unique(codes)) > 3


class Foreign(nn.Module):
    pass


def test_other_pickles_are_refused(published, tmp_path, capsys):
    """A class of another package, code, and half a folder: one line each, and nothing runs."""
    folder = published[2]
    (tmp_path / "decoder.pkl").write_bytes((folder / "decoder.pkl").read_bytes())
    with pytest.raises(FileNotFoundError, match="encoder.pkl is missing"):
        load_part(tmp_path, "dvae")

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for value, words in ((Evil(), "exec"), (Foreign(), "Foreign")):
        torch.save(value, tmp_path / "encoder.pkl")
        assert main(["convert", str(tmp_path), "--out", str(tmp_path / "made")]) == 1
        err = capsys.readouterr().err
        assert "its pickle is refused: it asks for" in err and words in err and len(err.splitlines()) == 1
    torch.save({"w": torch.zeros(2)}, tmp_path / "encoder.pkl")
    with pytest.raises(InputError, match="it has no blocks.input.w of 4 axes"):
        load_part(tmp_path, "dvae")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------ sizes and mathematics
def test_published_sizes():
    config = load_config(str(ROOT / "configs/dalle/dvae.py"))
    dvae.check(config)
    model = DVAE(**config_json(config.model))
    shapes = param_shapes(model, struct(1, 256, 256, 3))
    assert param_count(shapes["encoder"]) == 53_786_240
    assert param_count(shapes["decoder"]) == 43_829_766
    logits = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="encode"), shapes, struct(2, 256, 256, 3)
    )
    assert logits.shape == (2, 32, 32, 8192)


def test_logit_laplace_is_a_density():
    """It integrates to one over (0, 1), and its median is the sigmoid of the mean."""
    x = (np.arange(200_000) + 0.5) / 200_000
    for mean, log_scale in ((0.0, -1.0), (1.3, -0.5), (-0.7, 0.3)):
        density = np.exp(-np.asarray(logit_laplace(x, mean, log_scale), np.float64))
        share = np.cumsum(density) / len(x)
        np.testing.assert_allclose(share[-1], 1.0, atol=2e-3)
        np.testing.assert_allclose(x[np.searchsorted(share, 0.5)], 1 / (1 + np.exp(-mean)), atol=2e-3)


def test_pixels_and_divergence():
    image = jnp.linspace(-1, 1, 9)
    assert map_pixels(image).min() == pytest.approx(0.1) and map_pixels(image).max() == pytest.approx(0.9)
    np.testing.assert_allclose(unmap_pixels(map_pixels(image)), image, atol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(jnp.zeros((2, 5))), 0.0, atol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(jnp.array([0.0, -1e4, -1e4, -1e4])), np.log(4), rtol=1e-5)


def test_loss_is_that_of_the_paper():
    """The likelihood per value, plus beta KL(q || uniform) per value, with the schedules' values."""
    config = load_config(str(ROOT / "configs/dalle/dvae.py:tiny"))
    stage = dvae.stage(config, make_mesh(None, jax.devices()[:1]), {})
    params, extra = stage.init(jax.random.key(0))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    run = jax.jit(lambda key, step: stage.objective(params, extra, key, {"image": x}, step, frozen={}))
    loss, (metrics, _) = run(jax.random.key(1), 50)
    np.testing.assert_allclose([metrics["temperature"], metrics["kl_weight"]], [0.53125, 3.3], rtol=1e-5)
    variables = {"params": params}
    logits = stage.model.apply(variables, x, method="encode")
    shares = gumbel_softmax(logits, jax.random.key(1), 0.53125)
    mean, log_scale = stage.model.apply(variables, shares, method="decode")
    nll = np.mean(logit_laplace(map_pixels(x), mean, log_scale))
    kl = np.sum(kl_to_uniform(logits)) / 2
    np.testing.assert_allclose(loss, nll + 3.3 * kl / (16 * 16 * 3), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_size": 15}, "image_size=15 must be a multiple of 2"),
        ({"model.channels": 6}, "model.channels=6 must be a multiple of 4"),
        ({"temperature.end": 0.0}, "temperature.end must be a number in"),
        ({"kl_weight.steps": 0}, "kl_weight.steps must be a whole number in"),
    ],
)
def test_refused_settings(settings, words):
    config = load_config(str(ROOT / "configs/dalle/dvae.py:tiny"))
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match=words):
        dvae.check(config)
