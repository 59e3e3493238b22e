"""Sampling Karlo's prior at full size here and in diffusers: the same architecture, the same random weights, the same steps.

    python benchmarks/sampling.py --part prior --captions 1 --rounds 3        # needs torch and diffusers: pip install -e ".[test]"

Each library runs in a process of its own, in turn, so that neither holds memory or threads while the other is timed. Told are: seconds to
load, to the first sample, of a later one; peak resident memory; and the ratio of the later ones, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH = 77
SIZES = {  # keyword arguments of PriorTransformer
    "full": {},  # the public one, 1.02 billion parameters
    "small": {"num_attention_heads": 8, "num_layers": 6, "embedding_dim": 768},
}
GUIDANCE = 4.0


def make(folder: Path, size: str) -> None:
    """Writes the peer's prior at random weights, once."""
    if (folder / "config.json").is_file():
        return
    import torch
    from diffusers import PriorTransformer

    torch.manual_seed(0)
    prior = PriorTransformer(**SIZES[size])
    with torch.no_grad():
        for name in ("positional_embedding", "prd_embedding"):  # zero when fresh
            torch.nn.init.normal_(getattr(prior, name), std=0.02)
        prior.clip_std.fill_(1.0)
    prior.save_pretrained(folder, max_shard_size="100GB")


def inputs(captions: int, dim: int) -> dict[str, np.ndarray]:
    """Random captions of both guidance halves, the unconditional first; 20 tokens of 77 are theirs."""
    rng = np.random.default_rng(0)
    states, embed = rng.normal(size=(captions + 1, LENGTH, dim)), rng.normal(size=(captions + 1, dim))
    return {"states": np.float32(states), "embed": np.float32(embed), "noise": np.float32(rng.normal(size=(captions, dim)))}


def diffusers_sampler(folder: Path, captions: int, steps: int, compiled: bool):
    """The loop of UnCLIPPipeline, as a function without arguments."""
    import torch
    from diffusers import PriorTransformer, UnCLIPScheduler

    prior = PriorTransformer.from_pretrained(folder).eval()
    if compiled:
        prior = torch.compile(prior)
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    given = {k: torch.from_numpy(v) for k, v in inputs(captions, prior.config.embedding_dim).items()}
    both = lambda a: torch.cat([a[:1].expand(captions, *a.shape[1:]), a[1:]])  # noqa: E731
    mask = torch.arange(LENGTH)[None].expand(2 * captions, -1) < 20

    @torch.no_grad()
    def sample():
        torch.manual_seed(0)
        scheduler.set_timesteps(steps)
        x, times = given["noise"], scheduler.timesteps
        for i, t in enumerate(times):
            out = prior(
                torch.cat([x] * 2), t, proj_embedding=both(given["embed"]), encoder_hidden_states=both(given["states"]), attention_mask=mask
            ).predicted_image_embedding
            empty, text = out.chunk(2)
            out = empty + GUIDANCE * (text - empty)
            x = scheduler.step(out, t, x, prev_timestep=times[i + 1] if i + 1 < len(times) else None).prev_sample
        return x.numpy()

    return sample


def our_sampler(folder: Path, captions: int, steps: int):
    """`generate.sample_prior` in one compiled program."""
    import jax
    import jax.numpy as jnp

    from unclip_jax.checkpoint.convert import convert, shapes_of
    from unclip_jax.checkpoint.files import open_weights, read_json
    from unclip_jax.checkpoint.rules import karlo
    from unclip_jax.generate import SamplingOptions, TextConditioning, build_model, sample_prior

    model_config = karlo.prior_model(read_json(folder / "config.json"))
    dim = model_config["embed_dim"]
    config = {"kind": "prior_diffusion", "model": model_config, "diffusion": karlo.schedule({}, "x0", "prior")}
    config["embedding_space"] = {"kind": "whitened", "mean": np.zeros(dim), "std": np.ones(dim)}
    model = build_model(config)
    text = {"text_embed": jnp.zeros((1, dim)), "text_states": jnp.zeros((1, LENGTH, dim)), "text_mask": jnp.ones((1, LENGTH), bool)}
    shapes = shapes_of(model.init, jnp.zeros((1, dim)), jnp.zeros(1), **text)
    params = jax.device_put(convert(open_weights(folder), karlo.PRIOR, shapes, "the prior"))
    given = inputs(captions, dim)
    mask = jnp.arange(LENGTH)[None] < 20
    conditioning = TextConditioning(given["embed"][1:], given["states"][1:], jnp.repeat(mask, captions, axis=0))
    empty = TextConditioning(given["embed"][:1], given["states"][:1], mask)
    options = SamplingOptions(steps, guidance_scale=GUIDANCE, clip=5.0)
    run = jax.jit(lambda params, text, empty, key: sample_prior(model, params, config, text, empty, key, options))
    return lambda: np.asarray(run(params, conditioning, empty, jax.random.key(0)))


def worker(args: argparse.Namespace) -> None:
    """Loads and samples in one library; prints what it took as JSON."""
    started = time.perf_counter()
    if args.worker == "unclip_jax":
        sample = our_sampler(args.folder, args.captions, args.steps)
    else:
        sample = diffusers_sampler(args.folder, args.captions, args.steps, args.worker == "diffusers compiled")
    seconds = [time.perf_counter() - started]
    for _ in range(1 + args.repeats):
        started = time.perf_counter()
        assert np.isfinite(sample()).all()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"load": seconds[0], "first": seconds[1], "later": min(seconds[2:]), "peak": peak}))


def main() -> None:
    """Runs the libraries in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["prior"], default="prior")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--captions", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=25, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each library (3)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="later samples in each process, of which the best counts (1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--folder", type=Path, help="where the random weights are kept (a temporary folder)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "prior"
        make(folder, args.size)
        peers = ["diffusers", *(["diffusers compiled"] if args.compile else []), "unclip_jax"]
        rows: dict[str, list[dict]] = {peer: [] for peer in peers}
        for i in range(args.rounds):
            for peer in peers:
                command = [sys.executable, __file__, "--worker", peer, "--folder", str(folder), "--size", args.size]
                for name in ("captions", "steps", "repeats"):
                    command += [f"--{name}", str(getattr(args, name))]
                env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                rows[peer].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {i + 1}  {peer:20}" + "".join(f"  {k} {v:.2f}" for k, v in rows[peer][-1].items()), flush=True)
    print(f"\n{args.part}, {args.size}, {args.captions} captions, {args.steps} steps, guided; seconds and GiB, medians of {args.rounds}")
    for peer in peers:
        print(f"{peer:20}" + "".join(f"  {k} {np.median([r[k] for r in rows[peer]]):7.2f}" for k in rows[peer][0]))
    for peer in peers[:-1]:
        ratios = [theirs["later"] / ours["later"] for theirs, ours in zip(rows[peer], rows["unclip_jax"])]
        print(f"{peer} / unclip_jax: {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
