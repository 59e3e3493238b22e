"""The latent U-Net: the published sizes, and diffusers' network at the same random weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.checkpoint.peers import close, nchw, randomize
from tests.helpers import param_count, param_shapes, random_params, struct
from unclip_jax.checkpoint.convert import convert
from unclip_jax.checkpoint.providers.latent_names import diffusers_unet
from unclip_jax.errors import InputError
from unclip_jax.models.latent_unet import LatentUNet

SD1 = dict(
    image_size=64,
    in_channels=4,
    out_channels=4,
    channels=320,
    channel_mult=(1, 2, 4, 4),
    res_blocks=2,
    heads=(8, 8, 8, 8),
    attention_levels=(0, 1, 2),
    context_dim=768,
)
SD2 = SD1 | dict(heads=(5, 10, 20, 20), context_dim=1024, linear=True)


def ldm(channels, mult, levels, latents=3, extra=0, context=None, width=32, depth=1, **others):
    """A network of the paper: heads of `width` channels, or a tuple of heads."""
    heads = width if isinstance(width, tuple) else tuple(channels * m // width for m in mult)
    return dict(
        image_size=64,
        in_channels=latents + extra,
        out_channels=latents,
        channels=channels,
        channel_mult=mult,
        res_blocks=2,
        heads=heads,
        attention_levels=levels,
        context_dim=context,
        transformer_depth=depth,
        **others,
    )


BLOCKS = dict(resample="block")
SIZES = {
    "sd-1": (SD1, 859_520_964),
    "sd-1-inpaint": (SD1 | dict(in_channels=9), 859_535_364),
    "sd-2": (SD2, 865_910_724),
    "sd-2-unclip-h": (SD2 | dict(vector_dim=2048), 870_173_124),
    "sd-2-unclip-l": (SD2 | dict(vector_dim=1536), 869_517_764),
    "txt2img-1.45B": (SD1 | dict(context_dim=1280), 872_300_484),
    "cin256-v2": (ldm(192, (1, 2, 3, 5), (1, 2, 3), context=512, width=(1, 1, 1, 1)), 400_920_579),
    "cin-f8": (ldm(256, (1, 2, 4), (0, 1, 2), 4, context=512), 394_984_196),
    "celebahq-f4": (ldm(224, (1, 2, 3, 4), (1, 2, 3), depth=0), 274_056_163),
    "churches-f8": (
        ldm(192, (1, 2, 2, 4, 4), (0, 1, 2, 3), 4, width=(8,) * 5, depth=0, scale_shift=True, **BLOCKS),
        294_966_916,
    ),
    "inpainting-big": (
        ldm(256, (1, 2, 3, 4), (1, 2, 3), extra=4, width=(8,) * 4, depth=0, **BLOCKS),
        387_245_827,
    ),
    "bsr-sr": (ldm(160, (1, 2, 2, 4), (3,), extra=3, depth=0), 113_622_563),
    "rdm-ffhq": (ldm(224, (1, 2, 3, 4), (1, 2, 3), context=512), 414_713_603),
    "rdm-768": (ldm(448, (1, 2, 3, 4), (0, 1, 2), 16, context=768), 1_335_480_400),
}


def inputs(config, make, b=1, side=8, length=5):
    """Inputs of a network; `make` is a function of their shape."""
    x, t = make(b, side, side, config["in_channels"]), make(b)
    given = {}
    if config.get("context_dim"):
        given["context"] = make(b, length, config["context_dim"])
    if config.get("vector_dim"):
        given["vector"] = make(b, config["vector_dim"])
    return x, t, given


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    config, count = SIZES[name]
    side = 2 ** (len(config["channel_mult"]) - 1)
    x, t, given = inputs(config, struct, side=side)
    assert param_count(param_shapes(LatentUNet(**config), x, t, **given)) == count


# --------------------------------------------------------------------------------------------------- parity
TINY = dict(
    image_size=8,
    in_channels=5,
    out_channels=4,
    channels=32,
    channel_mult=(1, 2, 2),
    res_blocks=1,
    heads=(2, 4, 4),
    attention_levels=(0, 2),
    context_dim=12,
    groups=16,
)


def peer(config, depth=1):
    """diffusers' network of a configuration, at random weights."""
    warnings.filterwarnings("ignore")
    from diffusers import UNet2DConditionModel

    levels = range(len(config["channel_mult"]))
    cross = [level in config["attention_levels"] for level in levels]
    return randomize(
        UNet2DConditionModel(
            sample_size=config["image_size"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            layers_per_block=config["res_blocks"],
            block_out_channels=tuple(config["channels"] * m for m in config["channel_mult"]),
            down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
            up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in cross[::-1]),
            cross_attention_dim=config["context_dim"],
            attention_head_dim=config["heads"],
            use_linear_projection=config.get("linear", False),
            transformer_layers_per_block=depth,
            norm_num_groups=config["groups"],
            class_embed_type="projection" if config.get("vector_dim") else None,
            projection_class_embeddings_input_dim=config.get("vector_dim"),
        )
    )


