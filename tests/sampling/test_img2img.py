"""Image-to-image against diffusers' pipeline at the same random weights and noise, and its invariants."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import unclip_jax
from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw
from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.data import ops
from unclip_jax.diffusion import process
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import Start, diffusion_sampler
from unclip_jax.generate.latents import encode_latents, latent_denoiser
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.img2img import img2img_rows
from unclip_jax.sampling.edits.latent_img2img import img2img_rows as latent_img2img_rows
from unclip_jax.sampling.latent import encode_captions
from unclip_jax.sampling.programs import Sampler

RNG = np.random.default_rng(5)
NOISE = np.float32(RNG.normal(size=(2, 8, 8, 4)))
WIDE_NOISE = np.float32(RNG.normal(size=(2, 8, 12, 4)))
IMAGES = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
CAPTIONS = ["a red fox on the ice", "two cats"]
BLURRY = "blurry, dark"
nhwc = lambda t: np.moveaxis(np.asarray(t), 1, -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """diffusers' image-to-image pipeline of a tiny Stable Diffusion, and a sampler of its folder."""
    from diffusers import StableDiffusionImg2ImgPipeline

    folder = tmp_path_factory.mktemp("sd") / "sd"
    pipeline = StableDiffusionImg2ImgPipeline(**peers.stable_diffusion(folder).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Sampler(load_bundle(folder))


@pytest.fixture
def same_noise(monkeypatch):
    """Both libraries draw the same noise, wherever they draw."""
    noises = {noise.shape: noise for noise in (NOISE, WIDE_NOISE)}
    ours = lambda key, shape, dtype=jnp.float32: jnp.asarray(noises[tuple(shape)])
    torches = {tuple(nchw(noise).shape): nchw(noise) for noise in noises.values()}
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and "randn_tensor" in vars(module):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: torches[tuple(shape)])
        if name.startswith("unclip_jax.") and hasattr(module, "standard_normal") and module is not process:
            monkeypatch.setattr(module, "standard_normal", ours)


def theirs(pipeline, scheduler, images, strength, steps, output_type, repeats=False):
    """The pipeline's pictures or latents, with its scheduler's tables in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if not scheduler.config.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    pipeline.scheduler = scheduler
    if repeats:  # see the test
        pipeline.get_timesteps = lambda count, strength, device: repeated(scheduler, count, strength)
    try:
        return pipeline(
            CAPTIONS, image=[Image.fromarray(image) for image in images], strength=strength,
            num_inference_steps=steps, guidance_scale=4.0, negative_prompt=[BLURRY] * 2,
            output_type=output_type,
        ).images  # fmt: skip
    finally:
        vars(pipeline).pop("get_timesteps", None)


def repeated(scheduler, count, strength):
    """The last steps of PNDM's, the second of them twice, as at the start of its whole list."""
    kept = scheduler.timesteps.unique().flip(0)[count - int(count * strength) :]
    return torch.cat([kept[:2], kept[1:2], kept[2:]]), len(kept)


class Steps:
    """Runs a sampler's steps one after another, so that all samplers share one compiled denoiser."""

    def watch(self, denoise):
        return denoise

    def __call__(self, body, carry, xs):
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, _ = body(carry, jax.tree.map(lambda a, i=i: a[i], xs))
        return carry


@pytest.fixture(scope="module")
def latents(made):
    """A function (options, strength) -> latents, with the networks compiled once."""
    sampler = made[1]
    networks = sampler.networks
    latent, autoencoder = networks["latent"], networks["autoencoder"]
    captions, negative = sampler.captions(CAPTIONS), sampler.captions([BLURRY] * 2)
    texts = jax.jit(lambda a, b: encode_captions(networks["clip"], a, b))(captions, negative)
    moments = jax.jit(lambda x: autoencoder.apply(x, method="encode"))(ops.to_float(IMAGES))
    base = sampler.options({"latent": {"guidance_scale": 4.0}})["latent"]
    denoise = jax.jit(lambda x, t: latent_denoiser(latent, texts, (8, 8), base, 2)(x, t))

    def draw(options, strength):
        chosen = diffusion_sampler(latent.config, sampler.options({"latent": options})["latent"])
        given = {"latents": moments.mean + jnp.exp(0.5 * moments.logvar) * NOISE}
        x0 = encode_latents(autoencoder, given, None)
        chosen, x = chosen.begin(jnp.asarray(NOISE), Start(x0, strength))
        return chosen.run(denoise, x, jax.random.key(0), Steps())

    return draw


SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
LEADING = dict(timestep_spacing="leading", steps_offset=1)
CASES = {  # our options -> their scheduler and its settings
    ("ddim", "leading", "first"): ("DDIMScheduler", dict(LEADING, set_alpha_to_one=False)),
    ("plms", "leading", "first"): ("PNDMScheduler", dict(LEADING, skip_prk_steps=True)),
    ("euler", "linspace", "clean"): ("EulerDiscreteScheduler", dict(timestep_spacing="linspace")),
    ("euler_ancestral", "trailing", "clean"): (
        "EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing"),
    ),
    ("dpmpp_2m", "leading", "first"): (
        "DPMSolverMultistepScheduler", dict(LEADING, final_sigmas_type="sigma_min"),
    ),
    ("ddpm", "leading", "clean"): ("DDPMScheduler", dict(LEADING, variance_type="fixed_small")),
}  # fmt: skip


@pytest.mark.parametrize(
    "ours, steps, strength",
    [*((ours, 5, 0.61) for ours in CASES), (("dpmpp_2m", "leading", "first"), 16, 0.4)],
)
def test_samplers_equal_diffusers(made, latents, same_noise, ours, steps, strength):
    """Latents after the cut steps, for each sampler. diffusers' pipeline cuts PNDM's list of steps without
    repeating the second one, so that the sample lags one step behind what the network is told. Ours repeats
    it, and is compared with PNDM's own steps in that order."""
    import diffusers

    name, settings = CASES[ours]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name).from_config(SCHEDULE | settings)
    wanted = theirs(made[0], scheduler, IMAGES, strength, steps, "latent", repeats=name == "PNDMScheduler")
    spaced = dict(zip(("sampler", "spacing", "last"), ours), offset=settings.get("steps_offset", 0))
    drawn = latents(dict(steps=steps, guidance_scale=4.0, **spaced), strength)
    close(drawn, nhwc(wanted), 2e-4)


def test_whole_call_equals_diffusers(made, same_noise):
    """Pictures to pictures: equal to one level of 255. What has another shape is cropped first."""
    import diffusers

    images = RNG.integers(0, 256, (2, 16, 40, 3), np.uint8)
    cropped = [ops.center_crop(image, (16, 24)) for image in images]
    np.testing.assert_array_equal(cropped[0], images[0, :, 8:32])
    np.testing.assert_array_equal(ops.center_crop(images[0], (3, 3)), ops.center_crop_square(images[0]))
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, **LEADING, set_alpha_to_one=False)
    wanted = theirs(made[0], scheduler, cropped, 0.7, 4, "np")
    options = dict(steps=4, guidance_scale=4.0, negative=BLURRY, sampler="ddim", height=16, width=24)
    drawn = latent_img2img_rows(made[1], images, CAPTIONS, strength=0.7, options={"latent": options})
    assert np.abs(drawn.astype(int) - np.round(wanted * 255).astype(int)).max() <= 1
    assert np.abs(drawn.astype(int) - cropped).mean() > 5


@pytest.mark.parametrize(
    "strength, words",
    [
        (0.1, "makes none of 4 steps: raise the strength or the steps"),
        (0.0, "must be in \\(0, 1\\], got 0.0"),
        (1.2, "must be in"),
        (float("nan"), "must be in"),
    ],
)
def test_refused_strengths(made, tiny_bundle, strength, words):
    pixels = unclip_jax.load_bundle(tiny_bundle)
    for draw, bundle, name in ((latent_img2img_rows, made[1], "latent"), (img2img_rows, pixels, "decoder")):
        with pytest.raises(InputError, match=words):
            draw(bundle, IMAGES, CAPTIONS, strength=strength, options={name: {"steps": 4}})
        with pytest.raises(InputError, match="one caption per image"):
            draw(bundle, IMAGES, CAPTIONS[:1])


def test_pixels(tiny_bundle):
    """A decoder keeps the picture at a low strength, and less of it at a high one. Rows do not depend on
    their batch."""
    bundle = unclip_jax.load_bundle(tiny_bundle)
    parts = {name: part for name, part in bundle.parts.items() if name != "upsampler_16"}
    small = Sampler(Bundle(parts, sampling=bundle.sampling))
    smooth = np.tile(np.linspace(60, 190, 16)[:, None, None], (2, 1, 16, 3)).astype(np.uint8)
    shared = dict(options={"decoder": {"steps": 100, "sampler": "ddim"}}, prior="none", seed=2)
    drawn = {s: img2img_rows(small, smooth, CAPTIONS, strength=s, **shared).astype(int) for s in (0.02, 0.6)}
    errors = {s: np.abs(made - inversion.square(smooth, 8)).mean() for s, made in drawn.items()}
    assert errors[0.02] < 10 < 3 * errors[0.02] + 20 < errors[0.6], errors
    alone = img2img_rows(small, smooth[1:], CAPTIONS[1:], strength=0.6, positions=[1], **shared)
    assert np.abs(alone[0] - drawn[0.6][1]).max() <= 1
    assert np.abs(drawn[0.6][0] - drawn[0.6][1]).max() > 5
