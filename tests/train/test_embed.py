"""`unclip embed`: the folder holds CLIP's output for the source, and priors train from it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import SMALL, losses, tiny_config, train_tiny
from unclip_jax import sharding
from unclip_jax.checkpoint.load import load_part
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.cli.train import use_embeddings
from unclip_jax.data import embeddings, sources
from unclip_jax.data.examples import clip_example, decoder_example
from unclip_jax.data.pipeline import BadDataError
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.models.codec import Codec, project
from unclip_jax.run import frozen
from unclip_jax.run.batches import Data
from unclip_jax.run.frozen import (
    EMPTY,
    captions_of,
    clip_image_size,
    clip_network,
    clip_tokenizer,
    images_of,
    load_frozen,
)
from unclip_jax.train import decoder, embed_shards, prior_diffusion
from unclip_jax.train import embed as stage

COUNT, SHARD = 70, 32  # number of records, in all and in a shard


@pytest.fixture(scope="module")
def source():
    return dataclasses.replace(sources.make_source({"name": "emoji", "split": "val"}), length=COUNT)


def run(clip, source, out, states=True, **settings):
    settings = {"batch_size": 16, "shard_records": SHARD, "states": states, "dtype": "float32"} | settings
    return stage.embed(str(clip), source, out, sharding.make_mesh(), **settings)


@pytest.fixture(scope="module")
def folder(tiny_run, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "val"
    run(tiny_run("clip"), source, out)
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def clip(tiny_run):
    return clip_network(str(tiny_run("clip")), sharding.make_mesh(None, jax.devices()[:1]), "float32")


def hashes(out):
    return [shard["sha256"] for shard in json.loads((out / "manifest.json").read_text())["shards"]]


def test_what_is_read_is_what_clip_says(folder, source, clip):
    """Every image and caption has CLIP's embedding, in the source's order; states have half precision."""
    embedded = sources.make_source({"name": "embeddings", "path": str(folder)})
    assert len(embedded) == COUNT and embedded.embedded.clip == clip.hash
    settings = {"tokenizer": clip_tokenizer(clip), "size": clip_image_size(clip), "training": False}
    example, mesh = (
        lambda record: clip_example(record, None, **settings),
        sharding.make_mesh(None, jax.devices()[:1]),
    )
    image, text = (
        jax.jit(functools.partial(images_of, clip, mesh)),
        jax.jit(functools.partial(captions_of, clip, mesh, True)),
    )
    for i in (0, SHARD - 1, SHARD, COUNT - 1):
        record, picture = embedded.read(i), source.read(i)
        assert record.captions == picture.captions and len(record.embeds["text_embed"]) == len(
            picture.captions
        )
        for n, caption in enumerate(picture.captions):
            row = {k: v[None] for k, v in example(dataclasses.replace(picture, captions=(caption,))).items()}
            np.testing.assert_allclose(record.embeds["image_embed"], image(clip.params, row)[0], atol=1e-4)
            encoded = text(clip.params, row)
            np.testing.assert_allclose(record.embeds["text_embed"][n], encoded.embed[0], atol=1e-4)
            np.testing.assert_allclose(
                record.embeds["text_states"][n], encoded.states[0], atol=1e-2, rtol=1e-3
            )


def test_manifest_and_codec(folder, source, clip):
    """The manifest has counts, mean and deviation; the codec has components and extremes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    embedded = sources.make_source({"name": "embeddings", "path": str(folder)})
    z = np.stack([embedded.read(i).embeds["image_embed"] for i in range(COUNT)]).astype(np.float64)
    captions = sum(len(source.read(i).captions) for i in range(COUNT))
    assert (manifest["images"], manifest["captions"], manifest["bad"]) == (COUNT, captions, 0)
    assert manifest["clip"] == clip.hash and manifest["alignment"]["pairs"] == COUNT
    np.testing.assert_allclose(manifest["image_embed"]["mean"], z.mean(0), atol=1e-6)
    np.testing.assert_allclose(manifest["image_embed"]["std"], z.std(0), rtol=1e-5)
    part, _ = load_part(folder / "codec", "codec")
    assert part.config["frozen"] == {"clip": clip.hash}
    components = part.params["components"].astype(np.float64)
    np.testing.assert_allclose(
        components @ np.cov(z.T, bias=True) @ components.T, np.diag(part.params["eigenvalues"]), atol=1e-5
    )
    y = np.asarray(project(Codec(**part.params), np.float32(z), z.shape[1]))
    np.testing.assert_allclose([y.min(0), y.max(0)], [part.params["low"], part.params["high"]], atol=1e-4)


