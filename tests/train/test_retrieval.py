"""Retrieval-augmented diffusion: it learns from neighbours, draws in every mode, and takes another index."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.helpers import param_count, random_params
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.check import latent_shapes
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override, use_embeddings
from unclip_jax.data import sources
from unclip_jax.data.retrieval_index import open_index
from unclip_jax.run import frozen
from unclip_jax.run.batches import Data
from unclip_jax.run.resume import config_json
from unclip_jax.sampling import retrieval as cascade
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import system_of, text_to_image
from unclip_jax.train import retrieval
from unclip_jax.train.embed import embed
from unclip_jax.train.embed_index import embed_index

CONFIG = str(runs.ROOT / "configs/emoji/retrieval.py:tiny")
COUNT, K, D = 24, 2, 16
CAPTIONS = ["a red fox", "a 3d emoji of a cat", "a"]


def emoji(split, count, **more):
    source = sources.make_source({"name": "emoji", "split": split, **more})
    return dataclasses.replace(source, length=count)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a CLIP, an autoencoder, two indices of different styles, and embeddings of pictures."""
    box = tmp_path_factory.mktemp("retrieval")
    clip = runs.random_bundle().parts["clip"]
    save_bundle(Bundle({"clip": clip}), box / "clip")
    runs.random_autoencoder("kl_autoencoder", box / "autoencoder", latents=4)
    mesh, settings = sharding.make_mesh(), {"batch_size": 8, "dtype": "float32"}
    for style in ("3d", "blob"):
        embed_index(str(box / "clip"), emoji("val", 40, style=style), box / style, mesh, **settings)
    settings |= {"autoencoder": str(box / "autoencoder"), "latent_image_size": 16}
    settings |= {"index": str(box / "3d"), "nearest": 3}
    embed(str(box / "clip"), emoji("train", COUNT), box / "train", mesh, **settings)
    return box


def config(made, **changes):
    made_config = load_config(CONFIG)
    use_embeddings(made_config, [f"{made}/train", f"eval={made}/train"], keep_frozen=False)
    changes = {"frozen.autoencoder": f"{made}/autoencoder", "data.backend": "numpy"} | changes
    for key, value in changes.items():
        override(made_config, key, value)
    return made_config


@pytest.fixture(scope="module")
def run(made):
    """A short run on one batch, on one device."""
    steps = {"steps": 12, "eval_every": 12, "checkpoint_every": 12, "optimizer.learning_rate": 1e-2}
    with pytest.MonkeyPatch.context() as patch:
        runs.wrap_batches(patch, runs.Repeating)
        patch.setattr(retrieval, "make_mesh", lambda shape: sharding.make_mesh(None, jax.devices()[:1]))
        retrieval.train_and_evaluate(config(made, **steps), str(made / "run"))
    return made / "run"


@pytest.fixture(scope="module")
def bundle(made):
    """A bundle of random networks, none of whose layers is zero, without an index."""
    clip, autoencoder = (load_bundle(made / name).parts[name] for name in ("clip", "autoencoder"))
    settings = config(made)
    model = config_json(settings.model)
    part = {"kind": "retrieval", "model": model, "diffusion": config_json(settings.diffusion)}
    part |= {"embedding_space": {"kind": "raw"}, "neighbours": K, "frozen": {"clip": clip.hash}}
    kept = sources.make_source({"name": "embeddings", "path": f"{made}/train"}).embedded.neighbours
    part["popular"] = {key: kept[key] for key in ("index", "rows", "uses")}
    network = frozen.build_model(part)
    params = random_params(
        network, np.zeros((1, 8, 8, 4), np.float32), np.zeros(1), context=np.zeros((1, 2, D), np.float32)
    )
    parts = {"clip": clip, "autoencoder": autoencoder, "retrieval": Part(part, params)}
    sampling = {"retrieval": {"steps": 3, "sampler": "ddim", "guidance_scale": 2.0}}
    return Bundle(parts, "retrieval", sampling)


# ------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    "name, count, space",
    [
        ("retrieval/retrieval.py", 400_920_579, "raw"),
        ("retrieval/retrieval.py:ffhq", 414_713_603, "raw"),
        ("retrieval/retrieval.py:768", 1_335_480_400, "unit"),
    ],
)
def test_published_sizes(name, count, space):
    read = load_config(str(runs.ROOT / "configs" / name))
    retrieval.check(read)
    assert param_count(latent_shapes(config_json(read.model))) == count and read.embedding_space == space


