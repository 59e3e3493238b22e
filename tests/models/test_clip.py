"""CLIP: parity with a public implementation, causality and pooling of the text tower, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fast_key, param_count, param_shapes, random_params, struct
from unclip_jax.models.clip import CLIP, MEAN, STD, unit

VOCAB, LENGTH, SIZE, D = 60, 7, 16, 8
IMAGE = dict(image_size=SIZE, patch_size=8, width=24, layers=2, heads=3)
TEXT = dict(vocab_size=VOCAB, length=LENGTH, width=16, layers=2, heads=2)
MODEL = CLIP(embed_dim=D, image=IMAGE, text=TEXT)
EOT = VOCAB - 1
TOKENS = jnp.array([[58, 3, 4, 5, EOT, 0, 0], [58, 9, EOT, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, struct(1, SIZE, SIZE, 3), struct(1, LENGTH, dtype=jnp.int32))


encode_text = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens, method="encode_text"))
encode_image = jax.jit(lambda params, image: MODEL.apply({"params": params}, image, method="encode_image"))


def test_text_states_are_causal(params):
    """A later token does not change earlier states.

    Tokens after the end token do not change the embedding.
    """
    base, changed = encode_text(params, TOKENS), encode_text(params, TOKENS.at[0, 3].set(20))
    np.testing.assert_array_equal(base.states[0, :3], changed.states[0, :3])
    assert not np.allclose(base.states[0, 3], changed.states[0, 3])
    behind = encode_text(params, TOKENS.at[0, 5].set(20))
    np.testing.assert_array_equal(base.embed, behind.embed)


def test_pooling_at_the_end_token(params):
    """The embedding is the projected state at the end token: moving the end moves the pooling."""
    base = encode_text(params, TOKENS)
    kernel = params["text_tower"]["projection"]["kernel"]
    np.testing.assert_allclose(base.embed[0], base.states[0, 4] @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(base.embed[1], base.states[1, 2] @ kernel, rtol=1e-4, atol=1e-5)


def test_logit_scale_starts_at_its_value_and_is_clamped(params):
    """exp(ln(1/0.07)) at first, never above 100; embeddings have norm one."""
    call = jax.jit(lambda params: MODEL.apply({"params": params}, jnp.zeros((2, SIZE, SIZE, 3)), TOKENS))
    fresh = jax.jit(
        lambda key: MODEL.init(key, jnp.zeros((1, SIZE, SIZE, 3)), TOKENS)["params"]["logit_scale"]
    )(fast_key())
    image, text, scale = call(params | {"logit_scale": fresh})
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)
    np.testing.assert_allclose([np.linalg.norm(image, axis=-1), np.linalg.norm(text, axis=-1)], 1, rtol=1e-5)
    np.testing.assert_allclose(call(params | {"logit_scale": jnp.array(9.0)})[2], 100, rtol=1e-5)


def test_wrong_sizes_are_named():
    """The errors name the image size and the caption length."""
    with pytest.raises(ValueError, match="takes 16x16 images, got 16x24"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)), TOKENS))
    with pytest.raises(ValueError, match="takes 7 tokens, got 5"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), TOKENS[:, :5]))


def test_unit_of_zero_is_finite():
    """The norm has a floor."""
    np.testing.assert_array_equal(unit(jnp.zeros((1, 3))), 0)


def from_public(state):
    """A transformers CLIPModel state dict -> our parameters."""
    get = lambda name: state[name].numpy()
    kernel = lambda name: (
        {"kernel": get(f"{name}.weight").T}
        | ({"bias": get(f"{name}.bias")} if f"{name}.bias" in state else {})
    )
    norm = lambda name: {"norm": {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}}

    def blocks(prefix, config):
        width, heads = config["width"], config["heads"]
        out = {}
        for i in range(config["layers"]):
            layer = f"{prefix}.encoder.layers.{i}"
            heads_out = lambda name, layer=layer: {
                "kernel": get(f"{layer}.self_attn.{name}.weight").T.reshape(width, heads, -1),
                "bias": get(f"{layer}.self_attn.{name}.bias").reshape(heads, -1),
            }
            merged = kernel(f"{layer}.self_attn.out_proj")
            out[f"block_{i}"] = {
                "ln1": norm(f"{layer}.layer_norm1"),
                "ln2": norm(f"{layer}.layer_norm2"),
                "fc1": kernel(f"{layer}.mlp.fc1"),
                "fc2": kernel(f"{layer}.mlp.fc2"),
                "attn": {
                    "query": heads_out("q_proj"),
                    "key": heads_out("k_proj"),
                    "value": heads_out("v_proj"),
                    "out": merged | {"kernel": merged["kernel"].reshape(heads, -1, width)},
                },
            }
        return out

    return {
        "logit_scale": get("logit_scale"),
        "image_tower": {
            "patch_embed": {
                "kernel": get("vision_model.embeddings.patch_embedding.weight").transpose(2, 3, 1, 0)
            },
            "class_embedding": get("vision_model.embeddings.class_embedding"),
            "position_embedding": get("vision_model.embeddings.position_embedding.weight"),
            "ln_pre": norm("vision_model.pre_layrnorm"),
            "ln_post": norm("vision_model.post_layernorm"),
            "transformer": blocks("vision_model", IMAGE),
            "projection": kernel("visual_projection"),
        },
        "text_tower": {
            "token_embedding": get("text_model.embeddings.token_embedding.weight"),
            "position_embedding": get("text_model.embeddings.position_embedding.weight"),
            "ln_final": norm("text_model.final_layer_norm"),
            "transformer": blocks("text_model", TEXT),
            "projection": kernel("text_projection"),
        },
    }


def test_parity_with_a_public_implementation(params):
    """transformers' CLIPModel at random weights, mapped onto ours.

    Embeddings and logit scale are the same to 1e-4.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    names = lambda c: dict(
        hidden_size=c["width"], intermediate_size=4 * c["width"], num_hidden_layers=c["layers"]
    )
    shared = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, attention_dropout=0.0)
    text = (
        names(TEXT)
        | shared
        | dict(num_attention_heads=TEXT["heads"], vocab_size=VOCAB, max_position_embeddings=LENGTH)
    )
    vision = (
        names(IMAGE)
        | shared
        | dict(num_attention_heads=IMAGE["heads"], image_size=SIZE, patch_size=IMAGE["patch_size"])
    )
    config = transformers.CLIPConfig(
        text_config=text | dict(bos_token_id=VOCAB - 2, eos_token_id=EOT, pad_token_id=0),
        vision_config=vision,
        projection_dim=D,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = from_public(theirs.state_dict())
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)

    image = np.random.default_rng(0).uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
    pixels = ((image + 1) / 2 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(np.asarray(TOKENS), dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        )
    np.testing.assert_allclose(unit(encode_image(ours, image)), out.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(unit(encode_text(ours, TOKENS).embed), out.text_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(
        encode_text(ours, TOKENS).states, out.text_model_output.last_hidden_state.numpy(), atol=1e-4
    )


def full_size(
    embed, size, patch, image_width, image_layers, image_heads, text_width, text_layers, text_heads
):
    model = CLIP(
        embed_dim=embed,
        image=dict(
            image_size=size, patch_size=patch, width=image_width, layers=image_layers, heads=image_heads
        ),
        text=dict(vocab_size=49_408, length=77, width=text_width, layers=text_layers, heads=text_heads),
    )
    return param_shapes(model, struct(1, size, size, 3), struct(1, 77, dtype=jnp.int32))


@pytest.mark.parametrize(
    "arguments, count",
    [
        ((512, 224, 32, 768, 12, 12, 512, 12, 8), 151_277_313),
        ((512, 224, 16, 768, 12, 12, 512, 12, 8), 149_620_737),
        ((768, 224, 14, 1024, 24, 16, 768, 12, 12), 427_616_513),
        ((768, 336, 14, 1024, 24, 16, 768, 12, 12), 427_944_193),
    ],
    ids=["B/32", "B/16", "L/14", "L/14@336"],
)
def test_published_sizes(arguments, count):
    """The exact parameter counts of OpenAI's released models."""
    assert param_count(full_size(*arguments)) == count


def test_size_of_the_papers_clip():
    """ViT-H/16 at 256 px with a 24-layer text tower of width 1024."""
    shapes = full_size(1024, 256, 16, 1280, 32, 16, 1024, 24, 16)
    assert param_count(shapes["image_tower"]) == 632_307_200
    assert param_count(shapes["text_tower"]) == 354_032_640
