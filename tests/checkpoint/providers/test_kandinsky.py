"""Kandinsky 2.2's folders against diffusers, run at the same random weights."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.checkpoint.kandinsky_peers import SCHEDULE, kandinsky
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import kandinsky_export
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.diffusion import process
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits.coders import CODERS
from unclip_jax.sampling.edits.interpolation import interpolate
from unclip_jax.sampling.edits.kandinsky_img2img import img2img_rows
from unclip_jax.sampling.edits.kandinsky_inpaint import inpaint_rows
from unclip_jax.sampling.edits.mixing import mix
from unclip_jax.sampling.edits.text_diff import text_diff
from unclip_jax.sampling.edits.variations import fresh_variations, variations
from unclip_jax.sampling.kandinsky import sample_stages
from unclip_jax.sampling.programs import Sampler

RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))
nhwc = lambda t: np.moveaxis(t.detach().numpy(), 1, -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, the pipelines it was written by, and the bundle read from it."""
    folder = tmp_path_factory.mktemp("kandinsky")
    return folder, kandinsky(folder), load_bundle(folder)


def test_parts(made):
    """What the folders become, and the hashes of the parts under each."""
    bundle = made[2]
    assert bundle.system == "kandinsky"
    assert {name: part.config["kind"] for name, part in bundle.parts.items()} == {
        "clip": "clip",
        "prior_diffusion": "prior_diffusion",
        "latent": "kandinsky",
        "latent_inpaint": "kandinsky",
        "autoencoder": "vq_autoencoder",
    }
    frozen = {name: params_hash(bundle.parts[name].params) for name in ("clip", "autoencoder")}
    assert (
        bundle.parts["latent"].config["frozen"] == bundle.parts["latent_inpaint"].config["frozen"] == frozen
    )
    assert bundle.parts["prior_diffusion"].config["frozen"] == {"clip": frozen["clip"]}
    assert bundle.sampling["prior_diffusion"]["clip"] == 10
    assert bundle.sampling["latent"] == {
        "steps": 100, "guidance_scale": 4.0, "sampler": "ddpm", "spacing": "leading", "last": "clean",
        "variance": "small", "clip": None,
    }  # fmt: skip


@pytest.mark.parametrize("role, name", [("decoder", "latent"), ("inpaint", "latent_inpaint")])
def test_decoder_step(made, role, name):
    """Noise and variance, at a size that is not square."""
    unet, z = made[1][role].unet, normal(2, peers.DIM)
    x, t = normal(2, 10, 6, unet.config.in_channels), np.array([3, 912])
    with torch.no_grad():
        theirs = unet(
            nchw(x), torch.from_numpy(t), None, added_cond_kwargs={"image_embeds": torch.from_numpy(z)}
        ).sample
    close(run_part(made[2], name, x, t, image_embed=z), nhwc(theirs), 1e-4)


def test_autoencoder(made):
    """Latents of images with odd sides, and images of latents without the codebook."""
    movq, image, z = made[1]["decoder"].movq, np.tanh(normal(1, 21, 30, 3)), normal(1, 7, 9, 4)
    with torch.no_grad():
        latents = movq.encode(nchw(image)).latents
        decoded = movq.decode(nchw(z), force_not_quantize=True).sample
    close(run_part(made[2], "autoencoder", image, method="encode"), nhwc(latents), 1e-4)
    close(run_part(made[2], "autoencoder", z, method="decode_quantised"), nhwc(decoded), 1e-4)


def test_prior_step(made):
    """x0 for noised embeddings, with padding masked."""
    prior, z = made[1]["prior"].prior, normal(3, peers.DIM)
    z_text, states = normal(3, peers.DIM), normal(3, peers.LENGTH, peers.DIM)
    t, mask = np.array([0, 500, 999]), np.arange(peers.LENGTH) < np.array([[2], [5], [10]])
    given = dict(zip(("proj_embedding", "encoder_hidden_states", "attention_mask"), (z_text, states, mask)))
    with torch.no_grad():
        theirs = prior(
            *map(torch.from_numpy, (z, t)), **{name: torch.from_numpy(a) for name, a in given.items()}
        ).predicted_image_embedding
    text = {"text_embed": z_text, "text_states": states, "text_mask": mask}
    close(run_part(made[2], "prior_diffusion", z, t, **text), theirs, 1e-4)