@pytest.mark.parametrize(
    "name", ["retrieval/retrieval.py:tiny", "emoji/retrieval.py", "emoji/retrieval.py:tiny"]
)
def test_other_recipes_describe_networks(name):
    read = load_config(str(runs.ROOT / "configs" / name))
    retrieval.check(read)
    assert param_count(latent_shapes(config_json(read.model))) > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model.in_channels": 9}, "does not inpaint"),
        ({"model.context_dim": None}, "frozen.clip makes the context"),
        ({"embedding_space": "scaled"}, "embedding_space must be one of raw, unit"),
        ({"neighbours": 0}, "neighbours must be a whole number"),
        ({"sampling.mode": "nearest"}, "unknown mode 'nearest'"),
        ({"sampling.popular": 0.0}, "a share of the index's rows"),
        ({"sampling.negative": "blurry"}, "takes no negative caption"),
    ],
)
def test_refused_settings(settings, words):
    read = load_config(CONFIG)
    with read.unlocked():
        read.sampling.update({"mode": "text", "popular": 0.5, "negative": ""})
    for key, value in settings.items():
        override(read, key, value)
    with pytest.raises(ValueError, match=words):
        retrieval.check(read)


# ------------------------------------------------------------------------------------------ training
def test_the_loss_sees_neighbours(made):
    """A row holds the nearest K; the loss depends on them unless they are all dropped, and zeros are none."""
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    source = sources.make_source({"name": "embeddings", "path": f"{made}/train"})
    losses = {}
    for drop in (0.0, 1.0):
        settings = config(made, drop_neighbours=drop)
        networks = frozen.load_frozen(settings, made, mesh, retrieval.FROZEN, None)
        stage = retrieval.stage(settings, mesh, networks)
        rows = [stage.example(source.read(i), None, training=False) for i in range(8)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        assert batch["neighbours"].shape == (8, K, D) and batch["latents"].shape == (8, 8, 8, 4)
        np.testing.assert_array_equal(batch["neighbours"][3], source.read(3).embeds["neighbours"][:K])
        shapes = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1)
        params = random_params(stage.model, *shapes, context=np.zeros((1, K, D), np.float32))
        loss = jax.jit(lambda batch, s=stage, p=params, n=networks: s.objective(
            p, {}, jax.random.key(0), batch, 0, frozen=frozen.arrays(n))[0])  # fmt: skip
        turned = batch | {"neighbours": batch["neighbours"][::-1]}
        none = batch | {"neighbours": np.zeros_like(batch["neighbours"])}
        losses[drop] = [float(loss(each)) for each in (batch, turned, none)]
    assert abs(losses[0.0][0] - losses[0.0][1]) > 1e-4
    np.testing.assert_allclose(losses[1.0], losses[0.0][2], rtol=1e-6)


def test_a_run_learns(made, run):
    """The loss on a fixed batch falls. The part says its space, its number of neighbours, and what served."""
    meta, _, step = load_run(run)
    kept = sources.make_source({"name": "embeddings", "path": f"{made}/train"}).embedded
    assert (meta["name"], step) == ("retrieval", 12)
    part = meta["part"]
    assert (part["kind"], part["embedding_space"], part["neighbours"]) == ("retrieval", {"kind": "raw"}, K)
    assert part["frozen"]["clip"] == kept.clip
    assert part["popular"] == {key: kept.neighbours[key] for key in ("index", "rows", "uses")}
    assert (run / "samples" / "0000012.png").stat().st_size > 1000
    curve = runs.losses(run)
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3]), curve


def test_what_the_run_refuses(made):
    """A source without neighbours, too few of them, another CLIP, the other space."""
    clip = frozen.Network(None, {}, {}, open_index(f"{made}/3d").clip)
    embedded = sources.make_source({"name": "embeddings", "path": f"{made}/train"})
    retrieval.check_neighbours(clip, Data(embedded, {}), 3, "raw")
    for source, count, space, words in (
        (emoji("train", 8), 2, "raw", "holds no neighbours: embed with --neighbours"),
        (embedded, 4, "raw", "holds 3 neighbours of each picture, and neighbours=4"),
        (embedded, 2, "unit", "holds raw neighbours, and embedding_space=unit"),
    ):
        with pytest.raises(ValueError, match=words):
            retrieval.check_neighbours(clip, Data(source, {}), count, space)
    with pytest.raises(ValueError, match="embed again, or give that CLIP"):
        retrieval.check_neighbours(dataclasses.replace(clip, hash="x"), Data(embedded, {}), 2, "raw")


