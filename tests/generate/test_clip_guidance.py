"""CLIP guidance: the samplers' rule against an analytic Gaussian, GLIDE's noised CLIP, and drawn pictures."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checkpoint.peer_glide import write_glide
from tests.helpers import param_count
from unclip_jax.checkpoint.check import clip_shapes
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers.glide import clip_model
from unclip_jax.diffusion.guidance import Denoised, with_score
from unclip_jax.diffusion.samplers import ddim, ddpm
from unclip_jax.diffusion.schedule import make_schedule, time_steps
from unclip_jax.generate.clip_guidance import clip_score
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.models.clip import unit
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import system_of


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_an_analytic_gaussian(sampler):
    """x ~ N(0, 1) and y | x ~ N(x, s^2): with the exact score of y, samples have the posterior's moments."""
    schedule, y, s = make_schedule("cosine", 1000), 1.5, 0.7
    table = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x, t):
        return Denoised(jnp.sqrt(table[t]) * x, jnp.sqrt(1 - table[t]) * x, None)

    def score(x, t):
        root = jnp.sqrt(table[t])
        return root * (y - root * x) / (1 - table[t] + s**2)

    x = jax.random.normal(jax.random.key(0), (4096, 2))
    guided = with_score(denoise, score, schedule, sampler is ddpm)
    out = jax.jit(lambda x: sampler(guided, x, schedule, time_steps(1000, 1000), jax.random.key(1)))(x)
    np.testing.assert_allclose(out.mean(), y / (1 + s**2), atol=0.03)
    np.testing.assert_allclose(out.std(), s / math.sqrt(1 + s**2), atol=0.03)


# ------------------------------------------------------------------------------------ GLIDE's noised CLIP
OPTIONS = dict(
    image_size=16, patch_size=4, n_vocab=700, max_text_len=12, n_embd=10, n_timesteps=1000,
    n_head_text=2, n_xf_blocks_text=2, n_head_state_text=8, n_head_image=2, n_xf_blocks_image=1,
    n_head_state_image=12,
)  # fmt: skip


def test_published_sizes():
    shapes = clip_shapes(clip_model({}, "clip"))
    assert param_count(shapes["image_tower"]) == 86_443_776
    assert param_count(shapes["text_tower"]) == 71_679_488