@pytest.mark.parametrize(
    "changes, size",
    [({}, (8, 8)), ({"linear": True, "vector_dim": 7, "transformer_depth": 2, "res_blocks": 2}, (7, 10))],
    ids=["conv", "linear-vector-odd"],
)
def test_equals_diffusers(changes, size):
    """The same output at the same weights, with and without the keys and values kept in `fixed`."""
    config, rng = TINY | changes, np.random.default_rng(0)
    theirs = peer(config, config.get("transformer_depth", 1))
    make = lambda *shape: np.float32(rng.normal(size=shape))
    _, _, given = inputs(config, make, b=2)
    x, t = make(2, *size, config["in_channels"]), np.array([3, 977])
    with torch.no_grad():
        wanted = theirs(
            nchw(x),
            torch.from_numpy(t),
            encoder_hidden_states=torch.from_numpy(given["context"]),
            class_labels=torch.from_numpy(given["vector"]) if "vector" in given else None,
        ).sample
    model = LatentUNet(**config)
    weights = Tensors({name: value.numpy() for name, value in theirs.state_dict().items()})
    shapes = param_shapes(model, jnp.asarray(x), jnp.asarray(t), **given)
    params = convert(weights, diffusers_unet(config), shapes, "the U-Net")
    run = jax.jit(lambda p, f, x: model.apply({"params": p, **f}, x, t, **given, mutable=["fixed"]))
    drawn, fixed = run(params, {}, x)
    close(drawn, np.moveaxis(wanted.numpy(), 1, -1), 1e-4)
    assert len(jax.tree.leaves(fixed)) == 2 * sum("attn2.to_k" in name for name in weights)
    given = {name: value * 0 if name == "context" else value for name, value in given.items()}
    np.testing.assert_allclose(run(params, fixed, x)[0], drawn, atol=1e-5)


class Tensors(dict):
    """Tensors in memory, in place of a file's."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype

    def release(self, name):
        pass


def test_blocks_that_resample_and_plain_attention():
    """The paper's other networks run, and every input reaches the output."""
    config = ldm(32, (1, 2), (1,), width=(2, 2), depth=0, scale_shift=True, **BLOCKS)
    x, t, given = inputs(config, lambda *shape: np.ones(shape, np.float32), b=2)
    model = LatentUNet(**config)
    params = random_params(model, x, t)
    run = jax.jit(lambda x, t: model.apply({"params": params}, x, t))
    assert run(x, t).shape == (2, 8, 8, 3)
    assert np.abs(run(x, t) - run(x, t + 5)).max() > 1e-3
    with pytest.raises(InputError, match="multiples of 2"):
        model.apply({"params": params}, x[:, :7], t)


@pytest.mark.parametrize(
    "changes, given, words",
    [
        ({}, {}, "context tokens of 12, got None"),
        ({"context_dim": None}, {}, "needs context_dim"),
        ({"heads": (2,)}, {"context": 12}, "3 numbers"),
        ({"heads": (3, 3, 3)}, {"context": 12}, "multiple of 3 heads"),
        ({"attention_levels": (3,)}, {"context": 12}, "between 0 and 2"),
        ({"in_channels": 4}, {"context": 12}, "takes 4 channels, got 5"),
        ({"resample": "mean"}, {"context": 12}, "unknown resample"),
        ({}, {"context": 12, "vector": 3}, "vector of None, got 3"),
    ],
)
def test_refused(changes, given, words):
    given = {k: struct(1, 5, n) if k == "context" else struct(1, n) for k, n in given.items()}
    with pytest.raises(InputError, match=words):
        param_shapes(LatentUNet(**TINY | changes), struct(1, 8, 8, 5), struct(1), **given)
