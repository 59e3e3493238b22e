"""Stable Diffusion's folders against diffusers, run at the same random weights."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from tests.models.test_latent_unet import SD1, SD2
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import stable_diffusion_config, stable_diffusion_export
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.diffusion import process
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits.latent_inpaint import inpaint_rows
from unclip_jax.sampling.latent import sample_stages
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image

RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))
nhwc = lambda t: np.moveaxis(t.detach().numpy(), 1, -1)
CAPTIONS = ["a red fox on the ice", "two cats"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each version: the folder, the pipeline it was written by, and the bundle read from it."""
    found = {}
    for version, prediction in ((1, "epsilon"), (2, "v_prediction")):
        folder = tmp_path_factory.mktemp("sd") / f"sd{version}"
        pipeline = peers.stable_diffusion(folder, version=version, prediction=prediction)
        found[version] = folder, pipeline, load_bundle(folder)
    return found


both = pytest.mark.parametrize("version", [1, 2])


@both
def test_parts(made, version):
    bundle = made[version][2]
    assert bundle.system == "latent"
    assert {name: part.config["kind"] for name, part in bundle.parts.items()} == {
        "clip": "clip",
        "latent": "latent",
        "autoencoder": "kl_autoencoder",
    }
    frozen = {name: params_hash(bundle.parts[name].params) for name in ("clip", "autoencoder")}
    assert bundle.parts["latent"].config["frozen"] == frozen
    assert bundle.parts["latent"].config["diffusion"]["prediction"] == ("eps" if version == 1 else "v")
    assert bundle.sampling["latent"]["sampler"] == "plms" and bundle.sampling["latent"]["offset"] == 1
    assert bundle.parts["autoencoder"].config["scale_factor"] == 0.18215


