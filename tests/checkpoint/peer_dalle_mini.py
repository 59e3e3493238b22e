"""dalle-mini and its VQGAN at random weights, in the published layout, and what they compute: the network in
NumPy, in float64, and the VQGAN with torch's functions, both written from their equations over the published
names. (The published code needs versions of its libraries that no longer install.)"""

import json
import math

import numpy as np
from flax.serialization import msgpack_serialize

from unclip_jax.data.tokenizer import byte_characters

WIDTH, HEADS, HIDDEN, LENGTH, WORDS, CODES, SIDE = 16, 2, 24, 6, 266, 9, 4
CONFIG = {
    "model_type": "dallebart",
    "activation_function": "gelu",
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "encoder_vocab_size": WORDS,
    "image_vocab_size": CODES + 2,
    "decoder_start_token_id": CODES,
    "bos_token_id": CODES + 1,
    "image_length": SIDE**2,
    "max_text_length": LENGTH,
    "normalize_text": True,
    "ln_positions": "normformer",
    "use_scan": True,
    "transformers_version": "4.20.0",
}
CODER = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "resolution": 8,
    "attn_resolutions": [4],
    "z_channels": 4,
    "embed_dim": 4,
    "n_embed": CODES,
    "double_z": False,
    "model_type": "vqgan",
}
MERGES = [("Ġ", "f"), ("Ġf", "o"), ("Ġfo", "x"), ("Ġ", "a"), ("r", "e"), ("re", "d")]


class Random:
    """Random arrays: kernels scaled by their number of inputs, gains about one."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape, scale=1.0, mean=0.0):
        return (mean + scale * self.rng.normal(size=shape)).astype(np.float32)

    def kernel(self, *shape):
        return {"kernel": self.normal(*shape, scale=math.prod(shape[:-1]) ** -0.5)}

    def norm(self, width, scaled=True):
        scale = {"scale": self.normal(width, scale=0.2, mean=1.0)} if scaled else {}
        return scale | {"bias": self.normal(width, scale=0.2)}

    def conv(self, side, inner, outer):
        return self.kernel(side, side, inner, outer) | {"bias": self.normal(outer, scale=0.2)}


# ------------------------------------------------------------------------------------ the network
def network(scanned=True, gated=True, scales=False, head_scale=False, seed=0):
    """Random arrays by the published names: those of a version of the code."""
    make = Random(seed)

    def attention():
        own = {name: make.kernel(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        return own | ({"head_scale": make.normal(1, 1, HEADS, 1, mean=1.0)} if head_scale else {})

    def layer(decodes):
        mlp = {"LayerNorm_0": make.norm(WIDTH, scales), "LayerNorm_1": make.norm(HIDDEN, scales)}
        ways = 2 if gated else 1
        mlp |= {f"Dense_{i}": make.kernel(WIDTH, HIDDEN) for i in range(ways)}
        mlp[f"Dense_{ways}"] = make.kernel(HIDDEN, WIDTH)
        found = {"GLU_0" if gated else "FFN_0": mlp}
        for i in range(2 if decodes else 1):
            found[f"FlaxBartAttention_{i}"] = attention()
            found[f"LayerNorm_{2 * i}"] = make.norm(WIDTH, scales)
            found[f"LayerNorm_{2 * i + 1}"] = make.norm(WIDTH)
        return found

    def half(name, rows, places):
        layers = [layer(name == "Decoder") for _ in range(2)]
        if scanned:
            held = {f"FlaxBart{name}Layers": stacked(layers)}
        else:
            held = {f"FlaxBart{name}Layer_{i}": one for i, one in enumerate(layers)}
        return {
            "embed_tokens": {"embedding": make.normal(rows, WIDTH)},
            "embed_positions": {"embedding": make.normal(places, WIDTH)},
            "layernorm_embedding": make.norm(WIDTH),
            "final_ln": make.norm(WIDTH, scales),
            "layers": held,
        }

    rows = CODES + 3
    model = {"encoder": half("Encoder", WORDS, LENGTH), "decoder": half("Decoder", rows, SIDE**2)}
    return {"model": model, "lm_head": make.kernel(WIDTH, rows)}


def stacked(layers):
    """A tree whose arrays hold those of all layers, along a first axis."""
    first = layers[0]
    if isinstance(first, dict):
        return {key: stacked([layer[key] for layer in layers]) for key in first}
    return np.stack(layers)


def layer_of(held, name, i):
    """The i-th layer of a half, however the half holds them."""
    if f"{name}_{i}" in held:
        return held[f"{name}_{i}"]
    pick = lambda tree: {k: pick(v) if isinstance(v, dict) else v[i] for k, v in tree.items()}
    return pick(held[f"{name}s"])


def normed(x, own):
    """Layer normalisation."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * own.get("scale", 1) + own["bias"]


