"""Public weights against the libraries they come from, run at random weights in the same test, and the folders that are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import unclip_jax
from tests.checkpoint import peers
from tests.checkpoint.peers import nchw
from unclip_jax.checkpoint.bundle import load_bundle, load_part, save_bundle
from unclip_jax.cli.main import main
from unclip_jax.data import ops
from unclip_jax.diffusion import samplers
from unclip_jax.generate import build_model
from unclip_jax.sampling.latents import embed_images
from unclip_jax.sampling.variations import fresh_variations

RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))
nhwc = lambda t: np.moveaxis(t.detach().numpy(), 1, -1)


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """A folder and the pipeline it was written by."""
    folder = tmp_path_factory.mktemp("public") / "karlo"
    return folder, peers.karlo(folder)


@pytest.fixture(scope="module")
def bundle(karlo):
    return load_bundle(karlo[0])


def run(bundle, name, *args, method=None, **kwargs):
    part = bundle.parts[name]
    model = build_model(part.config)
    return jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k, method=method))(part.params, args, kwargs)


def close(ours, theirs, atol=1e-5):
    """Equal to rounding, and not because both are nothing."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=atol * max(1.0, np.abs(theirs).max()), rtol=0)


# ---------------------------------------------------------------------------------------------------------------------- CLIP
def tokens(vocab=600):
    """Rows of different lengths: start, words, end (the highest id), zeros."""
    rows = np.zeros((3, peers.LENGTH), np.int64)
    for row, n in zip(rows, (1, 4, peers.LENGTH - 2)):
        row[: n + 2] = [vocab - 2, *RNG.integers(1, vocab - 2, n), vocab - 1]
    return rows


