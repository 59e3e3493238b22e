"""Compare how unclip_jax and diffusers sample Karlo, part by part: time, memory and parity.

    python benchmarks/sampling.py --part prior_diffusion --captions 1 --rounds 3

The benchmark needs torch and diffusers: pip install -e ".[test]"

Both libraries run the same architecture with the same random weights and the same number of steps. Each
library runs in a process of its own, in turn, so that neither holds memory or threads while the benchmark
times the other. On a GPU both compute in bfloat16, on a CPU in float32. The benchmark prints:

- load, first, later: the seconds to load, for the first sample, and for a later sample;
- resident, anonymous, device: the peak of resident memory, of anonymous memory (without the pages of files),
  and of the GPU's memory;
- the ratio of the libraries' times for a later sample, from each pair of processes: median and range;
- the largest difference between the libraries' outputs for one step of the network.

`--part whole` adds up the times of the parts to get the time of the whole pipeline.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import Peak, add_arguments, device_gib, memory, record

LENGTH, WORDS = 77, 20  # text states, and how many of them belong to the caption
PARTS = {  # folders with weights, and the pipeline's steps and guidance scale
    "prior_diffusion": {"folders": ["prior"], "steps": 25, "guidance": 4.0},
    "decoder": {"folders": ["decoder", "text_proj"], "steps": 25, "guidance": 8.0},
    "upsampler": {"folders": ["super_res_first", "super_res_last"], "steps": 7, "guidance": 1.0},
}
SIZES = {  # options of the prior and the U-Nets; sides of the decoder's and the upsampler's images
    "full": {
        "prior": {}, "unet": {"layers_per_block": 3, "block_out_channels": (320, 640, 960, 1280)},
        "sides": (64, 256),
    },
    "small": {
        "prior": {"num_attention_heads": 8, "num_layers": 6},
        "unet": {"layers_per_block": 1, "block_out_channels": (64, 128, 192, 256)}, "sides": (32, 64),
    },
    "tiny": {
        "prior": {"num_attention_heads": 2, "num_layers": 1},
        "unet": {"layers_per_block": 1, "block_out_channels": (64, 64, 64, 64)}, "sides": (16, 16),
    },
}  # fmt: skip
Sample = Callable[[], np.ndarray]


# ------------------------------------------------------------------------------------------ weights
def make(folder: Path, size: str, part: str) -> None:
    """Writes a folder in diffusers' format, and reuses the weights and configurations that it finds there.

    The part and the text encoder get random weights. The other parts get only a configuration.
    """
    import diffusers
    import torch
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from unclip_jax.data.tokenizer import ClipTokenizer

    sizes, plain, cross = SIZES[size], ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "SimpleCrossAttn"
    width, small, large = sizes["unet"]["block_out_channels"][0], *sizes["sides"]
    decoder = functools.partial(
        diffusers.UNet2DConditionModel,
        sample_size=small,
        in_channels=3,
        out_channels=6,
        cross_attention_dim=1536,
        attention_head_dim=64,
        down_block_types=(plain[0], *(f"{cross}DownBlock2D",) * 3),
        mid_block_type=f"UNetMidBlock2D{cross}",
        class_embed_type="identity",
        up_block_types=(*(f"{cross}UpBlock2D",) * 3, plain[1]),
        resnet_time_scale_shift="scale_shift",
        **sizes["unet"],
    )
    super_res = functools.partial(
        diffusers.UNet2DModel,
        sample_size=large,
        in_channels=6,
        out_channels=3,
        down_block_types=plain[:1] * 4,
        up_block_types=plain[1:] * 4,
        add_attention=False,
        **sizes["unet"],
    )
    projection = {
        "clip_extra_context_tokens": 4,
        "clip_embeddings_dim": 768,
        "time_embed_dim": 4 * width,
        "cross_attention_dim": 1536,
    }
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        projection_dim=768,
        num_hidden_layers=12,
    )
    makers = {
        "text_encoder": lambda: CLIPTextModelWithProjection(text),
        "prior": lambda: diffusers.PriorTransformer(**sizes["prior"]),
        "text_proj": lambda: UnCLIPTextProjModel(**projection),
        "decoder": decoder,
        "super_res_first": super_res,
        "super_res_last": super_res,
    }
    for name, maker in makers.items():
        needs_weights = name in ("text_encoder", *PARTS[part]["folders"])
        target = folder / name
        if any(target.glob("*.safetensors")) or (not needs_weights and (target / "config.json").is_file()):
            continue
        if not needs_weights:
            with torch.device("meta"):
                maker().save_config(target)
            continue
        torch.manual_seed(0)
        module = maker()
        # diffusers initialises these to zero.
        zeros = ("positional_embedding", "prd_embedding", "learned_classifier_free_guidance_embeddings")
        for parameter in (getattr(module, key) for key in zeros if hasattr(module, key)):
            torch.nn.init.normal_(parameter, std=0.02)
        if name == "prior":
            module.clip_std.data.fill_(1.0)
        module.save_pretrained(target, max_shard_size="100GB")
    for name, variance, prediction, bound in (
        ("prior", "fixed_small_log", "sample", 5.0),
        ("decoder", "learned_range", "epsilon", 1.0),
        ("super_res", "fixed_small_log", "epsilon", 1.0),
    ):
        scheduler = diffusers.UnCLIPScheduler(
            variance_type=variance, prediction_type=prediction, clip_sample_range=bound
        )
        scheduler.save_pretrained(folder / f"{name}_scheduler")
    ClipTokenizer().save_folder(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "UnCLIPPipeline"}))


def inputs(captions: int, sides: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns random inputs for all parts.

    They are the embeddings and states of the captions (the empty caption comes first), an image embedding for
    each caption, the initial noise of each part, and low-resolution images.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    small, large = ((captions, side, side, 3) for side in sides)
    return {
        "states": normal(captions + 1, LENGTH, 768),
        "embed": normal(captions + 1, 768),
        "z_image": normal(captions, 768),
        "prior_diffusion": normal(captions, 768),
        "decoder": normal(*small),
        "upsampler": normal(*large),
        "low_res": np.tanh(normal(*small)),
    }


# ------------------------------------------------------------------------------------------ diffusers
def diffusers_sampler(
    folder: Path, part: str, captions: int, steps: int, sides: tuple[int, int], compiled: bool
) -> tuple[Sample, Sample]:
    """Returns two functions without arguments: the part's sampler, and one network call at step 500.

    The sampler runs the same loop as diffusers' UnCLIPPipeline.
    """
    import diffusers
    import torch
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    network_class = {
        "prior_diffusion": diffusers.PriorTransformer,
        "decoder": diffusers.UNet2DConditionModel,
        "upsampler": diffusers.UNet2DModel,
    }[part]
    names = [name for name in PARTS[part]["folders"] if name != "text_proj"]
    gpu = torch.cuda.is_available()
    place = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {"device": "cpu"}
    nets = [network_class.from_pretrained(folder / name).eval().to(**place) for name in names]
    if gpu and part != "prior_diffusion":
        nets = [net.to(memory_format=torch.channels_last) for net in nets]
    text_proj = (
        UnCLIPTextProjModel.from_pretrained(folder / "text_proj").eval().to(**place)
        if part == "decoder"
        else None
    )
    nets = [torch.compile(net) for net in nets] if compiled else nets
    scheduler = diffusers.UnCLIPScheduler.from_pretrained(
        folder / f"{'super_res' if part == 'upsampler' else part}_scheduler"
    )
    tensors = {
        k: torch.from_numpy(np.moveaxis(v, -1, 1).copy() if v.ndim == 4 else v).to(**place)
        for k, v in inputs(captions, sides).items()
    }
    both_halves = lambda a: torch.cat([a[:1].expand(captions, *a.shape[1:]), a[1:]])
    mask = (torch.arange(LENGTH, device=place.get("device"))[None] < WORDS).expand(2 * captions, -1)
    scale = PARTS[part]["guidance"]
    if part == "prior_diffusion":
        conditions = {
            "proj_embedding": both_halves(tensors["embed"]),
            "encoder_hidden_states": both_halves(tensors["states"]),
            "attention_mask": mask,
        }
        network = lambda x, t, last: nets[0](torch.cat([x] * 2), t, **conditions).predicted_image_embedding
    elif part == "decoder":

        def decoder_conditions():
            context, added = text_proj(
                image_embeddings=tensors["z_image"],
                prompt_embeds=both_halves(tensors["embed"]),
                do_classifier_free_guidance=True,
                text_encoder_hidden_states=both_halves(tensors["states"]),
            )
            padded = torch.nn.functional.pad(mask, (4, 0), value=True)
            return {"encoder_hidden_states": context, "class_labels": added, "attention_mask": padded}

        network = lambda x, t, last: nets[0](torch.cat([x] * 2), t, **conditions).sample
    else:
        enlarged = torch.nn.functional.interpolate(
            tensors["low_res"], size=[sides[1]] * 2, mode="bicubic", antialias=True
        )
        network = lambda x, t, last: nets[last](torch.cat([x, enlarged], dim=1), t).sample

    def guided(out):
        if part == "upsampler":
            return out
        empty, text = out.chunk(2)
        if part == "prior_diffusion":
            return empty + scale * (text - empty)
        return torch.cat([empty[:, :3] + scale * (text[:, :3] - empty[:, :3]), text[:, 3:]], dim=1)

    @torch.no_grad()
    def sample() -> np.ndarray:
        nonlocal conditions
        conditions = decoder_conditions() if part == "decoder" else conditions
        torch.manual_seed(0)
        scheduler.set_timesteps(steps)
        x, times = tensors[part], scheduler.timesteps
        for i, t in enumerate(times):
            last = i + 1 == len(times)
            out = guided(network(x, t, last))
            x = scheduler.step(out, t, x, prev_timestep=None if last else times[i + 1]).prev_sample
        return x.float().cpu().numpy()

    conditions = conditions if part == "prior_diffusion" else {}

    @torch.no_grad()
    def step() -> np.ndarray:
        out = network(tensors[part], torch.tensor(500), False).float().cpu().numpy()
        return out if out.ndim == 2 else np.moveaxis(out, 1, -1)

    return sample, step


# ------------------------------------------------------------------------------------------ unclip_jax
def our_sampler(
    folder: Path, part: str, captions: int, steps: int, sides: tuple[int, int]
) -> tuple[Sample, Sample]:
    """Returns two functions without arguments: the part's sampler, and one network call at step 500.

    The sampler runs the part's `sample_*` function of `unclip_jax.generate` as one compiled program.
    """
    from unclip_jax.cli.options import save_memory_on_cpu

    save_memory_on_cpu()
    import jax
    import jax.numpy as jnp

    from unclip_jax.checkpoint.providers import find_provider
    from unclip_jax.generate.decoder import sample_decoder
    from unclip_jax.generate.networks import Network, sampling_model
    from unclip_jax.generate.options import SamplingOptions
    from unclip_jax.generate.prior import sample_prior
    from unclip_jax.generate.text import TextConditioning, Texts
    from unclip_jax.generate.upsampler import sample_upsampler
    from unclip_jax.sharding import placer, sampling_mesh

    mesh = sampling_mesh()
    names = {"upsampler": [f"upsampler_{sides[1]}", f"upsampler_{sides[1]}_last"]}.get(part, [part])
    bundles = [find_provider(folder).read(folder, name, placer(mesh)) for name in names]
    parts = [bundle.parts[name] for bundle, name in zip(bundles, names)]
    config, params = parts[0].config, [part.params for part in parts]
    models = [sampling_model(part.config, mesh) for part in parts]
    options = SamplingOptions(
        **bundles[0].sampling[names[0]] | {"steps": steps, "guidance_scale": PARTS[part]["guidance"]}
    )
    arrays, mask = inputs(captions, sides), jnp.arange(LENGTH)[None] < WORDS
    text = TextConditioning(arrays["embed"][1:], arrays["states"][1:], jnp.repeat(mask, captions, axis=0))
    empty = TextConditioning(arrays["embed"][:1], arrays["states"][:1], mask)
    both_halves = lambda a: jnp.concatenate([jnp.repeat(a[:1], captions, axis=0), a[1:]])
    texts = {
        "text_embed": both_halves(arrays["embed"]),
        "text_states": both_halves(arrays["states"]),
        "text_mask": jnp.repeat(mask, 2 * captions, axis=0),
    }
    twice, z, low_res = (lambda a: jnp.concatenate([a, a])), arrays["z_image"], arrays["low_res"]
    # diffusers puts the unconditional half first.
    drop = {"image_embed": twice(z), "drop_image": jnp.arange(2 * captions) < captions}
    networks = lambda p: [Network(model, weights, config) for model, weights in zip(models, p)]
    samplers = {
        "prior_diffusion": lambda p, texts, key: sample_prior(networks(p)[0], texts, key, options),
        "decoder": lambda p, texts, key: sample_decoder(networks(p)[0], jnp.asarray(z), texts, key, options),
        "upsampler": lambda p, texts, key: sample_upsampler(
            networks(p)[0], low_res, key, options, networks(p)[-1]
        ),
    }
    steps_of = {
        "prior_diffusion": lambda p, x, t: models[0].apply({"params": p[0]}, twice(x), twice(t), **texts),
        "decoder": lambda p, x, t: models[0].apply({"params": p[0]}, twice(x), twice(t), **drop, **texts),
        "upsampler": lambda p, x, t: models[0].apply({"params": p[0]}, x, t, low_res=low_res),
    }
    run, network = jax.jit(samplers[part]), jax.jit(steps_of[part])
    sample = lambda: np.asarray(run(params, Texts(text, empty), jax.random.key(0)))
    return sample, lambda: np.asarray(network(params, arrays[part], jnp.full(captions, 500)))


# ------------------------------------------------------------------------------------------ measuring
def worker(args: argparse.Namespace) -> None:
    """Loads and samples with one library. Prints times and memory as JSON, and writes one step's output."""
    peak, sides = Peak(), SIZES[args.size]["sides"]
    started = time.perf_counter()
    if args.worker == "unclip_jax":
        sample, step = our_sampler(args.folder, args.part, args.captions, args.steps, sides)
    else:
        compiled = args.worker == "diffusers compiled"
        sample, step = diffusers_sampler(args.folder, args.part, args.captions, args.steps, sides, compiled)
    seconds = [time.perf_counter() - started]
    for _ in range(1 + args.repeats):
        started = time.perf_counter()
        assert np.isfinite(sample()).all()
        seconds.append(time.perf_counter() - started)
    figures = {"load": seconds[0], "first": seconds[1], "later": min(seconds[2:])}
    # The peak that getrusage reports would include the parent's.
    figures |= {"resident": memory("VmHWM"), "anonymous": peak.gib}
    figures |= {"device": device_gib()} if device_gib() else {}
    if args.outputs:
        np.save(args.outputs, step())
    print(json.dumps(figures))


