"""Karlo's public weights against the library they come from, run at random weights in the same test; the way
back; and the folders that are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import unclip_jax
from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.bundle import last_step, upsamplers
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.providers import PROVIDERS, karlo_export
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli import export
from unclip_jax.cli.main import main
from unclip_jax.diffusion import samplers
from unclip_jax.sampling.edits.inversion import embed_images
from unclip_jax.sampling.edits.variations import fresh_variations

RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))
nhwc = lambda t: np.moveaxis(t.detach().numpy(), 1, -1)


def test_parts(bundle):
    """What the folders become: names, kinds, CLIP's hash in `frozen`, and which one makes the last step."""
    kinds = {name: part.config["kind"] for name, part in bundle.parts.items()}
    assert kinds == {
        "clip": "clip",
        "prior_diffusion": "prior_diffusion",
        "decoder": "decoder",
        "upsampler_32": "upsampler",
        "upsampler_32_last": "upsampler",
    }
    assert upsamplers(bundle.parts) == ["upsampler_32"]
    assert last_step(bundle.parts, "upsampler_32") == "upsampler_32_last"
    assert bundle.sampling.keys() == {"prior_diffusion", "decoder", "upsampler_32"}
    assert bundle.parts["clip"].config["tokenizer"]["length"] == peers.LENGTH
    for name in ("prior_diffusion", "decoder"):
        assert bundle.parts[name].config["frozen"] == {"clip": params_hash(bundle.parts["clip"].params)}


# --------------------------------------------------------------------------------------------------- one step
def test_prior_step(karlo, bundle):
    """x0 for noised embeddings at any times, with padding masked."""
    z, z_text, states = normal(3, peers.DIM), normal(3, peers.DIM), normal(3, peers.LENGTH, peers.DIM)
    t, mask = np.array([0, 500, 999]), np.arange(peers.LENGTH) < np.array([[2], [5], [10]])
    with torch.no_grad():
        theirs = (
            karlo[1]
            .prior(
                *map(torch.from_numpy, (z, t)),
                proj_embedding=torch.from_numpy(z_text),
                encoder_hidden_states=torch.from_numpy(states),
                attention_mask=torch.from_numpy(mask),
            )
            .predicted_image_embedding
        )
    ours = run_part(bundle, "prior_diffusion", z, t, text_embed=z_text, text_states=states, text_mask=mask)
    close(ours, theirs)
    prior = karlo[1].prior
    space = bundle.parts["prior_diffusion"].config["embedding_space"]
    np.testing.assert_array_equal(
        [space["mean"], space["std"]], torch.cat([prior.clip_mean, prior.clip_std]).detach().numpy()
    )


def test_decoder_step_and_text_projection(karlo, bundle):
    """Noise and variance of both halves of guidance: conditional, and the learned embedding with the empty
    caption's states."""
    pipeline, b = karlo[1], 2
    x, z_image = normal(2 * b, 8, 8, 3), normal(b, peers.DIM)
    z_text, states = normal(2 * b, peers.DIM), normal(2 * b, peers.LENGTH, peers.DIM)
    mask = np.arange(peers.LENGTH) < np.array([[2], [2], [5], [10]])
    with torch.no_grad():
        context, additive = pipeline.text_proj(
            image_embeddings=torch.from_numpy(z_image),
            prompt_embeds=torch.from_numpy(z_text),
            text_encoder_hidden_states=torch.from_numpy(states),
            do_classifier_free_guidance=True,
        )
        attention_mask = torch.nn.functional.pad(torch.from_numpy(mask), (4, 0), value=True)
        theirs = pipeline.decoder(
            nchw(x), 700, encoder_hidden_states=context, class_labels=additive, attention_mask=attention_mask
        ).sample
    inputs = {"image_embed": np.concatenate([z_image, z_image]), "drop_image": np.arange(2 * b) < b}
    ours = run_part(
        bundle,
        "decoder",
        x,
        np.full(2 * b, 700),
        **inputs,
        text_embed=z_text,
        text_states=states,
        text_mask=mask,
    )
    close(ours, nhwc(theirs))


