"""GLIDE's byte-level BPE tokenizer (Nichol et al. 2021): GPT-2's vocabulary on text in lower case.

The ids stand for the 256 bytes, the merges in their order, and one end token, which only fills rows: 50,257
in all. There is no start token and no end token around a text, and the empty text is padding alone. The
package does not hold the vocabulary; it lies beside the public weights.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unclip_jax.data.tokenizer import MAX_CHARS, byte_characters, check_texts, is_merge
from unclip_jax.errors import InputError

# Words, numbers and other signs take the blank before them.
_WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
# The file of merges and that of ids: as GLIDE and GPT-2 name them, and as transformers does.
FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
SPECIAL_TOKENS = 1
LARGEST_FILE = 2**26  # bytes, unpacked


def _ids(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    tokens = [*byte_characters(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


@functools.lru_cache(maxsize=4)
def _engine(merges: tuple[tuple[str, str], ...]):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = _ids(merges)
    if len(vocab) != 256 + len(merges) + SPECIAL_TOKENS:
        raise InputError("the merges of this vocabulary repeat a token: it is not GLIDE's")
    try:
        engine = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())
        raise InputError(f"these merges are not those of GLIDE's vocabulary: {reason}") from None
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    return engine


class GlideTokenizer:
    """Turns captions into ids: `GlideTokenizer(merges, length=128)(texts)`. Any thread may call it.

    A row is the text's tokens, then the end token. The mask is true on the text's own tokens. A text that is
    too long is cut.

    Attributes:
      length: L, how many tokens a row has, at least 1.
      vocab_size: how many ids there are.
      end_id: what fills a row, `vocab_size - 1`.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], length: int = 128):
        if length < 1:
            raise InputError(f"length={length} must be at least 1")
        self._merges, self.length = tuple(map(tuple, merges)), int(length)
        self.vocab_size = 256 + len(self._merges) + SPECIAL_TOKENS
        self.end_id = self.vocab_size - 1
        self._engine = _engine(self._merges)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, length: int = 128) -> GlideTokenizer:
        """The tokenizer in a folder: `vocab.bpe` and `encoder.json`, also as `.gz`, as glide-text2im and
        GPT-2 hold them, or transformers' `merges.txt` and `vocab.json` of GPT-2.

        Raises:
          FileNotFoundError: if the files are missing.
          ValueError: if they are damaged, or not those of such a tokenizer.
        """
        folder = Path(path)
        for names in FILES:
            found = [next((f for f in (folder / n, folder / f"{n}.gz") if f.is_file()), None) for n in names]
            if None not in found:
                return cls._of_files(*found, length)
        raise FileNotFoundError(
            f"{folder} holds no tokenizer of GLIDE: put vocab.bpe.gz and encoder.json.gz of glide-text2im "
            "(glide_text2im/tokenizer), or GPT-2's merges.txt and vocab.json, beside the weights"
        )

    @classmethod
    def _of_files(cls, merges_file: Path, ids_file: Path, length: int) -> GlideTokenizer:
        lines = _text(merges_file).split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        if not all(is_merge(pair) for pair in pairs):
            raise InputError(f"{merges_file} is no list of merges of two words each: copy it again")
        try:
            vocab = json.loads(_text(ids_file))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{ids_file} is damaged ({reason}): copy it again") from None
        if vocab != _ids(pairs):
            raise InputError(
                f"{ids_file} and {merges_file.name} are not of one GPT-2 tokenizer: expected 256 bytes, the "
                "merges, <|endoftext|>"
            )
        return cls(pairs, length)

    def _encode(self, text: str):
        return self._engine.encode(text[:MAX_CHARS].lower(), add_special_tokens=False)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (B, L), mask bool (B, L)) of B texts. Raises `TypeError` if not given texts."""
        check_texts(texts)
        tokens = np.full((len(texts), self.length), self.end_id, np.int32)
        mask = np.zeros((len(texts), self.length), np.bool_)
        for row, text in enumerate(texts):
            ids = self._encode(text).ids[: self.length]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return tokens, mask

    def lost(self, text: str) -> str:
        """The end of a text that its row does not hold; "" if the row holds the whole text."""
        encoded = self._encode(text)
        lost = "" if len(encoded.ids) <= self.length else text[encoded.offsets[self.length][0] : MAX_CHARS]
        return " ".join((lost + text[MAX_CHARS:]).split())

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption, which stands for a dropped caption: tokens int32 (L,), mask bool (L,)."""
        tokens, mask = self([""])
        return tokens[0], mask[0]

    def config(self) -> dict:
        """What `from_config` needs to build this tokenizer again: a dict of JSON types."""
        merges = [" ".join(pair) for pair in self._merges]
        return {"kind": "glide_bpe", "length": self.length, "vocab_size": self.vocab_size, "merges": merges}

    @classmethod
    def from_config(cls, config: dict) -> GlideTokenizer:
        """The inverse of `config()`. Raises `ValueError` for merges that do not fit."""
        merges = config.get("merges")
        pairs = [pair.split() if isinstance(pair, str) else None for pair in merges or [None]]
        if not all(is_merge(pair) for pair in pairs):
            raise InputError("the tokenizer config has merges that are no list of two words each")
        tokenizer = cls(pairs, config["length"])
        if tokenizer.vocab_size != config["vocab_size"]:
            given = f"{len(pairs)} merges, which does not fit vocab_size={config['vocab_size']}"
            raise InputError(f"the tokenizer config lists {given}")
        return tokenizer


def _text(file: Path) -> str:
    # A text file, unpacked where it is a .gz.
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                data = stream.read(LARGEST_FILE + 1)
        else:
            data = file.read_bytes()
        if len(data) > LARGEST_FILE:
            raise InputError(f"{file} is larger than any vocabulary")
        return data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{file} is damaged ({reason}): copy it again") from None
