"""Eight host devices on the CPU, before anything imports jax, so that the sharded path is the only path; tiny runs shared by all tests."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A folder with one short run of every stage, named as parts."""
    from tests.runs import STAGES, tiny_config

    root = tmp_path_factory.mktemp("runs")
    for name, (stage, _) in STAGES.items():
        stage.train_and_evaluate(tiny_config(name, ROOT), str(root / name))
    return root


@pytest.fixture(scope="session")
def tiny_bundle(tiny_runs, tmp_path_factory):
    """The bundle of those runs."""
    from unclip_jax.checkpoint.bundle import save_bundle
    from unclip_jax.cli.bundle import collect

    return save_bundle(collect(tiny_runs), tmp_path_factory.mktemp("bundle") / "tiny")
