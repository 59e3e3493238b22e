"""The stages' own text encoder, and the networks that use one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import param_count, param_shapes, random_params, struct
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.text_encoder import TextEncoder

B, L, D, V = 2, 5, 6, 11
TINY = dict(vocab_size=V, length=L, width=8, layers=2, heads=2)
MODEL = TextEncoder(**TINY)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, V, (B, L)).astype(np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, TOKENS, MASK)


def test_every_token_reaches_every_state(params):
    """Without a causal mask the first token changes the last state, and the last the first.

    Masked tokens change nothing.
    """
    apply = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens, MASK))
    states, last = apply(TOKENS)
    assert states.shape == (B, L, 8)
    np.testing.assert_array_equal(last, states[:, -1])
    for i in range(L):
        other = TOKENS.copy()
        other[:, i] = other[:, i] % (V - 1) + 1
        moved = np.abs(apply(other)[0] - states).max(-1)
        assert np.all(moved[0] > 1e-5)
        assert np.all(moved[1] > 1e-5) if MASK[1, i] else np.all(moved[1] == 0)


def test_padding_is_learned(params):
    """The padding embedding matters to a short caption but not to a full one."""
    changed = {**params, "padding_embedding": params["padding_embedding"][:, ::-1]}
    before, after = (
        jax.jit(lambda p: MODEL.apply({"params": p}, TOKENS, MASK)[0])(p) for p in (params, changed)
    )
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="built for 5 tokens, got 3"):
        param_shapes(MODEL, struct(1, 3, dtype=jnp.int32), struct(1, 3, dtype=bool))


def test_size_of_glides():
    """GLIDE's encoder has 1,316,249,600 parameters at context 128.

    This includes its projection to the time embedding (2048 to 2048).
    """
    glide = TextEncoder(vocab_size=50_257, length=128, width=2048, layers=24, heads=32)
    tokens = struct(1, 128, dtype=jnp.int32), struct(1, 128, dtype=bool)
    assert param_count(param_shapes(glide, *tokens)) + 2048 * 2048 + 2048 == 3_554_414_086 - 2_238_164_486


UNET = dict(
    image_size=8, out_channels=3, channels=8, channel_mult=(1,), res_blocks=1, head_channels=4, groups=4
)
CONDITIONING = dict(context_dim=8, use_text_embed=False, use_text_states=False)
X, T, Z = (
    np.float32(RNG.normal(size=(B, 8, 8, 3))),
    np.array([3.0, 700.0]),
    np.float32(RNG.normal(size=(B, D))),
)
NETWORKS = {
    "decoder": (Decoder(UNET, CONDITIONING, TINY), (X, T), dict(image_embed=Z, drop_image=np.zeros(B, bool))),
    "prior_diffusion": (
        DiffusionPrior(embed_dim=D, length=L, width=8, layers=2, heads=2, text={"num_embeddings": V}),
        (Z, T), dict(text_embed=Z),
    ),
    "prior_ar": (
        ARPrior(codes=3, buckets=4, dot_bins=2, length=L, width=8, layers=2, heads=2, text=TINY),
        (np.zeros((B, 3), np.int32), np.zeros(B, np.int32)),
        dict(text_embed=Z),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_read_their_own_tokens(name):
    """Another caption gives another output, row by row. Masked tokens do not matter."""
    model, args, kwargs = NETWORKS[name]
    params = random_params(model, *args, **kwargs, tokens=TOKENS, token_mask=MASK)
    apply = jax.jit(
        lambda tokens: model.apply({"params": params}, *args, **kwargs, tokens=tokens, token_mask=MASK)
    )
    base, first, hidden = apply(TOKENS), TOKENS.copy(), TOKENS.copy()
    first[0, 1] = first[0, 1] % (V - 1) + 1
    hidden[1, 4] = hidden[1, 4] % (V - 1) + 1
    assert np.abs(apply(first)[0] - base[0]).max() > 1e-4
    np.testing.assert_allclose(apply(first)[1], base[1], atol=1e-6)
    np.testing.assert_allclose(apply(hidden), base, atol=1e-6)
