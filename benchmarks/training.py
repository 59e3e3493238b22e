"""Compare how fast unclip_jax and the PyTorch libraries train the same networks.

    python benchmarks/training.py --network emoji --rounds 5

The benchmark needs torch, diffusers and transformers: pip install -e ".[test]"

One step is forward, backward and Adam on one batch that stays in memory. The networks of both libraries have
the same shape, and the benchmark asserts that they have the same number of parameters:

    emoji    the shipped decoder at 32 px                  diffusers' U-Net with Karlo's projection
    karlo    Karlo's decoder, 64 px (0.9 billion)          the same
    small    Karlo's decoder with 64 channels, 32 px       the same
    tiny     the same at 8 px, to try the benchmark        the same
    prior    the shipped diffusion prior                   diffusers' PriorTransformer
    clip     the shipped CLIP                              transformers' CLIPModel
    karlo_prior   Karlo's diffusion prior (1.0 billion)    diffusers' PriorTransformer
    clip_l14      CLIP ViT-L/14 (0.43 billion)             transformers' CLIPModel

Each library has a process of its own, which waits while another one is timed. A round times every library
once, one after the other, so that a slow minute of the machine hits all of them. The benchmark prints:

- images per second, the median of the rounds;
- the ratio of unclip_jax to each peer, median and range of the rounds;
- the peak of resident memory, or of the device's memory on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from measure import add_arguments, append_row, peak_gib

UNETS = {  # the U-Net, the conditioning and the sizes of CLIP that a decoder sees; the default batch
    "emoji": {
        "side": 32, "channels": 16, "mult": (1, 2, 4, 8), "blocks": 1, "attention": (8, 4), "head": 32,
        "groups": 8, "context": 128, "embed": 128, "states": (24, 128), "batch": 32,
    },
    "small": {
        "side": 32, "channels": 64, "mult": (1, 2, 3, 4), "blocks": 1, "attention": (16, 8, 4), "head": 64,
        "groups": 32, "context": 256, "embed": 128, "states": (24, 128), "batch": 16,
    },
    "tiny": {
        "side": 8, "channels": 16, "mult": (1, 2), "blocks": 1, "attention": (4,), "head": 16,
        "groups": 8, "context": 32, "embed": 128, "states": (24, 128), "batch": 2,
    },
    "karlo": {
        "side": 64, "channels": 320, "mult": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8), "head": 64,
        "groups": 32, "context": 1536, "embed": 768, "states": (77, 768), "batch": 2,
    },
}  # fmt: skip
PRIORS = {
    "prior": {"embed": 128, "length": 24, "width": 192, "layers": 4, "heads": 6, "batch": 128},
    "karlo_prior": {"embed": 768, "length": 77, "width": 2048, "layers": 20, "heads": 32, "batch": 8},
}
CLIPS = {
    "clip": {
        "embed": 128, "length": 24, "vocabulary": 8192, "batch": 128,
        "image": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 4, "heads": 6},
        "text": {"width": 128, "layers": 2, "heads": 4},
    },
    "clip_l14": {
        "embed": 768, "length": 77, "vocabulary": 49408, "batch": 8,
        "image": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
        "text": {"width": 768, "layers": 12, "heads": 12},
    },
}  # fmt: skip
NETWORKS = {name: shape["batch"] for name, shape in (UNETS | PRIORS | CLIPS).items()}
RATE, BETAS, EPS = 1e-4, (0.9, 0.99), 1e-8
Train = Callable[[int], float]  # steps -> the last loss, when everything has been computed


def batch_of(network: str, rows: int) -> dict[str, np.ndarray]:
    """A random batch: what the network sees, and what it should answer."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    shape = (UNETS | PRIORS | CLIPS)[network]
    if network in CLIPS:
        side = shape["image"]["image_size"]
        tokens = rng.integers(1, shape["vocabulary"] - 1, (rows, shape["length"]))
        tokens[:, -1] = shape["vocabulary"] - 1  # the end token has the largest number
        return {"image": np.tanh(normal(rows, side, side, 3)), "tokens": tokens}
    length, width = (shape["length"], shape["embed"]) if network in PRIORS else shape["states"]
    x = (rows, shape["embed"]) if network in PRIORS else (rows, shape["side"], shape["side"], 3)
    return {
        "x": normal(*x),
        "t": rng.integers(0, 1000, rows),
        "target": normal(*x),
        "image_embed": normal(rows, shape["embed"]),
        "text_embed": normal(rows, shape["embed"]),
        "text_states": normal(rows, length, width),
    }