def test_published_configurations():
    """The files of 1.x and 2.x describe the networks whose parameters `test_latent_unet` counts."""
    unet = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8, "freq_shift": 0,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True, "in_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
        "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    second = unet | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    second |= {"use_linear_projection": True, "upcast_attention": True, "dual_cross_attention": False}
    for config, wanted in ((unet, SD1), (second, SD2)):
        model = stable_diffusion_config.unet_model(config, "the U-Net")
        assert {key: model[key] for key in wanted} == wanted
    scheduler = {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    for kind, prediction, sampler in (("PNDM", "epsilon", "plms"), ("DDIM", "v_prediction", "ddim")):
        config = scheduler | {"_class_name": f"{kind}Scheduler", "prediction_type": prediction}
        diffusion, sampling = stable_diffusion_config.scheduler(config, "the scheduler")
        assert sampling["sampler"] == sampler and sampling["offset"] == 1 and sampling["last"] == "first"
        assert diffusion["prediction"] == {"epsilon": "eps", "v_prediction": "v"}[prediction]


@both
def test_text_states(made, version):
    """The tokens with their padding, and the states after the last norm."""
    _, pipeline, bundle = made[version]
    tokens = pipeline.tokenizer(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    ours = Sampler(bundle).captions(CAPTIONS)["clip_tokens"]
    np.testing.assert_array_equal(ours, tokens.numpy())
    assert ours[1, -1] == (599 if version == 1 else 0)
    with torch.no_grad():
        wanted = pipeline.text_encoder(tokens).last_hidden_state
    close(run_part(bundle, "clip", ours, method="encode_text").states, wanted)


@both
def test_networks(made, version):
    """The U-Net and the decoder, at sizes that do not halve evenly."""
    _, pipeline, bundle = made[version]
    x, states = normal(2, 7, 9, 4), normal(2, peers.LENGTH, 16)
    t = np.array([3, 912])
    with torch.no_grad():
        noise = pipeline.unet(
            nchw(x), torch.from_numpy(t), encoder_hidden_states=torch.from_numpy(states)
        ).sample
        image = pipeline.vae.decode(nchw(x)).sample
    close(run_part(bundle, "latent", x, t, context=states), nhwc(noise), 1e-4)
    close(run_part(bundle, "autoencoder", x, method="decode"), nhwc(image), 1e-4)


def share_noise(monkeypatch, noise):
    """Our samplers begin with this noise."""
    import sys

    draw = lambda key, shape, dtype=jnp.float32: jnp.asarray(noise)
    for name, module in list(sys.modules.items()):
        if name.startswith("unclip_jax.") and hasattr(module, "standard_normal") and module is not process:
            monkeypatch.setattr(module, "standard_normal", draw)


def drawn_by(pipeline, noise, **settings):
    """Pictures by the library's pipeline, with its schedulers' tables in float64."""
    scheduler = pipeline.scheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return pipeline(CAPTIONS, latents=nchw(noise), output_type="np", **settings).images


@pytest.mark.parametrize("version, negative", [(1, "blurry, dark"), (2, "")])
def test_whole_pipeline(made, version, negative, monkeypatch):
    """Captions to pictures with the same noise: equal to one level of 255."""
    _, pipeline, bundle = made[version]
    noise = normal(2, 8, 12, 4)
    settings = dict(num_inference_steps=5, guidance_scale=4.0, height=16, width=24)
    theirs = drawn_by(pipeline, noise, negative_prompt=[negative] * 2, **settings)
    share_noise(monkeypatch, noise)
    options = dict(steps=5, guidance_scale=4.0, height=16, width=24, negative=negative)
    ours = text_to_image(bundle, CAPTIONS, options={"latent": options})
    assert ours.shape == (2, 16, 24, 3) and ours.std() > 20
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


@pytest.mark.parametrize(
    "name, settings",
    [
        ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
        ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
        ("DPMSolverMultistepScheduler", dict(steps_offset=1, timestep_spacing="leading")),
    ],
)
def test_schedulers_of_folders(made, name, settings, tmp_path, monkeypatch):
    """A scheduler's file decides the sampler, and the pictures are the library's."""
    import diffusers

    folder, pipeline, _ = made[1]
    scheduler = getattr(diffusers, name).from_config(dict(pipeline.scheduler.config), **settings)
    before, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        shutil.copytree(folder, tmp_path / "sd")
        scheduler.save_pretrained(tmp_path / "sd" / "scheduler")
        noise = normal(2, 8, 8, 4)
        theirs = drawn_by(pipeline, noise, num_inference_steps=3, guidance_scale=3.0)
    finally:
        pipeline.scheduler = before
    share_noise(monkeypatch, noise)
    found = load_bundle(tmp_path / "sd")
    ours = text_to_image(found, CAPTIONS, options={"latent": {"steps": 3, "guidance_scale": 3.0}})
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_our_format_and_back(made, tmp_path):
    """A bundle in our format holds the same, and draws sizes that are asked for, in the order of
    positions."""
    bundle = made[1][2]
    save_bundle(bundle, tmp_path / "ours", np.float32)
    again = load_bundle(tmp_path / "ours")
    for name, part in bundle.parts.items():
        assert again.parts[name].config == json.loads(json.dumps(part.config))
        assert again.parts[name].hash == params_hash(part.params)
    options = {
        "latent": {"steps": 2, "height": 16, "width": 8, "sampler": "euler_ancestral", "last": "clean"}
    }
    sampler = Sampler(again)
    a = sample_stages(sampler, CAPTIONS, seed=3, options=options)
    b = sample_stages(sampler, CAPTIONS[::-1], seed=3, positions=[1, 0], options=options)
    np.testing.assert_allclose(a.images[0], b.images[0][::-1], atol=1e-5)
    assert a.images[0].shape == (2, 16, 8, 3) and a.latents.shape == (2, 8, 4, 4)
    assert np.abs(a.latents[0] - a.latents[1]).max() > 0.1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"height": 15}, "multiple of 2 from 2"),
        ({"tile": 3}, "tile must be a multiple of 2"),
        ({"negative": "x", "guidance_scale": 1.0}, "needs guidance"),
        ({"candidates": 2}, "only a prior chooses"),
        ({"variance": "learned", "sampler": "ddpm"}, "needs a network that predicts it"),
    ],
)
def test_refused_options(made, options, words):
    with pytest.raises(InputError, match=words):
        text_to_image(made[1][2], CAPTIONS, options={"latent": {"steps": 2, **options}})


def test_no_prior(made):
    with pytest.raises(InputError, match="has no prior"):
        text_to_image(made[1][2], CAPTIONS, prior="prior_diffusion")


@both
def test_export_to_diffusers(made, version, tmp_path):
    """The library loads what is written, with the same weights, scheduler and tokens; so do we."""
    from diffusers import StableDiffusionPipeline

    folder, pipeline, bundle = made[version]
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        theirs, wanted = (getattr(one, name).state_dict() for one in (loaded, pipeline))
        assert theirs.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(theirs[key].numpy(), value.numpy(), err_msg=key)
    for key in ("prediction_type", "steps_offset", "set_alpha_to_one", "timestep_spacing", "beta_end"):
        assert loaded.scheduler.config[key] == pipeline.scheduler.config[key]
    padded = dict(padding="max_length", max_length=peers.LENGTH, truncation=True)
    assert loaded.tokenizer(CAPTIONS, **padded).input_ids == pipeline.tokenizer(CAPTIONS, **padded).input_ids
    again = load_bundle(tmp_path / "out")
    assert again.sampling == bundle.sampling
    assert again.parts["latent"].config == bundle.parts["latent"].config


