"""Sampling of one stage: shapes, ranges, determinism, guidance limits and options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import Known, decoder_denoiser, sample_decoder
from unclip_jax.generate.networks import Network, build_model, part_schedule, part_space
from unclip_jax.generate.options import (
    OPTIONS,
    CodeSamplingOptions,
    SamplingOptions,
    check_options,
    is_guided,
    options_from,
)
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import TextConditioning, Texts, encode_text, select_text
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.models.codec import Codec, cosine, project

B, D, L, W, SIZE = 2, 6, 4, 8, 8
UNET = dict(image_size=SIZE, channels=8, channel_mult=(1,), res_blocks=1, head_channels=4, groups=4)
DIFFUSION = {"schedule": "cosine", "num_steps": 100}
PRIOR = {
    "kind": "prior_diffusion",
    "model": dict(embed_dim=D, length=L, width=16, layers=1, heads=2),
    "diffusion": DIFFUSION | {"prediction": "x0"},
    "embedding_space": {"kind": "whitened", "mean": np.full(D, 5.0), "std": np.full(D, 2.0)},
}
DECODER = {
    "kind": "decoder",
    "model": dict(unet=UNET | dict(out_channels=6), conditioning=dict(context_dim=8)),
    "diffusion": DIFFUSION | {"prediction": "eps"},
}
UPSAMPLER = {
    "kind": "upsampler",
    "factor": 2,
    "model": dict(unet=UNET | dict(out_channels=3, middle_attention=False)),
    "diffusion": DIFFUSION | {"prediction": "v"},
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


TEXT = TextConditioning(normal(0, B, D), normal(1, B, L, W), jnp.ones((B, L), bool).at[0, 2:].set(False))
EMPTY = TextConditioning(normal(2, 1, D), normal(3, 1, L, W), jnp.arange(L)[None] < 2)
Z = normal(4, B, D)
LOW = jnp.tanh(normal(5, B, SIZE // 2, SIZE // 2, 3))
KEYS = jax.random.split(jax.random.key(0), B)
T = jnp.zeros(B)


@pytest.fixture(scope="module")
def prior():
    """sample(params, text, keys, scale, guided), compiled once per `guided`, and parameters."""
    model = build_model(PRIOR)
    params = random_params(model, Z, T, text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)

    def sample(text, keys, scale):
        return sample_prior(
            Network(model, params, PRIOR),
            Texts(text, EMPTY),
            keys,
            SamplingOptions(4, guidance_scale=scale, clip=3.0),
        )

    return jax.jit(sample), jax.jit(lambda text, keys: sample(text, keys, 1))


@pytest.fixture(scope="module")
def decoder():
    """As `prior`, with z_image: one sampler with a traced scale and one with scale 1."""
    model = build_model(DECODER)
    x = jnp.zeros((B, SIZE, SIZE, 3))
    text = dict(text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)
    params = random_params(model, x, T, image_embed=Z, drop_image=jnp.zeros(B, bool), **text)
    options = SamplingOptions(3, variance="learned")

    def sample(z, text, keys, scale):
        return sample_decoder(
            Network(model, params, DECODER),
            z,
            Texts(text, EMPTY),
            keys,
            dataclasses.replace(options, guidance_scale=scale),
        )

    return jax.jit(sample), jax.jit(lambda z, text, keys: sample(z, text, keys, 1.0))


def one(i, text=TEXT):
    """The i-th caption alone."""
    return jax.tree.map(lambda a: a[i : i + 1], text)


def test_prior(prior):
    """Raw embeddings of the right shape, in the clipped range; each row's key decides its sample."""
    guided, _ = prior
    z = guided(TEXT, KEYS, 2.0)
    assert z.shape == (B, D) and z.dtype == jnp.float32
    assert np.all(np.abs((z - 5.0) / 2.0) <= 3.0 + 1e-5)
    assert np.abs(z - 5).max() > 0.5
    np.testing.assert_array_equal(z, guided(TEXT, KEYS, 2.0))
    np.testing.assert_allclose(z[1:], guided(one(1), KEYS[1:], 2.0), rtol=1e-4, atol=1e-4)
    other = guided(TEXT, KEYS[::-1], 2.0)
    assert np.all(np.abs(z - other).max(-1) > 1e-3)


