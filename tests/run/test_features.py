"""Feature networks equal their libraries', from the bytes of an image to the features."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoint import peers
from tests.fidelity import torch_fidelity
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_part
from unclip_jax.data import ops
from unclip_jax.errors import InputError, NumericalError
from unclip_jax.evaluate.distance import recipe_of
from unclip_jax.evaluate.statistics import Statistics, check_comparable
from unclip_jax.evaluate.streaming import PLAIN
from unclip_jax.run.features import open_network
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
    seen, pictures = [], images(SIZES[:3])
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        pool, logits = (
            torch.cat(values).numpy()
            for values in zip(*(theirs(torch.from_numpy(i).permute(2, 0, 1)[None]) for i in pictures))
        )
    spatial = torch.cat(seen)[:, :7].permute(0, 2, 3, 1).flatten(1).numpy()  # as ADM: height, width, channel
    done = []
    ours = inception(pictures, progress=lambda *counts: done.append(counts))
    assert done == [(2, 3), (3, 3)]
    assert {name: value.shape[1] for name, value in ours.items()} == inception.outputs
    assert inception.outputs == {"pool": 2048, "spatial": 2023, "logits": 1008}
    for name, expected in {"pool": pool, "spatial": spatial, "logits": logits}.items():
        assert ours[name].dtype == np.float32
        assert relative(ours[name], expected) < 1e-5, name
    assert inception.resize == "tf1-bilinear 299"


def test_statistics_state_the_layers_that_make_the_features(inception, inception_file, tmp_path):
    """Without its classifier, as `unclip fetch inception` has it, the network makes the same features: both
    compare. With another filter they do not."""
    part = load_part(inception_file.parent, "inception")[0]
    config = part.config | {"model": part.config["model"] | {"logits": None}}
    params = {name: value for name, value in part.params.items() if name != "logits"}
    save_bundle(Bundle({"inception": Part(config, params)}), tmp_path / "whole")
    whole = open_network("inception", tmp_path / "whole")
    assert whole.hash != inception.hash and "logits" not in whole.outputs
    assert recipe_of(whole, PLAIN) == recipe_of(inception, PLAIN)
    leaves, tree = jax.tree.flatten(params)
    leaves[0] = leaves[0] + np.float32(1e-3)
    moved = jax.tree.unflatten(tree, leaves)
    save_bundle(Bundle({"inception": Part(config, moved)}), tmp_path / "moved")
    other = recipe_of(open_network("inception", tmp_path / "moved"), PLAIN)
    with pytest.raises(InputError, match="were made differently: network hash"):
        check_comparable(Statistics("a", other, 9), Statistics("b", recipe_of(inception, PLAIN), 9))


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
    with pytest.raises(
        KeyError, match="unknown feature network 'vgg'; choose one of inception, dinov2, clip"
    ):
        open_network("vgg")
    with pytest.raises(InputError, match="make pool, spatial, logits, but no 'softmax'"):
        open_network("inception", inception_file, outputs=["softmax"])


# ------------------------------------------------------------------------------------------- DINOv2 and CLIP
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2(registers, tmp_path):
    """As FD-DINOv2's code: PIL's bicubic resize of the whole image to 224, ImageNet's statistics, the class
    token; and the positions resized as in DINOv2's own repository, with an offset that transformers lacks."""
    from tests.checkpoint.providers.test_dinov2 import saved

    theirs = saved(tmp_path, registers, image_size=518)

    def with_offset(embeddings, height, width):
        table, (rows, columns) = theirs.embeddings.position_embeddings, (height // 14, width // 14)
        square = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / 37, (columns + 0.1) / 37)
        square = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], square.flatten(2).transpose(1, 2)], dim=1)

    def features(pictures):
        seen = [Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC) for i in pictures]
        pixels = (np.float32(seen) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            return theirs(peers.nchw(np.float32(pixels))).pooler_output.numpy()

    pictures = images()
    plain = features(pictures)
    if not registers:
        theirs.embeddings.interpolate_pos_encoding = with_offset
    network = open_network("dinov2", tmp_path, rows=2)
    ours = network(pictures)["pool"]
    assert relative(ours, features(pictures)) < 1e-5
    assert registers or relative(ours, plain) > 5e-5
    assert (dict(network.outputs), network.resize) == ({"pool": 32}, "bicubic 224")
    with pytest.raises(InputError, match="dinov2 has no text encoder"):
        network.text(["a fox"])


def test_clip(tmp_path):
    """Images as CMMD's code prepares them, captions with the folder's tokenizer, in a padded batch."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    text, image = peers.clip_configs()
    theirs = peers.randomize(
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=peers.DIM)
        )
    )
    theirs.save_pretrained(tmp_path)
    tokenizer = peers.write_tokenizer(tmp_path)
    network = open_network("clip", tmp_path, rows=2)
    pictures, seen = images(), []
    for picture in map(Image.fromarray, pictures):
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        seen.append(np.float32(square.resize((16, 16), Image.Resampling.BICUBIC)))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = peers.nchw(np.float32((np.stack(seen) / 255 - mean) / std))
    captions = ["a red fox", "two", ""]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        z_image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output).numpy()
        z_text = theirs.text_projection(theirs.text_model(ids).pooler_output).numpy()
    assert relative(network(pictures)["pool"], z_image) < 1e-5
    assert relative(network.text(captions), z_text) < 1e-5
    assert (dict(network.outputs), network.resize) == ({"pool": peers.DIM}, "centre square, bicubic 16")
    with pytest.raises(InputError, match="no captions: give at least one"):
        network.text([])
    half, kept = CLIPVisionModelWithProjection(image), ("vision_model.", "visual_projection.")
    half.load_state_dict({name: x for name, x in theirs.state_dict().items() if name.startswith(kept)})
    half.save_pretrained(tmp_path / "image")
    alone = open_network("clip", tmp_path / "image")
    assert (alone.features_hash, alone.hash != network.hash) == (network.features_hash, True)


def test_what_clip_lacks(tmp_path):
    """A text encoder alone makes no features of images, and an image encoder none of captions."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text, image = peers.clip_configs()
    CLIPTextModelWithProjection(text).save_pretrained(tmp_path / "text")
    peers.write_tokenizer(tmp_path / "text")
    CLIPVisionModelWithProjection(image).save_pretrained(tmp_path / "image")
    with pytest.raises(InputError, match="no image encoder"):
        open_network("clip", tmp_path / "text")
    with pytest.raises(InputError, match="clip has no text encoder"):
        open_network("clip", tmp_path / "image").text(["a fox"])
    with pytest.raises(InputError, match="clip needs its weights: name a folder"):
        open_network("clip")
    with pytest.raises(KeyError, match="'dinov2'"):
        open_network("dinov2", tmp_path / "image")
