"""The encoder of T5 from transformers' folders: `T5EncoderModel`, or a whole `T5ForConditionalGeneration`,
whose decoder is not read. Versions 1.0 and 1.1, and Flan's. The weights may be one file or several.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, convert
from unclip_jax.checkpoint.files import Place, Weights, open_weights, read_json
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.checkpoint.shapes import t5_shapes
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.typed import shown

NAME = "t5"
LENGTH = 256  # tokens of a caption (Saharia et al. 2022)
_AT, _OURS = r"encoder\.block\.(\d+)\.layer\.", r"block_\1"
RULES: tuple[Rule, ...] = (
    Rule(r"shared\.weight", "token_embedding"),
    Rule(r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "position_bias"),
    *(
        Rule(rf"{_AT}0\.SelfAttention\.{theirs}\.weight", f"{_OURS}/attn/{ours}/kernel", "heads")
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    Rule(rf"{_AT}0\.SelfAttention\.o\.weight", f"{_OURS}/attn/out/kernel", "merge"),
    Rule(rf"{_AT}0\.layer_norm\.weight", f"{_OURS}/ln1/scale"),
    Rule(rf"{_AT}1\.layer_norm\.weight", f"{_OURS}/ln2/scale"),
    Rule(rf"{_AT}1\.DenseReluDense\.wi_0\.weight", f"{_OURS}/gate/kernel", "linear"),
    Rule(rf"{_AT}1\.DenseReluDense\.wi(?:_1)?\.weight", f"{_OURS}/fc1/kernel", "linear"),
    Rule(rf"{_AT}1\.DenseReluDense\.wo\.weight", f"{_OURS}/fc2/kernel", "linear"),
    Rule(r"encoder\.final_layer_norm\.weight", "ln_out/scale"),
    # Another name of shared.weight, and the decoder.
    Rule(r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight", ()),
)
SETTINGS = Settings(
    read={
        "vocab_size": (int, STATED),
        "d_model": (int, STATED),
        "d_kv": (int, STATED),
        "d_ff": (int, STATED),
        "num_layers": (int, STATED),
        "num_heads": (int, STATED),
        "relative_attention_num_buckets": (int, 32),
        "relative_attention_max_distance": (int, 128),
        "feed_forward_proj": (str, "relu"),
    },
    same={"layer_norm_epsilon": (1e-6,)},
    free=(
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "dropout_rate"),
        *("classifier_dropout", "initializer_factor", "num_decoder_layers", "n_positions", "output_past"),
        *("is_encoder_decoder", "use_cache", "pad_token_id", "eos_token_id", "decoder_start_token_id"),
        *("task_specific_params", "tie_word_embeddings", "is_gated_act", "dense_act_fn", "is_decoder"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("scale_decoder_outputs", "id2label", "label2id"),
    ),
)
MLPS = {"relu": False, "gated-gelu": True}


def model_config(config: Mapping[str, Any], name: str) -> dict:
    """`T5Config` -> keyword arguments of `T5Encoder`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    taken = SETTINGS.take(config, name)
    mlp = taken["feed_forward_proj"]
    if mlp not in MLPS:
        raise InputError(f"{name}: feed_forward_proj is {shown(mlp)}; known are {', '.join(MLPS)}")
    return {
        "vocab_size": taken["vocab_size"],
        "width": taken["d_model"],
        "layers": taken["num_layers"],
        "heads": taken["num_heads"],
        "head_dim": taken["d_kv"],
        "hidden": taken["d_ff"],
        "gated": MLPS[mlp],
        "buckets": taken["relative_attention_num_buckets"],
        "max_distance": taken["relative_attention_max_distance"],
    }


def recognises(path: Path) -> bool:
    """Whether a folder holds a T5."""
    if (path / "model_index.json").is_file() or not (path / "config.json").is_file():
        return False
    return read_json(path / "config.json").get("model_type") == "t5"


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder with T5 as a bundle of the one part `t5`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    model = model_config(read_json(path / "config.json"), f"{path}/config.json")
    tokenizer = T5Tokenizer.from_folder(path, LENGTH)
    if tokenizer.vocab_size > model["vocab_size"]:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, and the network "
            f"{model['vocab_size']}"
        )
    params = convert(_weights(path), RULES, t5_shapes(model), "T5", place)
    part = Part({"kind": NAME, "model": model, "tokenizer": tokenizer.config()}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))


def _weights(path: Path) -> Weights:
    # Some files hold the table of tokens only by its other name.
    weights = open_weights(path)
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        return weights.renamed({"encoder.embed_tokens.weight": "shared.weight"})
    return weights
