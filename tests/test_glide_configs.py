"""The recipes of GLIDE: exact sizes, training, fine-tuning to inpaint, and the bundle of the runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.peer_glide import write_tokenizer
from tests.helpers import param_count
from tests.runs import losses
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.shapes import glide_shapes
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.diffusion.losses import training_tables
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.run.frozen import text_tokenizer
from unclip_jax.run.resume import config_json, load_widened
from unclip_jax.sharding import make_mesh
from unclip_jax.train import glide

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "glide"
SIZES = {
    "glide.py:guidance": 3_554_414_086,
    "glide.py:filtered": 385_030_726,
    "glide_256.py:filtered-inpaint": 398_368_198,
}


def tiny(name, **changes):
    config = load_config(f"{CONFIGS / name}")
    settings = {"data.backend": "numpy", "optimizer.eps": 1e-6, "optimizer.learning_rate": 3e-3}
    for key, value in {**settings, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        override(config, key, value)
    return config


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """With GLIDE's own vocabulary."""
    config = load_config(f"{CONFIGS}/{name}")
    glide.check(config)
    model = config_json(config.model) | {"upsamples": config.factor is not None}
    model["text"] |= {"vocab_size": 50_257, "length": config.text_tokenizer.length}
    assert param_count(glide_shapes(model)) == SIZES[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both networks trained, and the first one fine-tuned to inpaint."""
    folder = tmp_path_factory.mktemp("glide") / "runs"
    one = {"model__unet__channel_mult": (1,), "model__unet__attention_resolutions": (8,)}
    long = one | {"steps": 12, "eval_every": 12, "checkpoint_every": 12}
    glide.train_and_evaluate(tiny("glide.py:tiny", drop_text=0.2, **long), str(folder / "glide"))
    short = {"steps": 2, "eval_every": 0, "model__unet__channel_mult": (1,)}
    glide.train_and_evaluate(tiny("glide_256.py:tiny", **short), str(folder / "glide_16"))
    config = tiny("glide.py:tiny-inpaint", optimizer__learning_rate=1e-9, **(one | short))
    glide.train_and_evaluate(config, str(folder / "glide_inpaint"), str(folder / "glide"))
    return folder


@pytest.mark.slow
def test_training(runs):
    """The loss falls; the inpainting run starts from the other one, with no weights for the known part."""
    curve = losses(runs / "glide")
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])
    plain, _ = load_part(runs / "glide", "glide")
    inpaints, _ = load_part(runs / "glide_inpaint", "glide_inpaint")
    kernels = [part.params["unet"]["conv_in"]["kernel"] for part in (plain, inpaints)]
    np.testing.assert_allclose(kernels[0], kernels[1][:, :, :3], atol=1e-6)
    assert kernels[1].shape[2] == 7 and np.abs(kernels[1][:, :, 3:]).max() < 1e-6


@pytest.mark.slow
def test_widened_channels_follow_the_image(runs):
    """The small image of an upsampler stays behind the known part's channels."""
    kernel = load_part(runs / "glide_16", "glide_16")[0].params["unet"]["conv_in"]["kernel"]
    wide = load_widened(str(runs / "glide_16"), "glide_16_inpaint")[0].params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(wide[:, :, :3], kernel[:, :, :3])
    np.testing.assert_array_equal(wide[:, :, 7:], kernel[:, :, 3:])
    assert wide.shape[2] == 10 and not wide[:, :, 3:7].any()


@pytest.mark.slow
def test_bundle(runs, tmp_path):
    """The runs make a bundle of the system, which draws."""
    out = tmp_path / "bundle"
    assert main(["bundle", str(runs), "--out", str(out), "--rows", "0"]) == 0
    assert load_bundle(out).system == "glide"
    drawn = ["sample", "a red fox", "a blue heart", "--bundle", str(out), "--guidance", "2"]
    assert main([*drawn, "--out", str(tmp_path / "fox.png")]) == 0


def test_dropped_captions_are_empty():
    """With drop_text 1 the caption does not matter to the loss, with 0 it does."""
    config = tiny("glide.py:tiny")
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stage = glide.stage(config, mesh, {})
    rng = np.random.default_rng(0)
    params = stage.init(jax.random.key(0))[0]
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)
    tokenizer = text_tokenizer(config)
    empty = glide.words(*(jnp.asarray(a)[None] for a in tokenizer.empty()))
    image = np.float32(rng.uniform(-1, 1, (2, 8, 8, 3)))
    tables = training_tables(schedule_of(config.diffusion))

    @jax.jit
    def loss(tokens, mask, drop_text):
        batch = {"image": image, "tokens": tokens, "token_mask": mask}
        return glide.loss_fn(
            params, jax.random.key(1), batch, frozen={}, model=stage.model, tables=tables,
            diffusion=config_json(config.diffusion), empty=empty, drop_text=drop_text,
        )[0]  # fmt: skip

    texts = [tokenizer([text] * 2) for text in ("a red fox", "a blue heart")]
    dropped, kept = ([float(loss(*text, drop)) for text in texts] for drop in (1.0, 0.0))
    assert dropped[0] == dropped[1] and abs(kept[0] - kept[1]) > 1e-5


def test_the_tokenizer_of_a_folder(tmp_path):
    write_tokenizer(tmp_path)
    config = tiny("glide.py:tiny", text_tokenizer__folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"has 261 tokens, not text_tokenizer.vocab_size=8192; set it"):
        text_tokenizer(config)
    override(config, "text_tokenizer.vocab_size", 261)
    assert text_tokenizer(config).config()["kind"] == "glide_bpe"


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("glide_256.py:tiny", "factor", 3, "must be a multiple of factor=3"),
        ("glide.py:tiny", "drop_text", 1.5, "drop_text must be a number in"),
        ("glide.py:tiny", "sampling.candidates", 2, "candidates"),
    ],
)
def test_settings_are_checked(name, key, value, message):
    config = tiny(name)
    if key.startswith("sampling"):
        with config.unlocked():
            config.sampling.candidates = value
    else:
        override(config, key, value)
    with pytest.raises(ValueError, match=message):
        glide.check(config)
