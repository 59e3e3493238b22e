"""The U-Net, the decoder's conditioning and the upsampler: formulas, inputs, hooks, published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fast_key, param_count, param_shapes, random_params, randomize, struct
from unclip_jax.models import unet
from unclip_jax.models.decoder import ClipConditioning, Decoder
from unclip_jax.models.unet import AttentionBlock, ResBlock, UNet
from unclip_jax.models.upsampler import Upsampler

B, SIZE, D, L, TEXT_WIDTH = 2, 8, 6, 5, 10
UNET = dict(
    image_size=SIZE,
    out_channels=6,
    channels=8,
    channel_mult=(1, 2),
    res_blocks=1,
    attention_resolutions=(4,),
    head_channels=4,
    groups=4,
)
DECODER = Decoder(unet=UNET, conditioning=dict(context_dim=12, clip_tokens=4))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conditioning():
    """Decoder inputs; the last two text tokens are padding."""
    mask = jnp.tile(jnp.arange(L) < L - 2, (B, 1))
    return dict(
        image_embed=normal(1, B, D),
        drop_image=jnp.zeros(B, bool),
        text_embed=normal(2, B, D),
        text_states=normal(3, B, L, TEXT_WIDTH),
        text_mask=mask,
    )


X, TIME = normal(0, B, SIZE, SIZE, 3), jnp.array([5, 800])


@pytest.fixture(scope="module")
def params():
    return random_params(DECODER, X, TIME, **conditioning())


decode = jax.jit(lambda params, x, t, cond: DECODER.apply({"params": params}, x, t, **cond))


# ----------------------------------------------------------------------------------------------------- blocks
def group_norm(x, params, groups):
    """Group normalisation by its definition, over positions and the channels of a group."""
    shape = x.shape
    x = np.asarray(x, np.float64).reshape(shape[0], -1, groups, shape[-1] // groups)
    x = (x - x.mean((1, 3), keepdims=True)) / np.sqrt(x.var((1, 3), keepdims=True) + 1e-5)
    return x.reshape(shape) * params["scale"] + params["bias"]


def conv3(x, params):
    """A 3x3 convolution as nine shifted products."""
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["kernel"]
    return (
        sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))
        + params["bias"]
    )


def silu(x):
    return x / (1 + np.exp(-np.asarray(x, np.float64)))


RESAMPLED = {
    None: lambda x: x,
    "down": lambda x: (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4,
    "up": lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
}


@pytest.mark.parametrize("resample, scale_shift", [(None, True), ("down", True), ("up", True), (None, False)])
def test_res_block_is_the_formula(resample, scale_shift):
    """Both uses of the time embedding and all three resamplings, with a change of channels."""
    x, emb = np.asarray(normal(0, B, 4, 4, 8)), np.asarray(normal(1, B, 5))
    block = ResBlock(12, groups=4, resample=resample, scale_shift=scale_shift)
    p = random_params(block, x, emb)
    out = jax.jit(block.apply)({"params": p}, x, emb)

    h = conv3(RESAMPLED[resample](silu(group_norm(x, p["norm1"], 4))), p["conv1"])
    time = (silu(emb) @ p["time"]["kernel"] + p["time"]["bias"])[:, None, None]
    if scale_shift:
        h = group_norm(h, p["norm2"], 4) * (1 + time[..., :12]) + time[..., 12:]
    else:
        h = group_norm(h + time, p["norm2"], 4)
    skip = RESAMPLED[resample](x) @ p["skip"]["kernel"][0, 0] + p["skip"]["bias"]
    np.testing.assert_allclose(out, skip + conv3(silu(h), p["conv2"]), rtol=1e-4, atol=1e-4)


def test_attention_block_is_the_formula():
    """Per head, keys and values of the plain context precede those of the normalised image.

    Masked tokens are left out.
    """
    x, context = np.asarray(normal(0, B, 2, 2, 8)), np.asarray(normal(1, B, 3, 5))
    mask = np.array([[True, False, True], [True, True, False]])
    block = AttentionBlock(head_channels=4, groups=4)
    p = random_params(block, x, context, mask)
    out = jax.jit(block.apply)({"params": p}, x, context, mask)

    y = group_norm(x, p["norm"], 4).reshape(B, 4, 8)
    dense = lambda name, y: np.einsum("ni,ikd->nkd", y, p[name]["kernel"]) + p[name]["bias"]
    for b in range(B):
        kept = context[b, mask[b]]
        q, k, v = dense("query", y[b]), dense("key", y[b]), dense("value", y[b])
        k, v = (
            np.concatenate([dense("context_key", kept), k]),
            np.concatenate([dense("context_value", kept), v]),
        )
        logits = np.einsum("qkd,pkd->kqp", q, k) / math.sqrt(4)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended = np.einsum("kqp,pkd->qkd", weights / weights.sum(-1, keepdims=True), v)
        expected = (
            x[b].reshape(4, 8) + np.einsum("qkd,kdc->qc", attended, p["out"]["kernel"]) + p["out"]["bias"]
        )
        np.testing.assert_allclose(out[b].reshape(4, 8), expected, rtol=1e-4, atol=1e-4)


def test_resampling():
    """Enlarging, then averaging, is the identity; averaging keeps the mean."""
    x = normal(0, B, 4, 6, 3)
    np.testing.assert_allclose(unet.downsample(unet.upsample(x)), x, rtol=1e-6)
    np.testing.assert_allclose(np.mean(unet.downsample(x), (1, 2)), np.mean(x, (1, 2)), rtol=1e-4, atol=1e-6)
    assert unet.upsample(x).shape == (B, 8, 12, 3)


def test_fresh_network_is_zero_and_its_blocks_are_identities():
    """Zero-initialised outputs; once those are filled, neither holds."""
    model = UNet(**UNET | {"channel_mult": (1,), "attention_resolutions": ()})
    out, variables = jax.jit(lambda key: model.init_with_output(key, X, TIME, context=normal(6, B, 3, 12)))(
        fast_key()
    )
    np.testing.assert_array_equal(out, 0)
    fresh, filled = variables["params"], randomize(variables["params"])
    h, emb, context = normal(4, B, 4, 4, 8), normal(5, B, 32), normal(6, B, 3, 12)
    res = jax.jit(lambda p: ResBlock(8, groups=4).apply({"params": p["middle_res_0"]}, h, emb))
    attention = jax.jit(
        lambda p: AttentionBlock(head_channels=4, groups=4).apply(
            {"params": p["middle_attn"]}, h, context, None
        )
    )
    for block in (res, attention):
        np.testing.assert_array_equal(block(fresh), h)
        assert np.abs(block(filled) - h).max() > 1e-2
    assert not np.any(fresh["conv_out"]["kernel"]) and not np.any(fresh["conv_out"]["bias"])


def test_attention_sits_where_the_configuration_says(params):
    """After every residual block of the named resolution, and in the middle."""
    names = set(params["unet"])
    assert {n for n in names if "attn" in n} == {"down_1_attn_0", "middle_attn", "up_1_attn_0", "up_1_attn_1"}
    assert {n for n in names if "res" in n} == {
        "down_0_res_0", "down_1_res_0", "middle_res_0", "middle_res_1",
        "up_1_res_0", "up_1_res_1", "up_0_res_0", "up_0_res_1",
    }  # fmt: skip
    without = param_shapes(UNet(**UNET | {"attention_resolutions": (), "middle_attention": False}), X, TIME)
    assert not any("attn" in n for n in without)


# ----------------------------------------------------------------------------------------------- conditioning
def test_masked_text_does_not_matter_and_the_rest_does(params):
    """A masked state changes nothing, to the bit.

    A kept state, z_t, z_i, t and the mask itself change the output noticeably. Rows are independent.
    """
    cond = conditioning()
    base = decode(params, X, TIME, cond)
    changed = lambda name, index: cond | {name: cond[name].at[index].multiply(-1.0)}
    np.testing.assert_array_equal(base, decode(params, X, TIME, changed("text_states", (0, L - 1))))
    for other in (
        decode(params, X, TIME, changed("text_states", (0, 0))),
        decode(params, X, TIME, changed("text_embed", 0)),
        decode(params, X, TIME, changed("image_embed", 0)),
        decode(params, X, TIME.at[0].add(20), cond),
        decode(params, X, TIME, cond | {"text_mask": cond["text_mask"].at[0, 1].set(False)}),
        decode(params, X.at[0, 0, 0].add(1.0), TIME, cond),
    ):
        assert np.abs(base - other)[0].max() > 1e-3
        np.testing.assert_allclose(base[1], other[1], rtol=1e-5, atol=1e-6)


def test_a_dropped_embedding_is_the_learned_null(params):
    """A dropped row gives the output of the null embedding, whatever z_i is.

    The other row does not change.
    """
    cond = conditioning()
    drop = jnp.array([True, False])
    dropped = decode(params, X, TIME, cond | {"drop_image": drop})
    null = params["conditioning"]["null_image_embed"]
    assert np.any(null)
    given = decode(params, X, TIME, cond | {"image_embed": cond["image_embed"].at[0].set(null)})
    np.testing.assert_allclose(dropped, given, rtol=1e-5, atol=1e-6)
    elsewhere = decode(
        params, X, TIME, cond | {"drop_image": drop, "image_embed": cond["image_embed"].at[0].add(9.0)}
    )
    np.testing.assert_array_equal(dropped, elsewhere)
    assert np.abs(dropped - decode(params, X, TIME, cond))[0].max() > 1e-3


def test_what_steps_have_in_common_is_kept(params):
    """The collection `fixed`, filled at one step, gives another step's output.

    That step does not read captions or embeddings again.
    """
    fill = jax.jit(
        lambda params, cond: DECODER.apply({"params": params}, X * 0, TIME * 0, **cond, mutable=["fixed"])[1]
    )
    fixed = fill(params, conditioning())
    other = jax.tree.map(lambda a: jnp.ones_like(a), conditioning())
    step = jax.jit(lambda params, fixed, cond: DECODER.apply({"params": params, **fixed}, X, TIME, **cond))
    kept = step(params, fixed, other)
    np.testing.assert_allclose(kept, decode(params, X, TIME, conditioning()), atol=1e-5)
    assert np.abs(kept - decode(params, X, TIME, other)).max() > 1e-2
    unused = jax.tree.map(lambda a: a, params) | {
        "conditioning": jax.tree.map(jnp.zeros_like, params["conditioning"])
    }
    np.testing.assert_array_equal(step(unused, fixed, other), kept)


def test_token_layout_and_the_text_norm():
    """CLIP tokens come first, laid out (B, Dc, tokens) and transposed, and are always allowed.

    The normalised text follows, under its mask.
    """
    model, cond = ClipConditioning(cond_dim=7, context_dim=12, clip_tokens=4), conditioning()
    arguments = [cond[k] for k in ("image_embed", "drop_image", "text_embed", "text_states", "text_mask")]
    p = random_params(model, *arguments)
    vector, context, mask = model.apply({"params": p}, *arguments)
    assert vector.shape == (B, 7) and context.shape == (B, 4 + L, 12)
    flat = cond["image_embed"] @ p["image_embed_tokens"]["kernel"] + p["image_embed_tokens"]["bias"]
    for token in range(4):
        np.testing.assert_allclose(context[:, token], flat[:, token::4], rtol=1e-5, atol=1e-6)
    norm = p["text_states_norm"]["norm"]
    plain = (context[:, 4:] - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(np.std(plain, -1), 1, rtol=1e-3)
    np.testing.assert_array_equal(mask, np.pad(cond["text_mask"], ((0, 0), (4, 0)), constant_values=True))
    expected = sum(
        cond[k] @ p[f"{k}_cond"]["kernel"] + p[f"{k}_cond"]["bias"] for k in ("image_embed", "text_embed")
    )
    np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


def test_conditioning_on_the_image_embedding_alone():
    """Without text the decoder needs no text inputs and has no text parameters."""
    model = Decoder(unet=UNET, conditioning=dict(context_dim=12, use_text_embed=False, use_text_states=False))
    shapes = param_shapes(model, X, TIME, image_embed=normal(1, B, D), drop_image=jnp.zeros(B, bool))
    assert set(shapes["conditioning"]) == {"null_image_embed", "image_embed_cond", "image_embed_tokens"}


# -------------------------------------------------------------------------------------------------- execution
def test_hooks_change_nothing():
    """remat and a gather on every block keep the parameter names and the output."""
    p, calls = random_params(UNet(**UNET), X, TIME), []

    def gather(tree):
        calls.append(tree)
        return jax.tree.map(lambda leaf: leaf * 1.0, tree)

    plain, with_hooks = UNet(**UNET), UNet(**UNET, remat="full", gather=gather)
    assert jax.tree.structure(param_shapes(with_hooks, X, TIME)) == jax.tree.structure(p)
    calls.clear()
    one, other = jax.jit(lambda p: [model.apply({"params": p}, X, TIME) for model in (plain, with_hooks)])(p)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert len(calls) == sum("res" in n or "attn" in n or "pool" in n or "expand" in n for n in p)


def test_dropout_only_when_not_deterministic():
    """With a rate, calls differ between keys. Deterministic calls need no key."""
    small = UNET | {"channel_mult": (1,), "attention_resolutions": (), "middle_attention": False}
    p = random_params(UNet(**small), X, TIME)
    dropping = UNet(**small, dropout=0.5)
    noisy = jax.jit(
        lambda key: dropping.apply({"params": p}, X, TIME, deterministic=False, rngs={"dropout": key})
    )
    assert not np.allclose(noisy(fast_key(0)), noisy(fast_key(1)))
    quiet, plain = jax.jit(
        lambda p: [model.apply({"params": p}, X, TIME) for model in (dropping, UNet(**small))]
    )(p)
    np.testing.assert_allclose(quiet, plain, rtol=1e-5)


def test_a_decoder_that_inpaints_sees_what_is_known_and_no_more():
    """Hidden pixels do not matter. Known pixels and the mask do."""
    model = DECODER.clone(inpaint=True)
    known = jnp.arange(SIZE)[None, :, None, None] * jnp.ones((B, 1, SIZE, 1)) < 3
    image = normal(7, B, SIZE, SIZE, 3)
    p = random_params(model, X, TIME, **conditioning(), known_image=image, known=known)
    assert p["unet"]["conv_in"]["kernel"].shape == (3, 3, 7, 8)
    call = jax.jit(
        lambda image, known: model.apply(
            {"params": p}, X, TIME, **conditioning(), known_image=image, known=known
        )
    )
    out = call(image, known)
    np.testing.assert_array_equal(out, call(jnp.where(known, image, 9.0), known))
    assert np.abs(out - call(jnp.where(known, -image, image), known)).max() > 1e-2
    assert np.abs(out - call(jnp.zeros_like(image), known)).max() > 1e-2
    assert np.abs(call(jnp.zeros_like(image), known) - call(jnp.zeros_like(image), ~known)).max() > 1e-2


def test_upsampler_at_other_sizes():
    """The same parameters enlarge images of other sizes and shapes.

    The low-resolution image matters. Sides that do not halve evenly are an error.
    """
    model = Upsampler(
        unet=UNET
        | {"out_channels": 3, "attention_resolutions": (), "middle_attention": False, "scale_shift": False}
    )
    low = normal(1, B, 4, 4, 3)
    p = random_params(model, X, TIME, low_res=low)
    call = jax.jit(lambda p, x, low: model.apply({"params": p}, x, TIME, low_res=low))
    out = call(p, X, low)
    assert out.shape == X.shape and out.dtype == jnp.float32
    assert np.abs(out - call(p, X, -low)).max() > 1e-2
    wide = jnp.concatenate([X, X], axis=2)
    assert jax.eval_shape(call, p, wide, jnp.concatenate([low, low], axis=2)).shape == (B, SIZE, 2 * SIZE, 3)
    with pytest.raises(ValueError, match="multiples of 2, got"):
        call(p, X[:, :7], low)


def test_heads_must_divide_the_channels():
    """The message names both numbers."""
    with pytest.raises(ValueError, match="16 channels are not a multiple of head_channels 5"):
        param_shapes(UNet(**UNET | {"head_channels": 5}), X, TIME)


# -------------------------------------------------------------------------------------------- published sizes
def full_size(size, out, channels, mult, res_blocks, attention=(), context=None, inputs=3, **options):
    side = 2 ** (len(mult) - 1)  # parameters do not depend on it
    model = UNet(
        image_size=size,
        out_channels=out,
        channels=channels,
        channel_mult=mult,
        res_blocks=res_blocks,
        attention_resolutions=attention,
        middle_attention=bool(attention),
        **options,
    )
    tokens = None if context is None else struct(1, 4, context)
    return param_count(param_shapes(model, struct(1, side, side, inputs), struct(1), context=tokens))


ATTENTION = (32, 16, 8)


@pytest.mark.parametrize(
    "count, arguments",
    [
        (729_702_083, dict(size=64, out=3, channels=320, mult=(1, 2, 3, 4), res_blocks=3, inputs=6)),
        (729_710_726, dict(size=64, out=6, channels=320, mult=(1, 2, 3, 4), res_blocks=3, inputs=6)),
        (282_059_139, dict(size=256, out=3, channels=192, mult=(1, 1, 2, 2, 4, 4), res_blocks=2, inputs=6)),
        (282_064_326, dict(size=256, out=6, channels=192, mult=(1, 1, 2, 2, 4, 4), res_blocks=2, inputs=6)),
        (691_579_523, dict(
            size=256, out=3, channels=320, mult=(1, 2, 3, 4), res_blocks=3, inputs=6, scale_shift=False)),
        (885_439_686, dict(
            size=64, out=6, channels=320, mult=(1, 2, 3, 4), res_blocks=3,
            attention=ATTENTION, context=1536)),
        (308_334_918, dict(
            size=64, out=6, channels=192, mult=(1, 2, 3, 4), res_blocks=3, attention=ATTENTION, context=512)),
        (2_238_164_486, dict(
            size=64, out=6, channels=512, mult=(1, 2, 3, 4), res_blocks=3,
            attention=ATTENTION, context=2048)),
        (295_904_454 - 1000 * 768, dict(
            size=64, out=6, channels=192, mult=(1, 2, 3, 4), res_blocks=3, attention=ATTENTION)),
        (553_838_086 - 1000 * 1024, dict(
            size=256, out=6, channels=256, mult=(1, 1, 2, 2, 4, 4), res_blocks=2, attention=ATTENTION)),
    ],
    ids=[
        "unCLIP 64-256", "unCLIP 64-256 learned variance",
        "unCLIP 256-1024", "unCLIP 256-1024 learned variance",
        "Karlo upsampler", "Karlo decoder", "GLIDE filtered", "GLIDE 3.5B",
        "ADM 64 less classes", "ADM 256 less classes",
    ],
)  # fmt: skip
def test_published_sizes(count, arguments):
    """Exact parameter counts of the U-Nets alone.

    ADM's table of 1000 class embeddings has no counterpart here.
    """
    assert full_size(**arguments) == count


def test_size_of_the_public_conditioning():
    """Karlo's projections of CLIP's embeddings and text states."""
    model = ClipConditioning(cond_dim=1280, context_dim=1536)
    embed, states, mask = struct(1, 768), struct(1, 77, 768), struct(1, 77, dtype=bool)
    assert param_count(param_shapes(model, embed, struct(1, dtype=bool), embed, states, mask)) == 7_878_400