def test_embeddings_beside_pictures(made, tmp_path):
    """Without latents, the folder stands beside the pictures, and the row has both."""
    settings = {"batch_size": 8, "dtype": "float32", "index": str(made / "3d"), "nearest": 2}
    embed(str(made / "clip"), emoji("train", COUNT), tmp_path / "e", sharding.make_mesh(), **settings)
    read = load_config(CONFIG)
    use_embeddings(read, [f"{tmp_path}/e", f"eval={tmp_path}/e"], keep_frozen=False)
    assert read.data.train.name == "emoji" and read.data.train.embeddings == f"{tmp_path}/e"
    record = sources.with_embeddings(emoji("train", COUNT), f"{tmp_path}/e").read(2)
    row = retrieval.retrieval_example(record, None, size=16, count=K)
    assert row["image"].shape == (16, 16, 3) and row["neighbours"].shape == (K, D)


# ------------------------------------------------------------------------------------------ drawing
def test_every_mode(made, bundle):
    """Neighbours are those of the caption; each mode draws other pictures, text alone without an index."""
    with_index = cascade.with_index(bundle, f"{made}/3d")
    sampler = Sampler(with_index, sharding.make_mesh(None, jax.devices()[:1]))
    draw = lambda mode, **more: cascade.sample_stages(
        sampler, CAPTIONS, options={"retrieval": {"mode": mode, **more}}
    )
    found = {mode: draw(mode) for mode in ("text", "text+neighbours", "neighbours", "popular")}
    assert [found[m].neighbours.shape[1] for m in found] == [0, K - 1, K, K]
    pictures = [stages.images[0] for stages in found.values()]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(pictures) for b in pictures[:i])
    np.testing.assert_array_equal(found["neighbours"].neighbours[:, :1], found["text+neighbours"].neighbours)
    rows = np.float64(open_index(f"{made}/3d").rows(0, 40))
    z = np.asarray(sampler.network("clip").apply(
        sampler.captions(CAPTIONS)["clip_tokens"], method="encode_text").embed)  # fmt: skip
    nearest = np.argsort(-(rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ z.T, axis=0)[:K].T
    np.testing.assert_array_equal(found["neighbours"].neighbours, nearest)
    assert draw("neighbours", neighbours=5).neighbours.shape == (3, 5)
    assert len([key for key in sampler._programs if key[0] == "retrieval"]) == 1  # for every mode
    alone = cascade.sample_stages(bundle, CAPTIONS, options={"retrieval": {"mode": "text"}})
    np.testing.assert_allclose(alone.images[0], found["text"].images[0], atol=1e-4)
    with pytest.raises(ValueError, match="has no index to draw neighbours from: give one with --index"):
        cascade.sample_stages(bundle, CAPTIONS)


def test_popular_rows(made, bundle, caplog):
    """Rows that served in training are drawn, with themselves as the first neighbour, by row and seed."""
    with_index = cascade.with_index(bundle, f"{made}/3d")
    sampler = Sampler(with_index)
    options = {"retrieval": {"mode": "popular", "popular": 0.1, "steps": 1}}
    draw = lambda seed, places=None, **more: cascade.sample_stages(
        sampler, ["", "a", "b", "c"], seed=seed, positions=places,
        options={"retrieval": options["retrieval"] | more},
    ).neighbours[:, 0]  # fmt: skip
    known = bundle.parts["retrieval"].config["popular"]["rows"][:4]
    drawn = np.concatenate([draw(seed) for seed in range(4)])
    assert set(drawn) <= set(known) and len(set(drawn)) > 1 and not caplog.text
    np.testing.assert_array_equal(draw(7)[1:2], draw(7, [1, 5, 6, 8])[:1])  # a row depends on its position
    part = with_index.parts["retrieval"]
    heavy = part.config["popular"] | {"uses": [10**6, *[1] * (len(part.config["popular"]["rows"]) - 1)]}
    parts = with_index.parts | {"retrieval": Part(part.config | {"popular": heavy}, part.params)}
    sampler = Sampler(dataclasses.replace(with_index, parts=parts))
    assert set(draw(0, weighted=True)) == {known[0]}
    sampler = Sampler(cascade.with_index(bundle, f"{made}/blob"))
    with caplog.at_level(logging.WARNING):
        draw(0)
    assert "training did not use this index" in caplog.text


def test_another_index_draws_other_pictures(made, bundle):
    """Exchanging the index changes the neighbours and the pictures, and no weight.

    At the guidance scale 0 the picture is that of no neighbours, whatever the index.
    """
    drawn = []
    for style in ("3d", "blob"):
        with_index = cascade.with_index(bundle, f"{made}/{style}")
        weights = [each.parts["retrieval"].params for each in (with_index, bundle)]
        jax.tree.map(np.testing.assert_array_equal, *weights)
        sampler = Sampler(with_index)
        draw = lambda scale, sampler=sampler: cascade.sample_stages(
            sampler, CAPTIONS, options={"retrieval": {"mode": "neighbours", "guidance_scale": scale}}
        )
        near = open_index(f"{made}/{style}").take(draw(2.0).neighbours)
        drawn.append([near, draw(2.0).images[0], *(draw(scale).latents for scale in (2.0, 3.0, 0.0))])
    (near, images, z, more, none), (other_near, other_images, other_z, _, other_none) = drawn
    differ = lambda a, b: np.abs(a - b).reshape(len(a), -1).max(axis=1) > 1e-3
    assert differ(near, other_near).all() and differ(z, other_z).all() and differ(z, more).all()
    assert differ(images, other_images).all()
    np.testing.assert_allclose(none, other_none, atol=1e-5)


def test_the_other_space_is_refused(made, bundle, tmp_path):
    """An index of unit rows is no index for a network of raw ones, at any door."""
    embed_index(str(made / "clip"), emoji("val", 8), tmp_path / "unit", sharding.make_mesh(), space="unit",
                batch_size=8, dtype="float32")  # fmt: skip
    with pytest.raises(ValueError, match="holds unit embeddings, but the network takes raw ones"):
        cascade.with_index(bundle, f"{tmp_path}/unit")
    part = bundle.parts["retrieval"]
    unit = Part(part.config | {"embedding_space": {"kind": "unit"}}, part.params)
    of_unit = dataclasses.replace(bundle, parts=bundle.parts | {"retrieval": unit})
    both = cascade.with_index(of_unit, f"{tmp_path}/unit")
    drawn = cascade.sample_stages(both, CAPTIONS)
    assert np.isfinite(drawn.images[0]).all()
    mixed = dataclasses.replace(both, parts=both.parts | {"retrieval": part})
    save_bundle(mixed, tmp_path / "mixed")
    with pytest.raises(ValueError, match="the index holds unit embeddings, but retrieval takes raw ones"):
        load_bundle(tmp_path / "mixed")
    with pytest.raises(ValueError, match="the index holds unit embeddings"):
        cascade.sample_stages(mixed, CAPTIONS)
    shutil.copytree(made / "3d", tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"clip": "another"}))
    with pytest.raises(ValueError, match="was made with CLIP another, but the network is of"):
        cascade.with_index(bundle, f"{tmp_path}/other")


