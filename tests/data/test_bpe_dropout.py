"""BPE dropout against its definition, and in the rows of a batch."""

import itertools
import time

import numpy as np
import pytest

from unclip_jax.data.bpe_dropout import merge_with_dropout
from unclip_jax.data.examples import token_example
from unclip_jax.data.order import example_rng
from unclip_jax.data.record import Record
from unclip_jax.data.tokenizer import ClipTokenizer, _tokens, clean_text

TEXTS = [
    "a photo of a cat",
    "crème brûlée & 日本語 🦊",
    "it's we're I'LL",
    "supercalifragilisticexpialidocious " * 5,
]
TOKENIZER = ClipTokenizer(256, 8192)
PIECES = _tokens(TOKENIZER._merges)


def pieces(tokens, mask):
    """The tokens of a row as texts, without its start and its end."""
    return [PIECES[i] for i in tokens[0][mask[0]][1:-1]]


def words(text):
    """The words of a text, in the characters that stand for bytes, with the mark of a word's end."""
    split = TOKENIZER._engine.pre_tokenizer.pre_tokenize_str(clean_text(text))
    return "".join(word + "</w>" for word, _ in split)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_at_every_rate_are_the_text(text):
    """A tiny rate gives the usual tokens, rate 1 single bytes; between them there are more tokens than usual.
    Always they join to the text."""
    usual = pieces(*TOKENIZER([text]))
    rows = {rate: pieces(*TOKENIZER([text], rate, example_rng(0, 1))) for rate in (1e-12, 0.1, 0.5, 1.0)}
    assert rows[1e-12] == usual
    assert all(len(piece.removesuffix("</w>")) == 1 for piece in rows[1.0])
    for row in rows.values():
        assert "".join(row) == words(text)
    assert len(usual) <= len(rows[0.5]) < len(rows[1.0])
    same = pieces(*TOKENIZER([text], 0.5, example_rng(0, 1)))
    assert same == rows[0.5]
    assert any(pieces(*TOKENIZER([text], 0.5, example_rng(0, n))) != same for n in range(2, 12))


def outcomes(parts, ranks, rate):
    """The probability of each end of algorithm 1: in each step every pair is left out with the rate, and the
    first of the others is joined."""
    pairs = [i for i in range(len(parts) - 1) if parts[i : i + 2] in ranks]
    found: dict[tuple, float] = {}
    for kept in itertools.product((False, True), repeat=len(pairs)):
        share = np.prod([1 - rate if keep else rate for keep in kept])
        chosen = [(ranks[parts[i : i + 2]], i) for i, keep in zip(pairs, kept, strict=True) if keep]
        if not chosen:
            found[parts] = found.get(parts, 0.0) + share
            continue
        _, i = min(chosen)
        for end, value in outcomes(
            (*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]), ranks, rate
        ).items():
            found[end] = found.get(end, 0.0) + share * value
    return found


def test_how_often_words_end_how():
    """Every end of the algorithm is as frequent as its definition says."""
    ranks = {("a", "b"): 0, ("b", "a"): 1, ("ab", "ab"): 2, ("ba", "b"): 3, ("a", "a"): 4}
    expected, rate, draws = outcomes(tuple("ababa"), ranks, 0.4), 0.4, 20_000
    assert len(expected) > 6 and abs(sum(expected.values()) - 1) < 1e-9
    rng, found = np.random.default_rng(0), {}
    for _ in range(draws):
        end = tuple(merge_with_dropout("ababa", ranks, rate, rng))
        found[end] = found.get(end, 0) + 1
    assert found.keys() <= expected.keys()
    for end, share in expected.items():
        error = 5 * (share * (1 - share) / draws) ** 0.5 + 1e-4
        assert abs(found.get(end, 0) / draws - share) < error, end


def test_rows_of_training_alone_have_dropout():
    """A row depends on its randomness alone; its other arrays stay; evaluation reads the usual tokens."""
    image = np.zeros((12, 10, 3), np.uint8) + np.arange(10, dtype=np.uint8)[:, None]
    record = Record("a", image, ("wonderful",), {}, "")
    row = lambda rate, position, training=True: token_example(
        record, example_rng(3, position), tokenizer=TOKENIZER, size=8, crop_scale=0.5, training=training,
        bpe_dropout=rate,
    )  # fmt: skip
    usual = TOKENIZER(["wonderful"])[0][0]
    rows = [row(0.5, n)["tokens"] for n in range(20)]
    assert any((tokens != usual).any() for tokens in rows)
    np.testing.assert_array_equal(row(0.5, 7)["tokens"], rows[7])
    np.testing.assert_array_equal(row(0.5, 7)["image"], row(0.0, 7)["image"])
    np.testing.assert_array_equal(row(0.0, 7)["tokens"], usual)
    np.testing.assert_array_equal(row(0.5, 7, training=False)["tokens"], usual)


def test_a_word_of_20000_letters_takes_no_time():
    began = time.monotonic()
    tokens, mask = TOKENIZER(["ab" * 10_000], 0.3, example_rng(0, 0))
    assert time.monotonic() - began < 5 and mask.all() and tokens[0, -1] == TOKENIZER.eot_id
