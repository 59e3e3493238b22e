"""A tiny Karlo at random weights, written by its own library."""

import pytest

from tests.checkpoint import peers
from unclip_jax.checkpoint.load import load_bundle


@pytest.fixture(scope="session")
def karlo(tmp_path_factory):
    """A folder and the pipeline it was written by."""
    folder = tmp_path_factory.mktemp("public") / "karlo"
    return folder, peers.karlo(folder)


@pytest.fixture(scope="session")
def bundle(karlo):
    return load_bundle(karlo[0])
