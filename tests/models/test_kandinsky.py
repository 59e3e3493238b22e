"""Kandinsky's decoder: published sizes, and what it refuses."""

import jax
import pytest

from tests.helpers import param_count, param_shapes, struct
from unclip_jax.checkpoint.check import clip_shapes, kandinsky_shapes
from unclip_jax.errors import InputError
from unclip_jax.models.kandinsky import KandinskyDecoder
from unclip_jax.models.prior_diffusion import DiffusionPrior

UNET = {
    "image_size": 64,
    "out_channels": 8,
    "channels": 384,
    "channel_mult": (1, 2, 3, 4),
    "res_blocks": 3,
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
}
PUBLISHED = {"unet": UNET, "embed_dim": 1280, "latent_channels": 4, "context_dim": 768}
TINY_UNET = {"image_size": 8, "out_channels": 8, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1}
TINY_UNET |= {"attention_resolutions": (4,), "head_channels": 8, "groups": 4}
TINY = {"unet": TINY_UNET, "embed_dim": 6, "latent_channels": 4, "context_dim": 12, "clip_tokens": 3}


@pytest.mark.parametrize("inpaint, count", [(False, 1_253_057_288), (True, 1_253_074_568)])
def test_published_sizes(inpaint, count):
    """The exact parameter counts of 2.2's decoders, in as many tensors."""
    shapes = kandinsky_shapes(PUBLISHED | {"inpaint": inpaint})
    assert param_count(shapes) == count
    assert len(jax.tree.leaves(shapes)) == 724


def test_published_prior():
    """The prior is Karlo's, for the embeddings of ViT-bigG/14. Its file also holds their statistics."""
    model = DiffusionPrior(embed_dim=1280, length=77, width=2048, layers=20, heads=32)
    text = {"text_embed": struct(1, 1280), "text_states": struct(1, 77, 1280)}
    shapes = param_shapes(model, struct(1, 1280), struct(1), **text, text_mask=struct(1, 77, dtype=bool))
    assert param_count(shapes) + 2 * 1280 == 1_026_225_920
    assert len(jax.tree.leaves(shapes)) + 2 == 338


@pytest.mark.parametrize(
    "changes, x, dim, words",
    [
        ({}, (1, 8, 8, 9), 6, "latents with channels of 4, got 9"),
        ({"inpaint": True}, (1, 8, 8, 4), 6, "latents with channels of 9, got 4"),
        ({}, (1, 8, 8, 4), 5, "embeddings of 6, got 5"),
        ({}, (1, 7, 8, 4), 6, "multiples of 2"),
    ],
)
def test_refused(changes, x, dim, words):
    with pytest.raises(InputError, match=words):
        param_shapes(KandinskyDecoder(**TINY | changes), struct(*x), struct(1), image_embed=struct(1, dim))


def test_published_clip():
    """Both halves of OpenCLIP's ViT-bigG/14, each with its projection."""
    model = {"embed_dim": 1280, "activation": "gelu", "image": None, "text": None}
    text = {"vocab_size": 49408, "length": 77, "width": 1280, "layers": 32, "heads": 20}
    image = {"image_size": 224, "patch_size": 14, "width": 1664, "layers": 48, "heads": 16}
    assert param_count(clip_shapes(model | {"text": text})) == 694_659_840
    assert param_count(clip_shapes(model | {"image": image | {"mlp_ratio": 8192 / 1664}})) == 1_844_907_264
