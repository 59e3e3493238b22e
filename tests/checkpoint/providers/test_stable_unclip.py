"""StableUnCLIP's folders against diffusers, run at the same random weights."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.checkpoint.peers import DIM, close, exact, nchw, run_part
from tests.helpers import param_count
from tests.models.test_latent_unet import SD2
from unclip_jax.checkpoint.check import clip_shapes
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import (
    stable_diffusion_config,
    stable_unclip_config,
    stable_unclip_export,
)
from unclip_jax.checkpoint.providers.clip import two_halves
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.diffusion import process
from unclip_jax.errors import InputError
from unclip_jax.generate.image_embeds import noised_vector
from unclip_jax.generate.networks import part_space
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.stable_unclip import sample_stages
from unclip_jax.sampling.text_to_image import text_to_image

RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))
nhwc = lambda t: np.moveaxis(t.detach().numpy(), 1, -1)
CAPTIONS = ["a red fox on the ice", "two cats"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of both pipelines: the folder, the pipeline it was written by, and the bundle read from it."""
    found = {}
    for name in ("draws", "varies"):
        folder = tmp_path_factory.mktemp("stable_unclip") / name
        pipeline = peers.stable_unclip(folder, draws=name == "draws")
        found[name] = folder, pipeline, load_bundle(folder)
    return found


def test_parts(made):
    """The parts, and the hashes of those that stand under them."""
    both = {"text": "clip", "latent": "latent", "autoencoder": "kl_autoencoder", "clip": "clip"}
    for name, more in (("draws", {"prior_diffusion": "prior_diffusion"}), ("varies", {})):
        bundle = made[name][2]
        assert bundle.system == "stable_unclip"
        assert {name: part.config["kind"] for name, part in bundle.parts.items()} == both | more
        hashes = {part: params_hash(bundle.parts[part].params) for part in ("text", "autoencoder", "clip")}
        assert bundle.parts["latent"].config["frozen"] == hashes
        assert bundle.parts["latent"].config["augmentation"] == {"schedule": "cosine", "num_steps": 1000}
        assert bundle.sampling["latent"]["steps"] == 20 and bundle.sampling["latent"]["guidance_scale"] == 10
    assert made["draws"][2].parts["prior_diffusion"].config["frozen"] == {"clip": hashes_of(made, "clip")}
    towers = [made[name][2].parts["clip"].config["model"] for name in ("draws", "varies")]
    assert [(t["text"] is None, t["image"] is None) for t in towers] == [(False, True), (True, False)]


def test_published_configurations():
    """The folders' files describe the networks whose parameters `test_latent_unet` counts, and image encoders
    of the published sizes."""
    shared = dict(
        attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, sample_size=96, layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], use_linear_projection=True,
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, class_embed_type="projection",
    )  # fmt: skip
    large = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
    large |= dict(patch_size=14, image_size=224, projection_dim=1024, hidden_act="gelu")
    small = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    small |= dict(patch_size=14, image_size=224, projection_dim=768)
    for image, parameters in ((large, 632_076_800), (small, 303_966_208)):
        model, dim = two_halves(None, image), image["projection_dim"]
        assert param_count(clip_shapes(model)) == parameters
        unet = shared | {"projection_class_embeddings_input_dim": 2 * dim}
        assert stable_diffusion_config.unet_model(unet, "the U-Net") == SD2 | dict(
            vector_dim=2 * dim, image_size=96, transformer_depth=1, groups=32
        )


def hashes_of(made, part):
    return params_hash(made["draws"][2].parts[part].params)