# ------------------------------------------------------------------------------------------ whole pipelines
CAPTIONS = ["a red fox on the ice", "two cats"]


@pytest.fixture(scope="module")
def exact(made):
    """The pipelines with their schedulers' tables in float64, as ours are."""
    for role, pipeline in made[1].items():
        scheduler = peers.exact(pipeline.scheduler)
        if role != "prior":
            ends = SCHEDULE["beta_start"], SCHEDULE["beta_end"]
            scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(*ends, 1000, dtype=torch.float64), 0)
    return made[1]


def share_noise(monkeypatch, size, rows=2):
    """The same noise in both libraries at every step: of embeddings, and of latents (rows, *size, 4). Theirs
    draws the negative captions' rows in the same call."""
    import diffusers.schedulers.scheduling_ddpm as ddpm
    import diffusers.schedulers.scheduling_unclip as unclip

    embeds, latents = normal(rows, peers.DIM), normal(rows, *size, 4)
    theirs = {(rows, peers.DIM): torch.from_numpy(embeds)}
    theirs[2 * rows, peers.DIM] = torch.from_numpy(np.concatenate([embeds, embeds]))
    theirs[rows, 4, *size] = nchw(latents)
    theirs[rows, 8, *size] = nchw(np.concatenate([latents, latents], -1))
    for module in (ddpm, unclip):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: theirs[tuple(shape)])
    ours = {embeds.shape: embeds, latents.shape: latents}
    draw = lambda key, shape, dtype=jnp.float32: jnp.asarray(ours[tuple(shape)])
    for name, module in list(sys.modules.items()):
        if name.startswith("unclip_jax.") and hasattr(module, "standard_normal") and module is not process:
            monkeypatch.setattr(module, "standard_normal", draw)
    return theirs[rows, peers.DIM], theirs[2 * rows, peers.DIM], theirs[rows, 4, *size]


def test_whole_pipeline(made, exact, monkeypatch):
    """Captions to pictures with the same noise: equal to one level of 255. One of the captions has a negative
    one beside it, and the other none."""
    embeds, both, latents = share_noise(monkeypatch, (8, 12))
    negative, options = ["blurry, dark", ""], {"height": 16, "width": 24, "guidance_scale": 3.0, "steps": 5}
    rows = [{"prior_diffusion": {"steps": 4}, "latent": options | {"negative": text}} for text in negative]
    drawn = sample_stages(load_bundle(made[0]), CAPTIONS, options=rows)
    options = {"num_inference_steps" if name == "steps" else name: value for name, value in options.items()}
    for row, (words, noise) in enumerate(((negative, both), (None, embeds))):
        found = exact["prior"](CAPTIONS, words, num_inference_steps=4, latents=noise)
        close(drawn.z_image[row], found.image_embeds[row], 1e-4)
        theirs = exact["decoder"](**found, **options, latents=latents, output_type="np").images[row]
        levels = np.round(theirs * 255).astype(int)
        assert levels.shape == (16, 24, 3) and levels.std() > 20
        assert np.abs(ops.to_uint8(drawn.images[0])[row].astype(int) - levels).max() <= 1


def picture_and_mask():
    """A picture of 16 px, and where it is drawn anew."""
    redrawn = np.zeros((16, 16), bool)
    redrawn[3:10, 5:12] = True
    return np.random.default_rng(4).integers(0, 256, (16, 16, 3), np.uint8), redrawn


