"""Checks of autoencoders, of codebooks, and of the networks that draw codes."""

from __future__ import annotations

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluate.doctor.limits import CODE_USE, DECODED, SPREAD_RATIO
from unclip_jax.evaluate.doctor.report import Finding, finding
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.models.quantiser import usage
from unclip_jax.sampling.text_to_image import system_of

CODERS = ("dvae", "dvae_strided", "vqvae", "vq_autoencoder")  # kinds that make codes of a picture
DRAW_CODES = ("dalle", "dalle_mini", "vqvae2")  # systems whose stages have `codes`
LARGEST = 256  # side of the pictures, where the bundle does not say which size it draws


def _pictures(subject: Subject, name: str) -> np.ndarray:
    # The pictures that one step is measured on, at the size that the bundle draws.
    try:
        side = system_of(subject.sampler.bundle).sizes(subject.sampler.bundle)[-1]
    except UserError:  # the part that draws is not there
        side = min(LARGEST, *(min(picture.shape[:2]) for picture in subject.pictures))
    factor = subject.sampler.network(name).module.factor
    return subject.images(max(side // factor, 1) * factor)[: subject.noised]


def decoded(subject: Subject, name: str) -> Finding:
    """The error of pictures that are encoded and decoded, by their variance."""
    network, x = subject.sampler.network(name), _pictures(subject, name)

    def make():
        def run(params, images):
            out = network.with_params(params).apply(images)
            return out[0] if isinstance(out, tuple) else out

        return run

    run = subject.sampler.program(("doctor decoded", name), make)
    batch = lambda rows: run(subject.sampler.params[name], subject.sampler.rows(x, rows))
    made = subject.sampler.in_batches(batch, len(x), [name])
    value = np.mean(np.square(made - x)) / max(float(np.mean(np.var(x, axis=0))), 1e-12)
    change = (
        "it does not give back what it is given (1 is the mean picture): train it longer, and check that its "
        "weights and configuration belong together"
    )
    return finding(name, "error of decoded pictures, by their variance", value, DECODED, change)


def _codes(subject: Subject, name: str, count: int) -> list[np.ndarray]:
    # The codes (count, h, w) of real pictures, one array for each level.
    def make():
        network, x = subject.sampler.network(name), _pictures(subject, name)
        encode = lambda params, x: network.with_params(params).apply(x, method="encode_codes")
        run = subject.sampler.program(("doctor codes", name), lambda: encode)
        batch = lambda rows: run(subject.sampler.params[name], subject.sampler.rows(x, rows))
        levels = subject.config(name)["model"].get("levels", 2) if _is_vqvae(subject, name) else 1
        return subject.sampler.in_batches(batch, len(x), [name] * levels)

    return [codes[:count] for codes in subject.once(("codes", name), make)]


def _is_vqvae(subject: Subject, name: str) -> bool:
    return subject.config(name)["kind"] == "vqvae"


def used(subject: Subject, name: str) -> Finding:
    """The perplexity of the codes of real pictures, by the largest possible: the smaller of the number of
    codes and of places."""
    size = subject.sampler.network(name).module.codes
    levels = _codes(subject, name, len(subject.pictures))
    shares = [float(usage(codes, size).perplexity) / min(size, codes.size) for codes in levels]
    more = {f"level {i}": share for i, share in enumerate(shares)}
    change = "most of the codebook is dead: train with quantiser.restart, or a slower temperature"
    figure = "perplexity of real pictures' codes, by the largest"
    return finding(name, figure, min(shares), CODE_USE, change, more=more)


def drawn_use(subject: Subject, name: str) -> Finding | None:
    """The perplexity of drawn codes, by that of as many real pictures' codes; None where the system cannot
    draw, or the part draws no codes of its own."""
    bundle = subject.sampler.bundle
    coder = next((part for part in subject.names(*CODERS) if part not in subject.broken), None)
    if coder is None or bundle.system not in DRAW_CODES:
        return None
    level = subject.config(name).get("level", 0)
    stages = subject.once("drawn codes", lambda: _draw(subject))
    drawn = stages.codes[level] if bundle.system == "vqvae2" else stages.codes
    drawn = drawn[: subject.noised]
    real = _codes(subject, coder, len(drawn))[level]
    size = subject.sampler.network(coder).module.codes
    found = {"drawn": float(usage(drawn, size).perplexity), "real": float(usage(real, size).perplexity)}
    change = (
        "it draws few of the codes that pictures have where the ratio is small, and noise where it is large: "
        "check temperature, top_k and guidance_scale, or train it longer"
    )
    figure = "perplexity of drawn codes, by that of real ones"
    return finding(name, figure, found["drawn"] / found["real"], SPREAD_RATIO, change, (coder,), found)


def _draw(subject: Subject):
    system, captions = system_of(subject.sampler.bundle), subject.captions[: subject.drawn]
    return system.sample(subject.sampler, captions, seed=subject.seed, progress=subject.progress)
