"""dalle-mini and its VQGAN from the published layout: equal to their equations, drawn from, and refused when
damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize

from tests.checkpoint import peer_dalle_mini as peer
from tests.checkpoint import peers
from unclip_jax.checkpoint.flax_file import open_flax
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.cli.main import main
from unclip_jax.data.bart_tokenizer import BartTokenizer, normalise
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.generate.tokens import nucleus
from unclip_jax.models.quantiser import nearest
from unclip_jax.sampling.dalle_mini import sample_stages, sizes
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import SYSTEMS

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published layout at random weights."""
    return peer.write(tmp_path_factory.mktemp("public") / "dalle-mini")


def run(part, *args, method=None):
    """A part's network, compiled."""
    model = build_model(part.config)
    return jax.jit(lambda params: model.apply({"params": params}, *args, method=method))(part.params)


# ------------------------------------------------------------------------------------ parity
@pytest.mark.parametrize(
    "version",
    [{}, {"scanned": False, "gated": False, "scales": True, "head_scale": True}],
    ids=["published", "other settings"],
)
def test_logits_are_those_of_the_equations(version, tmp_path):
    """Of stacked layers, and of layers one by one with the settings that other versions of the code had."""
    tree = peer.network(**version)
    peer.write(tmp_path, tree, changes={"use_head_scale": version.get("head_scale", False)})
    part, meta = load_part(tmp_path, "dalle_mini")
    assert meta["sampling"] == {"guidance_scale": 10.0}
    model = part.config["model"]
    assert (model["gated"], model["norm_scales"]) == (
        version.get("gated", True),
        version.get("scales", False),
    )
    tokens = RNG.integers(0, peer.WORDS, (2, peer.LENGTH))
    mask = np.arange(peer.LENGTH) < np.array([[3], [peer.LENGTH]])
    codes = RNG.integers(0, peer.CODES, (2, peer.SIDE**2))
    ours = run(part, jnp.int32(tokens), jnp.asarray(mask), jnp.int32(codes))
    for row in range(2):
        expected = peer.logits(tree, tokens[row], mask[row], codes[row])
        np.testing.assert_allclose(ours[row], expected, atol=1e-4)


def test_the_vqgan_equals_torchs_functions(folder):
    """Pictures from codes, and codes from pictures; its own pixels are in [0, 1], ours in [-1, 1]."""
    bundle = load_bundle(folder / "vqgan")
    assert list(bundle.parts) == ["autoencoder"]
    part, tree = bundle.parts["autoencoder"], peer.coder()
    codes = RNG.integers(0, peer.CODES, (2, 4, 4))
    expected = 2 * peer.decoded(tree, codes) - 1
    np.testing.assert_allclose(
        run(part, jnp.int32(codes), method="decode_codes"), expected.clip(-1, 1), atol=1e-4
    )
    assert np.abs(expected).max() > 0.1
    image = np.float32(RNG.uniform(0, 1, (2, 8, 8, 3)))
    latents = peer.encoded(tree, image)
    np.testing.assert_allclose(run(part, jnp.asarray(2 * image - 1), method="encode"), latents, atol=1e-4)
    table = tree["quantize"]["embedding"]["embedding"]
    distances = np.sum((latents[..., None, :] - table) ** 2, -1)
    np.testing.assert_array_equal(nearest(jnp.asarray(latents), jnp.asarray(table)), distances.argmin(-1))


# ------------------------------------------------------------------------------------ captions
def test_tokens_are_those_of_tokenizers(folder):
    """Against the byte-level BPE of the library `tokenizers`, between the start and the end token."""
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ours = BartTokenizer.from_folder(folder, length=40)
    texts = ["A red FOX, a fox", "redder", "  fox's 3.5 ", "héllo – 日本", ""]
    tokens, mask = ours(texts)
    for row, seen, text in zip(tokens, mask, texts, strict=True):
        expected = [0, *theirs.encode(normalise(text)).ids, 2]
        assert row[seen].tolist() == expected and set(row[~seen]) <= {1}
    assert BartTokenizer.from_config(json.loads(json.dumps(ours.config()))).config() == ours.config()
    short = BartTokenizer.from_folder(folder, length=4)
    row, seen = (a[0] for a in short(["a red fox"]))
    assert row[0] == 0 and row[-1] == 2 and seen.all() and short.lost("A red fox!").endswith("fox")
    assert not ours.lost("a red fox")
    assert ours.vocab_size == 267 and BartTokenizer.from_folder(folder, rows=266).vocab_size == 266
    with pytest.raises(InputError, match="has 267 tokens, and the network 265"):
        BartTokenizer.from_folder(folder, rows=265)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("A red FOX!", " a red fox"),
        ("It's 3.5 m, (really)", " it's 3.5 m, really"),
        ("black-and-white; 1,000 cats", " black and white, 1000 cats"),
        ("<b>caf\u00e9</b> &amp; bar http://a.b/c", " cafe & bar"),
        ("#fox_cub said \u201chi\u201d... sooooo 24/7 [3]", ' fox cub said " hi ", so 24/7'),
        ("a 🦊 50% off", " a 50 % off"),
        ("?!", ""),
    ],
)
def test_plain_form_of_captions(text, plain):
    assert normalise(text) == plain


# ------------------------------------------------------------------------------------ drawing
def test_nucleus():
    """The most probable codes that together have the probability p, in any order of the codes."""
    shares = np.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    kept = lambda p: np.isfinite(nucleus(jnp.log(jnp.float32(shares)), p)).tolist()[0]
    assert kept(0.4) == [False, True, False, False] and kept(0.6) == [False, True, False, True]
    assert kept(0.76) == [False, True, True, True] and kept(1.0) == [True] * 4
    assert kept(1e-9) == [False, True, False, False]


