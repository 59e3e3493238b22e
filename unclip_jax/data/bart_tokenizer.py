"""The tokenizer of dalle-mini and dalle-mega: BART's byte-level BPE with another vocabulary, on captions in a
plain form.

`normalise` follows the steps of the published code: Unicode and HTML repaired, ASCII letters in lower case,
links, tags and footnotes dropped, punctuation as commas. Three things differ, as they need tables that are
not in the weights' folder: an emoji is dropped and not spelled, words joined in a hashtag are not split, and
letters are brought to ASCII by their decomposition and a short table.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unclip_jax.data.tokenizer import MAX_CHARS, check_texts, is_merge
from unclip_jax.errors import InputError

START, PAD, END = SPECIAL = ("<s>", "<pad>", "</s>")
VOCAB, MERGES = "vocab.json", "merges.txt"
LARGEST_FILE = 2**26  # bytes

_LETTERS = str.maketrans(
    {"–": "-", "—": "--", "ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o", "Ø": "O", "œ": "oe", "Œ": "OE"}
    | {"ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "’": "'", "‘": "'", "“": '"', "”": '"'}
)
# Signs inside words and numbers that stay: they are set aside under characters that no caption has.
_DOT, _APOSTROPHE, _SLASH = "\x01", "\x02", "\x03"
_STEPS: tuple[tuple[re.Pattern, str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^\s*\[\d+\]|\[\d+\]\s*$", ""),  # footnotes
        (r"<[^<]+?>", " "),  # tags
        (r"http\S+", ""),
        (r"(?<=\d),(?=\d{3})", ""),  # thousands
        (r"(?<=\w)\.(?=\w)", _DOT),
        (r"'(?=(?:[stdm]|ll|re|ve)\b)", _APOSTROPHE),
        (r"(?<=\d)/(?=\d)", _SLASH),
        (r"(?<=\w)-(?=\w)", " "),
        (r"([%&/$*])", r" \1 "),
        (r"[_#\\]", " "),
        (r"['\"`]", ' " '),
        (r"[()\[\].,|:;?!=+~\-/{}]", ","),
        (_DOT, "."),
        (_APOSTROPHE, "'"),
        (_SLASH, "/"),
        (r"(\D)\1{3,}", r"\1"),  # a sign four times or more
        (r'(?:\s*"+\s*)+', ' " '),
        (r"(?:\s*,+\s*)+", ", "),
        (r"\s+", " "),
    )
)


def normalise(text: str) -> str:
    """A caption in the form that the networks were trained on: a blank, then its words in lower case, with
    commas for punctuation. "" where nothing is left."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text[:MAX_CHARS]))).translate(_LETTERS)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    text = "".join(sign for sign in text if sign >= " " or sign.isspace())
    for pattern, new in _STEPS:
        text = pattern.sub(new, text)
    text = text.strip().removesuffix(",").removeprefix(",").strip()
    return f" {text}" if text else ""


@functools.lru_cache(maxsize=4)
def _engine(tokens: tuple[str, ...], merges: tuple[tuple[str, str], ...]):
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise InputError("this vocabulary has a token twice")
    lacking = [token for token in SPECIAL if token not in ids]
    if lacking:
        raise InputError(f"this vocabulary has no {lacking[0]}: it is not dalle-mini's")
    try:
        engine = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"these merges are not those of the vocabulary: {reason}") from None
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return engine, ids


