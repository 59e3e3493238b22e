"""The autoencoders of latent diffusion: published sizes, equality with diffusers, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.checkpoint.peers import randomize
from tests.helpers import param_count, param_shapes, random_params, struct
from unclip_jax.checkpoint.convert import convert, export, shapes_of
from unclip_jax.checkpoint.providers.autoencoder import compvis_rules, diffusers_rules
from unclip_jax.models.autoencoder import (
    KLAutoencoder,
    Moments,
    VQAutoencoder,
    kl_divergence,
    sample_moments,
)

TINY = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1}
PAPER = {"channels": 128, "res_blocks": 2}
F4, F8_KL, F8_VQ, F16 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)


@pytest.mark.parametrize(
    "kind, count, tensors, arguments",
    [
        (KLAutoencoder, 55_312_063, None, dict(channel_mult=F4, latent_channels=3)),
        (KLAutoencoder, 83_653_863, 248, dict(channel_mult=F8_KL, latent_channels=4)),
        (KLAutoencoder, 69_610_963, None, dict(channel_mult=F16, latent_channels=16, attention_levels=(4,))),
        (VQAutoencoder, 55_322_782, 205, dict(channel_mult=F4, latent_channels=3)),
        (
            VQAutoencoder,
            53_219_486,
            None,
            dict(channel_mult=F4, latent_channels=3, middle_attention=False),
        ),
        (
            VQAutoencoder,
            67_717_295,
            None,
            dict(channel_mult=F8_VQ, latent_channels=4, attention_levels=(3,), codes=16384),
        ),
        (
            VQAutoencoder,
            67_652_783,
            None,
            dict(channel_mult=F8_VQ, latent_channels=4, attention_levels=(3,), codes=256),
        ),
        (
            VQAutoencoder,
            69_593_371,
            None,
            dict(channel_mult=F16, latent_channels=8, attention_levels=(4,), codes=16384),
        ),
        (
            VQAutoencoder,
            67_832_495,
            431,
            dict(
                channel_mult=F8_VQ, latent_channels=4, attention_levels=(3,), codes=16384, spatial_norm=True
            ),
        ),
    ],
    ids=["kl-f4", "kl-f8", "kl-f16", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16", "movq"],
)
def test_published_sizes(kind, count, tensors, arguments):
    """Exact parameter counts, the codebook included, and the size of the latents."""
    model = kind(**PAPER, **arguments)
    shapes = param_shapes(model, struct(1, 256, 256, 3))
    assert param_count(shapes) == count
    assert tensors in (None, len(jax.tree.leaves(shapes)))
    encoded = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="encode"), shapes, struct(1, 256, 256, 3)
    )
    side = 256 // model.factor
    assert jax.tree.leaves(encoded)[0].shape == (1, side, side, arguments["latent_channels"])


def images(height, width, channels=3):
    """(2, H, W, C) in [-1, 1], for both libraries."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, height, width, channels)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def array_of(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def converted(model, theirs, rules):
    """Their weights in our network; exported again, they are theirs."""
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    params = convert(_Tensors(state), rules, shapes_of(model.init, struct(1, 16, 16, 3)), "test")
    return {"params": params}, state


class _Tensors(dict):
    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype

    def release(self, name):
        pass


@pytest.mark.parametrize("attention, middle, sides", [(False, True, (24, 40)), (True, False, (37, 21))])
def test_kl_equals_diffusers(attention, middle, sides):
    """Moments and decoded images, at sides that are no power of two, and odd ones."""
    from diffusers import AutoencoderKL

    ways = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if attention else (None, None)
    theirs = randomize(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", ways[0] or "DownEncoderBlock2D"),
            up_block_types=(ways[1] or "UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
            mid_block_add_attention=middle,
        )
    )
    model = KLAutoencoder(
        **TINY, latent_channels=4, attention_levels=(1,) if attention else (), middle_attention=middle
    )
    rules = diffusers_rules(2)
    variables, state = converted(model, theirs, rules)
    x, x_torch = images(*sides)
    with torch.no_grad():
        posterior = theirs.encode(x_torch).latent_dist
        decoded = array_of(theirs.decode(posterior.mean).sample)
    moments = model.apply(variables, x, method="encode")
    np.testing.assert_allclose(moments.mean, array_of(posterior.mean), atol=1e-4)
    np.testing.assert_allclose(moments.logvar, array_of(posterior.logvar), atol=1e-4)
    np.testing.assert_allclose(kl_divergence(moments), posterior.kl().numpy(), rtol=1e-4)
    np.testing.assert_allclose(model.apply(variables, moments.mean, method="decode"), decoded, atol=1e-4)
    assert decoded.std() > 0.1
    written = export(variables["params"], rules, "test")
    assert set(written) == set(state)
    for name in state:
        np.testing.assert_array_equal(written[name], state[name])