def test_the_command_draws(folder, tmp_path, capsys):
    """Our bundle of the published layout holds the same weights, and gives a picture; with a `top_p` near 0,
    which leaves the most probable code, all seeds draw the same; bad options are refused."""
    out, written = tmp_path / "grid.png", tmp_path / "bundle"
    assert not main(["convert", str(folder), "--out", str(written), "--dtype", "float32"])
    assert not main(["sample", "a red fox", "--bundle", str(written), "--out", str(out)])
    assert out.stat().st_size > 200
    bundle, ours = load_bundle(folder), load_bundle(written)
    assert (ours.system, sizes(ours)) == ("dalle_mini", [8]) and ours.sampling == bundle.sampling
    for name, part in bundle.parts.items():
        assert ours.parts[name].config == part.config
        jax.tree.map(np.testing.assert_array_equal, ours.parts[name].params, part.params)
    options = {"dalle_mini": {"top_p": 1e-6}}
    drawn = sample_stages(bundle, ["a fox"] * 2, seed=[1, 2], options=options)
    assert drawn.images[0].shape == (2, 8, 8, 3) and np.abs(drawn.images[0]).max() <= 1
    np.testing.assert_array_equal(*drawn.codes)
    capsys.readouterr()
    for option, words in (
        ("top_p=1.5", "top_p must be in (0, 1]"),
        ("candidates=2", "need a CLIP that ranks"),
    ):
        command = ["sample", "a fox", "--bundle", str(written), "--set", f"dalle_mini.{option}"]
        assert main(command) == 1
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1


@pytest.mark.slow  # transformers writes a CLIP
def test_a_clip_in_the_folder_ranks(tmp_path):
    """Candidates of a caption, and of a picture's lower rows below its own upper ones."""
    from transformers import CLIPConfig, CLIPModel

    text, image = peers.clip_configs()
    config = CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)
    peer.write(tmp_path)
    peers.randomize(CLIPModel(config)).save_pretrained(tmp_path / "clip")
    peers.write_tokenizer(tmp_path / "clip")
    sampler, options = Sampler(load_bundle(tmp_path)), {"dalle_mini": {"candidates": 3}}
    drawn = sample_stages(sampler, ["a fox"], options=options)
    assert drawn.scores.shape == (1, 3) and len(np.unique(drawn.scores)) == 3
    picture = np.uint8(RNG.integers(0, 256, (8, 8, 3)))
    completed = SYSTEMS["dalle_mini"].complete(sampler, [picture], ["a fox"], rows=0.5, options=options)
    seen = jnp.float32(picture)[None] / 127.5 - 1
    own = run(sampler.bundle.parts["autoencoder"], seen, method="encode_codes")[0]
    np.testing.assert_array_equal(completed.codes[:, :2], own[:, :2])
    assert completed.scores.shape == (1, 3)


# ------------------------------------------------------------------------------------ files
def test_pieces_and_several_files(tmp_path):
    """An array in pieces, and weights in several files with an index, are those of one file."""
    tree = {"a": {"b": np.arange(12, dtype=np.float16).reshape(3, 4), "c": np.ones(2, np.float32)}}
    pieces = {str(i): part for i, part in enumerate(np.split(tree["a"]["b"].ravel(), [5, 6]))}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": pieces}
    for name, part in (("one", {"a": {"b": chunked}}), ("two", {"a": {"c": tree["a"]["c"]}})):
        (tmp_path / f"{name}.msgpack").write_bytes(msgpack_serialize(part))
    index = {"weight_map": {"a/b": "one.msgpack", "a/c": "two.msgpack"}}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    weights = open_flax(tmp_path)
    assert sorted(weights) == ["a/b", "a/c"] and weights.dtype("a/b") == np.float16
    np.testing.assert_array_equal(weights["a/b"], tree["a"]["b"])
    rows = weights.unstacked({"a": "a_"})
    assert sorted(rows) == ["a_0/b", "a_0/c", "a_1/b", "a_1/c", "a_2/b"] and rows.shape("a_1/c") == ()
    np.testing.assert_array_equal(rows["a_1/b"], tree["a"]["b"][1])
    (tmp_path / "two.msgpack").write_bytes(msgpack_serialize({}))
    with pytest.raises(InputError, match="lacks a/c, which flax_model"):
        open_flax(tmp_path)


WHOLE = msgpack_serialize({"a": {"b": np.ones((2, 3), np.float32)}})


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "it is empty"),
        (WHOLE[:-1], "it ends early"),
        (WHOLE + b"\x00", "something follows"),
        (b"\x05", "it holds no dictionary"),
        (b"\x81\xa1a\x05", "'a' in it is no array"),
        (b"\x81\x01\x80", "a name in it is no text"),
        (b"\x82\xa1a\x80\xa1a\x80", "'a' stands in it twice"),
        (b"\x81\xa1a\xd4\x03\x00", "values that are no arrays"),
        (b"\x81\xa1a\xd4\x01\x00", "not described as Flax does"),
        (b"\x81\xa1a\xc1", "a value of the kind 0xc1"),
        (b"\x81\xa1a" * 40 + b"\x80", "more than 32 dictionaries"),
        (b"\xdf\xff\xff\xff\xff", "a dictionary of 4294967295 entries"),
        (WHOLE.replace(b"float32", b"object_"), "has the type 'object_'"),
        (WHOLE.replace(b"\x92\x02\x03", b"\x92\x02\x04"), "an array of the shape [2, 4] has 24 bytes"),
        (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    ],
)
def test_damaged_files_of_flax(data, words, tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    with pytest.raises(InputError) as error:
        open_flax(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
