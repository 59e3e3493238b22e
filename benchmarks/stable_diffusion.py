"""Compare how unclip_jax and diffusers draw pictures with Stable Diffusion 1.5's networks.

    python benchmarks/stable_diffusion.py --captions 1 --rounds 3

The benchmark needs torch, diffusers and transformers: pip install -e ".[test]"

Both libraries read the same folder with random weights. They encode the captions, take the same number of
DDIM steps with guidance 7.5, and decode the latents. On a GPU both compute in bfloat16, on a CPU in float32.
Each library runs in a process of its own, in turn. The benchmark prints the seconds to load, for the first
pictures and for later ones, the peak of the memory, and the ratio of the times of later pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import add_arguments, peak_gib, record

SIZES = {  # the U-Net's and the autoencoder's channels, the text encoder's width, and the picture's side
    "full": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": (768, 12), "side": 512},
    "tiny": {"unet": (32, 64, 64, 64), "vae": (32, 32, 32, 32), "text": (64, 2), "side": 64},
}
CAPTION, GUIDANCE = "a red fox on the ice, number", 7.5


def make(folder: Path, size: str) -> None:
    """Writes Stable Diffusion 1.5 with random weights in diffusers' format, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from unclip_jax.data.tokenizer import ClipTokenizer

    torch.manual_seed(0)
    sizes, (width, layers) = SIZES[size], SIZES[size]["text"]
    crossed = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    ClipTokenizer().save_folder(folder / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=sizes["side"] // 8,
            block_out_channels=sizes["unet"],
            cross_attention_dim=width,
            attention_head_dim=8,
            down_block_types=(*crossed[0], "DownBlock2D"),
            up_block_types=("UpBlock2D", *crossed[1]),
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=sizes["vae"],
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=sizes["side"],
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def diffusers_sampler(folder: Path, captions: list[str], steps: int, compiled: bool) -> Callable:
    """A function that draws the pictures with diffusers: uint8 (B, H, W, 3)."""
    import torch
    from diffusers import StableDiffusionPipeline

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if gpu:
        pipeline.to("cuda")
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)

    def sample() -> np.ndarray:
        drawn = pipeline(captions, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np")
        return np.uint8(np.round(255 * drawn.images))

    return sample


def our_sampler(folder: Path, captions: list[str], steps: int) -> Callable:
    """A function that draws the pictures with unclip_jax: uint8 (B, H, W, 3)."""
    from unclip_jax.cli.options import save_memory_on_cpu

    save_memory_on_cpu()
    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.sampling.text_to_image import text_to_image
    from unclip_jax.sharding import sampling_mesh

    sampler = Sampler(load_bundle(folder, mesh=sampling_mesh()))
    options = {"latent": {"steps": steps, "guidance_scale": GUIDANCE}}
    return lambda: text_to_image(sampler, captions, options=options)


def worker(args: argparse.Namespace) -> None:
    """Loads and draws with one library, and prints times and memory as JSON."""
    captions = [f"{CAPTION} {i}" for i in range(args.captions)]
    started = time.perf_counter()
    if args.worker == "unclip_jax":
        sample = our_sampler(args.folder, captions, args.steps)
    else:
        sample = diffusers_sampler(args.folder, captions, args.steps, args.worker == "diffusers compiled")
    seconds, side = [time.perf_counter() - started], SIZES[args.size]["side"]
    for _ in range(1 + args.repeats):
        started = time.perf_counter()
        pictures = sample()
        seconds.append(time.perf_counter() - started)
    assert pictures.shape == (args.captions, side, side, 3)
    figures = {"load": seconds[0], "first": seconds[1], "later": min(seconds[2:]), "memory": peak_gib()}
    print(json.dumps(figures))


def main() -> None:
    """Runs the libraries in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--captions", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="DDIM steps (50)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per library (3)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="later samples per process (1)")
    add_arguments(parser, "diffusers")
    parser.add_argument("--folder", type=Path, help="keep the random weights here (a temporary folder)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    peers = [] if args.alone else ["diffusers", *(["diffusers compiled"] if args.compile else [])]
    peers.append("unclip_jax")
    rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "stable-diffusion"
        make(folder, args.size)
        for i in range(args.rounds):
            for peer in peers:
                command = [sys.executable, __file__, "--worker", peer, "--folder", str(folder)]
                for name in ("size", "captions", "steps", "repeats"):
                    command += [f"--{name}", str(getattr(args, name))]
                completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                rows[peer].append(json.loads(completed.stdout.splitlines()[-1]))
                figures = "".join(f"  {k} {v:.2f}" for k, v in rows[peer][-1].items())
                print(f"round {i + 1}  {peer:20}{figures}", flush=True)
    what = f"Stable Diffusion 1.5, {args.size}, {args.captions} captions, {args.steps} steps"
    print(f"\n{what}; seconds and GiB, medians of {args.rounds} rounds")
    medians = {
        peer: {k: float(np.median([row[k] for row in rows[peer]])) for k in rows[peer][0]} for peer in peers
    }
    for peer in peers:
        print(f"{peer:20}" + "".join(f"  {k} {v:7.2f}" for k, v in medians[peer].items()))
    later = {peer: [row["later"] for row in rows[peer]] for peer in peers}
    record(args.json, what, later, {peer: medians[peer]["memory"] for peer in peers})


if __name__ == "__main__":
    main()
