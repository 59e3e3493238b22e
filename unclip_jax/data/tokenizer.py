"""CLIP's byte-level BPE tokenizer, from the vocabulary file that ships with the package.

The file (MIT, from OpenAI's CLIP) is an ordered list of merges. The ids stand for:

1. the 256 bytes;
2. the 256 bytes at the end of a word;
3. the merges, in their order;
4. the start token and the end token: 49,408 ids in all.

A smaller `vocab_size` keeps only the first merges. It still tokenises any text, into more tokens; a model
that trains in minutes needs no more. The end token always has the highest id, because CLIP's pooling takes
the argmax of the ids.

Text is cleaned as in the original: repaired by ftfy, HTML entities unescaped twice, whitespace collapsed,
lower case. The `tokenizers` library does the merging. Transformers' fast tokenizers use it too, but their
normalisation differs from the original in composed characters and in lower case, so it is not used here. A
"<|endoftext|>" that is written in a caption is ordinary text and does not end the caption.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.data.bpe_dropout import merge_with_dropout
from unclip_jax.errors import InputError

log = logging.getLogger(__name__)

VOCAB_FILE = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
IMAGENET_TEMPLATES_FILE = VOCAB_FILE.with_name(
    "imagenet_templates.txt"
)  # CLIP's 80 prompts, one on each line
VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCAB_SIZE = 49408
BYTE_TOKENS = 512  # every byte, within a word and at its end
SPECIAL_TOKENS = 2  # start and end

# A text is cut to so many characters before it is cleaned. Its first 75 tokens need far fewer, and a text of
# a megabyte then costs no time.
MAX_CHARS = 20_000

# U+0345 is in no word: the original's pattern ignores case, and the upper case of that mark is a letter.
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}\u0345]+"
MAX_SHOWN = 8  # captions whose lost words `warn_of_cuts` shows


# ------------------------------------------------------------------------------------------------------------
# Cleaning
# ------------------------------------------------------------------------------------------------------------
def clean_text(text: str) -> str:
    """The text as CLIP cleans it: ftfy, HTML entities unescaped twice, whitespace collapsed, lower case."""
    import ftfy

    text = ftfy.fix_text(text.lstrip(" \t\r\n")[:MAX_CHARS])
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


# ------------------------------------------------------------------------------------------------------------
# Vocabulary
# ------------------------------------------------------------------------------------------------------------
def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes, in the order of GPT-2 and CLIP: printable bytes stand for
    themselves and come first; the others are U+0100 and what follows."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


@functools.lru_cache(maxsize=1)
def _shipped_merges() -> tuple[tuple[str, str], ...]:
    try:
        data = VOCAB_FILE.read_bytes()
    except FileNotFoundError:
        where = "unclip_jax/data/vocab"
        raise FileNotFoundError(
            f"{VOCAB_FILE.name} is missing from {where}: install the package again"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        reason = f"is not the CLIP vocabulary (sha256 {digest[:16]}...)"
        raise InputError(f"{VOCAB_FILE.name} {reason}: install the package again")
    lines = gzip.decompress(data).decode("utf-8").split("\n")
    count = VOCAB_SIZE - BYTE_TOKENS - SPECIAL_TOKENS
    return tuple(tuple(line.split()) for line in lines[1 : 1 + count])  # the first line is a version


def _tokens(merges: tuple[tuple[str, str], ...]) -> list[str]:
    # All tokens but the start and the end, in the order of their ids.
    characters = byte_characters()
    return [
        *characters,
        *(character + "</w>" for character in characters),
        *("".join(pair) for pair in merges),
    ]


@functools.lru_cache(maxsize=8)
def _engine(merges: tuple[tuple[str, str], ...]):
    # A tokenizers.Tokenizer without special tokens: ClipTokenizer adds the start and the end.
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokens = _tokens(merges)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InputError("the merges of this vocabulary repeat a token: it is not a CLIP vocabulary")
    try:
        model = models.BPE(
            vocab=vocab, merges=list(merges), end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())
        raise InputError(f"these merges are not those of a CLIP vocabulary: {reason}") from None
    engine = Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine


def _folder_merges(folder: Path) -> tuple[tuple[tuple[str, str], ...], int]:
    # (merges, number of tokens) of a folder of a transformers tokenizer, in its old format (vocab.json,
    # merges.txt) or its new one (tokenizer.json). A folder that has both must say the same in both.
    read = []
    try:
        if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            read.append((json.loads((folder / "vocab.json").read_text("utf-8")), pairs))
        if (folder / "tokenizer.json").exists():
            model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
            pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
            read.append((model["vocab"], pairs))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} holds a damaged tokenizer ({reason}): download it again") from error
    if not read:
        expected = "vocab.json and merges.txt, or tokenizer.json"
        raise FileNotFoundError(f"{folder} holds no CLIP tokenizer: expected {expected}")
    found = [_clip_merges(folder, vocab, pairs) for vocab, pairs in read]
    if found[0] != found[-1]:
        raise InputError(f"{folder} holds two tokenizers: tokenizer.json and merges.txt differ; keep one")
    return found[0]


def _clip_merges(folder: Path, vocab: Any, pairs: list) -> tuple[tuple[tuple[str, str], ...], int]:
    if not isinstance(vocab, dict) or not all(is_merge(pair) for pair in pairs):
        raise InputError(f"{folder} is not a CLIP tokenizer: its vocabulary or a merge is of another type")
    merges = tuple(tuple(pair) for pair in pairs)
    total = BYTE_TOKENS + len(merges) + SPECIAL_TOKENS
    ids = {token: i for i, token in enumerate(_tokens(merges))}
    ids |= {"<|startoftext|>": total - 2, "<|endoftext|>": total - 1}
    if any(vocab.get(token) != i for token, i in ids.items()):
        expected = "512 byte tokens, the merges, <|startoftext|>, <|endoftext|>"
        raise InputError(f"{folder} is not a CLIP tokenizer: expected {expected}")
    return merges, total


def is_merge(pair: object) -> bool:
    """Whether a value is a merge: a list or tuple of two texts."""
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


# ------------------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------------------
class ClipTokenizer:
    """Turns captions into ids: `ClipTokenizer(length=77, vocab_size=49408)(texts)`. Any thread may call it.

    A row is the start token, the text's tokens, the end token, then `pad_id`. The mask is true from the start
    to the end token inclusive. A text that is too long is cut, and its last token is the end token.

    Attributes:
      length: L, how many tokens a row has, at least 2.
      vocab_size: how many ids there are, in [514, 49408]; ids lie in [0, vocab_size).
      sot_id, eot_id: the ids of the start and the end token: vocab_size - 2 and vocab_size - 1.
      pad_id: what follows the end token: 0, as CLIP was trained, or eot_id, as in Stable Diffusion 1.

    Raises `ValueError` for a length, a vocab_size or a pad_id out of range.
    """

    def __init__(self, length: int = 77, vocab_size: int = VOCAB_SIZE, pad_id: int = 0):
        if not BYTE_TOKENS + SPECIAL_TOKENS <= vocab_size <= VOCAB_SIZE:
            raise InputError(
                f"vocab_size={vocab_size} must lie in [{BYTE_TOKENS + SPECIAL_TOKENS}, {VOCAB_SIZE}]"
            )
        merges = _shipped_merges()[: vocab_size - BYTE_TOKENS - SPECIAL_TOKENS]
        self._set_up(length, merges, True, pad_id)

    def _set_up(self, length: int, merges: tuple[tuple[str, str], ...], shipped: bool, pad_id: int) -> None:
        if length < 2:
            raise InputError(f"length={length} must be at least 2, for the start and the end token")
        self.length, self.vocab_size = int(length), BYTE_TOKENS + len(merges) + SPECIAL_TOKENS
        self.sot_id, self.eot_id = self.vocab_size - 2, self.vocab_size - 1
        self._merges, self._shipped, self.pad_id = merges, shipped, int(pad_id)
        if not 0 <= pad_id < self.vocab_size:
            raise InputError(f"pad_id={pad_id} must lie in [0, {self.vocab_size})")
        self._engine = _engine(merges)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, length: int = 77, pad_id: int = 0) -> ClipTokenizer:
        """The tokenizer in a folder of transformers: `vocab.json` and `merges.txt`, or `tokenizer.json`.

        Raises:
          FileNotFoundError: if the files are missing.
          ValueError: if they are damaged or not those of a CLIP tokenizer.
        """
        merges, _ = _folder_merges(Path(path))
        tokenizer = cls.__new__(cls)
        shipped = merges == _shipped_merges()[: len(merges)]
        tokenizer._set_up(length, merges, shipped, pad_id)
        return tokenizer

    def __call__(
        self, texts: Sequence[str], dropout: float = 0.0, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises B texts.

        Args:
          texts: a list of texts.
          dropout: of merges, in [0, 1], for training (`bpe_dropout`).
          rng: the randomness of dropout; not used where that is 0.

        Returns:
          tokens int32 (B, L), mask bool (B, L).

        Raises:
          TypeError: if not given texts.
        """
        check_texts(texts)
        tokens = np.full((len(texts), self.length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), self.length), np.bool_)
        for row, text in enumerate(texts):
            ids = self._ids(clean_text(text), dropout, rng)[: self.length - 2]
            tokens[row, : len(ids) + 2] = [self.sot_id, *ids, self.eot_id]
            mask[row, : len(ids) + 2] = True
        return tokens, mask

    def _ids(self, text: str, dropout: float, rng: np.random.Generator | None) -> list[int]:
        # The ids of a cleaned text. With dropout, at least those that fit into a row.
        if not dropout:
            return self._engine.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for word, _ in self._engine.pre_tokenizer.pre_tokenize_str(text):
            parts = merge_with_dropout([*word[:-1], word[-1] + "</w>"], self._ranks, dropout, rng)
            ids += map(self._engine.token_to_id, parts)
            if len(ids) >= self.length - 2:
                break
        return ids

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: place for place, pair in enumerate(self._merges)}

    def lost(self, text: str) -> str:
        """The end of a text that its row does not hold, cleaned; "" if the row holds the whole text."""
        encoded = self._engine.encode(clean_text(text), add_special_tokens=False)
        kept, stripped = self.length - 2, text.lstrip(" \t\r\n")
        lost = "" if len(encoded.ids) <= kept else clean_text(text)[encoded.offsets[kept][0] :]
        return " ".join([lost, *stripped[MAX_CHARS:].split()]).strip()

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption, which stands for a dropped caption: tokens int32 (L,), mask bool (L,)."""
        tokens, mask = self([""])
        return tokens[0], mask[0]

    def save_folder(self, path: str | os.PathLike) -> None:
        """Writes the folder of a transformers CLIP tokenizer: the inverse of `from_folder`.

        The files are `vocab.json`, `merges.txt` and `tokenizer_config.json`. The padding is `pad_id`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {
            token: i for i, token in enumerate([*_tokens(self._merges), "<|startoftext|>", "<|endoftext|>"])
        }
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in self._merges), "utf-8"
        )
        special = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": [*vocab][self.pad_id],
        }
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")

    def config(self) -> dict:
        """What `from_config` needs to build this tokenizer again: a dict of JSON types.

        It lists the merges only if they are not those of the shipped vocabulary.
        """
        config = {"kind": "clip_bpe", "length": self.length, "vocab_size": self.vocab_size}
        if self.pad_id:
            config["pad_id"] = self.pad_id
        if self._shipped:
            return {**config, "vocab_sha256": VOCAB_SHA256}
        return {**config, "merges": [" ".join(pair) for pair in self._merges]}

    @classmethod
    def from_config(cls, config: dict) -> ClipTokenizer:
        """The inverse of `config()`. Raises `ValueError` for an unknown kind, key or vocabulary."""
        allowed = ("kind", "length", "vocab_size", "vocab_sha256", "merges", "pad_id")
        for key in config:
            if key not in allowed:
                raise InputError(
                    f"unknown key {key!r} in the tokenizer config: allowed are {', '.join(allowed)}"
                )
        if config.get("kind") != "clip_bpe":
            raise InputError(f"unknown tokenizer kind {config.get('kind')!r}: this version reads 'clip_bpe'")
        for key in ("length", "vocab_size"):
            if type(config.get(key)) is not int:
                given = f"{key}={config.get(key)!r}"
                raise InputError(f"the tokenizer config has {given}: expected a whole number")
        pad_id = config.get("pad_id", 0)
        if type(pad_id) is not int:
            raise InputError(f"the tokenizer config has pad_id={pad_id!r}: expected a whole number")
        if "merges" not in config:
            if config.get("vocab_sha256", VOCAB_SHA256) != VOCAB_SHA256:
                reason = "the tokenizer config names another vocabulary (vocab_sha256) than the shipped one"
                raise InputError(f"{reason}: update unclip_jax")
            return cls(config["length"], config["vocab_size"], pad_id)
        pairs = config["merges"] if isinstance(config["merges"], list) else [None]
        pairs = [pair.split() if isinstance(pair, str) else None for pair in pairs]
        if not all(is_merge(pair) for pair in pairs):
            raise InputError("the tokenizer config has merges that are no list of two words each")
        merges = tuple(map(tuple, pairs))
        if BYTE_TOKENS + len(merges) + SPECIAL_TOKENS != config["vocab_size"]:
            given = f"{len(merges)} merges, which does not fit vocab_size={config['vocab_size']}"
            raise InputError(f"the tokenizer config lists {given}")
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(config["length"], merges, False, pad_id)
        return tokenizer


