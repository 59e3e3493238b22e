"""Feature networks equal their libraries', from the bytes of an image to the features."""

import jax
import numpy as np
import pytest
import torch

from tests.checkpoint import peers
from tests.fidelity import torch_fidelity
from unclip_jax.data import ops
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.evaluate.features import open_network
from unclip_jax.sharding import make_mesh

RNG = np.random.default_rng(0)
# Smaller and larger than the networks' squares, of one pixel, and exactly of FID's square.
SIZES = ((64, 64), (320, 411), (1, 1), (299, 299), (301, 17))


def images(sizes=SIZES):
    """Noise of several scales, so that neighbours differ and areas do too."""
    made = []
    for height, width in sizes:
        coarse = RNG.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
        noise = RNG.integers(-40, 41, (height, width, 3))
        made.append(np.clip(coarse[:height, :width] + noise, 0, 255).astype(np.uint8))
    return made


def relative(ours, theirs):
    """The largest difference, in parts of the largest value."""
    assert theirs.std() > 1e-3
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def tf1_resize(image, size):
    """torch-fidelity's resize of an image (H, W, 3)."""
    resize = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return resize(x, size=(size, size), align_corners=False)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [299, 224, 7])
def test_resize_of_tensorflow_1(size):
    """Equal to torch-fidelity's and to TensorFlow's, bit for bit."""
    import tensorflow as tf

    for image in images():
        ours = ops.resize_tf1(image, size)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, tf1_resize(image, size))
        theirs = tf.compat.v1.image.resize_bilinear(image[None].astype(np.float32), (size, size))[0]
        np.testing.assert_array_equal(ours, theirs.numpy())


# ------------------------------------------------------------------------------------------- Inception
@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the file of pytorch-fid and torch-fidelity."""
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-random.pth"
    torch.save(peers.inception_state(), file)
    return file


@pytest.fixture(scope="module")
def inception(inception_file):
    """Their network on two devices, an image on each."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    return open_network("inception", inception_file.parent, mesh=mesh, rows=1)


def test_inception(inception, inception_file):
    """All features equal torch-fidelity's, which resizes with its own code; the last batch is padded."""
    theirs = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file
    )
    seen, pictures = [], images()
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        pool, logits = (
            torch.cat(values).numpy()
            for values in zip(*(theirs(torch.from_numpy(i).permute(2, 0, 1)[None]) for i in pictures))
        )
    spatial = torch.cat(seen)[:, :7].permute(0, 2, 3, 1).flatten(1).numpy()  # as ADM: height, width, channel
    done = []
    ours = inception(pictures, progress=lambda *counts: done.append(counts))
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert {name: value.shape[1] for name, value in ours.items()} == inception.outputs
    assert inception.outputs == {"pool": 2048, "spatial": 2023, "logits": 1008}
    for name, expected in {"pool": pool, "spatial": spatial, "logits": logits}.items():
        assert ours[name].dtype == np.float32
        assert relative(ours[name], expected) < 1e-5, name
    assert inception.resize == "tf1-bilinear 299"


def test_what_images_may_be(inception):
    for wrong in ([], [np.zeros((4, 4), np.uint8)], [np.zeros((4, 4, 3), np.float32)]):
        with pytest.raises(InputError, match="give at least one|must be uint8"):
            inception(wrong)


def test_features_that_are_not_finite(inception, monkeypatch):
    """They are one line that names the network."""
    program = inception._program

    def broken(x):
        return program(x) | {"spatial": jax.numpy.full((2, 2023), np.nan)}

    object.__setattr__(inception, "_program", broken)
    with pytest.raises(NumericalError, match="inception made spatial features that are not finite"):
        inception(images([(8, 8)]))
    object.__setattr__(inception, "_program", program)


def test_missing_weights_and_outputs(inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `unclip fetch inception` once"):
        open_network("inception")
    with pytest.raises(KeyError, match="unknown feature network 'vgg'; choose one of inception"):
        open_network("vgg")
    with pytest.raises(InputError, match="make pool, spatial, logits, but no 'softmax'"):
        open_network("inception", inception_file, outputs=["softmax"])
