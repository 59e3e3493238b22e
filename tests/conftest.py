"""Tests run on the CPU with eight host devices, so that the sharded path is the only path."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# With the concurrent scheduler, independent collectives of one program wait for one another in different
# orders on different devices. The program may then hang, and is aborted after 40 seconds.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Compilation dominates the suite's time. So code generation is cheap, and the workers share compiled
# programs.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    _CACHE = tempfile.TemporaryDirectory(prefix="unclip-tests-")
    os.environ["UNCLIP_CACHE"] = _CACHE.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_CACHE.name, "xla")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Every run tries the same examples, and a slow machine fails none.
settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=100)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_run():
    """Returns a function, name -> the folder of a tiny trained run of that stage.

    It trains the stage on the first call, after the runs that the stage starts from. All workers share the
    runs.
    """
    from filelock import FileLock

    from tests.runs import BESIDE, train_tiny

    runs = Path(os.environ["UNCLIP_CACHE"]) / "runs"
    runs.mkdir(exist_ok=True)

    def run(name):
        for other in BESIDE.get(name, ()):
            run(other)
        with FileLock(runs / f"{name}.lock"):
            if not (runs / f"{name}.done").exists():
                train_tiny(name, runs / name)
                (runs / f"{name}.done").touch()
        return runs / name

    return run


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """The folder of a bundle of tiny random networks, none of whose layers is zero."""
    from tests.runs import random_bundle
    from unclip_jax.checkpoint.bundle import save_bundle

    return save_bundle(random_bundle(), tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory):
    """The folder of a bundle with a tiny random CLIP, another one than that of `tiny_bundle`."""
    import jax
    import numpy as np

    from tests.runs import random_bundle
    from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle

    clip = random_bundle().parts["clip"]
    other = Part(clip.config, jax.tree.map(np.negative, clip.params))
    return save_bundle(Bundle({"clip": other}), tmp_path_factory.mktemp("judge") / "judge")