@pytest.mark.parametrize("which", ["first", "last"])
def test_super_resolution_step(which, karlo, bundle):
    """The small image is enlarged as the pipeline does it, then both networks see it beside the noise."""
    x, low = normal(2, 32, 32, 3), np.tanh(normal(2, 8, 8, 3))
    enlarged = torch.nn.functional.interpolate(nchw(low), size=[32, 32], mode="bicubic", antialias=True)
    with torch.no_grad():
        theirs = getattr(karlo[1], f"super_res_{which}")(torch.cat([nchw(x), enlarged], dim=1), 300).sample
    close(
        run_part(
            bundle, "upsampler_32" + ("_last" if which == "last" else ""), x, np.full(2, 300), low_res=low
        ),
        nhwc(theirs),
        2e-5,
    )


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res"])
def test_scheduler_steps(part, karlo, bundle, monkeypatch):
    """Every step of a run of 5, with noise, from the same predictions: the three settings of its
    scheduler."""
    import diffusers.schedulers.scheduling_unclip as theirs

    from unclip_jax.diffusion.guidance import make_denoiser
    from unclip_jax.diffusion.schedule import time_steps
    from unclip_jax.generate.networks import part_schedule

    scheduler = peers.exact(getattr(karlo[1], f"{part}_scheduler"))
    name = {"super_res": "upsampler_32", "prior": "prior_diffusion"}.get(part, part)
    config, options = bundle.parts[name].config, bundle.sampling[name]
    shape, channels = ((2, peers.DIM), peers.DIM) if part == "prior" else ((2, 4, 4, 3), 3)
    to_torch = torch.from_numpy if part == "prior" else nchw
    from_torch = (lambda t: t.numpy()) if part == "prior" else nhwc
    noise, predictions = normal(*shape), normal(5, *shape[:-1], channels * (2 if part == "decoder" else 1))
    monkeypatch.setattr(theirs, "randn_tensor", lambda *args, **kwargs: to_torch(noise))
    monkeypatch.setattr(samplers, "standard_normal", lambda key, shape, dtype=jnp.float32: jnp.asarray(noise))
    scheduler.set_timesteps(5)
    times = scheduler.timesteps.tolist()
    schedule = part_schedule(config)
    np.testing.assert_array_equal(time_steps(schedule.num_steps, 5), times)
    np.testing.assert_allclose(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-12
    )
    x = start = normal(*shape)
    x = to_torch(x)
    for i, t in enumerate(times):
        following = times[i + 1] if i < 4 else None
        x = scheduler.step(to_torch(predictions[i]), t, x, prev_timestep=following).prev_sample
    table = jnp.asarray(predictions)
    model = lambda x, t: table[4 - jnp.searchsorted(jnp.asarray(times[::-1]), t[0])]
    denoise = make_denoiser(
        model, schedule, prediction=config["diffusion"]["prediction"], clip=options["clip"]
    )
    steps = time_steps(schedule.num_steps, 5)
    ours = samplers.ddpm(
        denoise, jnp.asarray(start), schedule, steps, jax.random.key(0), variance=options["variance"]
    )
    close(ours, from_torch(x), 1e-4)


# --------------------------------------------------------------------------------------------- whole pipeline
@pytest.fixture
def same_noise(monkeypatch):
    return peers.share_noise(monkeypatch, peers.DIM)


def test_whole_pipeline(karlo, same_noise):
    """From captions to pixels with the same noise everywhere: the same 8-bit images, to one level."""
    pipeline, captions = peers.exact_pipeline(karlo[1]), ["a red fox on the moon", "x"]
    counts = dict(prior_num_inference_steps=5, decoder_num_inference_steps=6, super_res_num_inference_steps=4)
    expected = pipeline(captions, output_type="np", **counts, **same_noise).images
    options = {"prior_diffusion": {"steps": 5}, "decoder": {"steps": 6}, "upsampler_32": {"steps": 4}}
    drawn = unclip_jax.text_to_image(
        load_bundle(karlo[0]), captions, options=options
    )  # a bundle of its own: programs keep that noise
    assert expected.std() > 0.05 and np.abs(expected[0] - expected[1]).max() > 0.05
    assert np.abs(drawn.astype(int) - np.round(expected * 255)).max() <= 1


def test_image_variations(same_noise, tmp_path):
    """The twin with an image encoder and no prior: its embeddings, and its whole pipeline to one level; the
    missing prior is named."""
    pipeline = peers.karlo(tmp_path / "twin", "UnCLIPImageVariationPipeline")
    bundle = load_bundle(tmp_path / "twin")
    assert set(bundle.parts) == {"clip", "decoder", "upsampler_32", "upsampler_32_last"}
    images = RNG.integers(0, 255, (2, 16, 16, 3), np.uint8)
    mean, std = (
        np.array(pipeline.feature_extractor.image_mean),
        np.array(pipeline.feature_extractor.image_std),
    )
    pixels = nchw(np.float32((images / 255 - mean) / std))
    with torch.no_grad():
        close(embed_images(bundle, images), pipeline.image_encoder(pixels).image_embeds)
    peers.exact_pipeline(pipeline)
    del same_noise["prior_latents"]
    counts = dict(decoder_num_inference_steps=6, super_res_num_inference_steps=4)
    expected = pipeline(pixels, output_type="np", **counts, **same_noise).images
    drawn = fresh_variations(
        bundle, images, count=1, options={"decoder": {"steps": 6}, "upsampler_32": {"steps": 4}}
    )[:, 0]
    assert expected.std() > 0.05 and np.abs(expected[0] - expected[1]).max() > 0.05
    assert np.abs(drawn.astype(int) - np.round(expected * 255)).max() <= 1
    with pytest.raises(KeyError, match="no part 'prior_diffusion'"):
        unclip_jax.text_to_image(bundle, ["a fox"])