class BartTokenizer:
    """Turns captions into ids: `BartTokenizer(tokens, merges, length=64)(texts)`. Any thread may call it.

    A row is the start token, the text's tokens, the end token, then padding. The mask is true from the start
    to the end token. A text that is too long is cut so that the end token stays.

    Attributes:
      length: L, how many tokens a row has, at least 2.
      vocab_size: how many ids there are. The table of the network may have more rows.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[tuple[str, str]],
        length: int = 64,
        normalises: bool = True,
    ):
        """`tokens` in the order of their ids; `normalises` says whether texts go through `normalise`."""
        if length < 2:
            raise InputError(f"length={length} must be at least 2")
        self._tokens, self._merges = tuple(tokens), tuple(map(tuple, merges))
        self.length, self.vocab_size, self._normalises = int(length), len(self._tokens), bool(normalises)
        self._engine, ids = _engine(self._tokens, self._merges)
        self._start, self._pad, self._end = (ids[token] for token in SPECIAL)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike, length: int = 64, normalises: bool = True, rows: int | None = None
    ) -> BartTokenizer:
        """The tokenizer in a folder: transformers' `vocab.json` and `merges.txt`.

        Args:
          path: the folder.
          length, normalises: as in the class.
          rows: of the network's table of tokens. BART's vocabulary ends with `<mask>`, which no caption has:
            special tokens behind the last row are left out. None keeps all.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if one is damaged, they are not of one such tokenizer, or the network has too few rows.
        """
        texts = []
        for name in (VOCAB, MERGES):
            file = Path(path) / name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: the tokenizer is {VOCAB} and {MERGES}")
            if file.stat().st_size > LARGEST_FILE:
                raise InputError(f"{file} is larger than any vocabulary")
            texts.append(file.read_bytes())
        try:
            vocab, lines = json.loads(texts[0].decode("utf-8")), texts[1].decode("utf-8").split("\n")
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"the tokenizer of {path} is damaged ({reason}): copy it again") from None
        if not isinstance(vocab, dict) or {type(i) for i in vocab.values()} != {int}:
            raise InputError(f"{path}/{VOCAB} is no list of tokens with their numbers: copy it again")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise InputError(f"the numbers of {path}/{VOCAB} are not 0 to {len(vocab) - 1}: copy it again")
        merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        if not all(is_merge(pair) for pair in merges):
            raise InputError(f"{path}/{MERGES} is no list of merges of two words each: copy it again")
        tokens = sorted(vocab, key=vocab.__getitem__)
        if not all(re.fullmatch(r"<[^<>\s]+>", token) for token in tokens[rows or len(tokens) :]):
            raise InputError(f"the tokenizer of {path} has {len(tokens)} tokens, and the network {rows}")
        try:
            return cls(tokens[:rows], merges, length, normalises)
        except InputError as error:
            raise InputError(f"the tokenizer of {path}: {error}") from None

    def _plain(self, text: str) -> str:
        return normalise(text) if self._normalises else text[:MAX_CHARS]

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (B, L), mask bool (B, L)) of B texts. Raises `TypeError` if not given texts."""
        check_texts(texts)
        tokens = np.full((len(texts), self.length), self._pad, np.int32)
        mask = np.zeros((len(texts), self.length), np.bool_)
        for row, text in enumerate(texts):
            own = self._engine.encode(self._plain(text), add_special_tokens=False).ids[: self.length - 2]
            ids = [self._start, *own, self._end]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return tokens, mask

    def lost(self, text: str) -> str:
        """The end of a text that its row does not hold; "" if the row holds the whole text."""
        plain = self._plain(text)
        encoded, room = self._engine.encode(plain, add_special_tokens=False), self.length - 2
        lost = "" if len(encoded.ids) <= room else plain[encoded.offsets[room][0] :]
        return " ".join((lost + text[MAX_CHARS:]).split())

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption, its start and end token alone: tokens int32 (L,), mask bool (L,)."""
        tokens, mask = self([""])
        return tokens[0], mask[0]

    def config(self) -> dict:
        """What `from_config` needs to build this tokenizer again: a dict of JSON types."""
        return {
            "kind": "bart_bpe",
            "length": self.length,
            "vocab_size": self.vocab_size,
            "tokens": list(self._tokens),
            "merges": [" ".join(pair) for pair in self._merges],
            "normalises": self._normalises,
        }

    @classmethod
    def from_config(cls, config: dict) -> BartTokenizer:
        """The inverse of `config()`. Raises `ValueError` for a vocabulary that does not fit."""
        merges = [pair.split() for pair in config.get("merges", ())]
        tokens = config.get("tokens", ())
        if not all(is_merge(pair) for pair in merges):
            raise InputError("the tokenizer config has merges that are no list of two words each")
        if len(tokens) != config["vocab_size"]:
            given = f"{len(tokens)} tokens, which does not fit vocab_size={config['vocab_size']}"
            raise InputError(f"the tokenizer config lists {given}")
        return cls(tokens, merges, config["length"], config.get("normalises", True))
