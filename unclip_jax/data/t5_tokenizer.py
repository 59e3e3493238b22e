"""T5's tokenizer: a SentencePiece unigram model, an end token, and padding.

It is read from `tokenizer.json` (the format of the `tokenizers` library, which does the work), or from
`spiece.model`, the published file, whose pieces and normalisation are built into the same form. A text is cut
so that the end token stays.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from unclip_jax.data.tokenizer import MAX_CHARS, check_texts
from unclip_jax.errors import InputError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
JSON, PIECES = "tokenizer.json", "spiece.model"
LARGEST_FILE = 2**26  # bytes


@functools.lru_cache(maxsize=4)
def _engine(text: str):
    from tokenizers import Tokenizer

    try:
        engine = Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"this is no tokenizer of the tokenizers library: {reason}") from None
    engine.no_padding()
    engine.no_truncation()
    for token in (PAD, END):
        if engine.token_to_id(token) is None:
            raise InputError(f"this tokenizer has no {token}: it is not T5's")
    return engine


class T5Tokenizer:
    """Turns captions into ids: `T5Tokenizer(text, length=256)(texts)`. Any thread may call it.

    A row is the text's tokens, the end token, then padding. The mask is true from the first to the end token.

    Attributes:
      length: L, how many tokens a row has, at least 2.
      vocab_size: how many ids there are. The table of the network may have more rows.
    """

    def __init__(self, text: str, length: int = 256):
        """`text` is the content of a tokenizer.json. Raises ValueError if it is not one of T5."""
        if length < 2:
            raise InputError(f"length={length} must be at least 2")
        self._text, self.length, self._engine = text, int(length), _engine(text)
        self.vocab_size = self._engine.get_vocab_size()
        self.pad_id, self.end_id = (self._engine.token_to_id(token) for token in (PAD, END))

    @classmethod
    def from_folder(cls, path: str | os.PathLike, length: int = 256) -> T5Tokenizer:
        """The tokenizer in a folder of transformers.

        Raises:
          FileNotFoundError: if there is neither of the files.
          ValueError: if the file is damaged or not T5's.
        """
        folder = Path(path)
        for name, read in ((JSON, _read_json), (PIECES, _read_pieces)):
            file = folder / name
            if file.is_file():
                if file.stat().st_size > LARGEST_FILE:
                    raise InputError(f"{file} is larger than any vocabulary")
                try:
                    return cls(read(file.read_bytes()), length)
                except (InputError, ValueError, RecursionError, IndexError, struct.error) as error:
                    reason = " ".join(str(error).split())[:200]
                    raise InputError(f"{file} holds no tokenizer of T5: {reason}") from None
        raise FileNotFoundError(f"{folder} holds no tokenizer of T5: expected {JSON} or {PIECES}")

    def _ids(self, text: str) -> list[int]:
        return self._engine.encode(text[:MAX_CHARS], add_special_tokens=False).ids

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (B, L), mask bool (B, L)) of B texts. Raises `TypeError` if not given texts."""
        check_texts(texts)
        tokens = np.full((len(texts), self.length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), self.length), np.bool_)
        for row, text in enumerate(texts):
            ids = [*self._ids(text)[: self.length - 1], self.end_id]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return tokens, mask

    def lost(self, text: str) -> str:
        """The end of a text that its row does not hold; "" if the row holds the whole text."""
        ids = self._ids(text)[self.length - 1 :]
        return " ".join((self._engine.decode(ids) + text[MAX_CHARS:]).split())

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption, which is the end token alone: tokens int32 (L,), mask bool (L,)."""
        tokens, mask = self([""])
        return tokens[0], mask[0]

    def config(self) -> dict:
        """What `from_config` needs to build this tokenizer again: a dict of JSON types."""
        return {"kind": "t5", "length": self.length, "vocab_size": self.vocab_size, "json": self._text}

    @classmethod
    def from_config(cls, config: dict) -> T5Tokenizer:
        """The inverse of `config()`. Raises `ValueError` for a text that does not fit."""
        tokenizer = cls(config.get("json") or "", config["length"])
        if tokenizer.vocab_size != config["vocab_size"]:
            given = f"{tokenizer.vocab_size} tokens, which does not fit vocab_size={config['vocab_size']}"
            raise InputError(f"the tokenizer config lists {given}")
        return tokenizer


def _read_json(data: bytes) -> str:
    return json.dumps(json.loads(data.decode("utf-8")), ensure_ascii=False)


# ------------------------------------------------------------------------------------------- spiece.model
def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    # The fields of a protocol buffer: (number, value).
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data):
                raise InputError("it ends early, or is no protocol buffer")
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise InputError("a number has no end")

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(data):
            raise InputError("it ends early, or is no protocol buffer")
        yield number, data[at : at + size]
        at += size


def _read_pieces(data: bytes) -> str:
    # A SentencePiece model as tokenizer.json. Field 1 holds the pieces (text, score, kind), field 3 the
    # normaliser, whose field 2 is the table of characters.
    pieces: list[tuple[str, float, int]] = []
    table = b""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, 1)))
        elif number == 3 and isinstance(value, bytes):
            table = dict(_fields(value)).get(2, b"")
    unknown = [i for i, piece in enumerate(pieces) if piece[2] == 2]
    if len(unknown) != 1:
        raise InputError("it has no piece for unknown text, or several")
    added = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind in (2, 3)}
    normal = [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}]
    normal = normal if table else []
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    built = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **special} for piece, i in added.items()],
        "normalizer": {"type": "Sequence", "normalizers": [*normal, strip, spaces]},
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": unknown[0],
            "vocab": [[piece, score] for piece, score, _ in pieces],
            "byte_fallback": False,
        },
    }
    return json.dumps(built, ensure_ascii=False)
