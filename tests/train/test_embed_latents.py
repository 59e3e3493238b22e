"""`unclip embed --latents`: the folder also holds what an autoencoder makes of the source's images."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests import runs
from tests.helpers import random_params
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import Bundle, save_bundle
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.data import embeddings, ops, sources
from unclip_jax.generate.networks import build_model
from unclip_jax.run import frozen
from unclip_jax.run.batches import Data
from unclip_jax.train import latent
from unclip_jax.train.embed import embed

COUNT, SIZE = 20, 24


@pytest.fixture(scope="module")
def source():
    return dataclasses.replace(sources.make_source({"name": "emoji", "split": "val"}), length=COUNT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    parts = runs.random_bundle().parts
    return str(save_bundle(Bundle({"clip": parts["clip"]}), tmp_path_factory.mktemp("clip") / "clip"))


def run(clip, source, out, autoencoder, size=SIZE):
    settings = {"batch_size": 8, "shard_records": 12, "dtype": "float32", "states": True}
    return embed(
        clip,
        source,
        out,
        sharding.make_mesh(),
        autoencoder=str(autoencoder),
        latent_image_size=size,
        **settings,
    )


@pytest.mark.parametrize("kind", ["kl_autoencoder", "vq_autoencoder"])
def test_latents_are_those_of_the_encoder(kind, clip, source, tmp_path):
    """Each record has its image's latents, in half precision, not scaled; a second call changes nothing."""
    autoencoder = runs.random_autoencoder(kind, tmp_path / "autoencoder")
    manifest = run(clip, source, tmp_path / "out", autoencoder)
    part = load_part(autoencoder, "autoencoder")[0]
    described = {
        "autoencoder": params_hash(part.params),
        "size": SIZE,
        "shape": [12, 12, 3],
        "scale_factor": 0.5,
    }
    assert manifest["latents"] == described
    opened = sources.make_source({"name": "embeddings", "path": str(tmp_path / "out")})
    assert len(opened) == COUNT and opened.embedded.latents == described
    images = np.stack(
        [
            ops.to_float(ops.resize_then_crop(ops.decode_image(source.read(i).image), SIZE))
            for i in range(COUNT)
        ]
    )
    encoded = build_model(part.config).apply({"params": part.params}, images, method="encode")
    expected = encoded.mean if kind == "kl_autoencoder" else encoded
    for i in range(COUNT):
        latents = opened.read(i).embeds["latents"]
        assert latents.dtype == np.float16 and latents.shape == (12, 12, 3)
        np.testing.assert_allclose(latents, expected[i], atol=2e-3 * np.abs(expected).max())
    again = run(clip, source, tmp_path / "out", autoencoder)
    assert again == manifest


def test_what_is_refused(clip, source, tmp_path, capsys):
    """Another autoencoder or size in the same folder, a size that does not fit, damaged latents."""
    autoencoder = runs.random_autoencoder("kl_autoencoder", tmp_path / "autoencoder")
    out = tmp_path / "out"
    run(clip, source, out, autoencoder)
    with pytest.raises(ValueError, match="holds other embeddings .latents was"):
        run(clip, source, out, autoencoder, size=16)
    with pytest.raises(ValueError, match="--size 25 must be a multiple of 2"):
        run(clip, source, tmp_path / "other", autoencoder, size=25)
    assert not (tmp_path / "other").exists()
    command = ["embed", "--clip", clip, "--data", "name=emoji", "--out", str(tmp_path / "other")]
    assert main([*command, "--latents", str(autoencoder)]) == 1
    assert "--latents and --size go together" in capsys.readouterr().err
    file = embeddings.shard_path(out, 1) / "latents.npy"
    kept = file.read_bytes()
    file.write_bytes(kept[:-2] + b"\x00\x3c")
    run(clip, source, out, autoencoder)  # the damaged shard is made again
    assert file.read_bytes() == kept
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["latents"]["size"] = "large"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="latents: size"):
        embeddings.open_embedded(str(out))


def test_records_without_pictures(clip, source, tmp_path):
    """A record holds all that was stored, and no picture that would be decoded."""
    autoencoder = runs.random_autoencoder("kl_autoencoder", tmp_path / "autoencoder")
    run(clip, source, tmp_path / "out", autoencoder)
    opened = sources.make_source({"name": "embeddings", "path": str(tmp_path / "out")})
    record = opened.read(3)
    assert record.image == b"" and not opened.pictures
    assert set(record.embeds) == {"image_embed", "text_embed", "text_states", "latents"}


def test_latent_diffusion_trains_from_it(clip, source, tmp_path, capsys):
    """Its loss is that of the pictures, up to half precision, and neither CLIP nor the encoder runs."""
    autoencoder = runs.random_autoencoder("vq_autoencoder", tmp_path / "autoencoder", latents=4)
    run(clip, source, tmp_path / "out", autoencoder, size=16)
    config = load_config(str(runs.ROOT / "configs/emoji/latent.py:tiny"))
    override(config, "frozen.clip", clip)
    override(config, "frozen.autoencoder", str(autoencoder))
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    embedded = sources.make_source({"name": "embeddings", "path": str(tmp_path / "out")})
    rows, losses = range(8), []
    for read in (source, embedded):
        networks = frozen.load_frozen(config, tmp_path, mesh, latent.FROZEN, Data(read, {}))
        stage = latent.stage(config, mesh, networks)
        made = [stage.example(read.read(i), None, training=False) for i in rows]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        assert ("latents" in batch, "image" in batch) == ((False, True) if read is source else (True, False))
        arrays = frozen.arrays(networks)
        params = random_params(
            stage.model, np.zeros((1, 8, 8, 4)), np.zeros(1), context=np.zeros((1, 4, 32), np.float32)
        )
        loss = jax.jit(stage.objective)(params, {}, jax.random.key(0), batch, 0, frozen=arrays)[0]
        losses.append(float(loss))
    np.testing.assert_allclose(*losses, rtol=5e-3)

    check = functools.partial(frozen.check_latents, networks["autoencoder"], Data(embedded, {}))
    check(8, 1.0)
    with pytest.raises(ValueError, match="latents of the side 8, and model.image_size is 16"):
        check(16, 1.0)
    with pytest.raises(ValueError, match="data.crop_scale=0.8 crops at random"):
        check(8, 0.8)
    other = dataclasses.replace(networks["autoencoder"], hash="another")
    with pytest.raises(ValueError, match="embed again, or give that autoencoder"):
        frozen.check_latents(other, Data(embedded, {}), 8, 1.0)
    bare = dataclasses.replace(embedded, embedded=dataclasses.replace(embedded.embedded, latents=None))
    with pytest.raises(ValueError, match="holds no latents: embed with --latents"):
        frozen.check_latents(networks["autoencoder"], Data(bare, {}), 8, 1.0)

    command = ["train", str(runs.ROOT / "configs/emoji/latent.py:tiny"), "--workdir", str(tmp_path / "run")]
    command += ["--embeddings", str(tmp_path / "out"), "--embeddings", f"eval={tmp_path / 'out'}"]
    command += ["--set", f"frozen.autoencoder={autoencoder}", "--set", "steps=2", "--set", "eval_every=2"]
    assert main([*command, "--set", "data.backend=numpy"]) == 0
    assert "eval_loss" in capsys.readouterr().err
