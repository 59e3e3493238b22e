"""The paper's configurations: exact sizes, computed from shapes alone.

The tiny variants train, form a bundle, and sample with their own text encoders.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unclip_jax
from tests.helpers import param_count, param_shapes, struct
from tests.runs import losses, train_tiny
from unclip_jax import sharding
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.upsampler import Upsampler
from unclip_jax.run.frozen import text_tokenizer
from unclip_jax.run.resume import config_json
from unclip_jax.train import STAGES
from unclip_jax.train import clip as clip_stage

PAPER = Path(__file__).resolve().parent.parent / "configs" / "dalle2"
D, L = 1024, 256
CLIP_VOCAB, GLIDE_VOCAB = 49_408, 50_257
TOKENS = {"tokens": struct(1, L, dtype=jnp.int32), "token_mask": struct(1, L, dtype=bool)}


def paper(name):
    config = load_config(str(PAPER / f"{name}.py"))
    return config, config_json(config.model)


def dense(inputs, outputs):
    return (inputs + 1) * outputs


def blocks(layers, width):
    """A pre-norm block has 12 W^2 + 13 W parameters."""
    return layers * (12 * width**2 + 13 * width)


def text_encoder(vocab, width=2048, layers=24):
    """Token, position and padding embeddings, blocks, final norm."""
    return vocab * width + 2 * L * width + blocks(layers, width) + 2 * width


def test_blocks_of_the_prior():
    """The published count of 24 blocks of width 2048."""
    assert blocks(24, 2048) == 1_208_598_528


def test_size_of_clip():
    """Vision and text tower as published, and the temperature."""
    config, model = paper("clip")
    model["text"] |= {"vocab_size": config.tokenizer.vocab_size, "length": config.tokenizer.length}
    shapes = param_shapes(CLIP(**model), struct(1, 256, 256, 3), struct(1, 77, dtype=jnp.int32))
    assert param_count(shapes["image_tower"]) == 632_307_200
    assert param_count(shapes["text_tower"]) == 354_032_640
    assert param_count(shapes) == 632_307_200 + 354_032_640 + 1


def decoder_count(vocab):
    config, model = paper("decoder")
    model["text"] |= {"vocab_size": vocab, "length": config.text_tokenizer.length}
    image = struct(1, 8, 8, 3)  # parameters do not depend on the side
    inputs = {"image_embed": struct(1, D), "drop_image": struct(1, dtype=bool), **TOKENS}
    return param_count(param_shapes(Decoder(**model), image, struct(1), **inputs))


def test_size_of_the_decoder():
    """The count is 3,565,434,374 with GLIDE's vocabulary, plus our learned null embedding (D).

    CLIP's vocabulary has 849 rows fewer.
    """
    assert decoder_count(GLIDE_VOCAB) == 3_565_434_374 + D
    config, _ = paper("decoder")
    assert config.text_tokenizer.vocab_size == CLIP_VOCAB
    assert decoder_count(CLIP_VOCAB) == 3_565_434_374 + D - (GLIDE_VOCAB - CLIP_VOCAB) * 2048


def test_size_of_the_diffusion_prior():
    """1B as printed: the blocks, and around them what is counted here one by one."""
    config, model = paper("prior_diffusion")
    model |= {"embed_dim": D, "length": L, "text": {"num_embeddings": config.text_tokenizer.vocab_size}}
    count = param_count(
        param_shapes(DiffusionPrior(**model), struct(1, D), struct(1), text_embed=struct(1, D), **TOKENS)
    )
    width = 2048
    around = CLIP_VOCAB * width + (L + 4) * width + width  # token embedding, positions, query
    around += (
        2 * dense(D, width) + 2 * dense(width, width) + dense(width, D) + 2 * width
    )  # z_t, z_i; time; result; final norm
    assert count == blocks(24, width) + around == 1_325_014_016


def test_size_of_the_autoregressive_prior():
    """A text encoder of the published shape, and a latent decoder.

    Every layer of the decoder also projects the encoder's states to keys and values.
    """
    config, model = paper("prior_ar")
    model["length"] = L
    model["text"] |= {"vocab_size": config.text_tokenizer.vocab_size, "length": L}
    codes, dot = struct(1, 319, dtype=jnp.int32), struct(1, dtype=jnp.int32)
    count = param_count(param_shapes(ARPrior(**model), codes, dot, text_embed=struct(1, D), **TOKENS))
    width, buckets = 1664, 1024
    latent = blocks(24, width) + 24 * 2 * dense(2048, width)
    latent += (
        buckets * width + 128 * width + 320 * width + dense(D, width) + 2 * width + dense(width, buckets)
    )
    assert count == text_encoder(CLIP_VOCAB) + latent


@pytest.mark.parametrize("name, count", [("upsampler_256", 729_702_083), ("upsampler_1024", 282_059_139)])
def test_size_of_the_upsamplers(name, count):
    """The published topology; parameters do not depend on the side."""
    config, model = paper(name)
    side = 32
    shapes = param_shapes(
        Upsampler(**model), struct(1, side, side, 3), struct(1), low_res=struct(1, side // 4, side // 4, 3)
    )
    assert param_count(shapes) == count
    assert config.data.crop_size * 4 == config.model.unet.image_size  # crops of a quarter of the side


def train(name, workdir, **changes):
    config = load_config(f"{PAPER / name}.py:tiny")
    for key, value in {"data.backend": "numpy", **changes}.items():
        override(config, key, value)
    return STAGES[config.stage].train_and_evaluate(config, str(workdir))


def test_tiny_variants_train_and_sample(tiny_run, tmp_path, monkeypatch):
    """Both priors and the decoder train with the paper's options.

    The options are: own text encoders, scaled embeddings, analytic variance, two candidates, learned
    variance. The runs form one bundle, which samples with either prior. Its samples depend on the caption.
    """
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "clip").symlink_to(tiny_run("clip"))
    for name, run in ((name, name) for name in ("codec", "prior_diffusion", "prior_ar", "decoder")):
        figures = train(name, runs / run)
        assert figures and all(np.isfinite(v) for v in figures.values()), name
    assert main(["bundle", str(runs), "--out", str(tmp_path / "bundle"), "--rows", "0"]) == 0
    bundle = unclip_jax.load_bundle(tmp_path / "bundle")
    assert (
        bundle.sampling["prior_diffusion"]["variance"] == "analytic"
        and bundle.sampling["prior_diffusion"]["candidates"] == 2
    )
    errors = bundle.parts["prior_diffusion"].config["x0_error"]
    assert len(errors) == 1000 and min(errors) >= 0 and max(errors) > 0
    assert bundle.parts["decoder"].config["tokenizer"]["length"] == 12
    for prior in ("prior_diffusion", "prior_ar"):
        images = unclip_jax.text_to_image(bundle, ["a red fox", "a blue heart"], prior=prior)
        assert images.shape == (2, 8, 8, 3) and images.std() > 0


def test_tiny_clip_trains_with_sam_on_any_mesh(tmp_path, monkeypatch):
    """With groups of two rows, eight devices give the same losses as one device.

    Without SAM the losses differ after the first step.
    """
    curves = {}
    for name, changes in (("eight", {}), ("one", {}), ("off", {"sam.rho": 0.0})):
        with monkeypatch.context() as patch:
            if name == "one":
                patch.setattr(
                    clip_stage, "make_mesh", lambda shape: sharding.make_mesh(None, jax.devices()[:1])
                )
            train("clip", tmp_path / name, eval_every=0, **changes)
        curves[name] = losses(tmp_path / name)
    np.testing.assert_allclose(curves["eight"], curves["one"], rtol=1e-4)
    np.testing.assert_allclose(
        curves["eight"][:2], curves["off"][:2], rtol=1e-5
    )  # the warmup's first update is zero
    assert abs(curves["eight"][-1] / curves["off"][-1] - 1) > 1e-4


@pytest.mark.parametrize("name", ["upsampler_256", pytest.param("upsampler_1024", marks=pytest.mark.slow)])
def test_tiny_upsamplers_train(name, tmp_path):
    """Four times larger images; the second with BSR degradation."""
    config = load_config(f"{PAPER / name}.py:tiny")
    assert (
        config.factor == 4
        and config.data.degradation == {"upsampler_256": "blur", "upsampler_1024": "bsr_light"}[name]
    )
    assert np.isfinite(train(name, tmp_path / name)["eval_loss"])


def test_what_freezes_a_text_encoder(tmp_path):
    """It needs one, and no weight decay, which would shrink it without a gradient."""
    with pytest.raises(ValueError, match="it needs one, and no weight decay"):
        train("decoder", tmp_path / "decoder", freeze_text=True, **{"optimizer.weight_decay": 0.1})
    with pytest.raises(ValueError, match="it needs one, and no weight decay"):
        train_tiny("decoder", tmp_path / "decoder", freeze_text=True)


def test_text_encoder_settings_belong_together():
    """A tokenizer without an encoder, or an encoder without a tokenizer, is an error before training."""
    config = load_config(f"{PAPER / 'prior_ar'}.py:tiny")
    with config.unlocked():
        config.text_tokenizer = None
    with pytest.raises(ValueError, match="text_tokenizer and model.text belong together"):
        text_tokenizer(config)