def test_networks(made):
    """The U-Net, at sizes that do not halve evenly, both text towers, the image tower and the prior."""
    _, pipeline, bundle = made["draws"]
    x, states, vector = normal(2, 7, 9, 4), normal(2, peers.LENGTH, 16), normal(2, 2 * DIM)
    t = np.array([3, 912])
    with torch.no_grad():
        noise = pipeline.unet(
            nchw(x),
            torch.from_numpy(t),
            encoder_hidden_states=torch.from_numpy(states),
            class_labels=torch.from_numpy(vector),
        ).sample
    close(run_part(bundle, "latent", x, t, context=states, vector=vector), nhwc(noise), 1e-4)
    sampler = Sampler(bundle)
    for part, tokenizer, encoder in (
        ("text", pipeline.tokenizer, pipeline.text_encoder),
        ("clip", pipeline.prior_tokenizer, pipeline.prior_text_encoder),
    ):
        tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ours = sampler.captions(CAPTIONS, part)["clip_tokens"]
        np.testing.assert_array_equal(ours, tokens.numpy())
        with torch.no_grad():
            wanted = encoder(tokens)
        found = run_part(bundle, part, ours, method="encode_text")
        close(found.states, wanted.last_hidden_state)
        if part == "clip":
            close(found.embed, wanted.text_embeds)
    image = normal(2, 16, 16, 3)
    _, pipeline, bundle = made["varies"]
    mean, std = (np.float32(getattr(pipeline.feature_extractor, f"image_{name}")) for name in ("mean", "std"))
    with torch.no_grad():
        wanted = pipeline.image_encoder(nchw(((image + 1) / 2 - mean) / std)).image_embeds
    close(run_part(bundle, "clip", image, method="encode_image"), wanted)


@pytest.mark.parametrize("level", [0, 250, 999])
def test_noised_embeddings(made, level):
    """The vector that the U-Net sees, whitened and with its level."""
    _, pipeline, bundle = made["draws"]
    z, noise, config = normal(2, DIM), normal(2, DIM), bundle.parts["latent"].config
    exact(pipeline.image_noising_scheduler)
    wanted = pipeline.noise_image_embeddings(torch.from_numpy(z), level, torch.from_numpy(noise))
    ours = noised_vector(config["augmentation"], part_space(config), z, jnp.full(2, level), noise)
    assert ours.shape == (2, 2 * DIM)
    close(ours, wanted.detach().float(), 1e-5)


def share_noise(monkeypatch, *noises):
    """The same noise in both libraries, by its shape: our (B, D) and (B, H, W, C), their (B, C, H, W)."""
    import diffusers.pipelines.stable_diffusion.pipeline_stable_unclip as draws
    import diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img as varies
    import diffusers.schedulers.scheduling_ddpm as ddpm
    import diffusers.schedulers.scheduling_unclip as karlo

    ours = {noise.shape: jnp.asarray(noise) for noise in noises}
    theirs = [torch.from_numpy(noise) if noise.ndim == 2 else nchw(noise) for noise in noises]
    theirs = {tuple(noise.shape): noise for noise in theirs}
    for module in (draws, varies, ddpm, karlo):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: theirs[tuple(shape)])
    draw = lambda key, shape, dtype=jnp.float32: ours[tuple(shape)]
    for name, module in list(sys.modules.items()):
        if name.startswith("unclip_jax.") and hasattr(module, "standard_normal") and module is not process:
            monkeypatch.setattr(module, "standard_normal", draw)


def exact_tables(pipeline):
    """All schedulers with their tables in float64."""
    for name in ("scheduler", "prior_scheduler", "image_noising_scheduler"):
        if hasattr(pipeline, name):
            exact(getattr(pipeline, name))
    scheduler = pipeline.scheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return pipeline


def one_level(ours, theirs):
    assert ours.std() > 20
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_captions_to_pictures(made, monkeypatch):
    """The whole pipeline with the same noise, Karlo's prior in front: equal to one level of 255."""
    _, pipeline, bundle = made["draws"]
    negative = "blurry"
    share_noise(monkeypatch, normal(2, DIM), normal(2, 8, 12, 4))
    theirs = exact_tables(pipeline)(
        CAPTIONS, negative_prompt=[negative] * 2, height=16, width=24, num_inference_steps=4,
        guidance_scale=3.0, prior_num_inference_steps=5, noise_level=200, output_type="np",
    ).images  # fmt: skip
    drawn = dict(steps=4, guidance_scale=3.0, height=16, width=24, negative=negative, noise_level=200)
    ours = text_to_image(bundle, CAPTIONS, options={"latent": drawn, "prior_diffusion": {"steps": 5}})
    one_level(ours, theirs)


