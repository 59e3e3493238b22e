"""`unclip doctor` on systems without unCLIP's decoder: planted faults, and pictures as the cascade draws."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import systems
from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data import ops
from unclip_jax.data.sources import make_source
from unclip_jax.evaluate.doctor import captioned, codes, denoising, pictures
from unclip_jax.evaluate.doctor.examine import examine
from unclip_jax.evaluate.doctor.load import Opened, make_subject
from unclip_jax.evaluate.doctor.report import FAULT, OK, WARN
from unclip_jax.evaluate.doctor.subject import Subject
from unclip_jax.generate.networks import part_schedule
from unclip_jax.sampling.text_to_image import system_of

SHORT = ("a red fox", "a", "red", "fox, a")  # words that the small tokenizer of T5 knows


def subject_of(bundle, drawn=2):
    source = make_source({"name": "emoji", "split": "val"})
    made = make_subject(Opened(bundle, {}), source, rows=16, drawn=drawn)
    return dataclasses.replace(made, captions=[SHORT[i % len(SHORT)] for i in range(len(made.captions))])


def with_noise(monkeypatch, blur):
    """Networks that know the noise, up to a share of it, blur(inputs) of each row."""

    def output(self, name, x, t, inputs, params=None):
        x0 = denoising.case_of(self, name).x0
        abar = part_schedule(self.config(name)).abar(t).reshape(-1, 1, 1, 1)
        eps = (x - np.sqrt(abar) * np.tile(x0, (len(x) // len(x0), 1, 1, 1))) / np.sqrt(1 - abar)
        return np.float32(eps * (1 + blur(inputs).reshape(-1, 1, 1, 1)))

    monkeypatch.setattr(Subject, "network_output", output)


@pytest.fixture(scope="module")
def imagen():
    return subject_of(systems.imagen())


@pytest.mark.parametrize("trained_with, verdict", [(1.0, OK), (0.5, FAULT), (2.0, FAULT)])
def test_the_scale_of_text_states(imagen, monkeypatch, trained_with, verdict):
    """A network that was trained with T5's states at another scale fits better with that one."""
    norm = np.linalg.norm(imagen.caption_inputs("imagen")["text_states"], axis=-1).mean()

    def blur(inputs):
        seen = np.linalg.norm(inputs["text_states"], axis=-1).mean()
        return np.full(len(inputs["text_states"]), 0.1 + abs(seen / (trained_with * norm) - 1))

    with_noise(monkeypatch, blur)
    found = captioned.states_scale(imagen, "imagen")
    assert found.verdict == verdict
    assert found.change.startswith(
        {1.0: "", 0.5: "states at half norm fits", 2.0: "states at twice norm fits"}[trained_with]
    )


