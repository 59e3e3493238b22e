"""Adapters: they learn, the base stays and is in no state; the file merges into what training computed."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import runs
from tests.helpers import random_params
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import Bundle, Part, save_bundle
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.lora import merge_lora
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.cli.train import load_config, override, use_adapters
from unclip_jax.generate.networks import build_model
from unclip_jax.run import lora, state
from unclip_jax.run.optim import make_optimizers
from unclip_jax.run.resume import config_json
from unclip_jax.train import STAGES

RANK = 2
NAMES = ("decoder", "latent", "prior_diffusion")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A bundle of random networks, the latent U-Net among them, none of whose layers is zero."""
    box = tmp_path_factory.mktemp("lora")
    bundle = runs.random_bundle()
    read = load_bundle(runs.random_autoencoder("vq_autoencoder", box / "autoencoder", latents=4))
    config = load_config(str(runs.ROOT / "configs/emoji/latent.py:tiny"))
    part = {"kind": "latent", "model": config_json(config.model), "diffusion": config_json(config.diffusion)}
    inputs = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1)
    params = random_params(build_model(part), *inputs, context=np.zeros((1, 4, 32), np.float32))
    parts = bundle.parts | read.parts | {"latent": Part(part, params)}
    return save_bundle(
        Bundle(parts, sampling=bundle.sampling | {"latent": {"steps": 2}}), box / "base", np.float32
    )


