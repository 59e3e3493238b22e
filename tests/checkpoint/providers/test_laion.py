"""LAION's prior against DALLE2-pytorch, run at the same random weights."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from packaging.version import Version

from tests.checkpoint.peers import close, run_part
from tests.helpers import param_count
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.check import part_tree
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import Network, build_model
from unclip_jax.generate.options import check_options, options_from
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import TextConditioning, Texts
from unclip_jax.models.prior_laion import distance_buckets

DIM, LENGTH, STEPS = 32, 21, 50
NET = {
    "dim": DIM, "depth": 2, "num_timesteps": STEPS, "max_text_len": LENGTH, "dim_head": 48, "heads": 3,
    "ff_mult": 2, "normformer": True, "norm_in": True, "attn_dropout": 0.1,
}  # fmt: skip
CONFIG = {"net": NET, "image_embed_dim": DIM, "timesteps": STEPS, "sample_timesteps": 16, "image_size": 224}
# What the library imports for its decoders and for training; its priors do without.
UNUSED = ("torchvision", "torchvision.transforms", "kornia", "kornia.filters", "kornia.augmentation")
UNUSED += ("resize_right", "x_clip", "coca_pytorch", "dalle2_pytorch.tokenizer", "dalle2_pytorch.vqgan_vae")
RNG = np.random.default_rng(0)
normal = lambda *shape: np.float32(RNG.normal(size=shape))


@pytest.fixture(scope="module")
def library():
    """The library's own file of networks."""
    found = importlib.util.find_spec("dalle2_pytorch")
    if found is None or importlib.util.find_spec("rotary_embedding_torch") is None:
        pytest.skip("launch/test installs dalle2-pytorch and rotary-embedding-torch")
    file = Path(found.submodule_search_locations[0]) / "dalle2_pytorch.py"
    spec = importlib.util.spec_from_file_location("dalle2_networks", file)
    module, missing = importlib.util.module_from_spec(spec), [n for n in UNUSED if n not in sys.modules]
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        spec.loader.exec_module(module)
    finally:
        for name in missing:
            del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def prior(library):
    torch.manual_seed(0)
    net = library.DiffusionPriorNetwork(**NET)
    made = library.DiffusionPrior(
        net, image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.1, beta_schedule="cosine"
    ).eval()
    for name, value in made.named_parameters():
        if name.endswith(".g"):
            value.data += 0.3 * torch.randn_like(value)
    return made


NEWEST = Version("1.15.6")


