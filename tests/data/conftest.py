"""Fixtures of the tests of sources."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of cached indices, which is empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNCLIP_CACHE", str(folder))
    return folder / "index"