def test_what_cannot_be_exported(made, tmp_path):
    bundle = made[1][2]
    settings = {"steps": 2, "sampler": "ddpm", "spacing": "leading", "variance": "analytic"}
    other = dataclasses.replace(bundle, sampling={"latent": settings})
    with pytest.raises(InputError, match="its variance analytic is none of small"):
        stable_diffusion_export.write(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    even = dataclasses.replace(bundle, sampling={"latent": {"steps": 2, "sampler": "ddim"}})
    assert "spacing even" in " ".join(stable_diffusion_export.obstacles(even))


def picture_and_mask():
    """A picture of 16 px, and where it is drawn anew."""
    rng = np.random.default_rng(4)
    redrawn = np.zeros((16, 16), bool)
    redrawn[2:9, 5:] = True
    return rng.integers(0, 256, (16, 16, 3), np.uint8), redrawn


def test_inpainting_network(tmp_path, monkeypatch):
    """Pictures of the library's inpainting pipeline, to one level where they are drawn anew; the rest is
    kept."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from PIL import Image

    pipeline = peers.stable_diffusion(tmp_path / "inpaint", in_channels=9)
    found = load_bundle(tmp_path / "inpaint")
    with pytest.raises(InputError, match="inpaints: it takes 9 channels"):
        text_to_image(found, CAPTIONS)
    # Theirs draws the latents of the kept part, and ours takes the mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    image, redrawn = picture_and_mask()
    noise = normal(1, 8, 8, 4)
    scheduler = pipeline.scheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    theirs = pipeline(
        CAPTIONS[:1], image=Image.fromarray(image), mask_image=Image.fromarray(redrawn), latents=nchw(noise),
        num_inference_steps=4, guidance_scale=3.0, height=16, width=16, strength=1.0, output_type="np",
    ).images  # fmt: skip
    share_noise(monkeypatch, noise)
    options = {"latent": {"steps": 4, "guidance_scale": 3.0}}
    ours = inpaint_rows(found, [image], [~redrawn], CAPTIONS[:1], options=options)[0]
    np.testing.assert_array_equal(ours[~redrawn], image[~redrawn])
    levels = np.round(theirs[0] * 255).astype(int)
    assert np.abs(ours.astype(int) - levels)[redrawn].max() <= 1
    assert np.abs(levels - image)[redrawn].mean() > 5
    with pytest.raises(InputError, match="resample needs a latent U-Net of Z input channels"):
        inpaint_rows(found, [image], [~redrawn], CAPTIONS[:1], method="resample")


def test_inpainting_with_any_network(made):
    """RePaint in the latents keeps what is known, and draws the rest."""
    image, redrawn = picture_and_mask()
    options = {"latent": {"steps": 3, "guidance_scale": 2.0, "negative": "blurry"}}
    drawn = inpaint_rows(
        made[1][2], [image] * 2, [~redrawn] * 2, CAPTIONS, options=options, seed=1, resamples=2
    )
    np.testing.assert_array_equal(drawn[:, ~redrawn], np.stack([image] * 2)[:, ~redrawn])
    assert np.abs(drawn[0].astype(int) - drawn[1])[redrawn].mean() > 1
    with pytest.raises(InputError, match="trained needs a latent U-Net of 2 Z"):
        inpaint_rows(made[1][2], [image], [~redrawn], CAPTIONS[:1], method="trained")
    with pytest.raises(InputError, match="leave height and width out"):
        inpaint_rows(made[1][2], [image], [~redrawn], CAPTIONS[:1], options={"latent": {"height": 16}})


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "not known here"),
        ("unet/config.json", {"attention_head_dim": 5}, "numbers of heads"),
        ("unet/config.json", {"cross_attention_dim": 20}, "takes text states of 20, and CLIP makes 16"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("vae/config.json", {"latent_channels": 5}, "the autoencoder has 5"),
        ("scheduler/scheduler_config.json", {"_class_name": "LMSDiscreteScheduler"}, "known: PNDMScheduler"),
        ("scheduler/scheduler_config.json", {"skip_prk_steps": False}, "skip_prk_steps"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "known: epsilon"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, "pad_token is '\\[PAD\\]'"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "no such part"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "activations relu"),
    ],
)
def test_folders_that_are_refused(made, file, changes, words, tmp_path):
    """One line that names the setting, before any weights are read."""
    for source in made[1][0].rglob("*.json"):
        target = tmp_path / source.relative_to(made[1][0])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for name in ("vocab.json", "merges.txt"):
        if (made[1][0] / "tokenizer" / name).is_file():
            shutil.copy(made[1][0] / "tokenizer" / name, tmp_path / "tokenizer" / name)
    config = json.loads((tmp_path / file).read_text()) | changes
    (tmp_path / file).write_text(json.dumps(config))
    if "pad_token" in changes and (tmp_path / "tokenizer/special_tokens_map.json").is_file():
        (tmp_path / "tokenizer/special_tokens_map.json").unlink()
    with pytest.raises(InputError, match=words):
        load_bundle(tmp_path)
