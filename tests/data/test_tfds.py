"""The source over TensorFlow Datasets: mocked, prepared as TFRecord shards, and in a random-access format."""

import numpy as np
import pytest

from tests.data.shards import numbers, png
from unclip_jax.data import ops
from unclip_jax.data.pipeline import Workers, train_batches
from unclip_jax.data.sources import make_source

pytestmark = pytest.mark.usefixtures("cache")


def test_tfds_mocked():
    tf, library = pytest.importorskip("tensorflow"), pytest.importorskip("tensorflow_datasets")
    with library.testing.mock_data(num_examples=5):
        names = library.builder("cifar10").info.features["label"].names
        labels = make_source({"name": "tfds", "builder": "cifar10", "split": "train", "caption_key": "label"})
        assert (
            len(labels) == 5
            and labels.read(3).key == "train/3"
            and set(labels.read(3).captions) <= set(names)
        )
        again = make_source({"name": "tfds", "builder": "cifar10", "split": "train", "caption_key": "label"})
        assert again.checksum == labels.checksum and again.read(3).captions == labels.read(3).captions

        def make(record, rng):
            return {"image": ops.decode_image(record.image)}

        workers = Workers("numpy")
        batches = train_batches(labels, make, batch_size=4, seed=0, num_steps=2, workers=workers)
        assert [batch["image"].shape for batch in batches] == [(4, 32, 32, 3)] * 2
        with pytest.raises(
            ValueError, match=r"no feature 'labels': set caption_key to one of id, image, label"
        ):
            make_source({"name": "tfds", "builder": "cifar10", "caption_key": "labels"})

    def pairs(
        self, *args, **kwargs
    ):  # TFDS's own mock gives the lists of one caption unequal lengths, and then refuses them
        rows = [
            {"image": png(i), "captions": {"text": [f"caption {i}", f"other {i}"], "id": [1, 2]}}
            for i in range(3)
        ]
        kinds = {"image": "string", "captions": {"text": "string", "id": "int64"}}
        return tf.data.Dataset.from_generator(lambda: rows, output_types=kinds)

    with library.testing.mock_data(as_dataset_fn=pairs):
        for key in ("captions/text", "captions.text"):
            source = make_source(
                {"name": "tfds", "builder": "coco_captions", "split": "val", "caption_key": key}
            )
            assert numbers(source) == [0, 1, 2] and source.read(2).captions == ("caption 2", "other 2")
        with pytest.raises(ValueError, match=r"no feature 'captions/txt'"):
            make_source({"name": "tfds", "builder": "coco_captions", "caption_key": "captions/txt"})
    with pytest.raises(ValueError, match="cannot open TFDS builder 'no_such_builder'") as error:
        make_source({"name": "tfds", "builder": "no_such_builder"})
    assert "\n" not in str(error.value)


def test_tfds_prepared(tmp_path):
    """A dataset prepared as TFRecord shards, which are indexed here, and in a random-access format."""
    library = pytest.importorskip("tensorflow_datasets")

    class TinyPairs(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            texts = library.features.Sequence({"text": library.features.Text(), "id": np.int64})
            features = {
                "image": library.features.Image(encoding_format="png"),
                "captions": texts,
                "score": np.float32,
            }
            return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                texts = [{"text": f"caption {i}", "id": i}, {"text": f"other {i}", "id": i}]
                yield f"{i}", {"image": np.full((8, 8, 3), i, np.uint8), "captions": texts, "score": i / 10}

    contents = {}
    for file_format in ("tfrecord", "array_record"):
        folder = str(tmp_path / file_format)
        try:
            TinyPairs(data_dir=folder, file_format=file_format).download_and_prepare()
        except (ImportError, NotImplementedError):  # its writer is another package
            assert file_format != "tfrecord"
            continue
        config = {"name": "tfds", "builder": "tiny_pairs", "caption_key": "captions/text", "data_dir": folder}
        source = make_source({**config, "split": "train"})
        assert source.read(0).captions == tuple(
            f"{word} {numbers(source)[0]}" for word in ("caption", "other")
        )
        assert source.read(0).meta["score"] == pytest.approx(numbers(source)[0] / 10)
        contents[file_format] = numbers(source)
        assert sorted(contents[file_format]) == list(range(10))
        part = make_source({**config, "split": "train[20%:50%]"})
        assert numbers(part) == contents[file_format][2:5]
        ends = make_source({**config, "split": "train[:10%]+train[90%:]"})
        assert numbers(ends) == [contents[file_format][0], contents[file_format][9]]
        high = make_source({**config, "split": "train", "filters": {"scores": {"score": (0.65, None)}}})
        assert (
            sorted(numbers(high)) == [7, 8, 9] and high.n_filtered == 7 and high.checksum != source.checksum
        )
        with pytest.raises(ValueError, match=r"split 'test' .*it has train"):
            make_source({**config, "split": "test"})
    assert "tfrecord" in contents and len({tuple(content) for content in contents.values()}) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not prepared in .*tfds build tiny_pairs"):
        make_source(
            {
                "name": "tfds",
                "builder": "tiny_pairs",
                "caption_key": None,
                "data_dir": str(tmp_path / "empty"),
            }
        )