@pytest.mark.parametrize("activation, mlp", [("quick_gelu", 64), ("gelu", 79)])
def test_clip_of_transformers(activation, mlp, tmp_path):
    """Whole, its halves, and the halves without the names' prefix: embeddings, states and temperature. 79 / 16 is not a round ratio."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text, image = peers.clip_configs(activation, mlp=mlp)
    whole = peers.randomize(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)))
    whole.save_pretrained(tmp_path / "whole")
    peers.write_tokenizer(tmp_path / "whole")
    bundle = load_bundle(tmp_path / "whole")
    ids, pixels = tokens(), np.float32(RNG.uniform(-1, 1, (2, 16, 16, 3)))
    mean, std = (np.float32(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        seen = whole.text_model(torch.from_numpy(ids))
        z_text = whole.text_projection(seen.pooler_output)
        z_image = whole.visual_projection(whole.vision_model(nchw(((pixels + 1) / 2 - mean) / std)).pooler_output)
    ours = run(bundle, "clip", ids.astype(np.int32), method="encode_text")
    close(ours.embed, z_text)
    close(ours.states, seen.last_hidden_state)
    close(run(bundle, "clip", pixels, method="encode_image"), z_image)
    assert bundle.parts["clip"].params["logit_scale"] == whole.logit_scale.item()
    assert load_part(tmp_path / "whole", "clip")[1]["tokenizer"]["vocab_size"] == 600
    for made, half, method, inputs, expected in (
        (CLIPTextModelWithProjection(text), "text", "encode_text", ids.astype(np.int32), z_text),
        (CLIPVisionModelWithProjection(image), "vision", "encode_image", pixels, z_image),
    ):
        state = {k: v for k, v in whole.state_dict().items() if k in made.state_dict()}
        made.load_state_dict(state)
        made.save_pretrained(tmp_path / half)
        if half == "text":
            peers.write_tokenizer(tmp_path / half)
        for flat in (False, True):
            if flat:
                held = load_file(tmp_path / half / "model.safetensors")
                save_file({k.removeprefix(f"{half}_model."): v for k, v in held.items()}, tmp_path / half / "model.safetensors")
            alone = run(load_bundle(tmp_path / half), "clip", inputs, method=method)
            close(getattr(alone, "embed", alone), expected)


def test_clip_by_openais_names(tmp_path):
    """The same network under both names is the same tree; the shapes alone say what it is."""
    from transformers import CLIPConfig, CLIPModel

    text, image = peers.clip_configs(width=64, mlp=256, vocab_size=49408)
    for half in (text, image):
        half.num_attention_heads = 1
    whole = peers.randomize(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)))
    whole.save_pretrained(tmp_path / "transformers")
    theirs = {k: v.numpy() for k, v in whole.state_dict().items()}
    renamed = {"logit_scale": theirs["logit_scale"], "context_length": np.full(1, 10)}
    renamed |= {"text_projection": theirs["text_projection.weight"].T.copy(), "visual.proj": theirs["visual_projection.weight"].T.copy()}
    renamed |= {"positional_embedding": theirs["text_model.embeddings.position_embedding.weight"]}
    renamed |= {"token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"]}
    renamed |= {"visual.class_embedding": theirs["vision_model.embeddings.class_embedding"]}
    renamed |= {"visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"]}
    renamed |= {"visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"]}
    for kind in ("weight", "bias"):
        renamed[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
        renamed[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
        for half, prefix in (("text", ""), ("vision", "visual.")):
            for i in range(2):
                at, to = f"{half}_model.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                renamed[f"{to}attn.in_proj_{kind}"] = np.concatenate([theirs[f"{at}self_attn.{n}_proj.{kind}"] for n in "qkv"])
                renamed[f"{to}attn.out_proj.{kind}"] = theirs[f"{at}self_attn.out_proj.{kind}"]
                for n in "12":
                    renamed[f"{to}ln_{n}.{kind}"] = theirs[f"{at}layer_norm{n}.{kind}"]
                renamed[f"{to}mlp.c_fc.{kind}"], renamed[f"{to}mlp.c_proj.{kind}"] = (theirs[f"{at}mlp.fc{n}.{kind}"] for n in "12")
    (tmp_path / "openai").mkdir()
    save_file(renamed, tmp_path / "openai" / "model.safetensors")
    ours, other = (load_bundle(tmp_path / name) for name in ("openai", "transformers"))
    assert ours.parts["clip"].config == other.parts["clip"].config and ours.tokenizer == other.tokenizer
    jax.tree.map(np.testing.assert_array_equal, ours.parts["clip"].params, other.parts["clip"].params)


# ---------------------------------------------------------------------------------------------------------------------- one step
def test_prior_step(karlo, bundle):
    """x0 for noised embeddings at any times, with padding masked."""
    z, z_text, states = normal(3, peers.DIM), normal(3, peers.DIM), normal(3, peers.LENGTH, peers.DIM)
    t, mask = np.array([0, 500, 999]), np.arange(peers.LENGTH) < np.array([[2], [5], [10]])
    with torch.no_grad():
        theirs = karlo[1].prior(
            *map(torch.from_numpy, (z, t)),
            proj_embedding=torch.from_numpy(z_text),
            encoder_hidden_states=torch.from_numpy(states),
            attention_mask=torch.from_numpy(mask),
        ).predicted_image_embedding
    ours = run(bundle, "prior", z, t, text_embed=z_text, text_states=states, text_mask=mask)
    close(ours, theirs)
    prior = karlo[1].prior
    space = bundle.parts["prior"].config["embedding_space"]
    np.testing.assert_array_equal([space["mean"], space["std"]], torch.cat([prior.clip_mean, prior.clip_std]).detach().numpy())


def test_decoder_step_and_text_projection(karlo, bundle):
    """Noise and variance of both halves of guidance: conditional, and the learned embedding with the empty caption's states."""
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
    ours = run(bundle, "decoder", x, np.full(2 * b, 700), **inputs, text_embed=z_text, text_states=states, text_mask=mask)
    close(ours, nhwc(theirs))


