"""What configurations start from, and that every configuration file in every variant is whole."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from unclip_jax.cli.train import load_config
from unclip_jax.data.sources import SOURCES
from unclip_jax.run import defaults
from unclip_jax.run.optim import make_optimizer

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
RUN_SETTINGS = set(defaults.run("clip"))


def variants_of(path):
    spec = importlib.util.spec_from_file_location("configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VARIANTS


ALL = [(path, variant) for path in FILES for variant in variants_of(path)]
NAMES = [f"{path.relative_to(ROOT / 'configs')}:{variant}" for path, variant in ALL]


def sources(config):
    """Training and evaluation sources of a configuration."""
    evaluation = config.data.get("eval", {})
    return [config.data.train, *([evaluation] if "name" in evaluation else evaluation.values())]


# ---------------------------------------------------------------------------------------- the functions
@pytest.mark.parametrize("key", ["log_evry", "mesh.fspd", "track.wandbs"])
def test_a_typo_in_a_setting_of_the_run_fails(key):
    *parents, last = key.split(".")
    group = defaults.run("clip")
    for name in parents:
        group = group[name]
    with pytest.raises(AttributeError, match=last):
        setattr(group, last, 1)
    with pytest.raises(KeyError, match=last):
        group.update({last: 1})


def test_two_runs_share_nothing():
    """A change of one configuration does not reach the next one."""
    defaults.small_run(defaults.run("clip")).track.mlflow = "http://127.0.0.1:1"
    assert defaults.run("clip").track.mlflow is None and defaults.run("clip").mesh.fsdp == 8


def test_adamw_has_the_settings_of_the_optimizer():
    """Those of `make_optimizer` but for `steps`, which the configuration has itself, and the kind; a typo
    fails."""
    assert set(defaults.adamw(1e-3)) == set(inspect.signature(make_optimizer).parameters) - {"steps", "kind"}
    assert defaults.adamw(1e-3, b2=0.98).to_dict() == {**defaults.adamw(1e-3).to_dict(), "b2": 0.98}
    with pytest.raises(TypeError, match="warmup"):
        defaults.adamw(1e-3, warmup=100)


def test_unknown_variants_are_refused():
    defaults.check_variant("", ("", "tiny"), "configs/emoji/clip.py")
    defaults.check_variant("tiny", ("", "tiny"), "configs/emoji/clip.py")
    with pytest.raises(
        ValueError, match="unknown variant 'huge' of emoji/clip.py; choose one of quick, tiny, or none"
    ):
        defaults.check_variant("huge", ("", "quick", "tiny"), "configs/emoji/clip.py")


def test_data_sections():
    """One evaluation source, several by name, or none; a bad source is refused."""
    assert defaults.shards("val").eval.to_dict() == {"name": "tfrecord", "pattern": "data/val/*.tfrecord"}
    named = defaults.shards(("val",), "webdataset")
    assert named.eval.val.to_dict() == {"name": "webdataset", "pattern": "data/val/*.tar"}
    assert named.train.name in SOURCES and defaults.shards(None).train.name in SOURCES
    assert set(defaults.emoji(("val", "compose")).eval) == {"val", "compose"}
    assert "eval" not in defaults.emoji(None)
    with pytest.raises(ValueError, match="tfrecord or webdataset, got 'zip'"):
        defaults.shards(None, "zip")


@pytest.mark.parametrize("evaluation", ["val", ("val", "compose"), None])
def test_tiny_reads_the_embedded_data(evaluation):
    """Also where the recipe reads shards; a source that is the embedded data already stays as it is."""
    config = defaults.run("clip")
    with config.unlocked():
        config.update({"steps": 1000, "batch_size": 512, "optimizer": defaults.adamw(1e-3)})
        config.data = defaults.shards(evaluation)
    assert defaults.tiny(config) is config
    assert all(source.name == "emoji" and "pattern" not in source for source in sources(config))
    expected = {"val": "compose", ("val", "compose"): {"val", "compose"}, None: None}[evaluation]
    found = config.data.get("eval")
    assert (found if found is None else found.get("split", set(found))) == expected
    with config.unlocked():
        config.data = defaults.emoji(evaluation)
        config.data.train.balance = {"by": "base", "power": 0.5}
    before = config.data.to_dict()
    assert defaults.tiny(config).data.to_dict() == before


def test_defaults_import_next_to_nothing():
    """Configurations load without the packages that take seconds to import."""
    heavy = ("jax", "flax", "optax", "orbax", "numpy", "tensorflow", "PIL")
    code = f"import sys, unclip_jax.run.defaults; print(*sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# ------------------------------------------------------------------------------------ the configurations
@pytest.mark.parametrize("path, variant", ALL, ids=NAMES)
def test_every_variant_is_whole(path, variant):
    """It loads by its path, is locked, and has the settings of all configurations of its stage."""
    config = load_config(f"{path}:{variant}")
    assert config.is_locked and config.data.is_locked
    with pytest.raises(AttributeError, match="stepz"):
        config.stepz = 5
    assert RUN_SETTINGS <= set(config)
    same_stage = {frozenset(c) for p in FILES if (c := load_config(str(p))).stage == config.stage}
    assert same_stage == {frozenset(config)}
    assert all(source.name in SOURCES for source in sources(config))
    assert config.grad_accumulation == 1
    paths = [path for path in config.frozen.values() if path is not None]  # None: the stage does without
    assert all(path.startswith("../") or path == "lpips" for path in paths)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_configuration_has_a_tiny_variant(path):
    """A few steps of small batches on one device, on the embedded data. The docstring gives the command."""
    full, tiny = load_config(str(path)), load_config(f"{path}:tiny")
    assert tiny.steps <= 4 < full.steps and tiny.batch_size == 16
    assert tiny.remat == "none" and not tiny.scan_layers and tiny.mesh.fsdp == 1
    assert {source.name for source in sources(tiny)} == {"emoji"}
    assert tiny.stage == full.stage and set(tiny.frozen) == set(full.frozen)
    beside = {None, *full.frozen.values()} | {f"../{role}" for role in full.frozen}
    assert set(tiny.frozen.values()) <= beside
    command = f"unclip train configs/{path.relative_to(ROOT / 'configs')} --workdir runs/{path.parent.name}/"
    assert command in ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    with pytest.raises(ValueError, match=f"unknown variant 'huge' of {path.parent.name}/{path.name}"):
        load_config(f"{path}:huge")


@pytest.mark.parametrize("name", ["clip", "prior_diffusion", "decoder", "upsampler_256"])
def test_recipes_of_a_stage_have_one_layout(name):
    """The settings of dalle2 and karlo come in the same order, so that `diff` shows what differs."""
    texts = [
        (ROOT / "configs" / recipe / f"{name}.py").read_text(encoding="utf-8")
        for recipe in ("dalle2", "karlo")
    ]
    orders = []
    for text in texts:
        targets = [n.targets[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign)]
        names = [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)]
        orders.append(list(dict.fromkeys(names)))
    shared = set(orders[0]) & set(orders[1])
    assert [n for n in orders[0] if n in shared] == [n for n in orders[1] if n in shared]
    assert "config.optimizer" in shared
