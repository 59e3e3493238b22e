"""Bad folders of dalle-mini: its configuration, its tokenizer, its weights, and its VQGAN's."""

import json
import shutil

from tests.checkpoint import peer_dalle_mini as peer
from tests.cli.bad_inputs import Row

# What is bad, the changes of the configuration, those of the VQGAN's, and what is said.
CONFIGS = [
    ("another place of the norms", {"ln_positions": "swinv2"}, {}, "ln_positions is 'swinv2'"),
    ("another activation", {"activation_function": "relu"}, {}, "activation_function is 'relu'"),
    ("biases", {"use_bias": True}, {}, "use_bias is True"),
    ("an unknown setting", {"use_registers": 4}, {}, "'use_registers' is 4, a setting"),
    ("a width in words", {"d_model": "wide"}, {}, "d_model must be an integer"),
    (
        "heads that do not divide",
        {"encoder_attention_heads": 3, "decoder_attention_heads": 3},
        {},
        "no multiple",
    ),
    ("halves that differ", {"decoder_ffn_dim": 8}, {}, "decoder_ffn_dim is not 24, as in the encoder"),
    ("no square of codes", {"image_length": 15}, {}, "image_length 15 is no square"),
    ("a start among no codes", {"decoder_start_token_id": 99}, {}, "is not behind the codes"),
    ("a layer too many", {"encoder_layers": 3}, {}, "parameters are missing"),
    ("endless layers", {"decoder_layers": 10**9}, {}, "between 1 and 1000"),
    ("a small table of words", {"encoder_vocab_size": 20}, {}, "has 267 tokens, and the network 20"),
    ("other codes", {}, {"n_embed": 10}, "has 10 codes, and"),
    ("an odd width", {}, {"ch": 20}, "ch must be a multiple of 32, not 20"),
    ("two latents", {}, {"double_z": True}, "double_z is True"),
    ("latents that differ", {}, {"embed_dim": 8}, "embed_dim must be z_channels, not 8"),
    ("no levels", {}, {"ch_mult": []}, "ch_mult must have 1 to 8 numbers"),
    ("other attention", {}, {"attn_resolutions": [8]}, "does not fit these weights"),
]


def rows(box):
    """Writes the folders and returns the rows."""
    good = peer.write(box / "good")
    found = []

    def add(name, says, folder):
        found.append(Row(f"dalle-mini with {name}", ["convert", folder.name, "--out", "out"], says))

    def copied(number):
        folder = box / f"mini{number}"
        shutil.copytree(good, folder)
        return folder

    for number, (name, changes, coder_changes, says) in enumerate(CONFIGS):
        folder = copied(number)
        (folder / "config.json").write_text(json.dumps(peer.CONFIG | changes))
        (folder / "vqgan" / "config.json").write_text(json.dumps(peer.CODER | coder_changes))
        add(name, says, folder)
    weights, others = ((folder / "flax_model.msgpack").read_bytes() for folder in (good, good / "vqgan"))
    vocab = peer.vocabulary()
    endless = json.dumps({"end" if token == "</s>" else token: i for token, i in vocab.items()}).encode()
    for number, (name, file, data, says) in enumerate(
        [
            ("weights cut off", "flax_model.msgpack", weights[:-9], "msgpack (it ends early)"),
            ("the VQGAN's weights", "flax_model.msgpack", others, "tensors of the file have no use"),
            ("no weights", "flax_model.msgpack", None, "flax_model.msgpack is missing"),
            ("no merges", "merges.txt", None, "merges.txt is missing"),
            ("merges of three words", "merges.txt", b"a b c\n", "no list of merges"),
            ("merges of other words", "merges.txt", b"x yz\n", "not those of the vocabulary"),
            ("a gap in the words", "vocab.json", json.dumps(vocab | {"x": 999}).encode(), "are not 0 to"),
            ("words that are a list", "vocab.json", b"[]", "no list of tokens"),
            ("words without an end", "vocab.json", endless, "has no </s>"),
            ("words cut off", "vocab.json", b"{", "is damaged"),
            (
                "a VQGAN without weights",
                "vqgan/flax_model.msgpack",
                None,
                "no folder with dalle-mini's VQGAN",
            ),
        ],
        len(CONFIGS),
    ):
        folder = copied(number)
        if data is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(data)
        add(name, says, folder)
    twice = copied("_twice")
    shutil.copytree(twice / "vqgan", twice / "vqgan2")
    add("two VQGANs", "hold the same kind of network", twice)
    return found