@pytest.mark.parametrize("listens, verdict", [(True, OK), (False, WARN)])
def test_its_own_caption(imagen, monkeypatch, listens, verdict):
    own = imagen.caption_inputs("imagen")["text_states"][: imagen.noised]

    def blur(inputs):
        states = inputs["text_states"]
        other = np.abs(states - np.tile(own, (len(states) // len(own), 1, 1))).max(axis=(1, 2)) > 1e-6
        return 0.1 + listens * other

    with_noise(monkeypatch, blur)
    assert captioned.own_caption(imagen, "imagen").verdict == verdict
    assert captioned.own_caption(imagen, "imagen_16") is None


@pytest.mark.parametrize("noise, verdict", [(0.0, OK), (1.0, FAULT)])
def test_true_and_drawn_low_resolution(imagen, monkeypatch, noise, verdict):
    """An upsampler that enlarges plainly keeps what it is given; one that adds noise does not."""
    rng = np.random.default_rng(0)

    def draw(self, name, images=None):
        if images is None:
            return np.tile(np.linspace(-1, 1, 8, dtype=np.float32)[:, None], (self.drawn, 8, 1, 3))
        large = np.stack([ops.resize(image, 16) for image in images])
        return np.float32(large + noise * rng.normal(size=large.shape))

    monkeypatch.setattr(Subject, "draw_captioned", draw)
    subject = dataclasses.replace(imagen, kept={})
    found = pictures.faithful(subject, "imagen_16")
    assert found.verdict == verdict and set(found.more) == {"imagen's low_res", "true low_res"}
    assert pictures.to_enlarged(subject, "imagen_16").value == pytest.approx(1, abs=1e-4) or noise
    assert pictures.faithful(subject, "imagen") is None and pictures.to_enlarged(subject, "imagen") is None


@pytest.fixture(scope="module")
def dalle():
    return subject_of(systems.dalle())


def test_the_error_of_decoded_pictures(dalle):
    """By the variance of the pictures at the size that the bundle draws."""
    network = dalle.sampler.network("dvae")
    x = dalle.images(8)[: dalle.noised]
    made = jax.jit(lambda x: network.apply(x))(x)
    found = codes.decoded(dalle, "dvae")
    assert found.value == pytest.approx(
        float(np.mean((made - x) ** 2) / np.mean(np.var(x, axis=0))), rel=1e-3
    )
    assert found.verdict == FAULT  # its weights are random


def test_a_codebook_of_which_one_code_is_used(dalle):
    """Also where the transformer draws one code, and pictures have many."""
    sound = codes.used(dalle, "dvae")
    assert 1 / 9 < sound.value <= 1
    bundle = dalle.sampler.bundle
    spoilt = jax.tree.map(np.copy, jax.device_get(bundle.parts["dvae"].params))
    bias = spoilt["encoder"]["conv_out"]["bias"]
    bias[:] = np.where(np.arange(len(bias)) == 3, 100, 0)
    parts = bundle.parts | {"dvae": Part(bundle.parts["dvae"].config, spoilt)}
    collapsed = subject_of(dataclasses.replace(bundle, parts=parts))
    assert codes.used(collapsed, "dvae").value == pytest.approx(1 / 9, rel=1e-4)
    rng = np.random.default_rng(0)
    many = rng.integers(0, 9, (2, 4, 4), np.int32)
    for drawn, verdict in ((many[::-1], OK), (np.zeros_like(many), FAULT)):
        kept = {"drawn codes": type("Stages", (), {"codes": drawn}), ("codes", "dvae"): (many,)}
        found = codes.drawn_use(dataclasses.replace(dalle, kept=kept), "dalle")
        assert found.verdict == verdict and 1 <= found.more["drawn"] <= found.more["real"] + 1e-4


def test_what_reads_the_captions_of_imagen(imagen):
    """T5, or the CLIP under the network of small pictures; nothing where that network is missing."""
    bundle, clip = imagen.sampler.bundle, systems.random_bundle().parts["clip"]
    part = bundle.parts["imagen"]
    frozen = {"clip": params_hash(clip.params)}
    parts = {"clip": clip, "imagen": Part(part.config | {"frozen": frozen}, part.params)}
    subject = subject_of(Bundle(parts, "imagen", bundle.sampling))
    assert (imagen.reader("imagen_16"), subject.reader("imagen")) == ("t5", "clip")
    found = subject.caption_inputs("imagen")
    np.testing.assert_allclose(found["text_states"], subject.texts.states, atol=1e-5)
    np.testing.assert_array_equal(found["text_mask"], subject.texts.mask)
    alone = subject_of(Bundle({"imagen_16": bundle.parts["imagen_16"], "t5": bundle.parts["t5"]}), drawn=0)
    assert alone.reader("imagen_16") is None
    untested = [line for line in examine(alone, "", "").untested if line.startswith("imagen_16")]
    assert untested and all("the network of small pictures" in line for line in untested)


def test_a_second_clip():
    """Of a CLIP under another name, as GLIDE's of noised images, the weights are tested, with or without the
    part `clip` beside it."""
    clip = systems.random_bundle().parts["clip"]
    report = examine(subject_of(Bundle({"noised_clip": clip}), drawn=0), "", "")
    assert len(report.findings) == 2 and {found.stage for found in report.findings} == {"noised_clip"}
    both = examine(subject_of(Bundle({"clip": clip, "text": clip}), drawn=0), "", "")
    assert [found.stage for found in both.findings].count("text") == 2 < len(both.findings) - 2


# ------------------------------------------------------------------------------------------ whole
@pytest.mark.slow
@pytest.mark.parametrize("name", ["glide", "imagen"])
def test_pictures_are_those_of_the_cascade(name):
    """Base network and upsampler draw for the doctor what the system draws."""
    subject = subject_of(getattr(systems, name)())
    system = system_of(subject.sampler.bundle)
    small, large = system.sample(subject.sampler, subject.captions[:2], seed=subject.seed).images
    np.testing.assert_allclose(subject.drawn_base(name), small, atol=1e-4)
    np.testing.assert_allclose(subject.enlarge(f"{name}_16", small), large, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glide", "imagen", "dalle", "dalle_mini", "vqvae2", "latent"])
def test_every_part_is_examined(name):
    """Each part that computes something has a figure beyond its weights."""
    subject = subject_of(getattr(systems, name)())
    report = examine(subject, name, "")
    figures = {
        part: {f.figure for f in report.findings if f.stage == part} for part in subject.sampler.bundle.parts
    }
    bare = {part for part, found in figures.items() if len(found) <= 2}
    assert bare <= {"t5", "latent", "clip"} and all(figures.values())
