"""CLIP's tokenizer against open_clip's, against ids written down here, and on texts meant to break it."""

import importlib.util
import json
import os
import time
import unicodedata

import numpy as np
import pytest

from unclip_jax.data import tokenizer as tokenizer_module
from unclip_jax.data.tokenizer import ClipTokenizer

NASTY = [
    "",
    "    \t\n  ",
    "a photo of a cat",
    "A Photo  of\n\ta CAT!!!",
    "it's we're I'LL they'd 'tis rock'n'roll it'ſ",
    "crème brûlée piñata Größe İstanbul ΣΊΣΥΦΟΣ",
    "e\u0301 vs \u00e9 and &#101;&#769;",
    "🦊 a fox, 👩‍👩‍👧‍👦 a family, 👋🏽 a hand, 🏳️‍🌈",
    "日本語のテキスト 한국어 中文字符",
    "العربية עברית हिन्दी ไทย",
    "control \x00\x01\x07\x1b[31mred\x1b[0m \x7f \x85 end",
    "\x85 a leading next-line character",
    "&amp;lt;b&amp;gt; &quot;x&quot; &nbsp; &#x1f98a; &euro;5 &bogus;",
    "schÃ¶n â€œquotedâ€\x9d mojibake",
    "zero\u200bwidth\u200djoiner\ufeff\u2060here",
    "<|startoftext|> in the text <|endoftext|> and after",
    "x² + ½ = Ⅷ ₂ ① 3.14159 1000000",
    "lone surrogates \ud83e x",
    "\u2028line\u2029separators\u00a0no-break\u3000wide",
    "ypogegrammeni a\u0345b q\u0345 \u0345",
    "ﬁne ﬂuﬀy ＦＵＬＬwidth",
    "a" * 500,
    "word " * 200,
    "日" * 300,
    "!?" * 150 + " tail",
    "supercalifragilisticexpialidocious" * 20,
    "The quick brown fox. " * 477 + "end",  # 10,000 characters
]
assert len(NASTY[-1]) > 10_000

