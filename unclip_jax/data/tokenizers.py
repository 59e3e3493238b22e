"""The tokenizers by the `kind` of their configuration, which lies with the text encoder's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.data.bart_tokenizer import BartTokenizer
from unclip_jax.data.glide_tokenizer import GlideTokenizer
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError

TOKENIZERS = {
    "clip_bpe": ClipTokenizer,
    "glide_bpe": GlideTokenizer,
    "t5": T5Tokenizer,
    "bart_bpe": BartTokenizer,
}
# What a configuration may hold: key -> (type, whether it must be there).
FIELDS = {
    "kind": (str, True),
    "length": (int, True),
    "vocab_size": (int, True),
    "vocab_sha256": (str, False),
    "merges": (tuple[str, ...], False),
    "tokens": (tuple[str, ...], False),
    "normalises": (bool, False),
    "pad_id": (int, False),
    "json": (str, False),
}
# All have `length`, `vocab_size`, `lost`, `empty` and `config`, and are called with a list of texts.
AnyTokenizer = ClipTokenizer | GlideTokenizer | T5Tokenizer | BartTokenizer


def tokenizer_of(config: Mapping[str, Any]) -> AnyTokenizer:
    """The tokenizer that a part's configuration describes.

    Raises:
      ValueError: for an unknown kind, key or vocabulary.
    """
    kind = config.get("kind")
    if kind not in TOKENIZERS:
        raise InputError(f"unknown tokenizer kind {kind!r}: this version reads {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].from_config(dict(config))
