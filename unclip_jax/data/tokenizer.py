"""CLIP's byte-level BPE tokenizer, from the vocabulary file that ships with the package.

The file (MIT, from OpenAI's CLIP) is an ordered list of merges. Ids are: 256 bytes, 256 bytes that end a word, the merges in order,
then the start and the end token; so 49,408 in all. A smaller `vocab_size` keeps the first merges only: it still tokenises any text,
in more tokens, which is what a model trained in minutes needs. The end token has the highest id in every case (CLIP's pooling takes
the argmax of the ids).

Text is cleaned as the original does: mended by ftfy, HTML entities unescaped twice, whitespace collapsed, lower case. The merging is
done by the `tokenizers` library, the engine beneath transformers' fast tokenizers, without transformers' own normalisation, which
differs from the original's in composed characters and in lower case. A "<|endoftext|>" written inside a caption is ordinary text:
captions cannot end themselves.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VOCAB_FILE = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
IMAGENET_TEMPLATES_FILE = VOCAB_FILE.with_name("imagenet_templates.txt")  # CLIP's 80 prompts, one a line
VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCAB_SIZE = 49408
BYTE_TOKENS = 512  # every byte, inside a word and at its end
SPECIAL_TOKENS = 2  # start and end

# A text is cut here before it is cleaned. Its first 75 tokens come out of far fewer characters, and a megabyte then costs nothing.
MAX_CHARS = 20_000

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# ----------------------------------------------------------------------------------------------------------------------
# Cleaning
# ----------------------------------------------------------------------------------------------------------------------
def clean_text(text: str) -> str:
    """The original's cleaning: ftfy, HTML entities twice, stripped, every run of whitespace one space, lower case."""
    import ftfy

    text = ftfy.fix_text(text.lstrip(" \t\r\n")[:MAX_CHARS])
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


# ----------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ----------------------------------------------------------------------------------------------------------------------
def _byte_characters() -> list[str]:
    # The printable stand-ins of the 256 bytes in the original's order: printable bytes first, then the others from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


@functools.lru_cache(maxsize=1)
def _shipped_merges() -> tuple[tuple[str, str], ...]:
    try:
        data = VOCAB_FILE.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{VOCAB_FILE.name} is missing from unclip_jax/data/vocab: install the package again") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        raise ValueError(f"{VOCAB_FILE.name} is not the CLIP vocabulary (sha256 {digest[:16]}...): install the package again")
    lines = gzip.decompress(data).decode("utf-8").split("\n")
    count = VOCAB_SIZE - BYTE_TOKENS - SPECIAL_TOKENS
    return tuple(tuple(line.split()) for line in lines[1 : 1 + count])  # the first line is a version


def _tokens(merges: tuple[tuple[str, str], ...]) -> list[str]:
    # All tokens in the order of their ids but for the start and the end.
    characters = _byte_characters()
    return [*characters, *(character + "</w>" for character in characters), *("".join(pair) for pair in merges)]


@functools.lru_cache(maxsize=8)
def _engine(merges: tuple[tuple[str, str], ...]):
    # A tokenizers.Tokenizer without special tokens: start and end are added by ClipTokenizer.
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokens = _tokens(merges)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("the merges of this vocabulary repeat a token: it is not a CLIP vocabulary")
    engine = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix="</w>", continuing_subword_prefix=""))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine


