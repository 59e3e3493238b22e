"""Imagen: sizes of the recipes, networks, augmentation, training with Adafactor, and the cascade."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import param_count, random_params
from tests.models.test_t5 import write_pieces
from tests.runs import losses
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.shapes import imagen_shapes
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.diffusion.augmentation import augmented
from unclip_jax.models.imagen import ImagenUpsampler
from unclip_jax.models.t5 import T5Encoder
from unclip_jax.run.optim import make_optimizer, updates_applied
from unclip_jax.run.resume import config_json
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import system_of
from unclip_jax.train import imagen

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "imagen"
SIZES = {
    "imagen.py": 2_140_115_459,
    "upsampler.py": 457_916_547,
    "upsampler.py:1024": 453_718_147,
}
ONE_LEVEL = {"model.unet.channel_mult": (1,), "model.unet.attention_resolutions": (8,)}
UNET = dict(
    image_size=16, out_channels=3, channels=8, channel_mult=(1, 2), res_blocks=(1, 2), head_channels=8,
    attention=("cross", "self"), groups=4,
)  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    """Those that the recipes state, with T5-XXL's states."""
    config = load_config(f"{CONFIGS}/{name}")
    imagen.check(config)
    shapes = imagen_shapes(config_json(config.model), 4096, config.factor is not None)
    assert param_count(shapes) == SIZES[name]
    assert f"{SIZES[name]:,}" in (CONFIGS / name.split(":")[0]).read_text()


def inputs(rng, h=12, w=8):
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    image = lambda: np.float32(rng.normal(size=(2, h, w, 3)))
    given = dict(enlarged=image(), augmentation=np.array([0.1, 0.8], np.float32))
    return (
        image(),
        np.array([3.0, 700.0]),
        given | dict(text_states=np.float32(rng.normal(size=(2, 4, 6))), text_mask=mask),
    )


def test_the_upsampler_reads_all_its_inputs():
    """At an oblong size. Masked states do not matter, and each other input does, row by row."""
    model, (x, t, given) = ImagenUpsampler(UNET, 16), inputs(np.random.default_rng(0))
    params = random_params(model, x, t, **given)
    apply = jax.jit(lambda **given: model.apply({"params": params}, x, t, **given))
    base = apply(**given)
    assert base.shape == (2, 12, 8, 3)
    for name in ("enlarged", "augmentation", "text_states"):
        moved = np.array(given[name])
        moved[0] += 0.3
        changed = apply(**given | {name: moved})
        assert np.abs(changed[0] - base[0]).max() > 1e-4
        np.testing.assert_allclose(changed[1], base[1], atol=1e-5)
    hidden = np.array(given["text_states"])
    hidden[:, 3] += 5
    np.testing.assert_allclose(apply(**given | {"text_states": hidden}), base, atol=1e-5)


def test_bad_sides_and_levels():
    model, (x, t, given) = ImagenUpsampler(UNET, 16), inputs(np.random.default_rng(0), 10, 8)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(10, 8\)"):
        random_params(model, x, t, **given)
    model, (x, t, given) = ImagenUpsampler(UNET | {"res_blocks": (1,)}, 16), inputs(np.random.default_rng(0))
    with pytest.raises(ValueError, match="one value for each level"):
        random_params(model, x, t, **given)


def test_augmentation():
    """Variance preserved; nothing at level 0 but a hundredth, nearly noise alone at level 1."""
    rng = np.random.default_rng(0)
    x, eps = (np.float32(rng.normal(size=(3, 64, 64, 3))) for _ in range(2))
    out = np.asarray(augmented(x, jnp.array([0.0, 0.5, 1.0]), eps))
    np.testing.assert_allclose(out.std((1, 2, 3)), 1, atol=0.02)
    assert np.abs(out[0] - x[0]).max() < 0.06
    signal = [np.corrcoef(out[i].ravel(), x[i].ravel())[0, 1] for i in (1, 2)]
    np.testing.assert_allclose(signal, [math.exp(-1.25), math.exp(-5)], atol=0.03)


