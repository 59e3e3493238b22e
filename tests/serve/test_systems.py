"""Other systems than unCLIP are served through their row of `SYSTEMS`."""

import numpy as np
import pytest

from tests.models.test_safety import made  # noqa: F401
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.text_to_image import text_to_image
from unclip_jax.serve import fields
from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.models import Model


def test_a_folder_of_stable_diffusion(made):  # noqa: F811
    """Pictures are those of `text_to_image`; requests that differ in the negative caption share a batch."""
    sampler = Sampler(load_bundle(made[0]))
    model = Model("sd", sampler)
    assert model.verbs == ["generations", "edits"] and model.priors == []
    assert model.describe()["system"] == "latent"
    tasks = []
    for negative in ("a heart", "a car"):
        asked = {"prompt": "a fox", "steps": 2, "guidance_scale": 3.0, "negative_prompt": negative}
        values = fields.check_fields("generations", asked)
        assert model.prior(values) is None
        tasks.append(model.generate("a fox", 1, 5, None, model.options(values, None)))
    assert tasks[0].key == tasks[1].key
    drawn = tasks[0].draw([*tasks[0].rows, *tasks[1].rows])
    for negative, (picture,) in zip(("a heart", "a car"), drawn):
        options = {"latent": {"steps": 2, "guidance_scale": 3.0, "negative": negative}}
        alone = text_to_image(sampler, "a fox", seed=5, options=options)[0].astype(int)
        assert np.abs(alone - picture).max() <= 1
    with pytest.raises(ApiError, match="has no prior 'none'"):
        model.prior({"prior": "none"})
    with pytest.raises(ApiError, match="has no prior: leave"):
        model.options({"candidates": 2}, None)


def test_the_filter_is_on_unless_told_otherwise(made):  # noqa: F811
    sampler = Sampler(load_bundle(made[0]))
    filtered, open_ = Model("sd", sampler), Model("sd", sampler, no_filter=True)
    assert sampler.options(filtered.options({}, None))["latent"].filter
    assert not sampler.options(open_.options({"steps": 3}, None))["latent"].filter
    assert open_.options({"steps": 3}, None)["latent"]["steps"] == 3
    assert not open_.first().rows[0][-1]["latent"]["filter"]