def test_the_commands(made, run, bundle, tmp_path, capsys):
    """`unclip bundle --index` keeps an index; `unclip sample --index` takes another one."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "retrieval").symlink_to(run)
    base = save_bundle(
        Bundle({name: bundle.parts[name] for name in ("clip", "autoencoder")}), tmp_path / "base"
    )
    command = ["bundle", str(folder), "--base", str(base), "--out", str(tmp_path / "b")]
    assert main([*command, "--index", str(made / "3d")]) == 0
    read = load_bundle(tmp_path / "b")
    assert read.system == "retrieval" and set(read.parts) == {"clip", "autoencoder", "retrieval", "index"}
    assert system_of(read).sizes(read) == [16]
    rows = open_index(f"{made}/3d")
    np.testing.assert_array_equal(read.parts["index"].params["embedding"], np.float32(rows.rows(0, 40)))
    assert text_to_image(read, CAPTIONS, options={"retrieval": {"mode": "popular"}}).shape == (3, 16, 16, 3)
    sample = ["sample", "a fox", "--bundle", str(tmp_path / "b"), "--steps", "2"]
    for name, more in (("own", []), ("blob", ["--index", str(made / "blob")])):
        assert (
            main(
                [*sample, "--set", "retrieval.mode=neighbours", *more, "--out", str(tmp_path / f"{name}.png")]
            )
            == 0
        )
    own, blob = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("own", "blob"))
    assert own.shape == blob.shape and (own != blob).any()
    capsys.readouterr()
    for argv, says in (
        ([*sample, "--index", str(made / "train")], "holds embeddings and no index"),
        (["sample", "a", "--bundle", "emoji", "--index", str(made / "3d")], "draws without neighbours"),
        ([*sample, "--set", "retrieval.mode=near"], "unknown mode 'near'"),
        ([*sample, "--set", "retrieval.neighbours=50"], "has 40 rows"),
        ([*sample, "--negative", "a dog"], "takes no negative caption"),
    ):
        assert main([*argv, "--out", str(tmp_path / "no.png")]) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "no.png").exists()
