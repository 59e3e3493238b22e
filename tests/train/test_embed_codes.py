"""`unclip embed --codes`: the folder also holds the codes of the source's images; priors train from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests.helpers import random_params
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override
from unclip_jax.data import ops, sources
from unclip_jax.errors import InputError
from unclip_jax.models.dvae import DVAE
from unclip_jax.models.vqvae import VQVAE
from unclip_jax.run import frozen
from unclip_jax.run.batches import Data
from unclip_jax.train import dalle, pixelsnail
from unclip_jax.train.embed import embed

COUNT, SIZE = 10, 16
MODELS = {
    "vqvae": VQVAE(8, 4, 1, 4, 16),
    "dvae": DVAE(8, 2, 1, 16, 8),
}
FIELDS = {
    "vqvae": ("channels", "residual_channels", "res_blocks", "embed_dim", "codes"),
    "dvae": ("channels", "levels", "level_blocks", "codes", "embed_dim"),
}


@pytest.fixture(scope="module")
def source():
    return dataclasses.replace(sources.make_source({"name": "emoji", "split": "val"}), length=COUNT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    parts = runs.random_bundle().parts
    return str(save_bundle(Bundle({"clip": parts["clip"]}), tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture(scope="module", params=list(MODELS))
def made(request, clip, source, tmp_path_factory):
    """The kind of a coder, its folder, its parameters, and the folder of its codes."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    model = MODELS[kind]
    part = Part(
        {"kind": kind, "model": {name: getattr(model, name) for name in FIELDS[kind]}},
        random_params(model, jnp.zeros((1, 8, 8, 3))),
    )
    coder = str(save_bundle(Bundle({kind: part}), folder / "coder", np.float32))
    settings = {"batch_size": 8, "shard_records": 6, "dtype": "float32", "states": True}
    manifest = embed(
        clip, source, folder / "out", sharding.make_mesh(), coder=coder, latent_image_size=SIZE, **settings
    )
    return kind, coder, part.params, folder / "out", manifest


def test_codes_are_those_of_the_network(made, source):
    kind, _, params, out, manifest = made
    count = 4 * 4 + 2 * 2 if kind == "vqvae" else 8 * 8
    assert manifest["codes"] == {"coder": params_hash(params), "size": SIZE, "shape": [count]}
    opened = sources.make_source({"name": "embeddings", "path": str(out)})
    assert len(opened) == COUNT and opened.embedded.codes == manifest["codes"]
    images = [ops.resize_then_crop(ops.decode_image(source.read(i).image), SIZE) for i in range(COUNT)]
    levels = MODELS[kind].apply({"params": params}, ops.to_float(np.stack(images)), method="encode_codes")
    expected = np.concatenate([np.asarray(codes).reshape(COUNT, -1) for codes in levels], axis=1)
    found = np.stack([opened.read(i).embeds["codes"] for i in range(COUNT)])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 2


def test_priors_train_from_it(made, clip, source, tmp_path):
    """The loss is that of the pictures; another network or size is refused."""
    kind, coder, _, out, _ = made
    stage_file, name = (pixelsnail, "vqvae2/pixelsnail.py:tiny-bottom"), (dalle, "dalle/dalle.py:tiny")
    stage_file, name = stage_file if kind == "vqvae" else name
    config = load_config(str(runs.ROOT / f"configs/{name}"))
    override(config, f"frozen.{kind}", coder)
    override(config, "data.crop_scale", 1.0)
    if kind == "vqvae":
        override(config, "frozen.clip", clip)
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    embedded, losses = sources.make_source({"name": "embeddings", "path": str(out)}), []
    for read in (source, embedded):
        data = Data(read, {})
        given = data if kind == "vqvae" else None
        networks = frozen.load_frozen(config, tmp_path, mesh, stage_file.FROZEN, given)
        stage = stage_file.stage(config, mesh, networks)
        rows = [stage.example(read.read(i), None, training=False) for i in range(4)]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        assert ("codes" in batch, "image" in batch) == ((False, True) if read is source else (True, False))
        arrays = frozen.arrays(networks)
        params, extra = stage.init(jax.random.key(0))
        loss = jax.jit(stage.objective)(params, extra, jax.random.key(1), batch, 0, frozen=arrays)[0]
        losses.append(float(loss))
        frozen.check_codes(networks[kind], data, SIZE, 1.0)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for network, size, crop, words in (
        (networks[kind], 32, 1.0, "codes of images of 16 px, and image_size is 32"),
        (networks[kind], SIZE, 0.9, "codes are of the centred square"),
        (dataclasses.replace(networks[kind], hash="another"), SIZE, 1.0, "the network given is another"),
    ):
        with pytest.raises(InputError, match=words):
            frozen.check_codes(network, data, size, crop)


def test_what_the_command_refuses(made, clip, tmp_path, capsys):
    kind, coder, *_ = made
    command = ["embed", "--clip", clip, "--data", "name=emoji", "--out", str(tmp_path / "out"), "--codes"]
    for more, words in (
        ([coder], "--codes and --size go together"),
        ([coder, "--size", "9"], "--size 9 must be a multiple of"),
        ([clip, "--size", "16"], "holds neither a vqvae nor a dvae"),
        ([coder, "--size", "16", "--latents", coder], "--latents and --codes make two folders"),
    ):
        assert main([*command, *more]) == 1
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
