"""One server of the tiny bundle for all tests of this folder that do not need their own."""

import pytest

from tests.serve.browsing import address, browser, open_page, side  # noqa: F401


@pytest.fixture(scope="session")
def models(tiny_bundle):
    """The tiny bundle under the name `tiny`, with few sampling steps."""
    import dataclasses

    from unclip_jax.checkpoint.load import load_bundle
    from unclip_jax.sampling.programs import Sampler
    from unclip_jax.serve.models import Model, Models

    bundle = load_bundle(tiny_bundle)
    few = {
        name: {**settings, "steps": 4} for name, settings in bundle.sampling.items() if "steps" in settings
    }
    return Models([Model("tiny", Sampler(dataclasses.replace(bundle, sampling=bundle.sampling | few)))])


@pytest.fixture(scope="session")
def server(models):
    """The address of a running server, and its `Service`."""
    from tests.serve.running import running

    with running(models, batch=2) as found:
        yield found
