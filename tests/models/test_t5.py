"""T5's encoder: sizes, parity with transformers, tokenizer, half precision, and folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from tests.checkpoint.peers import randomize
from tests.helpers import param_count
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.shapes import t5_shapes
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.models.t5 import T5Encoder
from unclip_jax.sharding import infer_shardings, make_mesh

# version, size -> W, hidden, layers, heads, head's width, parameters
SIZES = {
    ("1.1", "small"): (512, 1024, 8, 6, 64, 35_332_800),
    ("1.1", "base"): (768, 2048, 12, 12, 64, 109_628_544),
    ("1.1", "large"): (1024, 2816, 24, 16, 64, 341_231_104),
    ("1.1", "XL"): (2048, 5120, 24, 32, 64, 1_223_527_424),
    ("1.1", "XXL"): (4096, 10240, 24, 64, 64, 4_762_310_656),
    ("1.0", "small"): (512, 2048, 6, 8, 64, 35_330_816),
    ("1.0", "base"): (768, 3072, 12, 12, 64, 109_628_544),
    ("1.0", "large"): (1024, 4096, 24, 16, 64, 334_939_648),
    ("1.0", "3B"): (1024, 16384, 24, 32, 128, 1_240_909_824),
    ("1.0", "11B"): (1024, 65536, 24, 128, 128, 4_864_791_552),
}
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁fo", "x", "a", "r", "e", "d", "f", "o", ",", "é"]


def settings(version, width, hidden, layers, heads, head_dim):
    shape = dict(width=width, hidden=hidden, layers=layers, heads=heads, head_dim=head_dim)
    return dict(vocab_size=32_128, gated=version == "1.1", **shape)


@pytest.mark.parametrize("which", SIZES, ids="-".join)
def test_published_sizes(which):
    *shape, count = SIZES[which]
    assert param_count(t5_shapes(settings(which[0], *shape))) == count


def field(number, value):
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + np.float32(value).tobytes()
    size = bytes([len(value)]) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
    return bytes([number << 3 | 2]) + size + value


def write_pieces(folder):
    """A spiece.model of a few pieces."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    pieces = [
        field(1, field(1, piece.encode()) + field(2, -float(i)) + field(3, kinds.get(piece, 1)))
        for i, piece in enumerate(PIECES)
    ]
    (folder / "spiece.model").write_bytes(b"".join(pieces))


@pytest.fixture(scope="module", params=["relu", "gated-gelu"], ids=["1.0", "1.1"])
def made(request, tmp_path_factory):
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj=request.param,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    peer = randomize(T5EncoderModel(config))
    peer.save_pretrained(folder, max_shard_size="10KB")
    write_pieces(folder)
    return folder, peer, load_bundle(folder).part("t5")


def encode(part, tokens, mask, dtype=jnp.float32):
    return jax.jit(T5Encoder(**part.config["model"], dtype=dtype).apply)(
        {"params": part.params}, tokens, mask
    )


def test_equals_transformers(made):
    """Sharded files; long captions reach all buckets; masked states are zero, and masked tokens change
    nothing."""
    folder, peer, part = made
    assert len(list(folder.glob("*.safetensors"))) > 1
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 40, (2, 29)).astype(np.int32), np.ones((2, 29), bool)
    mask[1, 11:] = False
    ours = encode(part, tokens, mask)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()).last_hidden_state
    np.testing.assert_allclose(ours, np.where(mask[..., None], theirs.numpy(), 0), atol=1e-4)
    tokens[1, 11:] = 7
    np.testing.assert_array_equal(encode(part, tokens, mask), ours)


def test_half_precision_does_not_overflow(made):
    """Activations beyond 65,504 in the residual stream and before `wo`."""
    part = made[2]
    params = jax.tree.map(np.array, part.params)
    params["token_embedding"] *= 1e6
    for i in range(2):
        params[f"block_{i}"]["fc1"]["kernel"] *= 3e3
    large = type(part)(part.config, params)
    tokens, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), bool)
    exact = np.asarray(encode(large, tokens, mask))
    for dtype in (jnp.float16, jnp.bfloat16):
        found = np.asarray(encode(large, tokens, mask, dtype))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, exact, atol=0.25)


def test_sharding_rules():
    """Tensor parallelism splits heads and the hidden width, and every large matrix is sharded."""
    shapes = t5_shapes(settings("1.1", 4096, 10240, 2, 64, 64))
    specs = infer_shardings(shapes, make_mesh({"data": 1, "fsdp": 2, "tensor": 4}))
    block = jax.tree.map(lambda s: s.spec, specs["block_1"])
    assert block["attn"]["query"]["kernel"] == P("fsdp", "tensor", None)
    assert block["attn"]["out"]["kernel"] == P("tensor", None, "fsdp")
    assert block["fc1"]["kernel"] == block["gate"]["kernel"] == P("fsdp", "tensor")
    assert block["fc2"]["kernel"] == P("tensor", "fsdp")
    assert specs["token_embedding"].spec != P()


def test_tokenizer(tmp_path):
    """The best segmentation, an end token that stays, padding; both files say the same."""
    write_pieces(tmp_path)
    tokenizer = T5Tokenizer.from_folder(tmp_path, 6)
    tokens, mask = tokenizer(["a  red fox ", "", "a red fox, a red fox"])
    pieces = [[PIECES[i] for i in row[kept]] for row, kept in zip(tokens, mask)]
    assert pieces[0] == ["▁a", "▁red", "▁fo", "x", "</s>"] and pieces[1] == ["</s>"]
    assert pieces[2] == ["▁a", "▁red", "▁fo", "x", ",", "</s>"] and tokens[0, -1] == 0
    assert tokenizer.lost("a red fox") == "" and tokenizer.lost("a red fox, a red fox") == "a red fox"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer.config()["json"])
    again = T5Tokenizer.from_folder(tmp_path / "other", 6)
    restored = T5Tokenizer.from_config(json.loads(json.dumps(tokenizer.config())))
    for one in (again, restored):
        np.testing.assert_array_equal(one(["a red fox"])[0], tokenizer(["a red fox"])[0])


def test_tokenizer_equals_transformers(tmp_path):
    """The unigram model as transformers builds it from the same pieces."""
    from transformers import T5Tokenizer as Peer

    write_pieces(tmp_path)
    ours = T5Tokenizer.from_folder(tmp_path, 32)
    theirs = Peer(vocab=[(piece, -float(i)) for i, piece in enumerate(PIECES)], extra_ids=0)
    for text in ("a red fox, dear", "foxed é  z a ", " a", "réd"):
        tokens, mask = ours([text])
        assert list(tokens[0][mask[0]]) == theirs(text)["input_ids"], text


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("spiece.model", b"\x0a\xff", "it ends early"),
        ("spiece.model", b"", "no piece for unknown"),
        ("tokenizer.json", b"{}", "no tokenizer of the tokenizers library"),
        ("tokenizer.json", b"\xff", "can't decode"),
        ("config.json", b"{}", "holds no tokenizer of T5: expected tokenizer.json or spiece.model"),
    ],
)
def test_bad_tokenizers(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        T5Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_another_network_is_refused(tmp_path, made):
    config = json.loads((made[0] / "config.json").read_text())
    for change, message in (
        (
            {"feed_forward_proj": "gated-silu"},
            "'gated-silu'; known are relu, gated-gelu",
        ),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"d_kv": 0}, "d_kv must be between 1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_bundle(tmp_path)