def compare(args: argparse.Namespace, part: str, folder: Path) -> dict[str, dict[str, float]]:
    """Runs the libraries in turn on a part, prints the part's table, and returns each library's medians."""
    steps = args.steps or PARTS[part]["steps"]
    make(folder, args.size, part)
    peers = [] if args.alone else ["diffusers", *(["diffusers compiled"] if args.compile else [])]
    peers.append("unclip_jax")
    rows: dict[str, list[dict]] = {peer: [] for peer in peers}
    outputs = {peer: str(folder / f"output-{i}.npy") for i, peer in enumerate(peers)}
    for i in range(args.rounds):
        for peer in peers:
            command = [sys.executable, __file__, "--worker", peer, "--folder", str(folder)]
            command += ["--part", part, "--steps", str(steps)]
            for name in ("size", "captions", "repeats"):
                command += [f"--{name}", str(getattr(args, name))]
            command += ["--outputs", outputs[peer]] if i == 0 else []
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
            completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            rows[peer].append(json.loads(completed.stdout.splitlines()[-1]))
            print(
                f"round {i + 1}  {peer:20}" + "".join(f"  {k} {v:.2f}" for k, v in rows[peer][-1].items()),
                flush=True,
            )
    print(
        f"\n{part}, {args.size}, {args.captions} captions, {steps} steps; "
        f"seconds and GiB, medians of {args.rounds} rounds"
    )
    medians = {
        peer: {k: float(np.median([r[k] for r in rows[peer]])) for k in rows[peer][0]} for peer in peers
    }
    for peer in peers:
        print(f"{peer:20}" + "".join(f"  {k} {v:7.2f}" for k, v in medians[peer].items()))
    what = f"Karlo's {part}, {args.captions} captions, {steps} steps"
    record(args.json, what, {peer: [row["later"] for row in rows[peer]] for peer in peers}, held(medians))
    if not args.alone:
        theirs, ours = (np.load(outputs[peer]) for peer in ("diffusers", "unclip_jax"))
        print(
            f"one step of the network: diffusers and unclip_jax differ by at most "
            f"{np.abs(theirs - ours).max():.1e}, for outputs up to {np.abs(theirs).max():.2g}\n",
            flush=True,
        )
    return medians


