"""CLIP's public weights against the library they come from, run at random weights in the same test."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.providers import clip, preprocess

RNG = np.random.default_rng(0)


def tokens(vocab=600):
    """Rows of different lengths: start, words, end (the highest id), zeros."""
    rows = np.zeros((3, peers.LENGTH), np.int64)
    for row, n in zip(rows, (1, 4, peers.LENGTH - 2)):
        row[: n + 2] = [vocab - 2, *RNG.integers(1, vocab - 2, n), vocab - 1]
    return rows


@pytest.mark.parametrize("activation, mlp", [("quick_gelu", 64), ("gelu", 79)])
def test_clip_of_transformers(activation, mlp, tmp_path):
    """Whole, its halves, and the halves without the names' prefix: embeddings, states and temperature. 79 /
    16 is not a round ratio."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text, image = peers.clip_configs(activation, mlp=mlp)
    whole = peers.randomize(
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    peers.write_tokenizer(tmp_path / "whole")
    bundle = load_bundle(tmp_path / "whole")
    ids, pixels = tokens(), np.float32(RNG.uniform(-1, 1, (2, 16, 16, 3)))
    mean, std = (
        np.float32(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        seen = whole.text_model(torch.from_numpy(ids))
        z_text = whole.text_projection(seen.pooler_output)
        z_image = whole.visual_projection(
            whole.vision_model(nchw(((pixels + 1) / 2 - mean) / std)).pooler_output
        )
    ours = run_part(bundle, "clip", ids.astype(np.int32), method="encode_text")
    close(ours.embed, z_text)
    close(ours.states, seen.last_hidden_state)
    close(run_part(bundle, "clip", pixels, method="encode_image"), z_image)
    assert bundle.parts["clip"].params["logit_scale"] == whole.logit_scale.item()
    assert load_part(tmp_path / "whole", "clip")[0].config["tokenizer"]["vocab_size"] == 600
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
                save_file(
                    {k.removeprefix(f"{half}_model."): v for k, v in held.items()},
                    tmp_path / half / "model.safetensors",
                )
            alone = run_part(load_bundle(tmp_path / half), "clip", inputs, method=method)
            close(getattr(alone, "embed", alone), expected)


def openai_tensors(whole, layers):
    """The tensors of a `CLIPModel` by OpenAI's names, with a number that OpenAI's files hold beside them."""
    theirs = {k: v.numpy() for k, v in whole.state_dict().items()}
    renamed = {"logit_scale": theirs["logit_scale"], "context_length": np.full(1, 10)}
    renamed |= {
        "text_projection": theirs["text_projection.weight"].T.copy(),
        "visual.proj": theirs["visual_projection.weight"].T.copy(),
    }
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
            for i in range(layers):
                at, to = f"{half}_model.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                renamed[f"{to}attn.in_proj_{kind}"] = np.concatenate(
                    [theirs[f"{at}self_attn.{n}_proj.{kind}"] for n in "qkv"]
                )
                renamed[f"{to}attn.out_proj.{kind}"] = theirs[f"{at}self_attn.out_proj.{kind}"]
                for n in "12":
                    renamed[f"{to}ln_{n}.{kind}"] = theirs[f"{at}layer_norm{n}.{kind}"]
                renamed[f"{to}mlp.c_fc.{kind}"], renamed[f"{to}mlp.c_proj.{kind}"] = (
                    theirs[f"{at}mlp.fc{n}.{kind}"] for n in "12"
                )
    return renamed


def test_clip_by_openais_names(tmp_path):
    """The same network under both names is the same tree. Without `context_length` and its like the file is
    not OpenAI's, and its activation cannot be told."""
    from transformers import CLIPConfig, CLIPModel

    text, image = (half.to_dict() for half in peers.clip_configs())
    text |= {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 1}
    image |= {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=512))
    whole.save_pretrained(tmp_path / "transformers")
    renamed = openai_tensors(whole, layers=1)
    (tmp_path / "openai").mkdir()
    save_file(renamed, tmp_path / "openai" / "model.safetensors")
    for name in ("transformers", "openai"):
        peers.write_tokenizer(tmp_path / name)
    ours, other = (load_bundle(tmp_path / name) for name in ("openai", "transformers"))
    assert ours.parts["clip"].config == other.parts["clip"].config
    jax.tree.map(np.testing.assert_array_equal, ours.parts["clip"].params, other.parts["clip"].params)
    del renamed["context_length"]
    save_file(renamed, tmp_path / "openai" / "model.safetensors")
    with pytest.raises(ValueError, match="they are not OpenAI's own.*copy open_clip_config.json beside them"):
        load_bundle(tmp_path / "openai")


@pytest.mark.parametrize("sizes", [(32, 320, 64), (1024, 1280, 1024), (512, 768, 768)])
def test_only_openais_own_networks_are_told_by_their_shapes(sizes):
    """The heads and the activation of any other network would be a guess."""
    embed_dim, width, text_width = sizes
    shapes = {
        "visual.conv1.weight": (width, 3, 14, 14),
        "visual.positional_embedding": (257, width),
        "token_embedding.weight": (49408, text_width),
        "text_projection": (text_width, embed_dim),
        "context_length": (1,),
    }
    with pytest.raises(ValueError, match=f"an embedding of {embed_dim} and towers of {width} and"):
        clip.openai_config(shapes.__getitem__, shapes)


# ------------------------------------------------------------------------------------------- images
def processor(**changes):
    size = {"height": 16, "width": 16}
    made = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": size}
    return made | changes


def image_half(folder, settings, file="preprocessor_config.json"):
    """An image encoder of transformers with this preprocessing; returns the network."""
    from transformers import CLIPVisionModelWithProjection

    model = peers.randomize(CLIPVisionModelWithProjection(peers.clip_configs()[1]))
    model.save_pretrained(folder)
    (folder / file).write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_the_images_statistics_are_read(nested, tmp_path):
    """Another mean and deviation than OpenAI's, in the old file and in the new one; the embeddings are those
    of the library, also after a round trip through a bundle."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.5, 0.7]
    settings, file = processor(image_mean=mean, image_std=std), "preprocessor_config.json"
    if nested:
        settings, file = {"image_processor": settings}, "processor_config.json"
    model = image_half(tmp_path, settings, file)
    pixels = np.float32(RNG.uniform(-1, 1, (2, 16, 16, 3)))
    normalised = ((pixels + 1) / 2 - np.float32(mean)) / np.float32(std)
    with torch.no_grad():
        theirs = model(nchw(normalised)).image_embeds
    read = load_bundle(tmp_path)
    close(run_part(read, "clip", pixels, method="encode_image"), theirs)
    again = load_bundle(save_bundle(read, tmp_path / "bundle", np.float32))
    assert again.parts["clip"].config == read.parts["clip"].config
    close(run_part(again, "clip", pixels, method="encode_image"), theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resample": 2}, "resample is 2, but the network here has 3"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784"),
        ({"size": {"shortest_edge": 20}}, "the shorter side is resized to the image tower's 16 pixels"),
        ({"size": {"height": 16, "width": 16}}, "the shorter side is resized"),
        ({"crop_size": 14}, "and the crop 14"),
        ({"crop_size": {"height": 16}}, "and the crop"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type is 'ViTImageProcessor'"),
        ({"image_mean": 0.5}, "image_mean must be a list of 3 numbers, not 0.5"),
        ({"image_std": [0.1, 0.0, 0.1]}, "deviation must be positive"),
        ({"do_pad": True}, "'do_pad' is True, a setting that is not known here"),
    ],
)
def test_images_prepared_in_another_way_are_refused(changes, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor(**changes)))
    with pytest.raises(ValueError, match=message):
        preprocess.of_transformers(tmp_path, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantization_config": {"bits": 8}}, "'quantization_config' is .* not known here"),
        ({"text_config": []}, "text_config must be an object or null, not"),
        ({"projection_dim": "512"}, "projection_dim must be an integer, not '512'"),
        ({"vision_config": {"hidden_size": 0}}, "hidden_size must be between 1 and 1048576, not 0"),
        ({"vision_config": {"num_attention_heads": 7}}, "no multiple of its 7 heads"),
        ({"vision_config": {"use_mean_pooling": True}}, "'use_mean_pooling' is True, a setting"),
        ({"vision_config": {"image_size": [224, 224]}}, "image_size must be an integer"),
        ({"text_config": {"eos_token_id": 49406}}, "eos_token_id is 49406, but the network here reads"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06, but the network here has"),
        ({"text_config": {"hidden_act": "gelu"}}, "activations gelu, quick_gelu"),
    ],
)
def test_settings_of_another_clip_are_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(tmp_path)
    assert "\n" not in str(error.value)


# What transformers 4.16 wrote into each half of openai/clip-vit-large-patch14, beside the sizes.
OLD = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
    "bad_words_ids": None, "bos_token_id": 0, "chunk_size_feed_forward": 0, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False, "eos_token_id": 2,
    "encoder_no_repeat_ngram_size": 0, "finetuning_task": None, "id2label": {"0": "LABEL_0"},
    "initializer_factor": 1.0, "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "pruned_heads": {},
    "num_return_sequences": 1, "output_attentions": False, "pad_token_id": 1, "repetition_penalty": 1.0,
    "return_dict": True, "temperature": 1.0, "tie_word_embeddings": True, "tokenizer_class": None,
    "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "transformers_version": "4.16",
    "typical_p": 1.0, "use_bfloat16": False, "hidden_act": "quick_gelu",
}  # fmt: skip


def test_the_published_configuration_is_known():
    """No key of OpenAI's ViT-L/14 is refused: those that generate text change nothing."""
    text = OLD | {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072}
    text |= {"num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408}
    image = OLD | {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    image |= {"num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768, "patch_size": 14}
    model = clip.transformers_config(text, image, 768)
    assert model["text"] == {
        **{"width": 768, "layers": 12, "heads": 12, "mlp_ratio": 4.0, "vocab_size": 49408, "length": 77}
    }
    assert model["image"] == {
        **{"width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0, "image_size": 224, "patch_size": 14}
    }


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Its ids would be read as other words."""
    from transformers import CLIPTextModelWithProjection

    text = peers.clip_configs(vocab_size=700)[0]
    CLIPTextModelWithProjection(text).save_pretrained(tmp_path)
    peers.write_tokenizer(tmp_path, 600)
    with pytest.raises(ValueError, match="reads 10 of 700 tokens, and the tokenizer makes 10 of 600"):
        load_bundle(tmp_path)