def gelu(x):
    """x times the normal distribution function of x."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attended(x, seen, own, mask):
    """Attention of x (P, W) to `seen` (Q, W) under a mask (P, Q)."""
    size = WIDTH // HEADS
    q, k, v = (
        y @ np.float64(own[n]["kernel"]) for n, y in (("q_proj", x), ("k_proj", seen), ("v_proj", seen))
    )
    out = np.zeros_like(q)
    for head in range(HEADS):
        cut = slice(head * size, (head + 1) * size)
        scores = np.where(mask, q[:, cut] @ k[:, cut].T / math.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, cut] = weights / weights.sum(-1, keepdims=True) @ v[:, cut]
        out[:, cut] *= own["head_scale"][0, 0, head, 0] if "head_scale" in own else 1
    return out @ np.float64(own["out_proj"]["kernel"])


def states(half, name, ids, mask, text=None, text_mask=None):
    """What a half makes of ids (P,)."""
    x = np.float64(half["embed_tokens"]["embedding"][ids] + half["embed_positions"]["embedding"][: len(ids)])
    x = normed(x, half["layernorm_embedding"])
    for i in range(2):
        layer = layer_of(half["layers"], f"FlaxBart{name}Layer", i)
        h = normed(x, layer["LayerNorm_0"])
        x = x + normed(attended(h, h, layer["FlaxBartAttention_0"], mask), layer["LayerNorm_1"])
        if text is not None:
            h = attended(normed(x, layer["LayerNorm_2"]), text, layer["FlaxBartAttention_1"], text_mask)
            x = x + normed(h, layer["LayerNorm_3"])
        mlp = layer.get("GLU_0", layer.get("FFN_0"))
        h = normed(x, mlp["LayerNorm_0"])
        inner = gelu(h @ mlp["Dense_0"]["kernel"])
        if "GLU_0" in layer:
            inner = inner * (h @ mlp["Dense_1"]["kernel"])
        last = mlp["Dense_2" if "GLU_0" in layer else "Dense_1"]["kernel"]
        x = x + normed(inner, mlp["LayerNorm_1"]) @ last
    return normed(x, half["final_ln"])


def logits(tree, tokens, mask, codes):
    """The logits (N, codes) of one caption's codes."""
    seen = np.asarray(mask, bool)[None]
    text = states(tree["model"]["encoder"], "Encoder", tokens, np.repeat(seen, LENGTH, 0))
    given, count = np.concatenate([[CODES], codes[:-1]]), SIDE**2
    causal = np.tril(np.ones((count, count), bool))
    x = states(tree["model"]["decoder"], "Decoder", given, causal, text, np.repeat(seen, count, 0))
    return (x @ tree["lm_head"]["kernel"])[:, :CODES]


# ------------------------------------------------------------------------------------ the VQGAN
def coder(seed=1):
    """Random arrays by the published names."""
    make = Random(seed)

    def res(inner, outer):
        found = {"norm1": make.norm(inner), "conv1": make.conv(3, inner, outer)}
        found |= {"norm2": make.norm(outer), "conv2": make.conv(3, outer, outer)}
        return found | ({"nin_shortcut": make.conv(1, inner, outer)} if inner != outer else {})

    def attention():
        return {"norm": make.norm(64)} | {n: make.conv(1, 64, 64) for n in ("q", "k", "v", "proj_out")}

    def middle():
        return {"block_1": res(64, 64), "attn_1": attention(), "block_2": res(64, 64)}

    encoder = {
        "conv_in": make.conv(3, 3, 32),
        "down_0": {"block_0": res(32, 32), "downsample": {"conv": make.conv(3, 32, 32)}},
        "down_1": {"block_0": res(32, 64), "attn_0": attention()},
        "mid": middle(),
        "norm_out": make.norm(64),
        "conv_out": make.conv(3, 64, 4),
    }
    decoder = {
        "conv_in": make.conv(3, 4, 64),
        "mid": middle(),
        "up_1": {f"block_{i}": res(64, 64) for i in range(2)}
        | {f"attn_{i}": attention() for i in range(2)}
        | {"upsample": {"conv": make.conv(3, 64, 64)}},
        "up_0": {"block_0": res(64, 32), "block_1": res(32, 32)},
        "norm_out": make.norm(32),
        "conv_out": make.conv(3, 32, 3),
    }
    return {
        "encoder": encoder,
        "decoder": decoder,
        "quantize": {"embedding": {"embedding": make.normal(CODES, 4)}},
        "quant_conv": make.conv(1, 4, 4),
        "post_quant_conv": make.conv(1, 4, 4),
    }