def held(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """The peak of the memory of each library, in GiB: the GPU's where there is one."""
    return {peer: row.get("device", row["resident"]) for peer, row in medians.items()}


def main() -> None:
    """Compares the libraries on one part, or on all parts and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part",
        choices=[*PARTS, "whole"],
        default="prior_diffusion",
        help="part to sample; whole: run all three in sequence and add up their times (prior_diffusion)",
    )
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--captions", type=int, default=1, metavar="N")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps of every part (the pipeline's 25, 25 and 7)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per library (3)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="later samples a process (1)")
    add_arguments(parser, "diffusers")
    parser.add_argument("--folder", type=Path, help="keep the random weights here (a temporary folder)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--outputs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "karlo"
        medians = [compare(args, part, folder) for part in (PARTS if args.part == "whole" else [args.part])]
    if args.part == "whole":
        peers, times = list(medians[0]), ("load", "first", "later")
        total = {peer: {k: sum(part[peer][k] for part in medians) for k in times} for peer in peers}
        print("whole, the sum of the parts")
        for peer, sums in total.items():
            print(f"{peer:20}" + "".join(f"  {k} {v:7.2f}" for k, v in sums.items()))
        most = {peer: max(held(part)[peer] for part in medians) for peer in peers}
        what = f"Karlo whole, {args.captions} captions, the sum of its parts"
        record(args.json, what, {peer: [total[peer]["later"]] for peer in peers}, most)


if __name__ == "__main__":
    main()