@pytest.mark.parametrize("spatial", [False, True])
def test_vq_equals_diffusers(spatial):
    """Latents before the codebook, codes, decoded images; MoVQ's norms with and without the codebook."""
    from diffusers import VQModel

    theirs = randomize(
        VQModel(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=48,
            norm_type="spatial" if spatial else "group",
        )
    )
    model = VQAutoencoder(**TINY, latent_channels=4, attention_levels=(1,), codes=48, spatial_norm=spatial)
    rules = diffusers_rules(2, spatial)
    variables, state = converted(model, theirs, rules)
    x, x_torch = images(29, 44)
    with torch.no_grad():
        latents = theirs.encode(x_torch).latents
        codes = theirs.quantize(latents)[2][2].numpy().reshape(2, 14, 22)
        decoded = [array_of(theirs.decode(latents, force_not_quantize=raw).sample) for raw in (False, True)]
    z = model.apply(variables, x, method="encode")
    np.testing.assert_allclose(z, array_of(latents), atol=1e-4)
    z = array_of(latents)  # MoVQ's norms multiply small differences
    quantised = model.apply(variables, z, method="quantise")
    np.testing.assert_array_equal(quantised.codes, codes)
    near = {"atol": 2e-4 if spatial else 1e-4}  # 1.1e-4 was measured with MoVQ's norms, on one core
    np.testing.assert_allclose(model.apply(variables, z, method="decode"), decoded[0], **near)
    np.testing.assert_allclose(model.apply(variables, z, method="decode_quantised"), decoded[1], **near)
    np.testing.assert_array_equal(model.apply(variables, quantised.codes, method="lookup"), quantised.vectors)
    assert len(np.unique(codes)) > 5 and np.abs(decoded[0] - decoded[1]).max() > 0.01
    assert set(export(variables["params"], rules, "test")) == set(state)


@pytest.mark.parametrize("kind", [KLAutoencoder, VQAutoencoder])
def test_names_of_compvis(kind):
    """CompVis' names fill the same parameters, and are written back."""
    model = kind(**TINY | {"channel_mult": (1, 2, 2)}, latent_channels=4, attention_levels=(2,))
    params = random_params(model, struct(1, 16, 16, 3))
    rules = compvis_rules(r"first_stage_model\.")
    tensors = export(params, compvis_rules("first_stage_model."), "test")
    for name in (
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.2.attn.0.proj_out.bias",
        "encoder.mid.block_2.norm1.weight",
        "decoder.up.1.upsample.conv.bias",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.mid.attn_1.q.weight",
        "decoder.norm_out.weight",
        "post_quant_conv.weight",
    ):
        assert f"first_stage_model.{name}" in tensors
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    back = convert(_Tensors(tensors), rules, shapes_of(model.init, struct(1, 16, 16, 3)), "test")
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_latents_of_the_gaussian():
    """Latents have the Gaussian's mean and variance; the KL is zero for N(0, 1) and never negative."""
    moments = Moments(jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), np.log(0.25)))
    z = sample_moments(moments, jax.random.normal(jax.random.key(0), moments.mean.shape))
    np.testing.assert_allclose([z.mean(), z.std()], [2.0, 0.5], atol=0.02)
    zeros = jnp.zeros((3, 2, 2, 4))
    np.testing.assert_array_equal(kl_divergence(Moments(zeros, zeros)), np.zeros(3))
    # KL(N(2, 1/4) || N(0, 1)) = ln 2 + (1/4 + 4) / 2 - 1/2 for each of 16384 latents
    np.testing.assert_allclose(kl_divergence(moments), 64 * 64 * 4 * (np.log(2) + 4.25 / 2 - 0.5), rtol=1e-5)


def test_log_variance_is_bounded():
    """An encoder that is sure beyond e^-30 gives e^-30."""
    model = KLAutoencoder(**TINY, latent_channels=2)
    params = random_params(model, struct(1, 8, 8, 3))
    params["quant_conv"]["bias"] = np.float32([0.0, 0.0, -1000.0, 1000.0])
    moments = model.apply({"params": params}, images(8, 8)[0], method="encode")
    assert np.all(moments.logvar[..., 0] == -30.0) and np.all(moments.logvar[..., 1] == 20.0)


def test_what_hooks_leave_alone():
    """Rematerialised blocks and gathered parameters give the same image; small images are refused."""
    model = KLAutoencoder(**TINY, latent_channels=2)
    x = images(8, 8)[0]
    params = random_params(model, struct(1, 8, 8, 3))
    hooked = model.clone(remat="full", gather=lambda tree: tree)
    loss = lambda m: jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(m.apply({"params": p}, x)[0]))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        loss(model)(params),
        loss(hooked)(params),
    )
    with pytest.raises(ValueError, match="an image of 1 x 8 is smaller than 2"):
        model.apply({"params": params}, jnp.zeros((1, 1, 8, 3)))