def _torch():
    import torch
    import torch.nn.functional as functions

    tensor = lambda a: torch.tensor(np.asarray(a))

    def conv(x, own, stride=1, padding=None):
        kernel = tensor(own["kernel"].transpose(3, 2, 0, 1).copy())
        padding = own["kernel"].shape[0] // 2 if padding is None else padding
        return functions.conv2d(x, kernel, tensor(own["bias"]), stride, padding)

    def swish(x, own):
        return functions.silu(functions.group_norm(x, 32, tensor(own["scale"]), tensor(own["bias"]), 1e-6))

    def res(x, own):
        h = conv(swish(conv(swish(x, own["norm1"]), own["conv1"]), own["norm2"]), own["conv2"])
        return h + (conv(x, own["nin_shortcut"]) if "nin_shortcut" in own else x)

    def attention(x, own):
        norm = own["norm"]
        h = functions.group_norm(x, 32, tensor(norm["scale"]), tensor(norm["bias"]), 1e-6)
        q, k, v = (conv(h, own[name]).flatten(2) for name in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        return x + conv((v @ weights.transpose(1, 2)).reshape(x.shape), own["proj_out"])

    def level(x, own):
        for i in range(4):
            x = res(x, own[f"block_{i}"]) if f"block_{i}" in own else x
            x = attention(x, own[f"attn_{i}"]) if f"attn_{i}" in own else x
        return x

    def middle(x, own):
        return res(attention(res(x, own["block_1"]), own["attn_1"]), own["block_2"])

    return torch, functions, conv, swish, level, middle


def decoded(tree, codes):
    """Codes (B, h, w) -> what the VQGAN draws, (B, H, W, 3), about [0, 1]."""
    torch, functions, conv, swish, level, middle = _torch()
    own = tree["decoder"]
    z = torch.tensor(tree["quantize"]["embedding"]["embedding"][codes]).permute(0, 3, 1, 2)
    x = middle(conv(conv(z, tree["post_quant_conv"]), own["conv_in"]), own["mid"])
    x = conv(functions.interpolate(level(x, own["up_1"]), scale_factor=2), own["up_1"]["upsample"]["conv"])
    x = level(x, own["up_0"])
    return conv(swish(x, own["norm_out"]), own["conv_out"]).permute(0, 2, 3, 1).numpy()


def encoded(tree, image):
    """An image (B, H, W, 3) in [0, 1] -> its latents (B, h, w, 4)."""
    torch, functions, conv, swish, level, middle = _torch()
    own = tree["encoder"]
    x = conv(torch.tensor(image).permute(0, 3, 1, 2), own["conv_in"])
    x = functions.pad(level(x, own["down_0"]), (0, 1, 0, 1))
    x = level(conv(x, own["down_0"]["downsample"]["conv"], 2, 0), own["down_1"])
    x = conv(swish(middle(x, own["mid"]), own["norm_out"]), own["conv_out"])
    return conv(x, tree["quant_conv"]).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------ files
def vocabulary():
    """The ids of the tokens: special ones, the bytes, the merges, and the mask, as in BART's."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*special, *byte_characters(), *map("".join, MERGES), "<mask>"]
    return {token: i for i, token in enumerate(tokens)}


def write_part(folder, config, tree):
    """A folder with a configuration and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))


def write(folder, tree=None, coder_tree=None, changes=(), coder_changes=()):
    """dalle-mini's folder, with that of the VQGAN in it."""
    write_part(folder, CONFIG | dict(changes), network() if tree is None else tree)
    write_part(folder / "vqgan", CODER | dict(coder_changes), coder() if coder_tree is None else coder_tree)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return folder
