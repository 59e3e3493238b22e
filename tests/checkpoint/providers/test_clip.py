"""CLIP's public weights against the library they come from, run at random weights in the same test."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.checkpoint import peers
from tests.checkpoint.peers import close, nchw, run_part
from unclip_jax.checkpoint.load import load_bundle, load_part

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


def test_clip_by_openais_names(tmp_path):
    """The same network under both names is the same tree; the shapes alone say what it is."""
    from transformers import CLIPConfig, CLIPModel

    text, image = peers.clip_configs(width=64, mlp=256, vocab_size=49408)
    for half in (text, image):
        half.num_attention_heads = 1
    whole = peers.randomize(
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)
        )
    )
    whole.save_pretrained(tmp_path / "transformers")
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
            for i in range(2):
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
    (tmp_path / "openai").mkdir()
    save_file(renamed, tmp_path / "openai" / "model.safetensors")
    ours, other = (load_bundle(tmp_path / name) for name in ("openai", "transformers"))
    assert ours.parts["clip"].config == other.parts["clip"].config
    jax.tree.map(np.testing.assert_array_equal, ours.parts["clip"].params, other.parts["clip"].params)
