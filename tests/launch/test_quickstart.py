"""What launch/quickstart says at its end."""

import importlib.util
from pathlib import Path

from unclip_jax.checkpoint.load import load_bundle

ROOT = Path(__file__).resolve().parent.parent.parent


def test_what_it_takes_to_go_on():
    """A run that saw what the recipe asks takes its own time again; one that saw half takes twice."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    training = load_bundle("emoji").provenance["training"]
    lines = quickstart.going_on(training)
    assert len(lines) == 2 + len(quickstart.STAGES)
    decoder = next(line for line in lines if line.startswith("decoder"))
    assert decoder.split()[1:5] == ["224,000", "224,000", f"{training['decoder']['seconds'] / 60:.0f}", "min"]
    half = training | {"decoder": training["decoder"] | {"step": 3500}}
    doubled = next(line for line in quickstart.going_on(half) if line.startswith("decoder"))
    assert doubled.split()[3] == f"{training['decoder']['seconds'] / 30:.0f}"