def test_cut_off_and_gone_on_with(copy, folder, tiny_run, source, caplog):
    """A resumed command makes only missing and damaged shards again, and they are the same as before."""
    written = lambda: {name: (copy / name / "shard.json").stat().st_mtime_ns for name in ("00000", "00001")}
    before = written()
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "00002")
    (copy / ".00002.tmp").mkdir()
    (copy / ".00002.tmp" / "image_embed.npy").write_bytes(b"half")
    file = copy / "00001" / "text_embed.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FileNotFoundError, match="did not finish"):
        sources.make_source({"name": "embeddings", "path": str(copy)})
    run(tiny_run("clip"), source, copy)
    assert [name for name, time in written().items() if time == before[name]] == ["00000"]
    assert hashes(copy) == hashes(folder)
    assert "text_embed.npy is damaged" in caplog.text and not list(copy.glob(".*"))


def test_two_hosts_share_the_shards(folder, tiny_run, source, tmp_path, monkeypatch):
    """The second host makes the odd shards, the first one the others. The result is as with one host."""
    network = clip_network(str(tiny_run("clip")), sharding.make_mesh(), "float32")
    monkeypatch.setattr(stage, "clip_network", lambda *_, **__: network)  # Orbax would ask the other host
    turn = {"host": 0}

    def wait(key):
        # The first host has made its shards; now it is the second one's turn.
        if key == "embedded" and turn["host"] == 0:
            assert not (tmp_path / "out" / "00001").exists() and (tmp_path / "out" / "00002").is_dir()
            turn["host"] = 1
            with pytest.raises(FileNotFoundError, match="manifest.json is missing"):  # a real one would wait
                run(tiny_run("clip"), source, tmp_path / "out")
            turn["host"] = 0

    for module in (stage, embed_shards):
        monkeypatch.setattr(module, "wait_for_hosts", wait)
    monkeypatch.setattr(stage.jax, "process_count", lambda: 2)
    monkeypatch.setattr(stage.jax, "process_index", lambda: turn["host"])
    run(tiny_run("clip"), source, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(folder)


def test_bad_records(tiny_run, source, tmp_path, caplog):
    """The command leaves out, counts and names unreadable records. Too many of them stop it."""
    spoil = lambda record: dataclasses.replace(record, image=b"no picture")
    broken = dataclasses.replace(
        source, fetch=lambda i: spoil(source.fetch(i)) if i in (3, 40) else source.fetch(i)
    )
    manifest = run(tiny_run("clip"), broken, tmp_path / "some", states=False)
    assert (manifest["images"], manifest["bad"]) == (COUNT - 2, 2) and "skipped record 40" in caplog.text
    embedded = sources.make_source({"name": "embeddings", "path": str(tmp_path / "some")})
    assert embedded.read(3).captions == source.read(4).captions
    with pytest.raises(BadDataError, match="1 of 16 records cannot be used.*record 3 of"):
        run(tiny_run("clip"), broken, tmp_path / "none", max_bad_fraction=0.0)


def test_refusals(copy, tiny_run, source, tmp_path, capsys):
    """Another plan, a folder of other files, embeddings as the source, and exchanged rows are errors."""
    with pytest.raises(ValueError, match="holds other embeddings .*shard_records was 32, is 16"):
        run(tiny_run("clip"), source, copy, shard_records=16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and holds no embeddings"):
        run(tiny_run("clip"), source, tmp_path / "full")
    with pytest.raises(ValueError, match="holds embeddings already"):
        run(
            tiny_run("clip"), sources.make_source({"name": "embeddings", "path": str(copy)}), tmp_path / "out"
        )
    shard = embeddings.Shard(copy / "00001", True)
    arrays = {file.stem: np.array(shard.array(file.stem)) for file in sorted(shard.folder.glob("*.npy"))}
    arrays["image_embed"] = arrays["image_embed"][::-1]
    described = embeddings.read_json(shard.folder / "shard.json")
    embeddings.write_arrays(shard.folder, arrays, {k: v for k, v in described.items() if k != "sha256"})
    with pytest.raises(ValueError, match="00001 is not the shard that .*manifest.json describes"):
        sources.make_source({"name": "embeddings", "path": str(copy)})
    with pytest.raises(ValueError, match="00001 does not hold what the networks say of record"):
        run(tiny_run("clip"), source, copy)
    assert main(["embed", "--clip", str(tiny_run("clip")), "--out", str(tmp_path / "x")]) == 1
    assert "say what to embed" in capsys.readouterr().err


def config_of(name, folder, keep_clip=False, **changes):
    config = tiny_config(name, **changes)
    use_embeddings(
        config, [str(folder), *(f"{key}={folder}" for key in config.data.get("eval", {}))], keep_clip
    )
    return config


def test_a_prior_trains_from_it(folder, tiny_run, tmp_path):
    """It trains without the CLIP, records the CLIP's hash, and takes the mean of all embeddings."""
    prior_diffusion.train_and_evaluate(
        config_of("prior_diffusion", folder, eval__rows=16), str(tmp_path / "prior")
    )
    meta = load_run(tmp_path / "prior")[0]
    assert meta["part"]["frozen"] == load_run(tiny_run("prior_diffusion"))[0]["part"]["frozen"]
    mean = json.loads((folder / "manifest.json").read_text())["image_embed"]["mean"]
    np.testing.assert_allclose(meta["part"]["embedding_space"]["mean"], mean, rtol=1e-6)
    assert np.mean(losses(tmp_path / "prior")[-4:]) < np.mean(losses(tmp_path / "prior")[:4])


def test_the_other_prior_trains_from_it(folder, tiny_run, tmp_path):
    """The command uses the codec in the folder. Its evaluation still embeds pictures, with the CLIP given."""
    settings = {
        "frozen.codec": folder / "codec",
        "steps": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "data.backend": "numpy",
    }
    command = [
        "train",
        "configs/emoji/prior_ar.py:tiny",
        "--workdir",
        str(tmp_path / "ar"),
        "--embeddings",
        str(folder),
    ]
    command += [
        "--clip",
        str(tiny_run("clip")),
        *(part for k, v in settings.items() for part in ("--set", f"{k}={v}")),
    ]
    assert main(command) == 0
    assert len(losses(tmp_path / "ar")) == 2


def test_the_same_conditioning_as_from_pictures(folder, source, tiny_run):
    """A batch of pictures and the same batch of embeddings give a stage the same conditioning.

    So does the empty caption. This holds with CLIP's text states and with a text encoder of the stage's own,
    and with the folder of embeddings in place of the CLIP.
    """
    embedded = sources.make_source({"name": "embeddings", "path": str(folder)})
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    clip_run, tokenizer = str(tiny_run("clip")), {"length": 12, "vocab_size": 8192}
    for own_settings in (None, tokenizer):
        config = tiny_config("prior_diffusion")
        if own_settings is not None:
            with config.unlocked():
                config.text_tokenizer, config.model.text = own_settings, {}
        outputs = []
        for place, data in ((clip_run, source), (clip_run, embedded), (str(folder), embedded)):
            config.frozen.clip = place
            networks = load_frozen(config, ".", mesh, {"clip": "clip"}, Data(data, {}))
            clip, own_tokenizer = (
                networks["clip"],
                None if own_settings is None else ClipTokenizer(**own_settings),
            )
            settings = {
                "tokenizer": clip_tokenizer(clip),
                "size": clip_image_size(clip),
                "training": False,
                "text_tokenizer": own_tokenizer,
            }
            rows = [clip_example(data.read(i), None, **settings) for i in range(4)]
            batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
            text = captions_of(clip, mesh, own_settings is None, clip.params, batch)
            outputs.append((images_of(clip, mesh, clip.params, batch), *text, *networks[EMPTY].params))
        for others in outputs[1:]:
            for a, b in zip(outputs[0], others, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-2, rtol=1e-3)


def test_what_does_not_fit_is_refused(folder, clip, tmp_path):
    """Another CLIP, a stage that needs pictures, pictures without a CLIP, and missing states are errors."""
    with pytest.raises(ValueError, match="was made with CLIP .* but the CLIP given is"):
        prior_diffusion.train_and_evaluate(
            config_of("prior_diffusion", folder, True, frozen__clip="emoji"), str(tmp_path / "a")
        )
    with pytest.raises(ValueError, match="the upsampler stage reads no embeddings; these stages do: prior_d"):
        use_embeddings(tiny_config("upsampler_16"), [str(folder)], False)
    with pytest.raises(ValueError, match="there is no evaluation 'test'; there are"):
        use_embeddings(tiny_config("prior_diffusion"), [f"test={folder}"], False)
    with pytest.raises(ValueError, match="holds no pictures, which this stage needs"):
        embedded = sources.make_source({"name": "embeddings", "path": str(folder)})
        frozen.check_sources(clip, Data(embedded, {}), pictures=True)
    with pytest.raises(ValueError, match="holds pictures, and the CLIP given is a folder of embeddings"):
        train_tiny("prior_diffusion", tmp_path / "d", frozen__clip=str(folder))
    manifest = embeddings.read_json(folder / "manifest.json")
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    embeddings.write_json(bare / "manifest.json", manifest | {"states": False})
    with pytest.raises(ValueError, match="holds no text states, which this stage needs"):
        prior_diffusion.train_and_evaluate(config_of("prior_diffusion", bare), str(tmp_path / "e"))


def test_a_record_without_a_caption_is_a_bad_one(tiny_run, source, tmp_path):
    """It is left out and counted. A start that fails leaves no folder, so that mended data fits."""
    bare = lambda record: dataclasses.replace(record, captions=())
    long = lambda record: dataclasses.replace(record, captions=("word " * 100, "a fox"))
    kept = {i: source.read(i) for i in range(6)}
    of = lambda change: dataclasses.replace(source, length=6, fetch=lambda i: change(i, kept[i]))
    with pytest.raises(BadDataError, match="1 of 6 records cannot be used.*has no caption.*--skip-bad"):
        half = of(lambda i, record: bare(record) if i == 3 else record)
        run(tiny_run("clip"), half, tmp_path / "out", max_bad_fraction=0.0)
    with pytest.raises(BadDataError, match="none of the 6 records can be used, as record 5 .*no caption"):
        run(tiny_run("clip"), of(lambda i, record: bare(record)), tmp_path / "out", max_bad_fraction=1.0)
    assert not (tmp_path / "out").exists()
    mixed = of(lambda i, record: bare(record) if i < 4 else long(record))
    manifest = run(tiny_run("clip"), mixed, tmp_path / "out", max_bad_fraction=1.0)
    assert (manifest["images"], manifest["bad"], manifest["captions"], manifest["cut"]) == (2, 4, 4, 2)


# ------------------------------------------------------------------------------------------ beside pictures
def test_the_decoder_sees_the_same_with_embeddings(folder, source, clip):
    """The same pictures and captions, and the embeddings that CLIP computes of them."""
    beside = sources.with_embeddings(source, str(folder))
    assert beside.embedded.clip == clip.hash and beside.checksum != source.checksum and beside.pictures
    settings = {"tokenizer": clip_tokenizer(clip), "size": 8, "clip_size": clip_image_size(clip)}
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    for i in (0, 40, COUNT - 1):
        plain, embedded = (
            decoder_example(data.read(i), None, training=False, **settings) for data in (source, beside)
        )
        np.testing.assert_array_equal(plain["image"], embedded["image"])
        assert "clip_image" not in embedded
        batches = [{name: value[None] for name, value in row.items()} for row in (plain, embedded)]
        read = lambda batch: (
            images_of(clip, mesh, clip.params, batch),
            *captions_of(clip, mesh, True, clip.params, batch)[:3],
        )
        for a, b in zip(*map(read, batches), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match="data.crop_scale=0.8 crops at random"):
        decoder_example(beside.read(0), np.random.default_rng(0), crop_scale=0.8, **settings)


def test_the_decoder_trains_with_embeddings(folder, source, tiny_run, tmp_path, monkeypatch):
    """It reads pictures and embeddings, and no CLIP; the part records the CLIP's hash."""
    small = SMALL | {"model__unet__attention_resolutions": ()}
    config = tiny_config("decoder", **small, steps=2, eval_every=2, optimizer__warmup_steps=1)
    monkeypatch.setitem(sources.SOURCES, "emoji", lambda split: source)
    use_embeddings(config, [str(folder), f"eval={folder}"], False)
    assert config.frozen.clip == config.data.train.embeddings == str(folder)
    decoder.train_and_evaluate(config, str(tmp_path / "decoder"))
    meta = load_run(tmp_path / "decoder")[0]
    assert meta["part"]["frozen"] == load_run(tiny_run("prior_diffusion"))[0]["part"]["frozen"]
    assert len(losses(tmp_path / "decoder")) == 2


def test_embeddings_of_another_source_are_refused(folder, source):
    with pytest.raises(ValueError, match="holds the embeddings of another source than emoji/compose"):
        sources.make_source({"name": "emoji", "split": "compose", "embeddings": str(folder)})
    embedded = sources.make_source({"name": "embeddings", "path": str(folder)})
    with pytest.raises(ValueError, match="holds embeddings already"):
        sources.with_embeddings(embedded, str(folder))
    # COUNT records were embedded; the whole split has more.
    whole = sources.with_embeddings(sources.make_source({"name": "emoji", "split": "val"}), str(folder))
    with pytest.raises(ValueError, match=f"record {COUNT} of emoji/val has no embedding in"):
        whole.read(COUNT)


def test_too_many_bad_records_are_told_before_the_rest_is_embedded(tiny_run, source, tmp_path, monkeypatch):
    """The batch with one bad record too many is the last that is read, and nothing of it is embedded."""
    read, made = [], stage._towers
    bare = lambda i: read.append(i) or dataclasses.replace(source.fetch(i), captions=())
    broken = dataclasses.replace(source, fetch=lambda i: bare(i) if i % 2 else source.fetch(i))

    def towers(*args):
        return dataclasses.replace(made(*args), image=lambda pictures: 1 / 0, text=lambda captions: 1 / 0)

    monkeypatch.setattr(stage, "_towers", towers)
    with pytest.raises(BadDataError, match="16 of 32 records cannot be used"):
        run(tiny_run("clip"), broken, tmp_path / "out", batch_size=32)
    assert max(read) < 3 * 32 and not (tmp_path / "out").exists()