def written(folder, state, config=CONFIG, version=NEWEST, **more):
    """A checkpoint of the trainer, with its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"model": {k: torch.zeros_like(v) for k, v in state.items()}, "ema_model": state, **more}
    saved |= {"version": version} if version is not None else {}
    torch.save(
        saved | {"optimizer": {"state": {}, "lr": 1e-4}, "step": torch.tensor(3)}, folder / "latest.pth"
    )
    (folder / "prior_config.json").write_text(json.dumps({"prior": config, "train": {"epochs": 1}}))
    return folder


def older(state):
    """The tensors by the names of the versions before 1.9, which had no null embeddings."""
    renamed = {k.replace("null_text_encodings", "null_text_embed"): v for k, v in state.items()}
    return {k: v for k, v in renamed.items() if not k.endswith(("null_text_embeds", "null_image_embed"))}


def inputs():
    mask = np.arange(LENGTH)[None] < np.array([[4], [LENGTH], [9]])
    return normal(3, DIM), np.array([0, 31, STEPS - 1]), normal(3, DIM), normal(3, LENGTH, DIM), mask


def theirs_of(prior, z, t, embed, states, mask, **settings):
    text = torch.from_numpy(np.where(mask[..., None], states, 0))
    unit = torch.nn.functional.normalize(torch.from_numpy(embed), dim=-1)
    with torch.no_grad():
        return prior.net(
            torch.from_numpy(z), torch.from_numpy(t), text_embed=unit, text_encodings=text, **settings
        )


def ours_of(bundle, z, t, embed, states, mask, **more):
    return run_part(
        bundle, "prior_diffusion", z, t, text_embed=embed, text_states=states, text_mask=mask, **more
    )


@pytest.mark.parametrize("version", [NEWEST, "1.9.0"])
def test_network(prior, version, tmp_path):
    """The averaged weights, with captions and without, at captions of different lengths."""
    bundle = load_bundle(written(tmp_path / "prior", prior.state_dict(), version=version))
    part = bundle.parts["prior_diffusion"]
    assert part.config["kind"] == "prior_laion" and part.config["model"]["null_embeds"]
    assert part.config["embedding_space"]["scale"] == pytest.approx(DIM**0.5)
    assert bundle.sampling["prior_diffusion"]["steps"] == 16
    given = inputs()
    close(ours_of(bundle, *given), theirs_of(prior, *given), 1e-4)
    dropped = theirs_of(prior, *given, text_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    close(ours_of(bundle, *given, drop=np.ones(3, bool)), dropped, 1e-4)


@pytest.mark.parametrize("version, cosine", [("1.1.0", False), ("1.6.0", True)])
def test_older_networks(prior, version, cosine, tmp_path):
    """Without null embeddings; and before 1.5 with the usual attention, whose scale 1.15 applies twice, and
    with a bias that is 128 times as large."""
    changed, bias = [], prior.net.causal_transformer.rel_pos_bias.relative_attention_bias.weight
    factor = 1.0 if cosine else 128.0
    for attention, _ in prior.net.causal_transformer.layers:
        changed.append((attention, attention.cosine_sim, attention.scale))
        if not cosine:
            attention.cosine_sim, attention.scale = False, math.sqrt(attention.null_kv.shape[1] ** -0.5)
    try:
        bundle = load_bundle(written(tmp_path / "prior", older(prior.state_dict()), version=version))
        given = inputs()
        bias.data *= factor
        close(ours_of(bundle, *given), theirs_of(prior, *given), 1e-4)
    finally:
        bias.data /= factor
        for attention, cosine_sim, scale in changed:
            attention.cosine_sim, attention.scale = cosine_sim, scale
    part = bundle.parts["prior_diffusion"]
    assert part.config["model"]["cosine"] == cosine and not part.config["model"]["null_embeds"]
    options = options_from(bundle.sampling["prior_diffusion"], "prior_laion", guidance_scale=2.0)
    with pytest.raises(InputError, match="cannot be guided"):
        check_options(options, part.config)


def test_it_draws_embeddings(prior, tmp_path):
    """With guidance and two candidates, from a bundle of our own format."""
    bundle = load_bundle(written(tmp_path / "prior", prior.state_dict()))
    save_bundle(bundle, tmp_path / "ours", np.float32)
    part = load_bundle(tmp_path / "ours").parts["prior_diffusion"]
    assert part.hash and part.config == json.loads(json.dumps(bundle.parts["prior_diffusion"].config))
    network = Network(build_model(part.config), part.params, part.config)
    given = dict(steps=3, guidance_scale=2.0, candidates=2)
    options = options_from(bundle.sampling["prior_diffusion"], "prior_laion", **given)
    _, _, embed, states, mask = inputs()
    text = TextConditioning(jnp.asarray(embed), jnp.asarray(states), jnp.asarray(mask))
    empty = jax.tree.map(lambda a: a[:1], text)
    draw = jax.jit(lambda key: sample_prior(network, Texts(text, empty), key, options))
    first, second = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert first.shape == (3, DIM) and np.isfinite(first).all() and np.abs(first - second).max() > 0.01


def test_published_size():
    """The configuration that LAION published has so many parameters in the library."""
    model = dict(
        embed_dim=768,
        length=77,
        num_steps=1000,
        layers=12,
        heads=12,
        head_dim=64,
        hidden=3072,
        normformer=True,
    )
    tree = part_tree({"kind": "prior_laion", "model": model | {"null_embeds": False}}, 1, 1)
    attention = 768 + 2 * 64 + 768 * 768 + 768 * 128 + 768 * 768 + 768
    feed_forward = 768 + 768 * 6144 + 3072 + 3072 * 768
    rest = 77 * 768 + 1000 * 768 + 768 + 32 * 12 + 768 + 768 * 768
    assert param_count(tree) == 12 * (attention + feed_forward) + rest


def test_buckets_of_distances(library):
    """Those of the library, where far keys share them."""
    for n in (1, 20, 81, 300):
        rel = torch.arange(n + 1)[None] - torch.arange(n)[:, None]
        wanted = library.RelPosBias._relative_position_bucket(rel).numpy()
        np.testing.assert_array_equal(distance_buckets(n), wanted)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(version=None), 'write "version": "1.1.0"'),
        (dict(version="0.26.2"), "known here are 1.0 to 1.15"),
        (dict(version="1.1.0"), "has the null embeddings"),
        (dict(config=CONFIG | {"predict_x_start": False}), "predict_x_start is False"),
        (dict(config=CONFIG | {"net": NET | {"self_cond": True}}), "self_cond is True"),
        (dict(config=CONFIG | {"net": NET | {"heads": 2}}), "heads"),
        (dict(config=CONFIG | {"beta_schedule": "linear"}), "another noise schedule"),
        (dict(config=CONFIG | {"beta_schedule": "jsd"}), "known: cosine, linear"),
        (dict(config=CONFIG | {"image_embed_dim": 16}), "and the prior on 16"),
        (dict(config=CONFIG | {"net": None}), "net must be an object"),
    ],
)
def test_what_is_refused(prior, change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        load_bundle(written(tmp_path / "prior", prior.state_dict(), **change))


def test_files_that_are_refused(prior, tmp_path):
    """Two files, none, a file without its configuration, a decoder, and a class that no reader knows."""
    folder = written(tmp_path / "two", prior.state_dict())
    (folder / "best.pth").write_bytes((folder / "latest.pth").read_bytes())
    with pytest.raises(InputError, match="holds best.pth, latest.pth: name the one"):
        load_bundle(folder)
    assert load_bundle(folder / "best.pth").parts
    (folder / "prior_config.json").unlink()
    with pytest.raises(InputError, match="copy its configuration beside it"):
        load_bundle(folder / "best.pth")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "prior_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no .pth file"):
        load_bundle(tmp_path / "none")
    torch.save({"model": {"unets.0.init_conv.weight": torch.zeros(2)}}, tmp_path / "decoder.pth")
    with pytest.raises(InputError, match="a decoder of DALLE2-pytorch, 1 U-Net, which are not unCLIP's"):
        load_bundle(tmp_path / "decoder.pth")
    written(tmp_path / "odd", prior.state_dict(), odd=Path("x"))
    with pytest.raises(InputError, match="asks for 'pathlib"):
        load_bundle(tmp_path / "odd")


@pytest.mark.parametrize("text, seen", [(True, "to z_i and to captions inside"), (False, "to z_i inside")])
def test_a_decoder_is_refused_with_the_reason(library, text, seen, tmp_path):
    """Of the library's own networks: how many they are, how wide, and what has no place here."""
    sizes = dict(dim_mults=(1, 2), image_embed_dim=8, cond_on_image_embeds=True, num_resnet_blocks=1)
    sizes |= dict(text_embed_dim=8, cond_on_text_encodings=text, max_text_len=4)
    sizes |= dict(attn_heads=1, attn_dim_head=4)
    nets = torch.nn.ModuleDict({"unets": torch.nn.ModuleList(library.Unet(dim, **sizes) for dim in (8, 16))})
    torch.save({"model": nets.state_dict()}, tmp_path / "decoder.pth")
    with pytest.raises(InputError, match="2 U-Nets of 8, 16 channels. .*attends " + seen) as error:
        load_bundle(tmp_path / "decoder.pth")
    assert "cross_attn." in str(error.value) and "\n" not in str(error.value)