def test_prior_guidance_limits(prior):
    """Scale 1 without the second half equals a traced scale of 1.0; scale 0 does not see the caption."""
    guided, plain = prior
    np.testing.assert_allclose(plain(TEXT, KEYS), guided(TEXT, KEYS, 1.0), rtol=1e-4, atol=1e-4)
    assert not np.allclose(plain(TEXT, KEYS), guided(TEXT, KEYS, 3.0), atol=1e-2)
    swapped = jax.tree.map(lambda a: a[::-1], TEXT)
    np.testing.assert_allclose(guided(TEXT, KEYS, 0.0), guided(swapped, KEYS, 0.0), rtol=1e-5)
    assert not np.allclose(guided(TEXT, KEYS, 1.0), guided(swapped, KEYS, 1.0), atol=1e-2)


def test_decoder(decoder):
    """Images of the decoder's size in [-1, 1]; the same key gives the same image, in any batch."""
    guided, _ = decoder
    images = guided(Z, TEXT, KEYS, 2.0)
    assert images.shape == (B, SIZE, SIZE, 3) and images.dtype == jnp.float32
    assert np.all(np.abs(images) <= 1) and np.std(images) > 0.05
    np.testing.assert_array_equal(images, guided(Z, TEXT, KEYS, 2.0))
    np.testing.assert_allclose(images[1:], guided(Z[1:], one(1), KEYS[1:], 2.0), rtol=1e-3, atol=1e-3)
    assert not np.allclose(images, guided(Z, TEXT, KEYS[::-1], 2.0), atol=1e-2)


