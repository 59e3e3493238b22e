"""VQ-VAE-2: published sizes; the same codes and images as a torch re-derivation, from the public layout's
files; relaxed codes; and a run that learns codebooks on both levels.

The public code is on no registry, so the network is derived again here in torch, as functions of a state
dictionary with its names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.helpers import param_count, param_shapes, struct
from tests.runs import ROOT
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.quantiser import annealed, gumbel_softmax, quantise, quantise_softly
from unclip_jax.models.vqvae import VQVAE
from unclip_jax.run.resume import config_json
from unclip_jax.sharding import make_mesh
from unclip_jax.train import vqvae

CHANNELS, RESIDUAL, BLOCKS, Z, K = 12, 5, 2, 6, 20


def public_state(seed=0):
    """Random weights under the public names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape, bias=None, fan=None):
        fan = np.prod(shape[1:]) if fan is None else fan
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * fan**-0.5
        state[f"{name}.bias"] = 0.2 * torch.randn(bias or shape[0], generator=generator)

    def blocks(name, first):
        for i in range(first, first + BLOCKS):
            add(f"{name}.blocks.{i}.conv.1", RESIDUAL, CHANNELS, 3, 3)
            add(f"{name}.blocks.{i}.conv.3", CHANNELS, RESIDUAL, 1, 1)

    def up(name, width, out):
        add(name, width, out, 4, 4, bias=out, fan=4 * width)

    half = CHANNELS // 2
    add("enc_b.blocks.0", half, 3, 4, 4), add("enc_b.blocks.2", CHANNELS, half, 4, 4)
    add("enc_b.blocks.4", CHANNELS, CHANNELS, 3, 3), blocks("enc_b", 5)
    add("enc_t.blocks.0", half, CHANNELS, 4, 4), add("enc_t.blocks.2", CHANNELS, half, 3, 3)
    blocks("enc_t", 3)
    add("quantize_conv_t", Z, CHANNELS, 1, 1), add("quantize_conv_b", Z, Z + CHANNELS, 1, 1)
    add("dec_t.blocks.0", CHANNELS, Z, 3, 3), blocks("dec_t", 1), up("dec_t.blocks.4", CHANNELS, Z)
    up("upsample_t", Z, Z)
    add("dec.blocks.0", CHANNELS, 2 * Z, 3, 3), blocks("dec", 1)
    up("dec.blocks.4", CHANNELS, half), up("dec.blocks.6", half, 3)
    for level in "tb":
        state[f"quantize_{level}.embed"] = 0.3 * torch.randn(Z, K, generator=generator)
        state[f"quantize_{level}.cluster_size"] = torch.rand(K, generator=generator)
        state[f"quantize_{level}.embed_avg"] = torch.randn(Z, K, generator=generator)
    return state