# ------------------------------------------------------------------------------------------ unclip_jax
def ours(network: str, batch: dict[str, np.ndarray], dtype: str) -> tuple[int, Train]:
    """The number of parameters of our network, and a function that trains it."""
    import jax
    import jax.numpy as jnp
    import optax

    from unclip_jax.models.clip import CLIP as Clip
    from unclip_jax.models.decoder import Decoder
    from unclip_jax.models.prior_diffusion import DiffusionPrior

    arrays, rows = {k: jnp.asarray(v) for k, v in batch.items()}, len(next(iter(batch.values())))
    texts = lambda b: {
        "text_embed": b["text_embed"],
        "text_states": b["text_states"],
        "text_mask": jnp.ones(b["text_states"].shape[:2], bool),
    }
    if network in CLIPS:
        clip = CLIPS[network]
        text = clip["text"] | {"vocab_size": clip["vocabulary"], "length": clip["length"]}
        model = Clip(clip["embed"], clip["image"], text, dtype=dtype)
        inputs = lambda b: ((b["image"], b["tokens"]), {})
    elif network in PRIORS:
        sizes = {name: PRIORS[network][name] for name in ("length", "width", "layers", "heads")}
        model = DiffusionPrior(PRIORS[network]["embed"], **sizes, dtype=dtype)
        inputs = lambda b: ((b["x"], b["t"]), texts(b))
    else:
        u = UNETS[network]
        unet = {
            "image_size": u["side"], "out_channels": 6, "channels": u["channels"], "channel_mult": u["mult"],
            "res_blocks": u["blocks"], "attention_resolutions": u["attention"], "head_channels": u["head"],
            "groups": u["groups"],
        }  # fmt: skip
        model = Decoder(unet, {"context_dim": u["context"]}, dtype=dtype)
        none = jnp.zeros(rows, bool)
        image = lambda b: {"image_embed": b["image_embed"], "drop_image": none}
        inputs = lambda b: ((b["x"], b["t"]), image(b) | texts(b))

    def loss_fn(params, b):
        given, named = inputs(b)
        out = model.apply({"params": params}, *given, **named)
        if network in CLIPS:
            logits, labels = out[2] * out[0] @ out[1].T, jnp.arange(rows)
            losses = (
                optax.softmax_cross_entropy_with_integer_labels(a, labels).mean() for a in (logits, logits.T)
            )
            return sum(losses) / 2
        return jnp.mean(jnp.square(out[..., : b["target"].shape[-1]] - b["target"]))

    given, named = inputs(arrays)
    params = jax.jit(model.init)(jax.random.key(0), *given, **named)["params"]
    tx = optax.adam(RATE, *BETAS, EPS)
    opt_state = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, b):
        loss, gradient = jax.value_and_grad(loss_fn)(params, b)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    def train(steps: int) -> float:
        nonlocal params, opt_state
        for _ in range(steps):
            params, opt_state, loss = step(params, opt_state, arrays)
        return float(loss)

    return sum(a.size for a in jax.tree.leaves(params)), train


