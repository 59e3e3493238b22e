"""GLIDE's networks in torch, written from the paper's mathematics with the published names of tensors, and
folders of them at random weights. The authors' package is on no registry."""

import json
import math

import torch
import torch.nn.functional as F
from torch import nn

# Small options of glide-text2im; the texts have 12 tokens.
BASE = dict(
    image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", num_head_channels=16,
    attention_resolutions="8", text_ctx=12, xf_width=32, xf_layers=2, xf_heads=2, dropout=0.1,
)  # fmt: skip
UP = BASE | dict(image_size=32, noise_schedule="linear")
FILES = {
    "base": (BASE, 3), "upsample": (UP, 6), "base_inpaint": (BASE, 7), "upsample_inpaint": (UP, 10),
}  # fmt: skip


def heads_first(x, heads, parts):
    """(B, parts * C, N), whose parts alternate head by head -> `parts` tensors (B * heads, C / heads, N)."""
    b, width, n = x.shape
    return x.reshape(b * heads, width // heads, n).chunk(parts, dim=1)


def attend(q, k, v):
    """(B, C, N) queries, (B, C, M) keys and values."""
    weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
    return v @ weights.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width, head, context):
        super().__init__()
        self.heads = width // head
        self.norm = nn.GroupNorm(32, width)
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)
        self.encoder_kv = nn.Conv1d(context, 2 * width, 1)

    def forward(self, x, states):
        flat = x.flatten(2)
        q, k, v = heads_first(self.qkv(self.norm(flat)), self.heads, 3)
        text_k, text_v = heads_first(self.encoder_kv(states), self.heads, 2)
        out = attend(q, torch.cat([text_k, k], -1), torch.cat([text_v, v], -1))
        return x + self.proj_out(out.reshape(flat.shape)).reshape(x.shape)


class Res(nn.Module):
    def __init__(self, inputs, outputs, emb, resample=None):
        super().__init__()
        self.resample = {
            None: lambda x: x,
            "down": lambda x: F.avg_pool2d(x, 2),
            "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        }[resample]
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, emb):
        h = self.in_layers[2](self.resample(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resample(x)) + self.out_layers[3](self.out_layers[1](h))


class TextBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_qkv": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        q, k, v = heads_first(self.attn["c_qkv"](self.ln_1(x)).transpose(1, 2), self.heads, 3)
        h = attend(q, k, v).reshape(x.transpose(1, 2).shape).transpose(1, 2)
        x = x + self.attn["c_proj"](h)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PeerGlide(nn.Module):
    """A network with the options of glide-text2im and so many input channels."""

    def __init__(self, options, channels, words):
        super().__init__()
        width, text, length = options["num_channels"], options["xf_width"], options["text_ctx"]
        head, count = options["num_head_channels"], options["num_res_blocks"]
        mult = [int(m) for m in options["channel_mult"].split(",")]
        attends = [
            str(options["image_size"] // 2**level) in options["attention_resolutions"].split(",")
            for level in range(len(mult))
        ]
        self.width, emb = width, 4 * width
        self.token_embedding = nn.Embedding(words, text)
        self.positional_embedding = nn.Parameter(torch.zeros(length, text))
        self.padding_embedding = nn.Parameter(torch.zeros(length, text))
        blocks = nn.ModuleList(TextBlock(text, options["xf_heads"]) for _ in range(options["xf_layers"]))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.final_ln, self.transformer_proj = nn.LayerNorm(text), nn.Linear(text, emb)
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def level_blocks(inputs, level):
            outputs = width * mult[level]
            attention = [Attention(outputs, head, text)] if attends[level] else []
            return [Res(inputs, outputs, emb), *attention], outputs

        now, skips = width * mult[0], [width * mult[0]]
        downs = [nn.ModuleList([nn.Conv2d(channels, now, 3, padding=1)])]
        for level in range(len(mult)):
            for _ in range(count):
                made, now = level_blocks(now, level)
                downs.append(nn.ModuleList(made))
                skips.append(now)
            if level < len(mult) - 1:
                downs.append(nn.ModuleList([Res(now, now, emb, "down")]))
                skips.append(now)
        self.input_blocks = nn.ModuleList(downs)
        self.middle_block = nn.ModuleList(
            [Res(now, now, emb), Attention(now, head, text), Res(now, now, emb)]
        )
        ups = []
        for level in reversed(range(len(mult))):
            for i in range(count + 1):
                made, now = level_blocks(now + skips.pop(), level)
                ups.append(nn.ModuleList(made + ([Res(now, now, emb, "up")] if level and i == count else [])))
        self.output_blocks = nn.ModuleList(ups)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 6, 3, padding=1))

    def forward(self, x, t, tokens, mask, low_res=None, known_image=None, known=None):
        """NCHW images, known (B, 1, H, W) bool."""
        seen = [x]
        if known is not None:
            seen += [known_image * known, known.float()]
        if low_res is not None:
            seen.append(F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False))
        words = torch.where(
            mask[..., None], self.token_embedding(tokens) + self.positional_embedding, self.padding_embedding
        )
        for block in self.transformer["resblocks"]:
            words = block(words)
        words = self.final_ln(words)
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        emb, states = emb + self.transformer_proj(words[:, -1]), words.transpose(1, 2)

        def run(blocks, h):
            for block in blocks:
                is_res, is_attention = isinstance(block, Res), isinstance(block, Attention)
                h = block(h, emb) if is_res else block(h, states) if is_attention else block(h)
            return h

        h, skips = torch.cat(seen, dim=1), []
        for blocks in self.input_blocks:
            h = run(blocks, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for blocks in self.output_blocks:
            h = run(blocks, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


def write_tokenizer(folder, merges=(("a", "b"), ("f", "o"), ("fo", "x"), ("Ġ", "fox"))):
    """GLIDE's tokenizer of a few merges."""
    from unclip_jax.data.glide_tokenizer import GlideTokenizer
    from unclip_jax.data.tokenizer import byte_characters

    tokens = [*byte_characters(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), "utf-8")
    return GlideTokenizer.from_folder(folder, 12)


def write_glide(folder, names=tuple(FILES)):
    """A folder as it is published, of small networks at random weights; returns them and the tokenizer."""
    from tests.checkpoint.peers import randomize

    tokenizer, networks = write_tokenizer(folder), {}
    for seed, name in enumerate(names):
        options, channels = FILES[name]
        networks[name] = randomize(PeerGlide(options, channels, tokenizer.vocab_size), seed)
        torch.save(networks[name].state_dict(), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(options))
    return networks, tokenizer