def check_texts(texts: Sequence[str]) -> None:
    """Raises a TypeError unless given a list of texts."""
    if isinstance(texts, (str, bytes)):
        raise TypeError("the tokenizer takes a list of texts; for one text pass [text]")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer takes texts, got {type(text).__name__}")


def caption_arrays(
    captions: Sequence[str], tokenizer: ClipTokenizer | None, text_tokenizer: Any = None
) -> dict[str, np.ndarray]:
    """The arrays that a batch holds for its captions.

    Args:
      captions: B texts.
      tokenizer: CLIP's tokenizer, for rows of L tokens; None where there is no CLIP.
      text_tokenizer: the tokenizer of another text encoder (`tokenizers.AnyTokenizer`), for rows of L'
        tokens.

    Returns:
      With CLIP `clip_tokens` int32 (B, L) and `clip_token_mask` bool (B, L); with a `text_tokenizer` also
      `tokens` int32 (B, L') and `token_mask` bool (B, L').
    """
    arrays = {}
    if tokenizer is not None:
        arrays |= dict(zip(("clip_tokens", "clip_token_mask"), tokenizer(captions)))
    if text_tokenizer is not None:
        arrays |= dict(zip(("tokens", "token_mask"), text_tokenizer(captions)))
    return arrays


def warn_of_cuts(captions: Sequence[str], *tokenizers: Any) -> None:
    """Logs one warning with the words that captions lose because a tokenizer has too few slots, if any do."""
    tokenizers = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if not tokenizers:
        return
    shortest = min(tokenizers, key=lambda tokenizer: tokenizer.length)
    unique = list(dict.fromkeys(captions))
    lost = [end for end in map(shortest.lost, unique) if end]
    if not lost:
        return
    shown = ", ".join(f'"{end[:200]}{"..." if len(end) > 200 else ""}"' for end in lost[:MAX_SHOWN])
    more = f" and {len(lost) - MAX_SHOWN} more" if len(lost) > MAX_SHOWN else ""
    count = f"{len(lost)} of {len(unique)} captions are" if len(unique) > 1 else "the caption is"
    slots = f"the {shortest.length} tokens that a text encoder reads"
    log.warning("%s cut to %s; lost: %s%s", count, slots, shown, more)