def peer_states(rng):
    """Both files at random weights, by their published names."""

    def half(name, table):
        width = OPTIONS[f"n_head_{name}"] * OPTIONS[f"n_head_state_{name}"]
        affine = lambda at, i, o, bias=True: {f"{at}.w": (o, i)} | ({f"{at}.b": (o,)} if bias else {})
        norm = lambda at: {f"{at}.g": (width,), f"{at}.b": (width,)}
        shapes = table(width) | norm("blocks.output.ln") | {"blocks.output.f.w": (OPTIONS["n_embd"], width)}
        for i in range(OPTIONS[f"n_xf_blocks_{name}"]):
            at = f"blocks.block_{i}"
            shapes |= norm(f"{at}.f_attn.ln") | norm(f"{at}.f_mlp.ln")
            for one in "qkvc":
                shapes |= affine(f"{at}.f_attn.f_{one}", width, width, one != "k")
            shapes |= affine(f"{at}.f_mlp.f_1", width, 4 * width) | affine(
                f"{at}.f_mlp.f_2", 4 * width, width
            )
        draw = lambda key, shape: (key.endswith(".g")) + 0.3 * rng.normal(size=shape)
        return {key: torch.tensor(draw(key, shape), dtype=torch.float32) for key, shape in shapes.items()}

    patches = (OPTIONS["image_size"] // OPTIONS["patch_size"]) ** 2
    image = half("image", lambda w: {
        "blocks.input.patch_proj": (w, 3, 4, 4), "blocks.input.w_pos": (1 + patches, w),
        "blocks.input.w_t": (1000, w), "blocks.input.ln.g": (w,), "blocks.input.ln.b": (w,),
    })  # fmt: skip
    text = half("text", lambda w: {"blocks.input.w_voc": (700, w), "blocks.input.w_pos": (12, w)})
    return {"clip_image_enc": image, "clip_text_enc": text}


def peer_encode(state, x, heads, mask):
    """The blocks and the pooled projection of a half (B, L, W); `mask` is added to the scores."""
    norm = lambda x, at: F.layer_norm(x, x.shape[-1:], state[f"{at}.g"], state[f"{at}.b"], 1e-5)
    affine = lambda x, at: x @ state[f"{at}.w"].T + state.get(f"{at}.b", torch.zeros(()))
    i = 0
    while f"blocks.block_{i}.f_attn.ln.g" in state:
        at = f"blocks.block_{i}"
        h = norm(x, f"{at}.f_attn.ln")
        q, k, v = (affine(h, f"{at}.f_attn.f_{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        h = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, dim=-1) @ v
        x = x + affine(h.transpose(1, 2).flatten(2), f"{at}.f_attn.f_c")
        h = affine(norm(x, f"{at}.f_mlp.ln"), f"{at}.f_mlp.f_1")
        x, i = x + affine(F.gelu(h), f"{at}.f_mlp.f_2"), i + 1
    return lambda at: norm(x[torch.arange(len(x)), at], "blocks.output.ln") @ state["blocks.output.f.w"].T


def peer_image(state, image, t):
    """(B, 3, H, W) in [-1, 1], (B,) steps -> unit embeddings."""
    means = torch.tensor([122.77093945, 116.74601272, 104.09373519])[:, None, None]
    deviations = torch.tensor([68.50053285, 66.63215831, 70.32316309])[:, None, None]
    patches = F.conv2d(((image + 1) * 127.5 - means) / deviations, state["blocks.input.patch_proj"], stride=4)
    x = torch.cat([state["blocks.input.w_t"][t][:, None], patches.flatten(2).transpose(1, 2)], 1)
    x = x + state["blocks.input.w_pos"]
    x = F.layer_norm(x, x.shape[-1:], state["blocks.input.ln.g"], state["blocks.input.ln.b"], 1e-5)
    return nn.functional.normalize(peer_encode(state, x, 2, 0.0)(torch.zeros(len(x)).long()), dim=-1)


def peer_text(state, tokens, length):
    x = state["blocks.input.w_voc"][tokens] + state["blocks.input.w_pos"]
    mask = torch.full((12, 12), -1e10).triu(1)
    return nn.functional.normalize(peer_encode(state, x, 2, mask)(length - 1), dim=-1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glide")
    write_glide(folder, ["base"])
    states = peer_states(np.random.default_rng(0))
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    (folder / "clip.json").write_text(json.dumps(OPTIONS))
    return folder, states, Sampler(load_bundle(folder))


def test_the_noised_clip(made):
    """Embeddings and the gradient by x_t equal torch's."""
    _, states, sampler = made
    part = sampler.bundle.part("noised_clip")
    clip = Network(build_model(part.config), part.params, part.config)
    tokens, mask = sampler.tokenizer_of("noised_clip")(["a red fox", "a blue heart, and more words"])
    z_text = jax.jit(lambda tokens: unit(clip.apply(tokens, method="encode_text").embed))(tokens)
    theirs = peer_text(states["clip_text_enc"], torch.tensor(tokens).long(), torch.tensor(mask.sum(1)))
    np.testing.assert_allclose(z_text, theirs, atol=1e-5)
    image = np.float32(np.random.default_rng(1).normal(size=(2, 16, 16, 3)))
    score = jax.jit(clip_score(clip, z_text, 3.0, None))(image, jnp.int32(417))
    x = torch.tensor(np.moveaxis(image, -1, 1), requires_grad=True)
    z_image = peer_image(states["clip_image_enc"], x, torch.tensor([417, 417]))
    (gradient,) = torch.autograd.grad(math.exp(math.log(100)) * (theirs * z_image).sum(), x)
    np.testing.assert_allclose(score, np.moveaxis(3 * gradient.numpy(), 1, -1), atol=1e-3, rtol=1e-3)


def test_glide_is_guided_by_its_noised_clip(made):
    folder, states, sampler = made
    draw = lambda **options: system_of(sampler.bundle).sample(
        sampler, ["a red fox"], options={"glide": {"steps": 12, "guidance_scale": 1.0, **options}}
    ).images[0]  # fmt: skip
    tokens, mask = sampler.tokenizer_of("noised_clip")(["a red fox"])
    z = peer_text(states["clip_text_enc"], torch.tensor(tokens).long(), torch.tensor(mask.sum(1)))

    def similarity(image):
        x = torch.tensor(np.moveaxis(image, -1, 1))
        return float((peer_image(states["clip_image_enc"], x, torch.tensor([0])) * z).sum())

    assert similarity(draw(clip_guidance=1.0)) > similarity(draw()) + 0.02
    (folder / "half").mkdir(exist_ok=True)
    (folder / "half" / "clip_text_enc.pt").write_bytes((folder / "clip_text_enc.pt").read_bytes())
    (folder / "half" / "base.pt").write_bytes((folder / "base.pt").read_bytes())
    for file in ("vocab.bpe", "encoder.json", "base.json"):
        (folder / "half" / file).write_text((folder / file).read_text())
    with pytest.raises(ValueError, match="clip_text_enc.pt is half of a CLIP"):
        load_bundle(folder / "half")


def test_unclip_is_guided_through_its_denoiser(tiny_bundle):
    """The gradient runs through the U-Net to CLIP's embedding of the clean image."""
    sampler = Sampler(load_bundle(tiny_bundle))
    clip = sampler.network("clip")
    embed = jax.jit(
        lambda x: unit(clip.apply(jax.image.resize(x, (1, 16, 16, 3), "cubic"), method="encode_image"))
    )
    found = []
    for scale in (0.0, 0.3):
        options = {"decoder": {"clip_guidance": scale, "steps": 8, "sampler": "ddim"}}
        stages = system_of(sampler.bundle).sample(sampler, ["a red fox"], prior="none", options=options)
        found.append(float((embed(stages.images[0]) * unit(stages.z_text)).sum()))
    assert found[1] > found[0] + 0.01
    for part, message in (("upsampler_16", "draw pixels from captions"), ("prior_diffusion", "draw pixels")):
        with pytest.raises(ValueError, match=message):
            sampler.options({part: {"clip_guidance": 1.0}})


def test_a_bundle_without_clip(made):
    sampler = made[2]
    parts = {"glide": sampler.bundle.part("glide")}
    alone = type(sampler.bundle)(parts, "glide", sampler.bundle.sampling)
    with pytest.raises(ValueError, match="clip_guidance needs a CLIP, and the bundle .* has none"):
        system_of(alone).sample(alone, ["a fox"], options={"glide": {"clip_guidance": 1.0}})