def test_decoder_guidance_limits(decoder):
    """Scale 1 equals the path without guidance. Scale 0 depends on neither the caption nor z_image, except
    through the variance, which is the conditional half's."""
    guided, plain = decoder
    np.testing.assert_allclose(plain(Z, TEXT, KEYS), guided(Z, TEXT, KEYS, 1.0), rtol=1e-3, atol=1e-3)
    model = build_model(DECODER)
    text = dict(text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)
    x = normal(6, B, SIZE, SIZE, 3)
    params = random_params(model, x, T, image_embed=Z, drop_image=jnp.zeros(B, bool), **text)

    @jax.jit
    def denoise(z, text):
        options = SamplingOptions(1, guidance_scale=0.0, clip=None)
        return decoder_denoiser(Network(model, params, DECODER), z, Texts(text, EMPTY), options)(
            x, jnp.array(50)
        )

    @jax.jit
    def unconditional(x):
        empty = (jnp.repeat(a, B, 0) for a in EMPTY[:3])
        text = dict(zip(("text_embed", "text_states", "text_mask"), empty))
        return model.apply(
            {"params": params}, x, jnp.full(B, 50), image_embed=Z, drop_image=jnp.ones(B, bool), **text
        )

    base, other = denoise(Z, TEXT), denoise(-Z, jax.tree.map(lambda a: a[::-1], TEXT))
    np.testing.assert_allclose(base.eps, other.eps, rtol=1e-4, atol=1e-5)
    assert not np.allclose(base.v_frac, other.v_frac, atol=1e-3)
    np.testing.assert_allclose(base.eps, unconditional(x)[..., :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_decoder_that_inpaints(sampler):
    """The known part comes back exactly. The rest is drawn: it depends on the key and on the known part."""
    config = DECODER | {"model": DECODER["model"] | {"inpaint": True}}
    model = build_model(config)
    image, known = (
        jnp.tanh(normal(7, B, SIZE, SIZE, 3)),
        jnp.broadcast_to((jnp.arange(SIZE) < 4)[None, None, :, None], (B, SIZE, SIZE, 1)),
    )
    text = dict(text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)
    params = random_params(
        model, image, T, image_embed=Z, drop_image=jnp.zeros(B, bool), known_image=image, known=known, **text
    )

    network = Network(model, params, config)

    @functools.partial(jax.jit, static_argnums=2)
    def sample(image, keys, scale):
        options = SamplingOptions(3, sampler=sampler, guidance_scale=scale)
        return sample_decoder(network, Z, Texts(TEXT, EMPTY), keys, options, known=Known(image, known))

    for scale in (1.0, 2.0):
        drawn = sample(image, KEYS, scale)
        np.testing.assert_allclose(jnp.where(known, drawn, 0), jnp.where(known, image, 0), atol=1e-5)
    unknown = lambda images: np.asarray(images)[:, :, 4:]
    assert np.abs(unknown(drawn) - unknown(sample(image, KEYS[::-1], 2.0))).max() > 0.05
    assert np.abs(unknown(drawn) - unknown(sample(-image, KEYS, 2.0))).max() > 0.05
    with pytest.raises(ValueError, match="needs the known part"):
        sample_decoder(network, Z, Texts(TEXT, EMPTY), KEYS, SamplingOptions(3))
    with pytest.raises(ValueError, match="another one cannot use it"):
        plain = Network(build_model(DECODER), params, DECODER)
        sample_decoder(plain, Z, Texts(TEXT, EMPTY), KEYS, SamplingOptions(3), known=Known(image, known))


def test_upsampler():
    """Twice the size, in [-1, 1]. The key decides DDIM's starting noise; the low-resolution image matters."""
    model = build_model(UPSAMPLER)
    params = random_params(model, jnp.zeros((B, SIZE, SIZE, 3)), T, low_res=LOW)
    network = Network(model, params, UPSAMPLER)
    sample = jax.jit(lambda low, key: sample_upsampler(network, low, key, SamplingOptions(3, sampler="ddim")))
    images = sample(LOW, KEYS)
    assert images.shape == (B, SIZE, SIZE, 3) and np.all(np.abs(images) <= 1)
    np.testing.assert_array_equal(images, sample(LOW, KEYS))
    assert not np.allclose(images, sample(-LOW, KEYS), atol=1e-2)
    assert not np.allclose(images, sample(LOW, KEYS[::-1]), atol=1e-2)


def test_options():
    """Overrides take precedence, also when None, and lists become tuples (options are keys).

    The errors name a misspelt option in either place, and an unknown sampler.
    """
    options = options_from(
        {"steps": 25, "guidance_scale": 4.0, "guidance_interval": [0.1, 0.9]}, clip=None, guidance_scale=2.0
    )
    assert (options.steps, options.guidance_scale, options.sampler, options.clip) == (25, 2.0, "ddpm", None)
    assert options.guidance_interval == (0.1, 0.9) and hash(options)
    with pytest.raises(ValueError, match="unknown sampling option stepz; known: steps, sampler"):
        options_from({"stepz": 25})
    with pytest.raises(ValueError, match="have no steps"):
        options_from({})
    with pytest.raises(ValueError, match="unknown sampling option scale"):
        options_from({"steps": 25}, scale=2.0)
    with pytest.raises(ValueError, match="'heun'; choose one of ddpm, ddim, dpmpp_2m"):
        model = build_model(UPSAMPLER)
        sample_upsampler(Network(model, {}, UPSAMPLER), LOW, KEYS, SamplingOptions(2, sampler="heun"))


NEVER = [True, float("nan"), float("inf"), -float("inf"), 1e39, {}, b"1", ["a"], [1, None], [True, 2]]


@pytest.mark.parametrize("kind", ["decoder", "prior_ar"])
def test_options_of_a_wrong_type(kind):
    """Every option says in one line what it takes. A number must be finite, also in float32."""
    for name in OPTIONS[kind].__dataclass_fields__:
        texts = ("sampler", "variance", "guidance_schedule", "spacing", "last")
        text, number = name in texts, name not in ("steps", "top_k")
        needed = name not in ("clip", "threshold", "threshold_most", "top_k", "top_p")
        wrong = [0, None] if text else ["x"] * number + [None] * needed
        for value in [*NEVER, *wrong]:
            settings = {"steps": 4, name: value} if kind == "decoder" else {name: value}
            with pytest.raises(InputError, match=f"^the sampling option {name} must be .*, got .*$"):
                options_from(settings, kind)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "between 1 and 1000"),
        ({"steps": "slow27"}, "'slow27'"),
        ({"sampler": "heun"}, "unknown sampler 'heun'"),
        ({"variance": "medium"}, "unknown variance 'medium'"),
        ({"eta": 2.0}, "eta must be in"),
        ({"guidance_scale": float("inf")}, "finite"),
        ({"guidance_schedule": "steep"}, "unknown guidance schedule"),
        ({"candidates": 0}, "candidates must be between 1 and 1024"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"threshold": 99.5, "clip": None}, "needs a clip"),
    ],
)
def test_options_out_of_range(settings, message):
    """The error comes before compilation."""
    config = {"diffusion": {"schedule": "cosine", "num_steps": 1000}}
    with pytest.raises(ValueError, match=message):
        check_options(SamplingOptions(**{"steps": 4, **settings}), config)
    check_options(SamplingOptions(4), config)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("upsampler", {"guidance_scale": 2.0}, "an upsampler is not guided"),
        ("upsampler", {"candidates": 2}, "only a prior chooses among candidates"),
        ("decoder", {"candidates": 2}, "only a prior chooses among candidates"),
    ],
)
def test_options_that_a_stage_would_ignore(kind, settings, message):
    config = {"kind": kind, "diffusion": {"schedule": "cosine", "num_steps": 1000}}
    with pytest.raises(InputError, match=message):
        check_options(SamplingOptions(4, **settings), config)