def test_converted_bundle_is_the_same(karlo, bundle, tmp_path, capsys):
    """`unclip convert` writes our own format; at full precision it is the same tree."""
    assert main(["convert", str(karlo[0]), "--out", str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    assert "upsampler_32_last" in capsys.readouterr().out
    again = load_bundle(tmp_path / "ours")
    assert again.system == bundle.system == "unclip" and again.sampling == bundle.sampling
    for name, part in bundle.parts.items():
        assert again.parts[name].config == part.config
        jax.tree.map(np.testing.assert_array_equal, again.parts[name].params, part.params)


# --------------------------------------------------------------------------------------------------- and back
def test_exported_bundle_is_the_pipeline_again(karlo, bundle, same_noise, tmp_path, capsys):
    """`unclip export`: the same tensors under the same names; the library loads its folder and draws the same
    picture; so do we."""
    out = tmp_path / "exported"
    assert main(["export", str(karlo[0]), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    for file in sorted(karlo[0].rglob("*.safetensors")):
        theirs, again = load_file(file), load_file(out / file.relative_to(karlo[0]))
        assert theirs.keys() == again.keys(), file
        for name, value in theirs.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)
    pipeline = peers.load_karlo(out)
    text = ["a red fox, and a café", "x"]
    np.testing.assert_array_equal(
        pipeline.tokenizer(text, padding="max_length", truncation=True)["input_ids"], ids_of(bundle, text)
    )
    counts = dict(prior_num_inference_steps=3, decoder_num_inference_steps=3, super_res_num_inference_steps=2)
    pipelines = [peers.exact_pipeline(made) for made in (karlo[1], pipeline)]
    expected, drawn = (made(text, output_type="np", **counts, **same_noise).images for made in pipelines)
    assert expected.std() > 0.05
    np.testing.assert_array_equal(drawn, expected)
    read = load_bundle(out)
    assert read.sampling == bundle.sampling
    for name, part in bundle.parts.items():
        assert read.parts[name].config == part.config
        jax.tree.map(np.testing.assert_array_equal, read.parts[name].params, part.params)


def ids_of(bundle, text):
    from unclip_jax.data.tokenizer import ClipTokenizer

    return ClipTokenizer.from_config(bundle.parts["clip"].config["tokenizer"])(text)[0]


def test_what_cannot_be_exported_says_why(bundle, tmp_path, capsys):
    """The emoji bundle is of another shape in several ways, all of which are named; nothing is written."""
    import dataclasses

    assert main(["export", "emoji", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    for why in ("decoder predicts eps, not v", "upsampler predicts eps, not v"):
        assert why in error, error
    without = dataclasses.replace(
        bundle, parts={k: v for k, v in bundle.parts.items() if k != "prior_diffusion"}
    )
    with pytest.raises(ValueError, match="it lacks prior_diffusion"):
        karlo_export.write(without, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        karlo_export.write(bundle, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_formats_of_the_command():
    """`unclip export --format` offers what a provider can write, and no more."""
    writers = [provider for provider in PROVIDERS.values() if provider.format is not None]
    assert {provider.format for provider in writers} == set(export.FORMATS)
    assert all(provider.write and provider.obstacles for provider in writers)


def test_half_precision_and_shards(karlo, bundle, tmp_path):
    """bfloat16 and float16 files, and several with an index, are the same weights."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    shutil.copytree(karlo[0], tmp_path / "karlo")
    file = tmp_path / "karlo" / "prior" / "diffusion_pytorch_model.safetensors"
    held = load_torch(file)
    for dtype in (torch.bfloat16, torch.float16):
        save_torch({k: v.to(dtype) for k, v in held.items()}, file)
        read = load_bundle(tmp_path / "karlo").parts["prior_diffusion"].params["z_in"]["kernel"]
        np.testing.assert_array_equal(read, held["proj_in.weight"].to(dtype).float().numpy().T)
    file.unlink()
    names, index = sorted(held), {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        save_torch({k: held[k] for k in chosen}, file.with_name(f"part-{i}.safetensors"))
        index |= {k: f"part-{i}.safetensors" for k in chosen}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    read = load_bundle(tmp_path / "karlo").parts["prior_diffusion"].params
    jax.tree.map(np.testing.assert_array_equal, read, bundle.parts["prior_diffusion"].params)
    file.with_name("part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.safetensors is missing"):
        load_bundle(tmp_path / "karlo")