# open_clip's ids, so that a wrong vocabulary or cleaning shows without it too.
GOLDEN = {
    "": [49406, 49407],
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "it's we're I'LL they'd": [49406, 585, 568, 649, 982, 328, 1342, 889, 1896, 49407],
    "crème brûlée": [49406, 1075, 12138, 614, 711, 127, 119, 75, 13489, 49407],
    "&amp;lt; &#x1f98a; 日本": [49406, 283, 6040, 488, 39121, 19277, 361, 49407],
    "zero\u200bwidth\u200djoiner": [49406, 5848, 9844, 23571, 728, 491, 683, 5155, 49407],
    "q\u0345q": [49406, 336, 336, 49407],
    "<|endoftext|> after": [49406, 27, 347, 40786, 4160, 91, 285, 953, 49407],
}


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer()


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's SimpleTokenizer, from its module alone: the package would import every model."""
    pytest.importorskip("torch")
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("needs open-clip-torch")
    path = os.path.join(package.submodule_search_locations[0], "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_ids_equal_open_clip(tokenizer, open_clip):
    expected = open_clip(NASTY).numpy()
    tokens, _ = tokenizer(NASTY)
    for text, ours, theirs in zip(NASTY, tokens, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=repr(text[:80]))


def test_ids_equal_open_clip_on_random_texts(tokenizer, open_clip):
    rng = np.random.default_rng(0)
    assigned = [
        chr(code) for code in range(0x30000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    pools = [
        assigned[:95],
        assigned[:500],
        assigned[500:6000],
        assigned,
        ["'s", "'T", "&amp;", "&#769;", "\u200d", " ", "e", "ς", "\x85"],
    ]
    texts = ["".join(rng.choice(pools[i % len(pools)], rng.integers(1, 30))) for i in range(800)]
    np.testing.assert_array_equal(tokenizer(texts)[0], open_clip(texts).numpy())


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(tokenizer, text):
    tokens, mask = tokenizer([text])
    ids = GOLDEN[text]
    assert tokens[0, : len(ids)].tolist() == ids
    assert not tokens[0, len(ids) :].any()
    assert mask[0].tolist() == [True] * len(ids) + [False] * (77 - len(ids))


@pytest.mark.parametrize("length, vocab_size", [(77, 49408), (16, 8192), (2, 514), (256, 49408)])
def test_every_row_is_start_tokens_end_padding(length, vocab_size):
    tokenizer = ClipTokenizer(length, vocab_size)
    tokens, mask = tokenizer(NASTY)
    assert (
        tokens.shape == mask.shape == (len(NASTY), length)
        and tokens.dtype == np.int32
        and mask.dtype == np.bool_
    )
    assert tokenizer.eot_id == vocab_size - 1 and tokenizer.sot_id == vocab_size - 2
    assert (tokens[:, 0] == tokenizer.sot_id).all() and tokens.max() == tokenizer.eot_id and tokens.min() >= 0
    for row, keep in zip(tokens, mask, strict=True):
        count = int(keep.sum())
        assert keep[:count].all() and row[count - 1] == tokenizer.eot_id and not row[count:].any()
        assert (row == tokenizer.eot_id).sum() == 1  # a marker written in a caption cannot end it
        assert row.argmax() == count - 1


def test_long_text_keeps_its_start(tokenizer):
    long, short = ClipTokenizer(256)(["word " * 300])[0][0], tokenizer(["word " * 300])[0][0]
    np.testing.assert_array_equal(long[:76], short[:76])
    assert short[76] == tokenizer.eot_id


@pytest.mark.parametrize("vocab_size", [514, 1000, 8192, 49408])
def test_cut_vocabulary_spells_the_same_text(vocab_size):
    text = "a photo of a piñata 🦊 and 日本"
    tokens, mask = ClipTokenizer(256, vocab_size)([text])
    engine = ClipTokenizer(256, vocab_size)._engine
    spelled = "".join(engine.id_to_token(int(i)) for i in tokens[0][mask[0]][1:-1]).replace("</w>", "")
    characters = tokenizer_module.byte_characters()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_in_order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    assert bytes(
        bytes_in_order[characters.index(character)] for character in spelled
    ).decode() == text.replace(" ", "")


def test_cut_vocabulary_is_a_prefix_of_the_whole(tokenizer):
    small, whole = ClipTokenizer(77, 8192)._engine, tokenizer._engine
    assert [small.id_to_token(i) for i in range(8190)] == [whole.id_to_token(i) for i in range(8190)]


def test_empty_is_start_and_end(tokenizer):
    tokens, mask = tokenizer.empty()
    assert tokens.shape == mask.shape == (77,)
    assert tokens[:2].tolist() == [49406, 49407] and mask.sum() == 2 and not tokens[2:].any()


@pytest.mark.parametrize(
    "text",
    ["x" * 10**6, "ab " * 400_000, "\n" * 10**6 + "a", "&amp;" * 200_000, "日本" * 500_000, "'" * 10**6],
)
def test_a_megabyte_is_not_slow(tokenizer, text):
    start = time.perf_counter()
    tokens, _ = tokenizer([text])
    assert time.perf_counter() - start < 2
    assert tokens[0, 1] != tokenizer.eot_id  # something of it was read


def test_texts_must_be_a_list_of_texts(tokenizer):
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        tokenizer("one text")
    with pytest.raises(TypeError, match="NoneType"):
        tokenizer([None])


def test_the_lost_end_of_a_text():
    """It is empty exactly if the text fits, and together with what is kept it is the whole text."""
    tokenizer = ClipTokenizer(16, 8192)
    for text in NASTY:
        ids = tokenizer._engine.encode(tokenizer_module.clean_text(text), add_special_tokens=False).ids
        lost = tokenizer.lost(text)
        assert (lost != "") == (len(ids) > 14) and tokenizer_module.clean_text(text).endswith(lost)
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert ClipTokenizer(16).lost(words) == "" and ClipTokenizer(16).lost(f"{words} A  Hat") == "a hat"
    assert tokenizer.lost("a" + " " * 30_000 + "fox") == "fox"  # beyond what is read of a text


def test_what_captions_lose_is_said_once(caplog):
    tokenizer = ClipTokenizer(8)
    tokenizer_module.warn_of_cuts(["a fox", "a b c d e f"], None, tokenizer)
    assert not caplog.messages
    tokenizer_module.warn_of_cuts(["a b c d e f and a party hat"] * 3, tokenizer, ClipTokenizer(77))
    reads = "the 8 tokens that a text encoder reads"
    assert caplog.messages == [f'the caption is cut to {reads}; lost: "and a party hat"']
    caplog.clear()
    tokenizer_module.warn_of_cuts(["a fox", *(f"a b c d e f {i}" for i in range(10))], tokenizer)
    shown = ", ".join(f'"{i}"' for i in range(8))
    assert caplog.messages == [f"10 of 11 captions are cut to {reads}; lost: {shown} and 2 more"]


def test_config_round_trip():
    tokenizer = ClipTokenizer(64, 8192)
    again = ClipTokenizer.from_config(json.loads(json.dumps(tokenizer.config())))
    np.testing.assert_array_equal(tokenizer(NASTY)[0], again(NASTY)[0])
    assert "merges" not in tokenizer.config() and again.length == 64


def test_folder_of_transformers(tmp_path, tokenizer):
    """A folder of transformers gives transformers' ids, in its new format and in the old one."""
    transformers = pytest.importorskip("transformers")
    engine = tokenizer._engine
    vocab = {**engine.get_vocab(), "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer._merges)]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (tmp_path / "old" / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(str(tmp_path / "old"))
    theirs.save_pretrained(str(tmp_path / "new"))
    texts = ["a photo of a cat", "crème brûlée", "🦊 it's a fox", "日本語", "x" * 300, ""]
    expected = [ids[:76] + [49407] if len(ids) > 77 else ids for ids in theirs(texts)["input_ids"]]
    for name in ("old", "new"):
        ours = ClipTokenizer.from_folder(tmp_path / name)
        tokens, mask = ours(texts)
        assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == expected
        assert ours.config() == tokenizer.config()  # recognised as the shipped vocabulary


def test_two_formats_that_differ_are_refused(tmp_path):
    """transformers reads tokenizer.json where it is there, and other libraries the other two files."""
    ClipTokenizer(8, 600).save_folder(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    merges = (tmp_path / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    new = {"model": {"vocab": vocab, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(new), "utf-8")
    assert ClipTokenizer.from_folder(tmp_path, 8).vocab_size == 600
    ClipTokenizer(8, 599).save_folder(tmp_path)
    with pytest.raises(ValueError, match="holds two tokenizers"):
        ClipTokenizer.from_folder(tmp_path, 8)


def test_folder_with_other_merges_travels_in_the_config(tmp_path):
    merges = (("x", "y"), ("xy", "z</w>"))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges), "utf-8"
    )
    tokens = [*tokenizer_module.byte_characters()]
    tokens += [token + "</w>" for token in tokens] + ["xy", "xyz</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    ours = ClipTokenizer.from_folder(tmp_path, 8)
    assert ours(["xyz"])[0][0].tolist() == [514, 513, 515, 0, 0, 0, 0, 0]
    again = ClipTokenizer.from_config(json.loads(json.dumps(ours.config())))
    np.testing.assert_array_equal(again(NASTY)[0], ours(NASTY)[0])


def test_bad_folder_and_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a CLIP tokenizer"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="damaged tokenizer"):
        ClipTokenizer.from_folder(tmp_path)
    for vocab, merges in (("[]", "a b"), ("{}", "a b c"), ('{"!": 0}', "a b")):
        (tmp_path / "vocab.json").write_text(vocab)
        (tmp_path / "merges.txt").write_text(merges)
        with pytest.raises(ValueError, match="is not a CLIP tokenizer"):
            ClipTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="lenght"):
        ClipTokenizer.from_config({"kind": "clip_bpe", "lenght": 3})
    with pytest.raises(ValueError, match="vocab_size=9"):
        ClipTokenizer(vocab_size=9)
    with pytest.raises(ValueError, match="length=1"):
        ClipTokenizer(length=1)


def test_other_ids_than_those_of_the_merges_are_refused(tmp_path):
    """The ends of the vocabulary may be right and two ids between them exchanged."""
    small = ClipTokenizer(8, 600)
    small.save_folder(tmp_path)
    assert ClipTokenizer.from_folder(tmp_path, 8).config() == small.config()
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    vocab["b"], vocab["c"] = vocab["c"], vocab["b"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    with pytest.raises(ValueError, match="is not a CLIP tokenizer"):
        ClipTokenizer.from_folder(tmp_path, 8)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"length": "8"}, "length='8': expected a whole number"),
        ({"length": True}, "length=True: expected a whole number"),
        ({"vocab_size": None}, "vocab_size=None: expected a whole number"),
        ({"merges": 5}, "merges that are no list"),
        ({"merges": ["a", "b"]}, "merges that are no list of two words each"),
        ({"merges": [5]}, "merges that are no list of two words each"),
        ({"merges": ["ab cd"], "vocab_size": 515}, "not those of a CLIP vocabulary"),
    ],
)
def test_a_config_of_other_types_is_refused(change, words):
    config = {"kind": "clip_bpe", "length": 8, "vocab_size": 600}
    with pytest.raises(ValueError, match=words):
        ClipTokenizer.from_config({**config, **change})


def test_another_vocabulary_file_is_refused(tmp_path, monkeypatch):
    tokenizer_module._shipped_merges.cache_clear()
    try:
        monkeypatch.setattr(tokenizer_module, "VOCAB_FILE", tmp_path / "v.gz")
        with pytest.raises(FileNotFoundError, match="install the package again"):
            ClipTokenizer()
        (tmp_path / "v.gz").write_bytes(b"x")
        with pytest.raises(ValueError, match="not the CLIP vocabulary"):
            ClipTokenizer()
    finally:
        tokenizer_module._shipped_merges.cache_clear()
