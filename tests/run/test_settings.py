"""The check of whole configurations, and how typed text becomes a setting."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.run.test_defaults import ALL, NAMES
from unclip_jax.cli.options import parse_mesh, part_options, read_text, source_options
from unclip_jax.cli.train import check_stage, load_config, override
from unclip_jax.errors import InputError
from unclip_jax.run import defaults, settings
from unclip_jax.train import STAGES

CLIP = Path(__file__).resolve().parents[2] / "configs/emoji/clip.py"


def names_of(section, prefix=""):
    """The dotted names of all settings in a configuration or a table."""
    for name in section:
        value = section[name]
        inner = value.table if isinstance(value, settings.Group) else value
        nested = hasattr(inner, "keys") and prefix + name not in ("data.train", "data.eval")
        yield from names_of(inner, f"{prefix}{name}.") if nested else [prefix + name]


@pytest.mark.parametrize("path, variant", ALL, ids=NAMES)
def test_every_configuration_passes(path, variant):
    check_stage(load_config(f"{path}:{variant}"))


def test_the_table_has_the_settings_of_every_run():
    missing = set(names_of(defaults.run("clip"))) - set(names_of(settings.RUN))
    assert missing == set()
    assert set(defaults.adamw(1e-3)) == set(settings.OPTIMIZER) - {"kind"}


def test_what_is_unknown_or_missing_is_named():
    config = load_config(f"{CLIP}:tiny")
    with config.unlocked():
        config.model.image.patchsize = 8
    with pytest.raises(InputError, match="'model.image.patchsize'; did you mean 'patch_size'"):
        check_stage(config)
    with config.unlocked():
        del config.model.image.patchsize, config.model.image.patch_size
    with pytest.raises(InputError, match="the configuration lacks the setting model.image.patch_size"):
        check_stage(config)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("data.train.split", "2024_01", "2024_01"),
        ("data.train.split", "none", "none"),
        ("data.eval.val.split", "1e3", "1e3"),
        ("data.train.balance.power", "1", 1.0),
        ("track.experiment", "2024", "2024"),
        ("track.wandb", "0x10", "0x10"),
        ("track.mlflow", "None", None),
        ("keep_best", "true", "true"),
        ("optimizer.clip_norm", "None", None),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("track.tensorboard", "FALSE", False),
        ("seed", "007", 7),
    ],
)
def test_the_setting_decides_how_text_is_read(key, text, value):
    config = load_config(str(CLIP))
    override(config, key, text)
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


def test_options_of_sources_and_parts_keep_their_text():
    assert source_options(["name=folder", "path=2024_01", "filters={'min_side': 3}"]) == {
        "name": "folder",
        "path": "2024_01",
        "filters": {"min_side": 3},
    }
    assert source_options(["name=tfrecord", "pattern=[ab]*.tfrecord"])["pattern"] == "[ab]*.tfrecord"
    assert part_options(["prior.steps=10,10,3", "a.steps=[9, 0]", "a.clip=None", "a.eta=1"]) == {
        "prior": {"steps": "10,10,3"},
        "a": {"steps": (9, 0), "clip": None, "eta": 1.0},
    }
    assert parse_mesh("data=2,fsdp=-1") == {"data": 2, "fsdp": -1}


@given(st.text())
def test_text_stays_text(text):
    assert read_text("x", text, (str,)) == text


@given(st.text(), st.lists(st.sampled_from([bool, int, float, tuple, dict, type(None)]), min_size=1))
def test_text_is_of_an_allowed_type_or_refused_in_one_line(text, kinds):
    try:
        value = read_text("x", text, kinds)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("x must be ")
    else:
        assert type(value) in kinds


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(value):
    """Nothing but the package's own error leaves the check."""
    for name, stage in STAGES.items():
        config = defaults.run(name)
        with config.unlocked(), config.ignore_type():
            for key in ("steps", "keep_best", "mesh", "profile", "data", "model", "optimizer"):
                config[key] = value
        with pytest.raises(InputError):
            stage.check(config)
