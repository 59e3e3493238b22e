"""A feature network of one line, for tests: a fixed random map of an image's mean colours by quarters."""

import dataclasses

import numpy as np

from unclip_jax.data import ops


@dataclasses.dataclass(frozen=True)
class FakeNetwork:
    """Has the interface of `features.FeatureNetwork`.

    config: of the part.
    width: of the pooled features.
    calls: number of images of each call so far.
    """

    name: str = "inception"
    hash: str = "f" * 64
    features_hash: str = "e" * 64
    config: dict = dataclasses.field(default_factory=dict, compare=False)
    resize: str = "tf1-bilinear 299"
    width: int = 6
    calls: list = dataclasses.field(default_factory=list, compare=False)

    @property
    def outputs(self):
        if self.name != "inception":
            return {"pool": self.width}
        return {"pool": self.width, "spatial": 5, "logits": 4}

    def __call__(self, images):
        self.calls.append(len(images))
        colours = np.stack([ops.resize(image, 2).reshape(12) for image in images]) / 255
        matrix = np.random.default_rng(0).normal(size=(12, sum(self.outputs.values())))
        ends = np.cumsum(list(self.outputs.values()))[:-1]
        return dict(zip(self.outputs, np.split(np.float32(colours @ matrix), ends, axis=1)))

    def text(self, captions):
        rng = [np.random.default_rng([ord(c) for c in caption]) for caption in captions]
        return np.float32([r.normal(size=self.width) for r in rng])