class Derived:
    """The public network in torch, as functions of the state dictionary."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1, padding=0):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def up(self, name, x):
        return F.conv_transpose2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 2, 1)

    def blocks(self, name, x, first):
        for i in range(first, first + BLOCKS):
            h = self.conv(f"{name}.blocks.{i}.conv.1", F.relu(x), padding=1)
            x = x + self.conv(f"{name}.blocks.{i}.conv.3", F.relu(h))
        return F.relu(x)

    def quantize(self, level, z):
        embed = self.state[f"quantize_{level}.embed"]
        distance = (z.movedim(1, -1)[..., None] - embed).square().sum(-2)
        codes = distance.argmin(-1)
        return codes, embed.T[codes].movedim(-1, 1)

    def encode(self, x):
        b = F.relu(self.conv("enc_b.blocks.0", x, 2, 1))
        b = F.relu(self.conv("enc_b.blocks.2", b, 2, 1))
        b = self.blocks("enc_b", self.conv("enc_b.blocks.4", b, padding=1), 5)
        t = F.relu(self.conv("enc_t.blocks.0", b, 2, 1))
        t = self.blocks("enc_t", self.conv("enc_t.blocks.2", t, padding=1), 3)
        codes_t, t = self.quantize("t", self.conv("quantize_conv_t", t))
        dec_t = self.blocks("dec_t", self.conv("dec_t.blocks.0", t, padding=1), 1)
        b = torch.cat([self.up("dec_t.blocks.4", dec_t), b], 1)
        codes_b, b = self.quantize("b", self.conv("quantize_conv_b", b))
        return codes_b, codes_t, self.decode(b, t)

    def decode(self, b, t):
        h = torch.cat([self.up("upsample_t", t), b], 1)
        h = self.blocks("dec", self.conv("dec.blocks.0", h, padding=1), 1)
        return self.up("dec.blocks.6", F.relu(self.up("dec.blocks.4", h)))


@pytest.fixture(scope="module")
def public():
    return public_state()


def write(state, folder, kind):
    folder.mkdir(exist_ok=True)
    if kind == "pt":  # as a distributed run saves it
        torch.save({f"module.{name}": value for name, value in state.items()}, folder / "vqvae_560.pt")
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "vqvae.safetensors")


@pytest.mark.parametrize("kind, sides", [("pt", (24, 40)), ("safetensors", (16, 32))])
def test_equals_the_public_network(public, kind, sides, tmp_path):
    """Codes of both levels and the image, read from a file in the public layout; also at oblong sizes."""
    write(public, tmp_path, kind)
    part = load_bundle(tmp_path).parts["vqvae"]
    sizes = {"channels": CHANNELS, "residual_channels": RESIDUAL, "res_blocks": BLOCKS, "codes": K}
    assert part.config["model"] == sizes | {
        "embed_dim": Z, "levels": 2, "halvings": 2, "image_channels": 3
    }  # fmt: skip
    model = build_model(part.config)
    x = np.random.default_rng(1).uniform(-1, 1, (2, *sides, 3)).astype(np.float32)
    made, levels = jax.jit(model.apply)({"params": part.params}, x)
    codes_b, codes_t, expected = Derived(public).encode(torch.from_numpy(x).movedim(-1, 1))
    np.testing.assert_array_equal(levels[0].quantised.codes, codes_b.numpy())
    np.testing.assert_array_equal(levels[1].quantised.codes, codes_t.numpy())
    np.testing.assert_allclose(made, expected.movedim(1, -1).numpy(), atol=1e-4)
    again = model.apply(
        {"params": part.params}, [level.quantised.codes for level in levels], method="decode_codes"
    )
    np.testing.assert_allclose(again, made, atol=1e-5)
    assert len(np.unique(codes_b)) > 3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("quantize_t.embed"), "parameters are missing in it: codebook_1"),
        (lambda s: s.update({"extra": torch.zeros(2)}), "1 tensors of the file have no use: module.extra"),
        (lambda s: s.update({"dec_t.blocks.0.bias": torch.zeros(3)}), "shapes do not fit"),
        (lambda s: s.pop("quantize_b.embed"), "is no VQ-VAE-2 of two levels: it has no quantize_b.embed"),
    ],
    ids=["missing", "more", "another shape", "another network"],
)
def test_other_networks_are_refused(public, change, words, tmp_path):
    state = dict(public)
    change(state)
    write(state, tmp_path, "pt")
    with pytest.raises(InputError) as error:
        load_part(tmp_path / "vqvae_560.pt", "vqvae")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variant, count, sides",
    [(":public", 1_388_867, (64, 32)), ("", 1_716_803, (64, 32)), (":ffhq", 3_197_059, (128, 64, 32))],
)
def test_published_sizes(variant, count, sides):
    config = load_config(str(ROOT / f"configs/vqvae2/vqvae.py{variant}"))
    vqvae.check(config)
    model = VQVAE(**config_json(config.model))
    shapes = param_shapes(model, struct(1, 256, 256, 3))
    assert param_count({k: v for k, v in shapes.items() if not k.startswith("codebook")}) == count
    assert all(shapes[f"codebook_{level}"].shape == (512, 64) for level in range(len(sides)))
    found = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x)[1], shapes, struct(1, *(config.image_size,) * 2, 3)
    )
    assert tuple(level.quantised.codes.shape[1] for level in found) == sides == model.sides(config.image_size)


def test_relaxed_codes_become_the_nearest():
    """At a low temperature a relaxed draw of well separated vectors is the nearest; its gradient reaches both
    the input and the codebook."""
    rng = np.random.default_rng(0)
    codebook = jnp.asarray(5 * rng.normal(size=(7, 3)), jnp.float32)
    z = codebook[rng.integers(0, 7, (4, 5))] + 0.1 * rng.normal(size=(4, 5, 3)).astype(np.float32)
    key = jax.random.key(0)
    soft, hard = quantise_softly(z, codebook, key, 1e-2), quantise(z, codebook)
    np.testing.assert_allclose(soft.latents, hard.latents, atol=1e-3)
    np.testing.assert_array_equal(soft.codes, hard.codes)
    follow = lambda z, codebook: jnp.sum(jnp.sin(quantise_softly(z, codebook, key, 5.0).latents))
    for gradient in jax.grad(follow, argnums=(0, 1))(z, codebook):
        assert np.abs(gradient).max() > 1e-3


def test_relaxed_draws_have_the_probabilities():
    """The largest share of a draw is code k with the probability softmax(logits)_k, at any temperature."""
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    shares = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 3)), jax.random.key(1), 2.0)
    np.testing.assert_allclose(jnp.sum(shares, -1), 1.0, rtol=1e-5)
    drawn = np.bincount(np.argmax(shares, -1), minlength=3) / 20_000
    np.testing.assert_allclose(drawn, [0.1, 0.2, 0.7], atol=0.015)


def test_annealed_values():
    at = lambda step: float(annealed(jnp.asarray(step), 1.0, 0.25, 100))
    np.testing.assert_allclose([at(0), at(50), at(100), at(10_000)], [1.0, 0.625, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("relax", [False, True])
def test_loss_is_that_of_the_paper(relax):
    """Mean squared error + beta times the commitment of each level; relaxed codes draw and move codebooks."""
    config = load_config(str(ROOT / "configs/vqvae2/vqvae.py:tiny"))
    if relax:
        override(config, "quantiser.codebook", "gradient")
        with config.unlocked():
            config.relax = {"start": 1.0, "end": 0.5, "steps": 10}
    stage = vqvae.stage(config, make_mesh(None, jax.devices()[:1]), {})
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    params, extra = stage.init(jax.random.key(0))
    (loss, (metrics, moved)), gradient = jax.jit(
        lambda key, step: jax.value_and_grad(stage.objective, has_aux=True)(
            params, extra, key, {"image": x}, step, frozen={}
        )
    )(jax.random.key(1), 5)
    if relax:
        assert metrics["temperature"] == 0.75 and not moved
        assert all(np.abs(gradient[f"codebook_{level}"]).max() > 0 for level in range(2))
        return
    made, levels = stage.model.apply({"params": params}, x)
    expected = np.mean(np.square(made - x))
    for level in levels:
        expected += 0.25 * np.mean(np.square(level.z - level.quantised.vectors))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(moved["averages"][f"codebook_{level}"].steps == 1 for level in range(2))
    assert all(np.abs(gradient[f"codebook_{level}"]).max() == 0 for level in range(2))


def test_a_run_is_a_part(tiny_run):
    """The codebooks are those of the averages, so they have left their first, small values."""
    part, _ = load_part(tiny_run("vqvae"), "vqvae")
    assert part.config["kind"] == "vqvae"
    assert all(np.abs(part.params[f"codebook_{level}"]).max() > 1 / 16 for level in range(2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 20}, "image_size=20 must be a multiple of 8"),
        ({"relax": {"start": 1.0, "end": 0.5, "steps": 9}}, "relaxed codes move the codebook by gradient"),
        ({"relax": {"start": 0.0, "end": 0.5, "steps": 9}}, "relax.start must be a number in"),
        ({"model.levels": 0}, "model.levels must be a whole number in"),
        ({"keep_best": "eval_fid"}, "eval_perplexity_1"),
    ],
)
def test_settings_that_do_not_fit(changes, words):
    config = load_config(str(ROOT / "configs/vqvae2/vqvae.py:tiny"))
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=words):
        vqvae.check(config)


def test_images_that_do_not_fit():
    model = VQVAE(8, 4, 1, 4, 16)
    with pytest.raises(InputError, match="16 x 20 has sides that are no multiples of 8"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 20, 3)))