def test_guidance_costs_nothing_at_one():
    """Only the Python number 1 switches the second half off."""
    guided = lambda scale: is_guided(SamplingOptions(1, guidance_scale=scale))
    assert not guided(1) and not guided(1.0)
    assert guided(0.0) and guided(1.5) and guided(jnp.array(1.0))


def test_parts():
    """A part's configuration gives its model, schedule and space; unknown kinds and options are errors."""
    assert part_schedule(PRIOR).num_steps == 100
    space = part_space(PRIOR)
    assert space.kind == "whitened" and space.mean.dtype == np.float32
    assert PRIOR["embedding_space"]["mean"].dtype == np.float64  # the configuration is not written to
    with pytest.raises(ValueError, match="unknown kind of network 'gan'"):
        build_model({"kind": "gan", "model": {}})
    with pytest.raises(ValueError, match="widht"):
        build_model({"kind": "prior_diffusion", "model": PRIOR["model"] | {"widht": 3}})


def test_select_text():
    """The caption where kept, the empty caption elsewhere, mask included."""
    chosen = select_text(jnp.array([True, False]), TEXT, EMPTY)
    for ours, text, empty in zip(chosen[:3], TEXT, EMPTY):
        np.testing.assert_array_equal(ours[0], text[0])
        np.testing.assert_array_equal(ours[1], empty[0])


