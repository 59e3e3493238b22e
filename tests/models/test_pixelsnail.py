"""PixelSNAIL: published sizes, causality, equality with a torch re-derivation, and drawing with caches.

The public code is on no registry, so its network is derived again here in torch, with the activations in
place that it has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import traverse_util

from tests.helpers import param_count, param_shapes, random_params, struct
from tests.runs import ROOT
from unclip_jax.checkpoint.check import check_config
from unclip_jax.cli.train import load_config, override
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import TokenSamplingOptions
from unclip_jax.generate.text import TextConditioning, Texts
from unclip_jax.generate.tokens import sample_grid
from unclip_jax.models.pixelsnail import PixelSNAIL
from unclip_jax.run.resume import config_json
from unclip_jax.train import pixelsnail

SIDE, K = 6, 7
SMALL = {
    "side": SIDE,
    "codes": K,
    "channels": 8,
    "kernel": 3,
    "blocks": 2,
    "res_blocks": 1,
    "res_channels": 6,
}
SMALL |= {"heads": 2}
KINDS = {
    "top": {},
    "bottom": {"attention": False, "coarse_codes": 5, "condition_blocks": 2},
    "captions": {"text_dim": 3, "coarse_codes": 5, "condition_blocks": 1, "out_blocks": 1},
}
RNG = np.random.default_rng(0)
CODES = jnp.asarray(RNG.integers(0, K, (2, SIDE, SIDE)), jnp.int32)


def made(kind, **changes):
    """A small prior with random weights, and its conditions."""
    model = PixelSNAIL(**SMALL | KINDS[kind] | changes)
    given = {}
    if model.coarse_codes is not None:
        given["coarse"] = jnp.asarray(RNG.integers(0, 5, (2, SIDE // 2, SIDE // 2)), jnp.int32)
    if model.text_dim is not None:
        given["text_embed"] = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    return model, random_params(model, CODES, **given), given


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_position_sees_what_is_before_it_and_nothing_else(kind, monkeypatch):
    """By the gradient of each position's logits with respect to relaxed one-hot codes."""
    model, params, given = made(kind)
    weight = jnp.asarray(RNG.normal(size=K), jnp.float32)
    harden = lambda self, codes, size: codes if codes.shape[-1] == K else jax.nn.one_hot(codes, size)
    monkeypatch.setattr(PixelSNAIL, "_one_hot", harden)

    def summed(one_hot):
        return model.apply({"params": params}, one_hot, **given, method="run")[0] @ weight

    relaxed = jax.nn.one_hot(CODES, K)
    jacobian = jax.jit(jax.jacrev(summed))(relaxed)[:, :, 0]
    reach = np.abs(jacobian).max(-1).reshape(SIDE**2, SIDE**2)  # of position n to position m
    assert np.all(reach[np.triu_indices(SIDE**2)] == 0)
    if model.attention:
        # A key does not hold its own position's code, so attention begins a row later at the latest.
        n, m = np.tril_indices(SIDE**2, -SIDE)
        assert np.all(reach[n, m] > 0)
    else:  # two blocks of 3 x 3 see some rows
        assert np.all(np.diagonal(reach, -SIDE) > 0)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_drawing_with_caches_equals_drawing_without(kind, scale):
    """Every code is the one that the whole network gives for the codes before it; guided draws, too."""
    model, params, given = made(kind)
    if scale != 1 and model.text_dim is None:
        pytest.skip("nothing to guide")
    network = Network(model, params, {})
    options = TokenSamplingOptions(temperature=0.0, guidance_scale=scale)
    texts = None
    if model.text_dim is not None:
        empty = jnp.asarray(RNG.normal(size=(1, 3)), jnp.float32)
        texts = Texts(TextConditioning(given["text_embed"], None, None), TextConditioning(empty, None, None))
    keys = jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(lambda keys: sample_grid(network, keys, options, coarse=given.get("coarse"), texts=texts))
    codes, finite = draw(keys)
    assert codes.shape == (2, SIDE, SIDE) and finite.all()
    logits = network.apply(codes, **given)
    if scale != 1:
        without = given | {"text_embed": jnp.broadcast_to(empty, (2, 3))}
        other = network.apply(codes, **without)
        logits = other + scale * (logits - other)
    np.testing.assert_array_equal(codes, jnp.argmax(logits, -1))
    assert len(np.unique(codes)) > 2


def test_a_draw_depends_on_its_key_alone_and_damage_is_seen():
    model, params, _ = made("top")
    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(
        lambda params, keys: sample_grid(Network(model, params, {}), keys, TokenSamplingOptions(top_k=4))
    )
    codes, finite = draw(params, keys)
    np.testing.assert_array_equal(codes[:2], draw(params, keys[:2])[0])
    assert finite.all() and not np.array_equal(codes[0], codes[1])
    params["logits"]["bias"] = params["logits"]["bias"] * np.nan
    assert not draw(params, keys)[1].any()


