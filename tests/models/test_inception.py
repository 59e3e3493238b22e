"""The sizes of FID's Inception. `tests/run/test_features.py` compares its values."""

import math

import jax
import pytest

from unclip_jax.checkpoint.convert import array, shapes_of
from unclip_jax.errors import InputError
from unclip_jax.models.inception import SIZE, Inception


@pytest.mark.parametrize("logits, count", [(None, 21_802_784), (1008, 21_802_784 + 2048 * 1008)])
def test_parameters_and_outputs(logits, count):
    """The numbers of the graph, and of `pt_inception-2015-12-05` without gains, counters and bias."""
    model, image = Inception(logits), array(2, SIZE, SIZE, 3)
    shapes = shapes_of(model.init, image)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    made = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), shapes, image)
    widths = {"pool": 2048, "spatial": 2023} | ({"logits": 1008} if logits else {})
    assert {name: (value.shape, str(value.dtype)) for name, value in made.items()} == {
        name: ((2, width), "float32") for name, width in widths.items()
    }


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="takes 299x299 images, got 64x64"):
        shapes_of(Inception().init, array(1, 64, 64, 3))
