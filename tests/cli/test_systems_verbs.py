"""Every system of `SYSTEMS` with every verb: what works, and what is refused in one line."""

import pytest

from unclip_jax.checkpoint.bundle import Part
from unclip_jax.errors import InputError
from unclip_jax.sampling.text_to_image import SYSTEMS, system_of_runs

MODEL = {"latent_channels": 4, "context_dim": 8, "levels": 3}
SEEN = {"latent": {}, "stable_unclip": {"augmentation": {}, "frozen": {"text": ""}}, "kandinsky": {}}
NEEDS = {
    "unclip": {"clip", "prior_diffusion", "decoder"},
    "latent": {"clip", "latent", "autoencoder"},
    "retrieval": {"clip", "retrieval", "autoencoder"},
    "stable_unclip": {"clip", "latent", "autoencoder", "text"},
    "imagen": {"t5", "imagen"},
    "glide": {"glide"},
    "kandinsky": {"clip", "prior_diffusion", "latent", "autoencoder"},
    "dalle": {"dalle", "dvae"},
    "vqvae2": {"vqvae", "pixelsnail_0", "pixelsnail_1", "pixelsnail_2"},
}


def parts_of(system):
    """Parts without weights, of the names that runs of a system have."""
    kinds = {"latent": "kandinsky" if system == "kandinsky" else "latent"}
    more = SEEN.get(system, {})
    return {name: Part({"kind": kinds.get(name, name), "model": MODEL} | more, {}) for name in NEEDS[system]}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_system_of_runs(system):
    """The part that draws, or its twin, says the system, and the system what else must be there."""
    parts, draws = parts_of(system), SYSTEMS[system].draws
    name, needs = system_of_runs(parts)
    assert (name, set(needs)) == (system, NEEDS[system])
    alone = system_of_runs({f"{draws}_other": parts[draws]})
    assert alone[0] == system and draws in alone[1]
    assert system_of_runs(parts | {"decoder": Part({"kind": "decoder"}, {})})[0] == "unclip"


def test_runs_of_two_systems():
    assert system_of_runs({"clip": Part({"kind": "clip"}, {})}) == ("unclip", ("clip",))
    assert "decoder" in system_of_runs({"prior_diffusion": Part({"kind": "prior_diffusion"}, {})})[1]
    both = parts_of("latent") | parts_of("glide")
    with pytest.raises(InputError, match="of 2 systems, latent and glide"):
        system_of_runs(both)