def test_adafactor_keeps_rows_and_columns():
    """A large matrix has two vectors in place of a second moment; the update count is found; a loss falls."""
    params = {"a": jnp.ones((256, 128)), "b": jnp.ones(3)}
    optimizer = make_optimizer(learning_rate=0.1, steps=20, kind="adafactor", schedule="constant", b1=0.0)
    state = optimizer.tx.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 256 * 128 / 8
    loss = lambda p: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))
    first = loss(params)
    for _ in range(5):
        updates, state = optimizer.tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert loss(params) < 0.5 * first and int(updates_applied(state)) == 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small T5 at random weights, and both networks trained on it."""
    folder = tmp_path_factory.mktemp("imagen")
    write_pieces(folder)
    tokenizer = T5Tokenizer.from_folder(folder, 8)
    model = dict(vocab_size=16, width=12, layers=1, heads=2, head_dim=8, hidden=16, gated=True)
    params = random_params(T5Encoder(**model), *tokenizer(["a"]))
    part = Part({"kind": "t5", "model": model, "tokenizer": tokenizer.config()}, params)
    save_bundle(Bundle({"t5": part}, "imagen"), folder / "t5", np.float32)
    for name, run, changes in (
        ("imagen.py:tiny", "imagen", {"steps": 24, "eval_every": 0, "checkpoint_every": 24} | ONE_LEVEL),
        ("upsampler.py:tiny", "imagen_16", {"steps": 2, "eval_every": 2}),
    ):
        config = load_config(f"{CONFIGS / name}")
        rates = {"optimizer.learning_rate": 3e-3, "optimizer.eps": 1e-6}
        for key, value in {
            "data.backend": "numpy",
            "frozen.t5": str(folder / "t5"),
            **rates,
            **changes,
        }.items():
            override(config, key, value)
        imagen.train_and_evaluate(config, str(folder / "runs" / run))
    return folder


@pytest.mark.slow
def test_training(runs):
    curve = losses(runs / "runs" / "imagen")
    assert np.mean(curve[-6:]) < 0.9 * np.mean(curve[:6])


@pytest.mark.slow
def test_the_cascade(runs, tmp_path, capsys):
    """The runs and T5 make a bundle, whose pictures depend on the caption and on the augmentation's level."""
    out, both = tmp_path / "bundle", ["--base", str(runs / "t5"), "--rows", "0"]
    assert main(["bundle", str(runs / "runs"), "--out", str(out), *both]) == 0
    bundle = load_bundle(out)
    assert bundle.system == "imagen" and set(bundle.parts) == {"t5", "imagen", "imagen_16"}
    rng = np.random.default_rng(0)  # output layers begin at zero
    noisy = lambda a: np.asarray(a) + np.float32(0.1 * rng.normal(size=a.shape))
    parts = {n: Part(p.config, jax.tree.map(noisy, p.params)) for n, p in bundle.parts.items()}
    sampler = Sampler(Bundle(parts, "imagen", bundle.sampling))
    draw = lambda captions, **options: system_of(sampler.bundle).sample(
        sampler, captions, positions=[0] * len(captions), options={"imagen_16": options}
    ).images  # fmt: skip
    base, large = draw(["a red fox", "a"])
    assert base.shape == (2, 8, 8, 3) and large.shape == (2, 16, 16, 3)
    assert np.abs(base[0] - base[1]).max() > 1e-3
    noised = draw(["a red fox", "a"], augmentation=0.9)
    np.testing.assert_array_equal(noised[0], base)
    assert np.abs(noised[1] - large).max() > 1e-3
    drawn = ["sample", "a red fox", "--bundle", str(out), "--out", str(tmp_path / "fox.png")]
    assert main([*drawn, "--set", "imagen_16.augmentation=2"]) == 1
    assert "augmentation must be in [0, 1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("imagen.py:tiny", "data.crop_size", 4, "crop_size is for upsamplers"),
        ("imagen.py:tiny", "factor", 2, "attention is of upsamplers"),
        ("upsampler.py:tiny", "data.crop_size", 6, "must be a multiple of factor=2 and of 4"),
        ("upsampler.py:tiny", "model.unet.attention", ("near", "self"), "none, self or cross"),
    ],
)
def test_settings_are_checked(name, key, value, message):
    config = load_config(f"{CONFIGS / name}")
    override(config, key, value)
    with pytest.raises(ValueError, match=message):
        imagen.check(config)