def test_inpainting_pipeline(made, exact, monkeypatch):
    """Pictures of the library's inpainting pipeline, to one level where they are drawn anew."""
    image, redrawn = picture_and_mask()
    embeds, _, latents = share_noise(monkeypatch, (8, 8), rows=1)
    found = exact["prior"](CAPTIONS[0], num_inference_steps=3, latents=embeds)
    theirs = exact["inpaint"](
        **found, image=[image], mask_image=[np.float32(redrawn)], num_inference_steps=4, guidance_scale=3.0,
        height=16, width=16, latents=latents, output_type="np",
    ).images[0]  # fmt: skip
    options = {"prior_diffusion": {"steps": 3}, "latent_inpaint": {"steps": 4, "guidance_scale": 3.0}}
    ours = inpaint_rows(load_bundle(made[0]), [image], [~redrawn], CAPTIONS[:1], options=options)[0]
    np.testing.assert_array_equal(ours[~redrawn], image[~redrawn])
    levels = np.round(theirs * 255).astype(int)
    assert np.abs(ours.astype(int) - levels)[redrawn].max() <= 1
    assert np.abs(levels - image)[redrawn].mean() > 5


def test_image_to_image_pipeline(made, exact, monkeypatch):
    """Pictures of the library's pipeline from the same noised latents, to one level."""
    from diffusers import KandinskyV22Img2ImgPipeline
    from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_img2img as theirs_module

    image, _ = picture_and_mask()
    embeds, _, latents = share_noise(monkeypatch, (8, 8), rows=1)
    monkeypatch.setattr(theirs_module, "randn_tensor", lambda shape, **kwargs: latents)
    found = exact["prior"](CAPTIONS[0], num_inference_steps=3, latents=embeds)
    pipeline = KandinskyV22Img2ImgPipeline(**exact["decoder"].components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        **found, image=nchw(ops.to_float(image[None])), strength=0.6, num_inference_steps=5,
        guidance_scale=3.0, height=16, width=16, output_type="np",
    ).images[0]  # fmt: skip
    options = {"prior_diffusion": {"steps": 3}, "latent": {"steps": 5, "guidance_scale": 3.0}}
    drawn = img2img_rows(load_bundle(made[0]), [image], CAPTIONS[:1], strength=0.6, options=options)[0]
    assert theirs.std() > 0.05
    assert np.abs(drawn.astype(int) - np.round(theirs * 255)).max() <= 1


@pytest.mark.slow
def test_inpainting_without_training(made):
    """RePaint with the other decoder keeps what is known, and draws the rest for the caption."""
    image, redrawn = picture_and_mask()
    options = {"prior_diffusion": {"steps": 2}, "latent": {"steps": 3, "guidance_scale": 2.0}}
    given = [image] * 2, [~redrawn] * 2, CAPTIONS
    drawn = inpaint_rows(made[2], *given, method="resample", options=options, seed=1, resamples=2)
    np.testing.assert_array_equal(drawn[:, ~redrawn], np.stack([image] * 2)[:, ~redrawn])
    assert np.abs(drawn[0].astype(int) - drawn[1])[redrawn].mean() > 1
    with pytest.raises(InputError, match="leave height and width out"):
        inpaint_rows(made[2], *given, options={"latent_inpaint": {"height": 16}})


# --------------------------------------------------------------------------------------------------- and back
def test_export_to_diffusers(made, tmp_path):
    """The library loads what `unclip export` writes, with the same tensors; so do we."""
    from diffusers import KandinskyV22InpaintPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline

    folder, pipelines, bundle = made
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    loaders = (KandinskyV22PriorPipeline, KandinskyV22Pipeline, KandinskyV22InpaintPipeline)
    for (role, pipeline), loader in zip(pipelines.items(), loaders):
        loaded = loader.from_pretrained(tmp_path / "out" / role)
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                theirs, wanted = getattr(loaded, name).state_dict(), module.state_dict()
                assert theirs.keys() == wanted.keys()
                for key, value in wanted.items():
                    np.testing.assert_array_equal(theirs[key].numpy(), value.numpy(), err_msg=key)
        for key in {"beta_schedule", "clip_sample", "num_train_timesteps"}:
            assert loaded.scheduler.config[key] == pipeline.scheduler.config[key]
    again = load_bundle(tmp_path / "out")
    assert again.sampling == bundle.sampling
    for name, part in bundle.parts.items():
        assert again.parts[name].config == part.config