def _folder_merges(folder: Path) -> tuple[tuple[tuple[str, str], ...], int]:
    # (merges, number of tokens) of a transformers tokenizer folder, old (vocab.json, merges.txt) or new (tokenizer.json).
    try:
        if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
            vocab = model["vocab"]
            pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
        else:
            raise FileNotFoundError(f"{folder} holds no CLIP tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds a damaged tokenizer ({' '.join(str(error).split())}): download it again") from error
    merges = tuple(tuple(pair) for pair in pairs)
    total = BYTE_TOKENS + len(merges) + SPECIAL_TOKENS
    wanted = [("<|startoftext|>", total - 2), ("<|endoftext|>", total - 1), ("!", 0), ("!</w>", 256)]
    if any(len(pair) != 2 for pair in merges) or any(vocab.get(token) != i for token, i in wanted):
        raise ValueError(f"{folder} is not a CLIP tokenizer: expected 512 byte tokens, the merges, <|startoftext|>, <|endoftext|>")
    return merges, total


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------------------
class ClipTokenizer:
    """Captions to ids. `ClipTokenizer(length=77, vocab_size=49408)(texts) -> tokens int32 (B, L), mask bool (B, L)`.

    A row is start, tokens, end, then zeros; the mask is true from start to end inclusive. A longer text is cut and its last slot is
    the end token. Ids lie in [0, vocab_size). Attributes: `length` (L), `vocab_size`, `sot_id` = vocab_size - 2, `eot_id` =
    vocab_size - 1. Calls are thread-safe.

    Raises `ValueError` for a length below 2 or a vocab_size outside [514, 49408].
    """

    def __init__(self, length: int = 77, vocab_size: int = VOCAB_SIZE):
        if not BYTE_TOKENS + SPECIAL_TOKENS <= vocab_size <= VOCAB_SIZE:
            raise ValueError(f"vocab_size={vocab_size} must lie in [{BYTE_TOKENS + SPECIAL_TOKENS}, {VOCAB_SIZE}]")
        self._set_up(length, _shipped_merges()[: vocab_size - BYTE_TOKENS - SPECIAL_TOKENS], shipped=True)

    def _set_up(self, length: int, merges: tuple[tuple[str, str], ...], shipped: bool) -> None:
        if length < 2:
            raise ValueError(f"length={length} must be at least 2: the start and the end token")
        self.length, self.vocab_size = int(length), BYTE_TOKENS + len(merges) + SPECIAL_TOKENS
        self.sot_id, self.eot_id = self.vocab_size - 2, self.vocab_size - 1
        self._merges, self._shipped = merges, shipped
        self._engine = _engine(merges)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, length: int = 77) -> ClipTokenizer:
        """Read a transformers CLIP tokenizer folder: `vocab.json` and `merges.txt`, or `tokenizer.json`.

        Raises `FileNotFoundError` if they are missing and `ValueError` if they are damaged or not CLIP's.
        """
        merges, _ = _folder_merges(Path(path))
        tokenizer = cls.__new__(cls)
        shipped = merges == _shipped_merges()[: len(merges)]
        tokenizer._set_up(length, merges, shipped)
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (B, L), mask bool (B, L)) of B texts. Raises `TypeError` for one bare string or an item that is no string."""
        if isinstance(texts, (str, bytes)):
            raise TypeError("the tokenizer takes a list of texts; for one text pass [text]")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"the tokenizer takes texts, got {type(text).__name__}")
        tokens = np.zeros((len(texts), self.length), np.int32)
        mask = np.zeros((len(texts), self.length), np.bool_)
        for row, text in enumerate(texts):
            ids = self._engine.encode(clean_text(text), add_special_tokens=False).ids[: self.length - 2]
            tokens[row, : len(ids) + 2] = [self.sot_id, *ids, self.eot_id]
            mask[row, : len(ids) + 2] = True
        return tokens, mask

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption, which a dropped caption becomes: tokens int32 (L,), mask bool (L,); start and end only."""
        tokens, mask = self([""])
        return tokens[0], mask[0]

    def save_folder(self, path: str | os.PathLike) -> None:
        """Write a transformers CLIP tokenizer folder, the inverse of `from_folder`: `vocab.json`, `merges.txt`, `tokenizer_config.json`.
        The padding is id 0, as here."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {token: i for i, token in enumerate([*_tokens(self._merges), "<|startoftext|>", "<|endoftext|>"])}
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in self._merges), "utf-8")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!"}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")

    def config(self) -> dict:
        """What `from_config` needs to build this tokenizer again: a dict of JSON types. Merges are listed only if not the shipped ones."""
        config = {"kind": "clip_bpe", "length": self.length, "vocab_size": self.vocab_size}
        if self._shipped:
            return {**config, "vocab_sha256": VOCAB_SHA256}
        return {**config, "merges": [" ".join(pair) for pair in self._merges]}

    @classmethod
    def from_config(cls, config: dict) -> ClipTokenizer:
        """The inverse of `config()`. Raises `ValueError` naming the key for an unknown kind, key or vocabulary."""
        allowed = ("kind", "length", "vocab_size", "vocab_sha256", "merges")
        for key in config:
            if key not in allowed:
                raise ValueError(f"unknown key {key!r} in the tokenizer config: allowed are {', '.join(allowed)}")
        if config.get("kind") != "clip_bpe":
            raise ValueError(f"unknown tokenizer kind {config.get('kind')!r}: this version reads 'clip_bpe'")
        if "merges" not in config:
            if config.get("vocab_sha256", VOCAB_SHA256) != VOCAB_SHA256:
                raise ValueError("the tokenizer config names another vocabulary (vocab_sha256) than the shipped one: update unclip_jax")
            return cls(length=config["length"], vocab_size=config["vocab_size"])
        merges = tuple(tuple(pair.split()) for pair in config["merges"])
        if BYTE_TOKENS + len(merges) + SPECIAL_TOKENS != config["vocab_size"]:
            raise ValueError(f"the tokenizer config lists {len(merges)} merges, which is not vocab_size={config['vocab_size']}")
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(config["length"], merges, shipped=False)
        return tokenizer


def caption_arrays(captions: Sequence[str], clip: ClipTokenizer, own: ClipTokenizer | None = None) -> dict[str, np.ndarray]:
    """What a batch holds of captions: `clip_tokens` and `clip_token_mask` (B, L), and `tokens` and `token_mask` (B, L') for a stage with a
    text encoder of its own."""
    arrays = dict(zip(("clip_tokens", "clip_token_mask"), clip(captions)))
    return arrays if own is None else arrays | dict(zip(("tokens", "token_mask"), own(captions)))