# ------------------------------------------------------------------------------------ the public network
class Derived:
    """The public network in torch, on our parameters: weight normalisation, and activations in place."""

    def __init__(self, model, params):
        self.model = model
        self.flat = {
            k: torch.from_numpy(np.array(v)) for k, v in traverse_util.flatten_dict(params, sep="/").items()
        }

    def conv(self, name, x, pad=(0, 0, 0, 0), causal=False):
        v = self.flat[f"{name}/kernel"].permute(3, 2, 0, 1).clone()
        if causal:
            v[:, :, -1, v.shape[3] // 2 :] = 0
        g = self.flat[f"{name}/scale"][:, None, None, None]
        weight = torch._weight_norm(v, g, 0)
        return F.conv2d(F.pad(x, pad), weight, self.flat.get(f"{name}/bias"))

    def gated(self, name, x, size=1, causal=False, condition=None, auxiliary=None):
        half = size // 2
        pad = (half, half, size - 1, 0) if causal else (half,) * 4
        end = "/conv" if causal else ""
        x = F.elu(x, inplace=True)  # the skip has the activated values
        h = self.conv(f"{name}/conv1{end}", x, pad, causal)
        if auxiliary is not None:
            h = h + self.conv(f"{name}/auxiliary", F.elu(auxiliary))
        h = self.conv(f"{name}/conv2{end}", F.elu(h), pad, causal)
        if condition is not None:
            h = h + self.conv(f"{name}/condition", condition)
        return F.glu(h, 1) + x

    def attend(self, name, query, key):
        b, _, h, w = key.shape
        heads = lambda x: x.reshape(b, self.model.heads, -1, h * w).transpose(2, 3)
        q, k, v = (
            heads(self.conv(f"{name}/{n}", x)) for n, x in (("query", query), ("key", key), ("value", key))
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mask = torch.tril(torch.ones(h * w, h * w), -1)
        weights = torch.softmax(scores.masked_fill(mask == 0, -1e9), -1) * (torch.arange(h * w) > 0)[:, None]
        return (weights @ v).transpose(2, 3).reshape(b, -1, h, w)

    def __call__(self, codes, coarse=None):
        model, one_hot = self.model, lambda c, size: F.one_hot(c.long(), size).movedim(-1, 1).float()
        x, condition = one_hot(codes, model.codes), None
        down = self.conv("down", x, (2, 2, 1, 0))
        right = self.conv("right", x, (1, 0, 2, 0))
        h = F.pad(down, (0, 0, 1, 0))[:, :, :SIDE] + F.pad(right, (1, 0, 0, 0))[:, :, :, :SIDE]
        if coarse is not None:
            condition = self.conv("coarse_in", one_hot(coarse, model.coarse_codes), (1, 1, 1, 1))
            for i in range(model.condition_blocks):
                condition = self.gated(f"coarse_{i}", condition, 3)
            condition = F.interpolate(condition, scale_factor=2)
        axis = (torch.arange(SIDE) - SIDE / 2) / SIDE
        background = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(codes), 2, SIDE, SIDE)
        for i in range(model.blocks):
            name, out = f"block_{i}", h
            for j in range(model.res_blocks):
                out = self.gated(f"{name}/res_{j}", out, model.kernel, True, condition)
            if not model.attention:
                h = self.conv(f"{name}/out", torch.cat([out, background], 1))
                continue
            key = self.gated(f"{name}/key_res", torch.cat([h, out, background], 1))
            query = self.gated(f"{name}/query_res", torch.cat([out, background], 1))
            h = self.gated(f"{name}/out_res", out, auxiliary=self.attend(f"{name}/attn", query, key))
        return self.conv("logits", F.elu(h))


@pytest.mark.parametrize("kind", ["top", "bottom"])
def test_equals_the_public_network(kind):
    model, params, given = made(kind, activated_skip=True)
    ours = jax.jit(model.apply)({"params": params}, CODES, **given)
    coarse = None if "coarse" not in given else torch.from_numpy(np.array(given["coarse"]))
    with torch.no_grad():
        theirs = Derived(model, params)(torch.from_numpy(np.array(CODES)), coarse)
    np.testing.assert_allclose(ours, theirs.movedim(1, -1).numpy(), atol=1e-4)
    paper = PixelSNAIL(**SMALL | KINDS[kind]).apply({"params": params}, CODES, **given)
    assert np.abs(paper - ours).max() > 0.01  # the skip matters


# ------------------------------------------------------------------------------------ recipes
def shapes_at(config):
    """The parameters' shapes of the recipe's prior over the paper's VQ-VAE."""
    level = config.level
    model = config_json(config.model) | {"side": 256 // (4 * 2**level), "codes": 512, "text_dim": None}
    model["coarse_codes"] = 512 if level == 0 else None
    check_config({"kind": "pixelsnail", "level": level, "model": model}, "test")
    grid = lambda side: struct(1, side, side, dtype=jnp.int32)
    given = {} if level else {"coarse": grid(model["side"] // 2)}
    return param_shapes(PixelSNAIL(**model), grid(model["side"]), **given)


@pytest.mark.parametrize("variant, count", [("", 84_873_280), ("bottom", 89_762_816)])
def test_published_sizes(variant, count):
    config = load_config(
        f"{ROOT}/configs/vqvae2/pixelsnail.py:{variant}"
        if variant
        else f"{ROOT}/configs/vqvae2/pixelsnail.py"
    )
    pixelsnail.check(config)
    assert param_count(shapes_at(config)) == count


@pytest.mark.parametrize("variant", ["top", "paper-top", "paper-bottom", "emoji-top", "emoji-bottom", "tiny"])
def test_other_recipes_describe_networks(variant):
    config = load_config(f"{ROOT}/configs/vqvae2/pixelsnail.py:{variant}")
    pixelsnail.check(config)
    assert param_count(shapes_at(config)) > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model.kernel": 4}, "model.kernel=4 must be odd"),
        ({"model.attention": True, "model.heads": 3}, "must be a multiple of model.heads=3"),
        ({"frozen.clip": None}, "guidance needs captions"),
        ({"sampling.temperature": -1.0}, "temperature must be 0 or"),
        ({"level": -1}, "level must be a whole number in"),
    ],
)
def test_refused_settings(settings, words):
    config = load_config(f"{ROOT}/configs/vqvae2/pixelsnail.py:tiny-bottom")
    for key, value in settings.items():
        override(config, key, value)
    with pytest.raises(InputError, match=words):
        pixelsnail.check(config)
