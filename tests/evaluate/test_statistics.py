"""Files of statistics: our layout, those of other tools, and what may not be compared."""

import dataclasses
import json

import numpy as np
import pytest

from unclip_jax.evaluate.sets import open_set
from unclip_jax.evaluate.statistics import (
    MADE_BY,
    Recipe,
    Statistics,
    check_comparable,
    read_statistics,
    save_statistics,
)
from unclip_jax.metrics.moments import moments

RECIPE = Recipe("inception", "a" * 64, "tf1-bilinear 299", "none", "none")
RNG = np.random.default_rng(0)
POOL, SPATIAL = np.float32(RNG.normal(size=(20, 4))), np.float32(RNG.normal(size=(20, 3)))


def described(**changes):
    found = Statistics(
        "pictures", RECIPE, 20, {"pool": moments(POOL), "spatial": moments(SPATIAL)}, {"pool": POOL}, ("png",)
    )
    return dataclasses.replace(found, **changes)


def foreign(path, **arrays):
    """A file as ADM's evaluator, clean-fid and torch-fidelity's users write it."""
    np.savez(path, **arrays)
    return path


def test_our_layout_comes_back_whole(tmp_path):
    for features in (False, True):
        save_statistics(tmp_path / "s.npz", described(), features=features)
        file = read_statistics(tmp_path / "s.npz", "adm")  # what the file says counts, not what the user says
        found = file.statistics
        assert (found.recipe, found.count, found.stored, file.images) == (RECIPE, 20, ("png",), None)
        for output, stats in described().moments.items():
            assert found.moments[output].count == 20
            np.testing.assert_array_equal(found.moments[output].mean, stats.mean)
            np.testing.assert_array_equal(found.moments[output].cov, stats.cov)
        assert set(found.features) == ({"pool"} if features else set())
        if features:
            np.testing.assert_array_equal(found.features["pool"], POOL)


def test_an_unknown_count_comes_back(tmp_path):
    """Statistics of another tool, which do not say how many images there were, saved in our layout."""
    save_statistics(tmp_path / "s.npz", described(count=None))
    found = read_statistics(tmp_path / "s.npz").statistics
    assert found.count is None and found.moments["pool"].count is None


def test_other_tools_read_ours(tmp_path):
    """pytorch-fid and clean-fid read `mu` and `sigma`; ADM's evaluator also `mu_s` and `sigma_s`."""
    save_statistics(tmp_path / "s.npz", described())
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_allclose(file["mu"], POOL.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(POOL, rowvar=False), rtol=1e-5)
        np.testing.assert_allclose(file["sigma_s"], np.cov(SPATIAL, rowvar=False), rtol=1e-5)


def test_layouts_of_other_tools(tmp_path):
    mu, sigma = POOL.mean(axis=0), np.cov(POOL, rowvar=False)
    images = RNG.integers(0, 256, (5, 8, 9, 3), np.uint8)
    adm = foreign(tmp_path / "a.npz", mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3], arr_0=images)
    with pytest.raises(ValueError, match="a.npz does not say how its statistics were made.*--made-by.*adm"):
        read_statistics(adm)
    found = read_statistics(adm, "adm")
    assert set(found.statistics.moments) == {"pool", "spatial"} and found.statistics.count is None
    assert found.statistics.recipe == MADE_BY["adm"]
    np.testing.assert_array_equal(found.images, images)
    assert isinstance(found.images, np.memmap)
    batch = read_statistics(foreign(tmp_path / "b.npz", arr_0=images))  # images need no maker
    assert batch.statistics is None
    np.testing.assert_array_equal(batch.images, images)
    np.savez_compressed(tmp_path / "c.npz", arr_0=images)
    np.testing.assert_array_equal(read_statistics(tmp_path / "c.npz").images, images)
    kid = read_statistics(foreign(tmp_path / "k.npz", feats=POOL), "clean-fid").statistics
    assert kid.count == 20 and not kid.moments
    np.testing.assert_array_equal(kid.features["pool"], POOL)
    with pytest.raises(ValueError, match="unknown maker 'me'"):
        read_statistics(adm, "me")
    again = open_set(str(tmp_path / "b.npz"), None).images
    np.testing.assert_array_equal(again.load([3])[0].pixels, images[3])
    other = foreign(tmp_path / "d.npz", arr_0=255 - images)
    assert open_set(str(other), None).images.checksum != again.checksum


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("network", "dinov2", "network 'inception' and 'dinov2'"),
        ("network_hash", "b" * 64, "network hash"),
        ("resize", "bicubic 224", "resize 'tf1-bilinear 299' and 'bicubic 224'"),
        ("crop", "center 256 bicubic", "crop 'none' and 'center 256 bicubic'"),
        ("codec", "jpeg 75", "codec 'none' and 'jpeg 75'"),
    ],
)
def test_what_was_made_differently_is_not_compared(field, value, says):
    other = described(name="others", recipe=dataclasses.replace(RECIPE, **{field: value}))
    with pytest.raises(ValueError, match=f"pictures and others were made differently: {says}"):
        check_comparable(described(), other)


def test_what_a_file_does_not_say_is_noted():
    assert check_comparable(described(), described()) == []
    notes = check_comparable(described(), described(name="ref.npz", recipe=MADE_BY["adm"], stored=()))
    assert notes == [f"ref.npz does not state the {what}" for what in ("network hash", "crop", "codec")]
    (note,) = check_comparable(described(), described(stored=("jpeg",)))
    assert "stored differently, png and jpeg" in note
    with pytest.raises(ValueError, match="resize 'tf1-bilinear 299' and 'clean bicubic 299'"):
        check_comparable(described(), described(recipe=MADE_BY["clean-fid"]))


ABOUT = {"format": 1, "recipe": dataclasses.asdict(RECIPE), "count": 20, "stored": []}
GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros(2)}, "holds x: expected mu and sigma, feats, or arr_0"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"a mean \(2,\) and a covariance \(3, 3\) do not belong"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "the covariance is not symmetric"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "values that are not finite numbers"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "values that are not finite numbers"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "the array mu is damaged"),
        ({"feats": np.zeros(3)}, r"feats must be \(N, D\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 must be images, uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "arr_0 must be images, uint8"),
        ({**GOOD, "about": np.asarray("no JSON")}, "about"),
        ({**GOOD, "about": np.asarray(json.dumps(ABOUT | {"format": 9}))}, "another version"),
        ({**GOOD, "about": np.asarray(json.dumps(ABOUT | {"count": "20"}))}, "does not say how many"),
        ({**GOOD, "about": np.asarray(json.dumps(ABOUT | {"recipe": {"network": 1}}))}, "does not say how"),
    ],
)
def test_damaged_files_are_refused(arrays, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_statistics(foreign(tmp_path / "s.npz", **arrays), "adm")


def test_files_that_are_no_archives(tmp_path):
    save_statistics(tmp_path / "s.npz", described())
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "x.pt").write_bytes(b"\x80\x02}")
    flipped = bytearray(data)
    flipped[data.index(POOL.mean(axis=0, dtype=np.float64)[:1].tobytes()[:4])] ^= 1
    (tmp_path / "flipped.npz").write_bytes(bytes(flipped))
    for name, says in (
        ("cut.npz", "no archive of NumPy"),
        ("x.pt", "a pickle is not read"),
        ("flipped.npz", "mu is damaged"),
    ):
        with pytest.raises(ValueError, match=says):
            read_statistics(tmp_path / name, "adm")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_statistics(tmp_path / "nothing.npz")