def test_encode_text_is_the_towers():
    """The conditioning is the text tower's embedding and states, with the given mask."""
    tower = dict(vocab_size=20, length=L, width=W, layers=1, heads=2)
    config = {
        "embed_dim": D,
        "image": dict(image_size=4, patch_size=2, width=8, layers=1, heads=2),
        "text": tower,
    }
    clip = build_model({"kind": "clip", "model": config})
    tokens = jnp.array([[18, 5, 19, 0], [18, 19, 0, 0]])
    params = random_params(clip, jnp.zeros((2, 4, 4, 3)), tokens)
    batch = {"clip_tokens": tokens, "clip_token_mask": tokens > 0}
    text = jax.jit(lambda params: encode_text(Network(clip, params, {}), batch))(params)
    assert text.embed.shape == (2, D) and text.states.shape == (2, L, W)
    np.testing.assert_array_equal(text.mask, tokens > 0)
    np.testing.assert_allclose(
        text.embed[0], text.states[0, 2] @ params["text_tower"]["projection"]["kernel"], rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------------------------ codes
@pytest.fixture(scope="module")
def codes():
    """A sampler (text, keys, options, scale) -> z_image of a small autoregressive prior, and its codec."""
    config = {
        "kind": "prior_ar",
        "model": {"codes": 4, "buckets": 9, "dot_bins": 4, "length": L, "width": 16, "layers": 2, "heads": 2},
    }
    model, rng = build_model(config), np.random.default_rng(0)
    args = (jnp.zeros((B, 4), int), jnp.zeros(B, int))
    params = random_params(model, *args, text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)
    params["logits_out"]["kernel"] *= 4.0
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    codec = Codec(
        *(np.asarray(a, np.float32) for a in (rng.normal(size=D), basis, np.ones(D), -np.ones(D), np.ones(D)))
    )

    @functools.partial(jax.jit, static_argnames="options")
    def draw(text, keys, options, scale=None):
        options = options if scale is None else dataclasses.replace(options, guidance_scale=scale)
        return sample_prior(Network(model, params, config), Texts(text, EMPTY), keys, options, codec)

    return draw, codec, config


def test_codes_are_bucket_centres(codes):
    """Samples lie on the codec's grid. A row's key decides its sample in any batch; the caption matters."""
    draw, codec, _ = codes
    options = CodeSamplingOptions()
    z = draw(TEXT, KEYS, options)
    assert z.shape == (B, D) and z.dtype == jnp.float32
    y = np.asarray(project(codec, z, D))
    np.testing.assert_allclose((y[:, :4] + 1) * 4.5 - 0.5, np.round((y[:, :4] + 1) * 4.5 - 0.5), atol=1e-3)
    np.testing.assert_allclose(y[:, 4:], 0.0, atol=1e-5)  # components without a code are the mean's
    np.testing.assert_allclose(draw(one(1), KEYS[1:], options), z[1:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(draw(TEXT, KEYS[::-1], options), z, atol=1e-2)


def test_code_guidance_limits(codes):
    """Scale 1 is the conditional model, and scale 0 does not see the caption."""
    draw, _, _ = codes
    options, other = CodeSamplingOptions(guidance_scale=0.5), jax.tree.map(lambda a: a[::-1], TEXT)
    np.testing.assert_allclose(
        draw(TEXT, KEYS, options, 1.0), draw(TEXT, KEYS, CodeSamplingOptions()), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        draw(TEXT, KEYS, options, 0.0), draw(other, KEYS, options, 0.0), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(draw(TEXT, KEYS, options, 1.0), draw(other, KEYS, options, 1.0), atol=1e-2)


def test_code_temperature_and_top_k(codes):
    """Temperature 0, top-k 1 and a tiny temperature all take the most probable code.

    Then only the dot product is random.
    """
    draw, _, _ = codes
    last = 0.99  # only the highest bin
    greedy = draw(TEXT, KEYS, CodeSamplingOptions(temperature=0.0, dot_quantile=last))
    for options in (
        CodeSamplingOptions(top_k=1, dot_quantile=last),
        CodeSamplingOptions(temperature=1e-4, dot_quantile=last),
    ):
        np.testing.assert_allclose(draw(TEXT, KEYS, options), greedy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        draw(TEXT, KEYS[::-1], CodeSamplingOptions(temperature=0.0, dot_quantile=last)),
        greedy,
        rtol=1e-4,
        atol=1e-5,
    )
    assert not np.allclose(
        draw(TEXT, KEYS, CodeSamplingOptions(temperature=5.0, dot_quantile=last)), greedy, atol=1e-2
    )


def test_the_dot_product_comes_from_the_top(codes):
    """At quantile 0.5 of four bins, only bins 2 and 3 are drawn, each about half of the time."""
    draw, _, config = codes
    seen = []

    class Spy(type(build_model(config))):
        def prefill(self, dot, **text):
            jax.debug.callback(lambda d: seen.extend(np.asarray(d).tolist()), dot)
            return super().prefill(dot, **text)

    model = Spy(**config["model"])
    many = jax.tree.map(lambda a: jnp.repeat(a, 100, 0), TEXT)
    args = (jnp.zeros((B, 4), int), jnp.zeros(B, int))
    params = random_params(model, *args, text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask)
    sample_prior(
        Network(model, params, config), Texts(many, EMPTY), jax.random.key(0), CodeSamplingOptions(), codes[1]
    )
    jax.effects_barrier()
    assert len(seen) == 200 and set(seen) == {2, 3} and 70 < seen.count(2) < 130


@pytest.mark.parametrize("kind", ["codes", "diffusion"])
def test_candidates(kind, codes, request):
    """Either prior keeps the candidate nearest to the caption."""
    if kind == "codes":
        draw = lambda text, keys, count: codes[0](text, keys, CodeSamplingOptions(candidates=count))
    else:
        model = build_model(PRIOR)
        params = random_params(
            model, Z, T, text_embed=TEXT.embed, text_states=TEXT.states, text_mask=TEXT.mask
        )
        draw = lambda text, keys, count: sample_prior(
            Network(model, params, PRIOR),
            Texts(text, EMPTY),
            keys,
            SamplingOptions(3, clip=3.0, candidates=count),
        )
    best = draw(TEXT, KEYS, 4)
    every = jnp.stack(
        [draw(TEXT, jax.vmap(lambda k, j=j: jax.random.split(k, 4)[j])(KEYS), 1) for j in range(4)]
    )
    scores = cosine(every, TEXT.embed)
    np.testing.assert_allclose(cosine(best, TEXT.embed), scores.max(0), rtol=1e-3, atol=1e-4)
    assert np.all(scores.max(0) > scores.min(0) + 1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature must be 0 or a positive number"),
        ({"top_k": 0}, "top_k must be between 1 and 9"),
        ({"top_k": 10}, "top_k must be between 1 and 9"),
        ({"dot_quantile": 1.0}, "dot_quantile must be in"),
        ({"candidates": 0}, "candidates must be between 1 and 1024"),
        ({"guidance_scale": float("nan")}, "finite"),
    ],
)
def test_code_options_out_of_range(codes, settings, message):
    with pytest.raises(ValueError, match=message):
        check_options(CodeSamplingOptions(**settings), codes[2])
    with pytest.raises(ValueError, match="unknown sampling option steps; known: guidance_scale, temperature"):
        options_from({"steps": 3}, "prior_ar")
    with pytest.raises(ValueError, match="needs the codec of the codec part"):
        sample_prior(Network(None, {}, codes[2]), Texts(TEXT, EMPTY), KEYS, CodeSamplingOptions())