# ------------------------------------------------------------------------------------------ PyTorch
def theirs(network: str, batch: dict[str, np.ndarray], dtype: str, compiled: bool) -> tuple[int, Train]:
    """The number of parameters of the peer's network, and a function that trains it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    nchw = lambda v: np.ascontiguousarray(np.moveaxis(v, -1, 1)) if v.ndim == 4 else v
    tensors = {k: torch.from_numpy(nchw(v)).to(device) for k, v in batch.items()}
    torch.manual_seed(0)
    make = torch_clip if network in CLIPS else torch_prior if network in PRIORS else torch_decoder
    module, forward = make(network)
    module.to(device).train()
    run = torch.compile(forward) if compiled else forward
    optimizer = torch.optim.Adam(module.parameters(), RATE, BETAS, EPS)
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            with cast:
                loss = run(tensors)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return sum(p.numel() for p in module.parameters() if p.requires_grad), train


def torch_clip(network: str):
    from transformers import CLIPConfig, CLIPModel

    clip = CLIPS[network]
    towers = {
        name: {
            "hidden_size": clip[role]["width"],
            "intermediate_size": 4 * clip[role]["width"],
            "num_hidden_layers": clip[role]["layers"],
            "num_attention_heads": clip[role]["heads"],
        }
        for name, role in (("text_config", "text"), ("vision_config", "image"))
    }
    towers["text_config"] |= {
        "vocab_size": clip["vocabulary"],
        "max_position_embeddings": clip["length"],
        "bos_token_id": 0,
        "eos_token_id": clip["vocabulary"] - 1,
    }
    towers["vision_config"] |= {name: clip["image"][name] for name in ("image_size", "patch_size")}
    module = CLIPModel(CLIPConfig(**towers, projection_dim=clip["embed"]))
    return (
        module,
        lambda b: (
            module(
                input_ids=b["tokens"],
                pixel_values=b["image"],
                return_loss=True,
                interpolate_pos_encoding=False,
            ).loss
        ),
    )


def torch_prior(network: str):
    import torch
    from diffusers import PriorTransformer

    prior = PRIORS[network]
    module = PriorTransformer(
        num_attention_heads=prior["heads"],
        attention_head_dim=prior["width"] // prior["heads"],
        num_layers=prior["layers"],
        embedding_dim=prior["embed"],
        num_embeddings=prior["length"],
    )
    module.clip_mean.requires_grad_(False), module.clip_std.requires_grad_(False)
    mask = torch.ones(1, prior["length"], dtype=torch.bool)

    def forward(b):
        out = module(
            b["x"],
            b["t"],
            proj_embedding=b["text_embed"],
            encoder_hidden_states=b["text_states"],
            attention_mask=mask.to(b["x"].device).expand(len(b["x"]), -1),
        )
        return (out.predicted_image_embedding - b["target"]).square().mean()

    return module, forward


def torch_decoder(network: str):
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    u = UNETS[network]
    sides = [u["side"] // 2**level for level in range(len(u["mult"]))]
    kinds = ["SimpleCrossAttn" if side in u["attention"] else "Resnet" for side in sides]
    block = lambda kind, way: f"{kind}{way}Block2D" if kind != "Resnet" else f"Resnet{way}sampleBlock2D"
    unet = UNet2DConditionModel(
        sample_size=u["side"],
        in_channels=3,
        out_channels=6,
        block_out_channels=[u["channels"] * m for m in u["mult"]],
        layers_per_block=u["blocks"],
        cross_attention_dim=u["context"],
        attention_head_dim=u["head"],
        norm_num_groups=u["groups"],
        down_block_types=[block(kind, "Down") for kind in kinds],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=[block(kind, "Up") for kind in reversed(kinds)],
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    projection = UnCLIPTextProjModel(
        clip_extra_context_tokens=4,
        clip_embeddings_dim=u["embed"],
        time_embed_dim=4 * u["channels"],
        cross_attention_dim=u["context"],
    )
    if u["states"][1] != u["embed"]:
        raise ValueError("UnCLIPTextProjModel wants states as wide as the embeddings")
    module = torch.nn.ModuleList([unet, projection])

    def forward(b):
        context, added = projection(
            image_embeddings=b["image_embed"],
            prompt_embeds=b["text_embed"],
            text_encoder_hidden_states=b["text_states"],
            do_classifier_free_guidance=False,
        )
        out = unet(b["x"], b["t"], encoder_hidden_states=context, class_labels=added).sample
        return (out[:, :3] - b["target"]).square().mean()

    return module, forward


# ------------------------------------------------------------------------------------------ measuring
def worker(args: argparse.Namespace) -> None:
    """Builds and compiles a library's step. For each number of steps on standard input it prints a line."""
    batch = batch_of(args.network, args.batch)
    started = time.perf_counter()
    if args.worker == "unclip_jax":
        parameters, train = ours(args.network, batch, args.dtype)
    else:
        parameters, train = theirs(args.network, batch, args.dtype, args.worker == "compiled")
    train(2)
    print(json.dumps({"parameters": parameters, "ready": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        loss = train(int(line))
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": peak_gib()}), flush=True)


def start(peer: str, args: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", peer, "--network", args.network]
    command += ["--batch", str(args.batch), "--dtype", args.dtype]
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def answer(process: subprocess.Popen) -> dict[str, float]:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a library's process ended with status {process.wait()}; its message is above")
    return json.loads(line)


def compare(args: argparse.Namespace) -> None:
    """Times all libraries on one network, and prints the table."""
    peers = ["unclip_jax"]
    if not args.alone:
        peers += ["eager", *(["compiled"] if args.compile else [])]
    processes, ready = {}, {}
    for peer in peers:  # one after the other, so that they do not compile at once
        processes[peer] = start(peer, args)
        ready[peer] = answer(processes[peer])
    counts = {peer: ready[peer]["parameters"] for peer in peers}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the networks differ: {counts} parameters")
    rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for _ in range(args.rounds):
        for peer in peers:
            processes[peer].stdin.write(f"{args.steps}\n")
            processes[peer].stdin.flush()
            rows[peer].append(answer(processes[peer]))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    per_second = lambda peer: [args.steps * args.batch / row["seconds"] for row in rows[peer]]
    what = f"a training step of {args.network}, batch {args.batch}, {args.dtype}"
    print(
        f"{args.network}: {counts['unclip_jax']:,} parameters, batch {args.batch}, {args.dtype}, "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    for peer in peers:
        memory, seconds = rows[peer][-1]["memory"], ready[peer]["ready"]
        line = f"{peer:12} {np.median(per_second(peer)):9.1f} images/s  ready after {seconds:6.1f} s"
        line += f"  memory {memory:.2f} GiB"
        figures = {"value": float(np.median(per_second(peer))), "unit": "images/s", "memory": memory}
        if peer != "unclip_jax":
            ratios = np.divide(per_second("unclip_jax"), per_second(peer))
            line += f"  unclip_jax / {peer}: {np.median(ratios):.2f}"
            line += f" ({ratios.min():.2f} to {ratios.max():.2f})"
            figures |= {"ratio": float(np.median(ratios)), "range": [ratios.min(), ratios.max()]}
        print(line, flush=True)
        append_row(args.json, what, peer if peer == "unclip_jax" else f"PyTorch, {peer}", **figures)


def main() -> None:
    """Compares the libraries on the networks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", choices=[*NETWORKS, "all"], default="emoji", help="all: every one (emoji)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images in a batch (the network's own)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps in a round (10)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network")
    add_arguments(parser, "PyTorch")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    chosen = [name for name in NETWORKS if name != "tiny"] if args.network == "all" else [args.network]
    for network in chosen:
        compare(
            argparse.Namespace(**vars(args) | {"network": network, "batch": args.batch or NETWORKS[network]})
        )


if __name__ == "__main__":
    main()
