"""DINOv2's sizes, and how its positions are resized."""

import math

import jax
import numpy as np
import pytest
import torch

from unclip_jax.checkpoint.convert import array, shapes_of
from unclip_jax.errors import InputError
from unclip_jax.models.dinov2 import DINOv2, cubic_matrix

SIZES = {"S": (384, 12, 6, 22_056_576), "B": (768, 12, 12, 86_580_480), "L": (1024, 24, 16, 304_368_640)}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("registers", [None, 4])
def test_published_sizes(name, registers):
    """The counts of the published weights, without the mask token (a vector)."""
    width, layers, heads, count = SIZES[name]
    model = DINOv2(width, layers, heads, patch_size=14, positions=37, registers=registers)
    shapes = shapes_of(model.init, array(1, 518, 518, 3))
    expected = count - width + (registers or 0) * width
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected
    made = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), shapes, array(2, 224, 224, 3))
    assert made.shape == (2, width)


@pytest.mark.parametrize("size, new", [(37, 16), (4, 7), (5, 5), (37, 1)])
@pytest.mark.parametrize("antialias, offset", [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_resize_of_positions(size, new, antialias, offset):
    """Equal to PyTorch's, with and without the offset of the authors' code."""
    table = torch.randn(1, 3, 4, size)
    wanted = {"scale_factor": (1.0, (new + offset) / size)} if offset else {"size": (4, new)}
    theirs = torch.nn.functional.interpolate(table, mode="bicubic", antialias=antialias, **wanted)
    matrix = cubic_matrix(size, new, size / (new + offset), antialias)
    np.testing.assert_allclose(table.numpy() @ matrix.T, theirs, atol=2e-5)


def test_images_of_other_sides_are_refused():
    with pytest.raises(InputError, match="multiples of 14 pixels, got 224x225"):
        shapes_of(DINOv2(16, 1, 2, 14, 2).init, array(1, 224, 225, 3))
