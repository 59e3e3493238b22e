"""The safety checker against diffusers' at the same random weights, near its thresholds."""

import warnings

import jax
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.checkpoint.peers import nchw, run_part
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.models.clip import MEAN, STD
from unclip_jax.sampling.latent import flagged
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image

ROWS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checker whose thresholds flag some pictures; the checker; pictures of its size."""
    warnings.filterwarnings("ignore")
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = tmp_path_factory.mktemp("safety") / "sd"
    pipeline = peers.stable_diffusion(folder)
    text, vision = peers.clip_configs()
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=peers.DIM)
    checker = peers.randomize(StableDiffusionSafetyChecker(config), 9)
    image = np.float32(np.random.default_rng(0).uniform(-1, 1, (ROWS, 16, 16, 3)))
    seen = nchw(np.float32(((image + 1) / 2 - np.array(MEAN)) / np.array(STD)))
    with torch.no_grad():
        z = checker.visual_projection(checker.vision_model(seen)[1])
        cosines = lambda table: torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(table).T
        # Half of the pictures are over one threshold of each kind; all are within the 0.01 of some other.
        for table, limits in (
            (checker.special_care_embeds, checker.special_care_embeds_weights),
            (checker.concept_embeds, checker.concept_embeds_weights),
        ):
            found = cosines(table)
            limits.copy_(found.max(0).values + 0.005)
            limits[0] = found[:, 0].median() - 0.002
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(**size))
    pipeline.save_pretrained(folder)
    return folder, checker, image, seen


def test_flags_equal_diffusers(made):
    folder, checker, image, seen = made
    with torch.no_grad():
        _, wanted = checker(seen, np.ones((ROWS, 4, 4, 3), np.float32))
    assert 0 < sum(wanted) < ROWS
    bundle = load_bundle(folder)
    np.testing.assert_array_equal(run_part(bundle, "safety", image), wanted)
    part = bundle.parts["safety"]
    assert part.config["kind"] == "safety"
    raised = jax.tree.map(lambda a: a, part.params) | {
        "concept_threshold": part.params["concept_threshold"] + 1
    }
    part.params.update(raised)
    assert not run_part(bundle, "safety", image).any()


def test_pictures_of_a_bundle(made):
    """The sampler's pictures are resized to the checker's size; a bundle without a checker flags nothing."""
    folder, checker, image, _ = made
    bundle = load_bundle(folder)
    large = np.repeat(np.repeat(np.uint8(127.5 * (image + 1)), 2, axis=1), 2, axis=2)
    found = flagged(Sampler(bundle), large)
    assert found.shape == (ROWS,) and found.dtype == bool
    del bundle.parts["safety"]
    assert not flagged(Sampler(bundle), large).any()


def test_flagged_pictures_are_black(made, tmp_path, caplog):
    """With thresholds that all pictures exceed, they are black and a warning says so; `filter` keeps them."""
    bundle = load_bundle(made[0])
    bundle.parts["safety"].params["concept_threshold"] = np.full(17, -2, np.float32)
    sampler, captions = Sampler(bundle), ["a fox", "a cat"]
    options = {"steps": 2, "guidance_scale": 2.0}
    assert not text_to_image(sampler, captions, options={"latent": options}).any()
    assert "flagged 2 of 2 pictures" in caplog.text and "--no-filter" in caplog.text
    assert text_to_image(sampler, captions, options={"latent": options | {"filter": False}}).std() > 10