def test_pictures_to_pictures(made, monkeypatch):
    """The whole pipeline that varies images, from their embeddings."""
    _, pipeline, bundle = made["varies"]
    share_noise(monkeypatch, normal(2, DIM), normal(2, 8, 8, 4))
    z = normal(2, DIM)
    theirs = exact_tables(pipeline)(
        image_embeds=torch.from_numpy(z), prompt=CAPTIONS, num_inference_steps=4, guidance_scale=3.0,
        noise_level=0, output_type="np",
    ).images  # fmt: skip
    options = {"latent": {"steps": 4, "guidance_scale": 3.0}}
    stages = sample_stages(bundle, CAPTIONS, z_image=z, options=options)
    np.testing.assert_array_equal(stages.z_image, z)
    one_level(np.round((stages.images[0] + 1) * 127.5), theirs)


def test_schedulers_of_the_prior(made, tmp_path):
    """Karlo's own scheduler spreads the steps over both ends, and the DDPM one as its file says."""
    ours = made["draws"][2]
    assert ours.sampling["prior_diffusion"] == dict(
        steps=25,
        sampler="ddpm",
        variance="small",
        guidance_scale=4.0,
        clip=5.0,
        spacing="leading",
        last="clean",
    )
    assert ours.parts["prior_diffusion"].config["diffusion"]["prediction"] == "x0"
    config = {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", "clip_sample_range": 5.0}
    diffusion, sampling = stable_unclip_config.prior_scheduler(config, "the prior's")
    spaced = ("spacing", "last")
    assert sampling == {k: v for k, v in ours.sampling["prior_diffusion"].items() if k not in spaced}
    assert diffusion == ours.parts["prior_diffusion"].config["diffusion"]


@pytest.mark.parametrize("name", ["draws", "varies"])
def test_export_to_diffusers(made, name, tmp_path):
    """The library loads what is written, with the same weights and schedulers; so do we."""
    folder, pipeline, bundle = made[name]
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    loaded = type(pipeline).from_pretrained(tmp_path / "out")
    for part, network in pipeline.components.items():
        found = getattr(loaded, part)
        if isinstance(network, torch.nn.Module):
            theirs, wanted = found.state_dict(), network.state_dict()
            assert theirs.keys() == wanted.keys()
            for key, value in wanted.items():
                np.testing.assert_array_equal(theirs[key].numpy(), value.numpy(), err_msg=key)
        elif "scheduler" in part:
            for key in ("beta_schedule", "prediction_type", "num_train_timesteps", "clip_sample"):
                if part != "image_noising_scheduler" or key != "prediction_type":
                    assert found.config[key] == network.config[key], (part, key)
        elif part == "feature_extractor":
            assert found.image_mean == network.image_mean and found.image_std == network.image_std
    again = load_bundle(tmp_path / "out")
    assert again.sampling == bundle.sampling
    for part, value in bundle.parts.items():
        assert again.parts[part].config == value.config, part


def test_what_cannot_be_exported(made):
    bundle = made["varies"][2]
    parts = {name: part for name, part in bundle.parts.items() if name != "clip"}
    assert list(stable_unclip_export.obstacles(dataclasses.replace(bundle, parts=parts))) == ["it lacks clip"]
    clip_part = made["draws"][2].parts["clip"]
    towers = dataclasses.replace(bundle, parts=bundle.parts | {"clip": clip_part})
    assert "neither a prior nor an image tower" in " ".join(stable_unclip_export.obstacles(towers))
    drawing = made["draws"][2]
    prior = drawing.parts["prior_diffusion"]
    own = prior.config | {"embedding_space": {"kind": "raw", "scale": None}}
    changed = drawing.parts | {"prior_diffusion": dataclasses.replace(prior, config=own)}
    reasons = list(stable_unclip_export.obstacles(dataclasses.replace(drawing, parts=changed)))
    assert reasons == ["Karlo's prior works on embeddings whitened by mean and standard deviation"]


def test_what_gives_no_embedding(made):
    """A bundle that varies images has no prior, and no text tower for one."""
    bundle = made["varies"][2]
    with pytest.raises(KeyError, match="no part 'prior_diffusion'"):
        text_to_image(bundle, CAPTIONS)
    with pytest.raises(InputError, match="has no text encoder, so no caption gives a z_i"):
        text_to_image(bundle, CAPTIONS, prior="none")
    with pytest.raises(InputError, match="noise_level must be between 0 and 999"):
        text_to_image(bundle, CAPTIONS, prior="null", options={"latent": {"noise_level": 1000}})