@pytest.mark.parametrize("which", ["first", "last"])
def test_super_resolution_step(which, karlo, bundle):
    """The small image is enlarged as the pipeline does it, then both networks see it beside the noise."""
    x, low = normal(2, 32, 32, 3), np.tanh(normal(2, 8, 8, 3))
    enlarged = torch.nn.functional.interpolate(nchw(low), size=[32, 32], mode="bicubic", antialias=True)
    with torch.no_grad():
        theirs = getattr(karlo[1], f"super_res_{which}")(torch.cat([nchw(x), enlarged], dim=1), 300).sample
    close(run(bundle, "upsampler_32" + ("_last" if which == "last" else ""), x, np.full(2, 300), low_res=low), nhwc(theirs), 2e-5)


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res"])
def test_scheduler_steps(part, karlo, bundle, monkeypatch):
    """Every step of a run of 5, with noise, from the same predictions: the three settings of its scheduler."""
    import diffusers.schedulers.scheduling_unclip as theirs

    from unclip_jax.diffusion.guidance import make_denoiser
    from unclip_jax.diffusion.schedule import time_steps
    from unclip_jax.generate import part_schedule

    scheduler = peers.exact(getattr(karlo[1], f"{part}_scheduler"))
    name = {"super_res": "upsampler_32"}.get(part, part)
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
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-12)
    x = start = normal(*shape)
    x = to_torch(x)
    for i, t in enumerate(times):
        following = times[i + 1] if i < 4 else None
        x = scheduler.step(to_torch(predictions[i]), t, x, prev_timestep=following).prev_sample
    table = jnp.asarray(predictions)
    model = lambda x, t: table[4 - jnp.searchsorted(jnp.asarray(times[::-1]), t[0])]
    denoise = make_denoiser(model, schedule, prediction=config["diffusion"]["prediction"], clip=options["clip"])
    steps = time_steps(schedule.num_steps, 5)
    ours = samplers.ddpm(denoise, jnp.asarray(start), schedule, steps, jax.random.key(0), variance=options["variance"])
    close(ours, from_torch(x), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------- whole pipeline
@pytest.fixture
def same_noise(monkeypatch):
    return peers.share_noise(monkeypatch, peers.DIM)


def test_whole_pipeline(karlo, same_noise):
    """From captions to pixels with the same noise everywhere: the same 8-bit images, to one level."""
    pipeline, captions = peers.exact_pipeline(karlo[1]), ["a red fox on the moon", "x"]
    counts = dict(prior_num_inference_steps=5, decoder_num_inference_steps=6, super_res_num_inference_steps=4)
    expected = pipeline(captions, output_type="np", **counts, **same_noise).images
    options = {"prior": {"steps": 5}, "decoder": {"steps": 6}, "upsampler_32": {"steps": 4}}
    drawn = unclip_jax.text_to_image(load_bundle(karlo[0]), captions, options=options)  # a bundle of its own: programs keep that noise
    assert expected.std() > 0.05 and np.abs(expected[0] - expected[1]).max() > 0.05
    assert np.abs(drawn.astype(int) - np.round(expected * 255)).max() <= 1


def test_image_variations(same_noise, tmp_path):
    """The twin with an image encoder and no prior: its embeddings, and its whole pipeline to one level; the missing prior is named."""
    pipeline = peers.karlo(tmp_path / "twin", "UnCLIPImageVariationPipeline")
    bundle = load_bundle(tmp_path / "twin")
    assert set(bundle.parts) == {"clip", "decoder", "upsampler_32", "upsampler_32_last"}
    images = RNG.integers(0, 255, (2, 16, 16, 3), np.uint8)
    mean, std = np.array(pipeline.feature_extractor.image_mean), np.array(pipeline.feature_extractor.image_std)
    pixels = nchw(np.float32((images / 255 - mean) / std))
    with torch.no_grad():
        close(embed_images(bundle, images), pipeline.image_encoder(pixels).image_embeds)
    peers.exact_pipeline(pipeline)
    del same_noise["prior_latents"]
    counts = dict(decoder_num_inference_steps=6, super_res_num_inference_steps=4)
    expected = pipeline(pixels, output_type="np", **counts, **same_noise).images
    drawn = fresh_variations(bundle, images, count=1, options={"decoder": {"steps": 6}, "upsampler_32": {"steps": 4}})[:, 0]
    assert expected.std() > 0.05 and np.abs(expected[0] - expected[1]).max() > 0.05
    assert np.abs(drawn.astype(int) - np.round(expected * 255)).max() <= 1
    with pytest.raises(KeyError, match="no part 'prior'"):
        unclip_jax.text_to_image(bundle, ["a fox"])


def test_converted_bundle_is_the_same(karlo, bundle, tmp_path, capsys):
    """`unclip convert` writes our own format; at full precision it is the same tree."""
    assert main(["convert", str(karlo[0]), "--out", str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    assert "upsampler_32_last" in capsys.readouterr().out
    again = load_bundle(tmp_path / "ours")
    assert again.tokenizer == bundle.tokenizer and again.sampling == bundle.sampling
    for name, part in bundle.parts.items():
        assert again.parts[name].config == part.config
        jax.tree.map(np.testing.assert_array_equal, again.parts[name].params, part.params)


# ---------------------------------------------------------------------------------------------------------------------- and back
def test_exported_bundle_is_the_pipeline_again(karlo, bundle, same_noise, tmp_path, capsys):
    """`unclip export`: the same tensors under the same names; the library loads its folder and draws the same picture; so do we."""
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
    np.testing.assert_array_equal(pipeline.tokenizer(text, padding="max_length", truncation=True)["input_ids"], ids_of(bundle, text))
    counts = dict(prior_num_inference_steps=3, decoder_num_inference_steps=3, super_res_num_inference_steps=2)
    pipelines = [peers.exact_pipeline(made) for made in (karlo[1], pipeline)]
    expected, drawn = (made(text, output_type="np", **counts, **same_noise).images for made in pipelines)
    assert expected.std() > 0.05
    np.testing.assert_array_equal(drawn, expected)
    read = load_bundle(out)
    for name, part in bundle.parts.items():
        jax.tree.map(np.testing.assert_array_equal, read.parts[name].params, part.params)
    assert read.sampling == bundle.sampling and read.tokenizer == bundle.tokenizer


def ids_of(bundle, text):
    from unclip_jax.data.tokenizer import ClipTokenizer

    return ClipTokenizer.from_config(bundle.tokenizer)(text)[0]


def test_what_cannot_be_exported_says_why(bundle, tmp_path, capsys):
    """The emoji bundle is of another shape in several ways, all of which are named; nothing is written."""
    import dataclasses

    assert main(["export", "emoji", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    for why in ("decoder predicts eps, not v", "upsampler predicts eps, not v"):
        assert why in error, error
    without = dataclasses.replace(bundle, parts={k: v for k, v in bundle.parts.items() if k != "prior"})
    from unclip_jax.checkpoint.export import export_diffusers

    with pytest.raises(ValueError, match="it lacks prior"):
        export_diffusers(without, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_diffusers(bundle, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_half_precision_and_shards(karlo, bundle, tmp_path):
    """bfloat16 and float16 files, and several with an index, are the same weights."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    shutil.copytree(karlo[0], tmp_path / "karlo")
    file = tmp_path / "karlo" / "prior" / "diffusion_pytorch_model.safetensors"
    held = load_torch(file)
    for dtype in (torch.bfloat16, torch.float16):
        save_torch({k: v.to(dtype) for k, v in held.items()}, file)
        read = load_bundle(tmp_path / "karlo").parts["prior"].params["z_in"]["kernel"]
        np.testing.assert_array_equal(read, held["proj_in.weight"].to(dtype).float().numpy().T)
    file.unlink()
    names, index = sorted(held), {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        save_torch({k: held[k] for k in chosen}, file.with_name(f"part-{i}.safetensors"))
        index |= {k: f"part-{i}.safetensors" for k in chosen}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    read = load_bundle(tmp_path / "karlo").parts["prior"].params
    jax.tree.map(np.testing.assert_array_equal, read, bundle.parts["prior"].params)
    file.with_name("part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.safetensors is missing"):
        load_bundle(tmp_path / "karlo")


# ---------------------------------------------------------------------------------------------------------------------- what is refused
def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file, change):
    held = load_file(file)
    change(held)
    save_file(held, file)


def pickled(folder):
    """In place of the weights, a pickle that would write a file."""
    weights = folder / "prior" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    code = b"cbuiltins\nexec\n(S'open(\"%s\", \"w\")'\ntR." % str(folder / "executed").encode()
    weights.with_suffix(".bin").write_bytes(code)


PRIOR, SR = "prior/diffusion_pytorch_model.safetensors", "super_res_last/diffusion_pytorch_model.safetensors"
BROKEN = {
    "missing": (lambda f: edit_weights(f / PRIOR, lambda w: w.pop("proj_in.bias")), "1 parameters are missing in it: z_in/bias"),
    "extra": (lambda f: edit_weights(f / PRIOR, lambda w: w.update(more=np.zeros(3))), "1 tensors of the file have no use: more"),
    "mis-shaped": (lambda f: edit_weights(f / SR, lambda w: w.update({"conv_in.bias": np.zeros(31)})), r"conv_in.bias \[31\] for"),
    "truncated": (lambda f: (f / PRIOR).write_bytes((f / PRIOR).read_bytes()[:-100]), "cannot be read as safetensors"),
    "corrupted": (lambda f: (f / PRIOR).write_bytes(b"\xff" * 100), "cannot be read as safetensors"),
    "no weights": (lambda f: (f / PRIOR).unlink(), "is missing, and with it the weights"),
    "pickle": (pickled, "is a pickle, which could run code"),
    "no config": (lambda f: (f / "decoder" / "config.json").unlink(), "decoder/config.json is missing"),
    "bad json": (lambda f: (f / "decoder" / "config.json").write_text("{"), "is not valid JSON"),
    "not an object": (lambda f: (f / "decoder" / "config.json").write_text("[]"), "does not hold a JSON object"),
    "no number": (lambda f: (f / "decoder" / "config.json").write_text("{}"), "a configuration lacks"),
    "another activation": (lambda f: edit_config(f / "decoder", act_fn="gelu"), "act_fn is 'gelu', but the network here has 'silu'"),
    "another clip": (lambda f: edit_config(f / "text_encoder", projection_dim=24), "the text encoder makes 10 and 24: they are"),
    "a prior of another clip": (lambda f: edit_config(f / "prior", embedding_dim=24), "they are of different CLIPs"),
    "another pipeline": (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "is a FluxPipeline"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no CLIP tokenizer"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_folders_are_refused(how, karlo, tmp_path, capsys):
    """One line that says what is wrong; nothing is written, nothing from a file is run."""
    folder = tmp_path / "karlo"
    shutil.copytree(karlo[0], folder)
    breaks, message = BROKEN[how]
    breaks(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_bundle(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and not (tmp_path / "out").exists() and not (folder / "executed").exists()


def test_a_hub_repository(karlo, bundle, monkeypatch):
    """The hub's own library fetches a pinned revision, without pickles; what goes wrong there is one line."""
    import huggingface_hub

    calls = []

    def fetch(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        if revision == "nowhere":
            raise RuntimeError("404 Client Error.\nRevision Not Found")
        return str(karlo[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    read = load_bundle("hf:kakaobrain/karlo-v1-alpha@0123abc")
    assert calls == [("kakaobrain/karlo-v1-alpha", "0123abc")] and set(read.parts) == set(bundle.parts)
    assert load_part("hf:kakaobrain/karlo-v1-alpha@0123abc", "prior")[0].config == bundle.parts["prior"].config
    with pytest.raises(OSError, match="cannot be fetched: 404 Client Error. Revision Not Found"):
        load_bundle("hf:kakaobrain/karlo-v1-alpha@nowhere")
    for text in ("hf:kakaobrain/karlo-v1-alpha", "hf:karlo@main"):
        with pytest.raises(ValueError, match="write hf:owner/name@revision"):
            load_bundle(text)


def test_parts_of_another_clip_are_refused(karlo, bundle, tiny_bundle, tmp_path):
    """A converted decoder does not go with another CLIP."""
    import dataclasses

    mixed = dataclasses.replace(bundle, parts=bundle.parts | {"clip": load_bundle(tiny_bundle).parts["clip"]})
    with pytest.raises(ValueError, match="was trained in the embedding space of CLIP"):
        save_bundle(mixed, tmp_path / "mixed")


def test_images_without_an_image_encoder(bundle):
    with pytest.raises(ValueError, match="has no image encoder"):
        embed_images(bundle, [ops.to_uint8(np.zeros((8, 8, 3)))])