def config_of(name, base, **changes):
    config = load_config(str(runs.ROOT / f"configs/emoji/{name}.py:tiny"))
    use_adapters(config, RANK)
    changes = {"steps": 12, "eval_every": 12, "checkpoint_every": 12, "data.backend": "numpy"} | changes
    changes |= {f"frozen.{role}": str(base) for role in config.frozen}
    changes |= {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 1, "ema_decay": 0.5}
    for key, value in changes.items():
        override(config, key, value)
    return config


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Name of a stage -> the folder of its run of adapters, on one batch and one noise; made once."""
    box, made = tmp_path_factory.mktemp("runs"), {}

    def train(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                runs.wrap_batches(patch, runs.Repeating)
                patch.setattr(state, "step_rng", lambda seed, step: jax.random.key(seed))
                one = sharding.make_mesh(None, jax.devices()[:1])
                patch.setattr(STAGES[name], "make_mesh", lambda shape: one)
                STAGES[name].train_and_evaluate(config_of(name, base), str(box / name), str(base))
            made[name] = box / name
        return made[name]

    return train


@pytest.mark.parametrize("name", ["decoder", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_adapters_learn_and_merge(name, base, trained, tmp_path):
    """The loss falls. The file, merged by the reader, gives the weights that training drew with."""
    folder = trained(name)
    curve = runs.losses(folder)
    assert curve[-1] < 0.95 * curve[0], curve
    meta, params, _ = load_run(folder)
    assert meta["name"] == f"{name}_lora" and meta["part"]["lora"] == {"rank": RANK}
    bundle = load_bundle(base)
    assert meta["part"]["frozen"]["base"] == bundle.parts[name].hash
    merged = merge_lora(bundle, folder / "lora.safetensors")
    wanted = lora.whole(params, {lora.BASE: bundle.parts[name].params})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.parts[name].params, wanted)
    flat = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]
    changed = [
        path
        for (path, a), (_, b) in zip(flat(wanted), flat(bundle.parts[name].params))
        if not np.array_equal(a, b)
    ]
    assert 0 < len(changed) == len(load_file(folder / "lora.safetensors")) / 2 < len(flat(wanted)) / 2
    assert all("attn" in jax.tree_util.keystr(path) for path in changed)
    for other in merged.parts.keys() - {name}:
        assert merged.parts[other] is bundle.parts[other]


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_is_that_of_the_merged_network(name, base):
    """The objective of adapters is the stage's own at the merged weights, and starts as the base's.

    The state and the optimizer hold adapters alone.
    """
    mesh, config = sharding.make_mesh(None, jax.devices()[:1]), config_of(name, base)
    module = STAGES[name]
    networks = module.load_frozen(config, "", mesh, module.FROZEN, module.open_data(config, mesh))
    plain = module.stage(config, mesh, networks)
    stage, frozen, start = lora.adapted(plain, config, mesh, module.arrays(networks), str(base))
    assert start is None and plain.name == name
    shapes = state.abstract_state(stage, make_optimizers(config, stage.players), mesh)[0]
    own = {
        key[-1].key
        for tree in (shapes.params, shapes.ema_params)
        for key, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert own == {"down", "up"}
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(shapes.opt_state) < 2 * size(shapes.params) + 10 < size(frozen[lora.BASE])
    source = module.open_data(config, mesh).train
    rows = [stage.example(source.read(i), None, training=False) for i in range(2)]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    if stage.fit is not None:
        part = load_part(base, name)[0]
        assert stage.fit.measure(None) == {key: part.config[key] for key in stage.fit.keys}
        frozen[module.FITTED] = stage.fit.arrays(part.config)
    fresh = stage.init(jax.random.key(1))[0]
    drawn = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), fresh)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, objective):
        return objective(params, {}, jax.random.key(0), batch, 0, frozen=frozen)[0]

    started, at_base = loss(fresh, stage.objective), loss(frozen[lora.BASE], plain.objective)
    np.testing.assert_allclose(started, at_base, rtol=1e-6)
    moved = loss(drawn, stage.objective)
    np.testing.assert_allclose(moved, loss(lora.whole(drawn, frozen), plain.objective), rtol=1e-6)
    assert abs(moved - started) > 1e-5


def test_a_resumed_run_is_of_the_same_base(base, trained, tmp_path):
    """It goes on where it stopped; another base is refused."""
    folder, module = trained("decoder"), STAGES["decoder"]
    figures = module.train_and_evaluate(config_of("decoder", base), str(folder), str(base))
    assert np.isfinite(figures.get("eval_loss", 0.0)) and load_run(folder)[2] == 12
    bundle = load_bundle(base)
    part = bundle.parts["decoder"]
    other = Part(part.config, jax.tree.map(lambda x: x + 1.0, part.params))
    save_bundle(Bundle(bundle.parts | {"decoder": other}), tmp_path / "other", np.float32)
    config = config_of("decoder", base)
    with pytest.raises(ValueError, match="was trained with base"):
        module.train_and_evaluate(config, str(folder), str(tmp_path / "other"))


def test_the_command(base, trained, tmp_path, capsys):
    """`unclip train --lora` and `unclip sample --lora`; what each refuses in one line."""
    train = ["train", str(runs.ROOT / "configs/emoji/decoder.py:tiny"), "--workdir", str(tmp_path / "run")]
    train += ["--set", f"frozen.clip={base}", "--set", "data.backend=numpy"]
    for more, says in (
        (["--lora", "2"], "name them with --init-from"),
        (["--lora", "0", "--init-from", str(base)], "lora must be a whole number in [1, inf)"),
        (["--lora", "999", "--init-from", str(base)], "lora=999 is larger than the smallest matrix"),
    ):
        assert main([*train, *more]) == 1
        assert says in capsys.readouterr().err
    clip = [
        "train",
        str(runs.ROOT / "configs/emoji/clip.py:tiny"),
        "--workdir",
        str(tmp_path / "c"),
        "--lora",
        "2",
    ]
    assert main(clip) == 1
    assert (
        "the clip stage trains no adapters; these stages do: prior_diffusion, decoder"
        in capsys.readouterr().err
    )
    file = trained("decoder") / "lora.safetensors"
    sample = ["sample", "a fox", "--bundle", str(base), "--steps", "2", "--set", "prior_diffusion.steps=2"]
    assert main([*sample, "--lora", str(file), "--out", str(tmp_path / "fox.png")]) == 0
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "decoder_lora").symlink_to(trained("decoder"))
    capsys.readouterr()
    assert (
        main(
            [
                "bundle",
                str(tmp_path / "runs"),
                "--base",
                str(base),
                "--out",
                str(tmp_path / "b"),
                "--rows",
                "0",
            ]
        )
        == 1
    )
    assert "trained adapters: move it away" in capsys.readouterr().err
    rows = [json.loads(line) for line in (trained("decoder") / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["eval_loss"]) for row in rows if "eval_loss" in row)
