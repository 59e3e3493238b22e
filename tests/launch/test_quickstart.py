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

    def decoder(made):
        lines = quickstart.going_on(training | {"decoder": made})
        return next(line for line in lines if line.startswith("decoder")).split()[1:5]

    made = {"step": 7000, "config": {"batch_size": 32}, "seconds": 600.0}
    assert decoder(made) == ["224,000", "224,000", "10", "min"]
    assert decoder(made | {"step": 3500}) == ["112,000", "224,000", "20", "min"]
    # A run that started from the weights of another one saw the images of both.
    assert decoder(made | {"initialised_from": made}) == ["448,000", "224,000", "10", "min"]