@pytest.mark.parametrize("name", ["latent", "latent_inpaint"])
def test_what_cannot_be_exported(made, tmp_path, name):
    bundle = made[2]
    other = dataclasses.replace(bundle, sampling=bundle.sampling | {name: {"steps": 2, "sampler": "euler"}})
    with pytest.raises(InputError, match="samplers are ddpm and ddim, not euler"):
        kandinsky_export.write(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- verbs
@pytest.mark.slow
def test_image_edits(made):
    """The picture again from its z_i and x_T, closer with more steps; variations with noise are others; ways
    between pictures end at both; text diffs begin at the picture."""
    bundle, rng = made[2], np.random.default_rng(5)
    unet = bundle.parts["latent"].params["unet"]
    # A network of random weights turns sharply from step to step, and a trained one does not.
    calm = unet | {"conv_out": jax.tree.map(lambda value: 0.1 * value, unet["conv_out"])}
    latent = dataclasses.replace(
        bundle.parts["latent"], params=bundle.parts["latent"].params | {"unet": calm}
    )
    sampler = Sampler(dataclasses.replace(bundle, parts=bundle.parts | {"latent": latent}))
    first, second = (ops.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), 16) for _ in range(2))
    wanted = sampler.network("autoencoder").apply(ops.to_float(first[None]), method="encode")
    errors = []
    for steps in (4, 40):
        z_image, x_T = CODERS["kandinsky"].encode(sampler, [first], steps=steps)
        options = {"steps": steps, "sampler": "ddim", "spacing": "even", "guidance_scale": 1.0, "clip": None}
        drawn = sample_stages(sampler, [""], z_image=z_image, x_T=x_T, options={"latent": options})
        errors.append(np.abs(drawn.latents - wanted).max() / np.abs(wanted).max())
    assert errors[1] < 0.4 * errors[0], errors
    same, other = (variations(sampler, [first], count=1, eta=eta, steps=4)[0, 0] for eta in (0.0, 1.0))
    assert np.abs(same.astype(int) - other).mean() > 5
    between = interpolate(sampler, first, second, count=3, steps=4)
    assert np.abs(between[0].astype(int) - same).max() <= 1
    turned = text_diff(sampler, first, "a cat", "a dog", count=2, steps=4)
    assert np.abs(turned[0].astype(int) - same).max() <= 1 and np.any(turned[1] != turned[0])
    fresh = fresh_variations(sampler, [first], count=2, options={"latent": {"steps": 4}})[0]
    assert fresh.shape == (2, 16, 16, 3) and np.abs(fresh[0].astype(int) - fresh[1]).mean() > 5


def test_mixtures(made, exact, monkeypatch):
    """A weighted picture and a caption: the pictures of the library's `interpolate`, to one level."""
    image = np.random.default_rng(7).integers(0, 256, (16, 16, 3), np.uint8)
    embeds, _, latents = share_noise(monkeypatch, (8, 8), rows=1)
    processor = exact["prior"].image_processor
    pixels = np.float32((image / 255 - processor.image_mean) / processor.image_std)[None]
    found = exact["prior"].interpolate(
        [nchw(pixels), CAPTIONS[0]], [0.3, 0.6], num_inference_steps=3, latents=embeds
    )
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    theirs = exact["decoder"](**found, **settings, latents=latents, output_type="np").images
    options = {"prior_diffusion": {"steps": 3}, "latent": {"steps": 4, "guidance_scale": 3.0}}
    ours = mix(load_bundle(made[0]), [image, CAPTIONS[0]], [0.3, 0.6], count=1, options=options)
    assert theirs.std() > 0.05
    assert np.abs(ours.astype(int) - np.round(theirs * 255)).max() <= 1
    for weights, words in (([1.0], "a weight for each of 2"), ([0.0, 0.0], "not all zero")):
        with pytest.raises(InputError, match=words):
            mix(made[2], [image, CAPTIONS[0]], weights)
