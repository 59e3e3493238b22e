"""The stage of StableUnCLIP: it learns, makes a bundle that draws, and starts from Stable Diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import param_count, random_params
from tests.runs import Repeating, losses, random_bundle, tiny_config, train_tiny, wrap_batches
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.check import latent_shapes
from unclip_jax.checkpoint.store import load_run, params_hash
from unclip_jax.cli.bundle import collect
from unclip_jax.cli.train import load_config
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network
from unclip_jax.generate.text import TextConditioning
from unclip_jax.models.autoencoder import KLAutoencoder
from unclip_jax.models.latent_unet import LatentUNet
from unclip_jax.run.frozen import EMPTY, arrays, load_frozen
from unclip_jax.run.resume import config_json, load_with_vector
from unclip_jax.run.stage import FITTED
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sampling.stable_unclip import sample_stages
from unclip_jax.sharding import make_mesh
from unclip_jax.train import stable_unclip

VAE = dict(latent_channels=4, channels=8, channel_mult=(1, 2), res_blocks=1, groups=4)


@pytest.fixture(scope="module")
def under(tmp_path_factory):
    """A bundle with what stands under the stage, and a prior, at random weights."""
    parts = random_bundle().parts
    params = random_params(KLAutoencoder(**VAE), jnp.zeros((1, 8, 8, 3)))
    autoencoder = Part({"kind": "kl_autoencoder", "model": VAE, "scale_factor": 0.5}, params)
    chosen = {"autoencoder": autoencoder} | {name: parts[name] for name in ("clip", "prior_diffusion")}
    return save_bundle(Bundle(chosen, "stable_unclip"), tmp_path_factory.mktemp("under") / "b", np.float32)


def test_it_learns_and_its_bundle_draws(under, tmp_path, monkeypatch):
    """The loss on a fixed batch falls. With a prior beside it, the part draws from captions."""
    wrap_batches(monkeypatch, Repeating)
    changes = {"frozen__clip": str(under), "frozen__autoencoder": str(under), "eval_every": 12}
    figures = train_tiny("stable_unclip", tmp_path / "stable_unclip", **changes)
    assert np.isfinite(figures["eval_loss"])
    curve = losses(tmp_path / "stable_unclip")
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3]), curve
    meta, params, _ = load_run(tmp_path / "stable_unclip")
    part = meta["part"]
    assert meta["name"] == part["kind"] == "latent" and part["augmentation"]["num_steps"] == 1000
    assert part["model"]["vector_dim"] == 32 and params["vector_fc1"]["kernel"].shape[0] == 32
    assert np.abs(part["embedding_space"]["mean"]).max() > 0.01  # measured, not the placeholder
    bundle = collect(tmp_path, str(under))
    assert bundle.system == "stable_unclip"
    sampler, options = Sampler(bundle), {"latent": {"steps": 2}, "prior_diffusion": {"steps": 2}}
    drawn = sample_stages(sampler, ["a fox"] * 2, options=options)
    assert drawn.images[0].shape == (2, 16, 16, 3) and np.abs(np.diff(drawn.z_image, axis=0)).max() > 1e-3


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_loss_sees_the_embedding(under, drop):
    """It depends on z_i where z_i is kept, and not where it is dropped, with its level."""
    config = tiny_config(
        "stable_unclip", frozen__clip=str(under), frozen__autoencoder=str(under), drop_image=drop
    )
    mesh, rng = make_mesh(None, jax.devices()[:1]), np.random.default_rng(0)
    networks = load_frozen(config, ".", mesh, stable_unclip.FROZEN, None)
    networks[EMPTY] = empty_caption(networks["clip"])
    stage = stable_unclip.stage(config, mesh, networks)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), shapes)
    frozen = arrays(networks) | {FITTED: stage.fit.arrays(stage.part)}
    batch = {
        "latents": np.float32(rng.normal(size=(2, 8, 8, 4))),
        "text_embed": np.zeros((2, 16), np.float32),
        "text_states": np.repeat(networks[EMPTY].params.states, 2, axis=0),
        "clip_token_mask": np.repeat(networks[EMPTY].params.mask, 2, axis=0),
    }

    @jax.jit
    def loss(z_image):
        given = batch | {"image_embed": z_image}
        return stage.objective(params, {}, jax.random.key(3), given, 0, frozen=frozen)[0]

    first, second = (float(loss(np.full((2, 16), value, np.float32))) for value in (0.0, 5.0))
    assert (abs(first - second) > 1e-4) if drop == 0 else first == second


def empty_caption(clip):
    text = clip.config["model"]["text"]
    states = np.float32(np.random.default_rng(2).normal(size=(1, text["length"], text["width"])))
    mask = np.ones(states.shape[:2], bool)
    return Network(None, TextConditioning(np.zeros((1, 16), np.float32), states, mask), {})


def test_stable_diffusion_starts_it(tmp_path):
    """The layers of the vector are added, and the network computes what it did, for any vector."""
    model = dict(
        image_size=8, in_channels=4, out_channels=4, channels=8, channel_mult=(1,), res_blocks=1, heads=(2,),
        attention_levels=(0,), context_dim=8, groups=4,
    )  # fmt: skip
    x, t, context = np.ones((1, 8, 8, 4), np.float32), np.zeros(1), np.ones((1, 3, 8), np.float32)
    params = random_params(LatentUNet(**model), x, t, context=context)
    diffusion = {"schedule": "scaled_linear", "num_steps": 1000, "prediction": "v"}
    part = Part({"kind": "latent", "model": model, "diffusion": diffusion}, params)
    save_bundle(Bundle({"latent": part}, "latent"), tmp_path / "b", np.float32)
    started, _ = load_with_vector(str(tmp_path / "b"), "latent", vector_dim=12)
    before = LatentUNet(**model).apply({"params": params}, x, t, context=context)
    vector = np.random.default_rng(0).normal(size=(1, 12))
    now = LatentUNet(**model, vector_dim=12)
    after = now.apply({"params": started.params}, x, t, context=context, vector=vector)
    np.testing.assert_array_equal(before, after)
    assert np.abs(before).max() > 0.1
    kept, _ = load_with_vector(str(save_vector(tmp_path, model, started)), "latent", vector_dim=12)
    assert params_hash(kept.params) == params_hash(started.params)


def save_vector(folder, model, part):
    config = {**part.config, "model": {**model, "vector_dim": 12}}
    return save_bundle(Bundle({"latent": Part(config, part.params)}, "latent"), folder / "v", np.float32)


def test_recipes():
    """The exact sizes of both, and what is refused."""
    config = load_config("configs/stable_unclip/latent.py")
    for dim, parameters in ((1024, 870_173_124), (768, 869_517_764)):
        stable_unclip.check(config)
        model = config_json(config.model) | {"vector_dim": 2 * dim}
        assert param_count(latent_shapes(model)) == parameters
    for name in ("stable_unclip/latent.py:tiny", "emoji/stable_unclip.py", "emoji/stable_unclip.py:64"):
        stable_unclip.check(load_config(f"configs/{name}"))
    for key, value, words in (
        ("model.in_channels", 9, "does not inpaint"),
        ("space.kind", "unit", "needs space.scale"),
        ("drop_image", 2.0, "drop_image must be"),
        ("augmentation.schedule", "sigmoid", "augmentation.schedule must be one of"),
    ):
        config = tiny_config("stable_unclip", **{key.replace(".", "__"): value})
        with pytest.raises(InputError, match=words):
            stable_unclip.check(config)
