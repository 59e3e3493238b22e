"""How the `unclip` command shows errors: a user's in one line, a bug with what to report."""

import pickle
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from unclip_jax import errors
from unclip_jax.cli import sample
from unclip_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
BUILTINS = {
    errors.InputError: ValueError,
    errors.MissingError: KeyError,
    errors.MissingPackageError: ImportError,
    errors.MemoryNeededError: MemoryError,
    errors.NumericalError: FloatingPointError,
}


def store_error():
    """An error like those of TensorFlow's file systems: the command looks at the class's module."""
    return type("PermissionDeniedError", (Exception,), {"__module__": "tensorflow.python.framework"})(
        "gs://b"
    )


@pytest.fixture
def fails(monkeypatch):
    """Returns a function that makes `unclip sample` raise a given exception."""

    def with_error(error):
        def run(args):
            raise error

        monkeypatch.setattr(sample, "run", run)

    return with_error


@pytest.mark.parametrize("kind, builtin", BUILTINS.items())
def test_each_error_is_also_the_builtin_that_describes_it(kind, builtin):
    error = pickle.loads(pickle.dumps(kind("the thing 'x' is not there")))
    assert isinstance(error, errors.UserError) and isinstance(error, builtin)
    assert str(error) == "the thing 'x' is not there" and str(kind()) == ""


@pytest.mark.parametrize(
    "error, line",
    [
        *[(kind("what is wrong:\n  'x'"), "what is wrong: 'x'") for kind in BUILTINS],
        (errors.InputError(), "InputError"),
        (FileNotFoundError("no picture a.png"), "no picture a.png"),
        (store_error(), "gs://b"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "RESOURCE_EXHAUSTED: Out of memory"),
        (
            RuntimeError("Unable to initialize backend 'cuda': none"),
            "Unable to initialize backend 'cuda': none",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line(error, line, fails, monkeypatch, capsys):
    monkeypatch.delenv("UNCLIP_DEBUG", raising=False)
    fails(error)
    assert main(["sample", "a fox"]) == 1
    assert capsys.readouterr().err == f"unclip sample: error: {line} (UNCLIP_DEBUG=1 shows the traceback)\n"
    monkeypatch.setenv("UNCLIP_DEBUG", "1")
    with pytest.raises(type(error)) as shown:
        main(["sample", "a fox"])
    assert shown.value is error


@pytest.mark.parametrize(
    "kind", [TypeError, AttributeError, ValueError, KeyError, ZeroDivisionError, RuntimeError]
)
def test_a_bug_shows_its_traceback_and_how_to_report_it(kind, fails, capsys):
    fails(kind("sizes"))
    assert main(["sample", "a red fox", "--seed", "3"]) == 70
    *traceback, last = capsys.readouterr().err.splitlines()
    assert traceback[0].startswith("Traceback") and traceback[-1].startswith(kind.__name__)
    assert any("in run" in line for line in traceback)
    assert "This is a bug in unclip_jax" in last and "`unclip sample 'a red fox' --seed 3`" in last
    jax, package = import_module("jax").__version__, import_module("unclip_jax").__version__
    assert last.endswith(f"unclip_jax {package}, jax {jax}, Python {platform.python_version()}")


def test_the_command_of_a_bug_is_that_of_the_process():
    """Without `argv` the report has the process's own command, and the process exits with status 70."""
    code = (
        "import sys\nfrom unclip_jax.cli import main, sample\n"
        "def run(args): raise TypeError('sizes')\nsample.run = run\nsys.exit(main.main())"
    )
    command = [sys.executable, "-c", code, "sample", "it's"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 70 and """`unclip sample 'it'"'"'s'`""" in done.stderr.splitlines()[-1]


def test_an_interrupt_is_no_bug(fails, capsys):
    fails(KeyboardInterrupt())
    assert main(["sample", "a fox"]) == 130
    assert capsys.readouterr().err == "unclip: stopped\n"


@pytest.mark.parametrize("name", ["KeyError", "InputError", "FileNotFoundError", "TypeError"])
def test_input_errors_turns_the_kinds_it_is_told(name):
    """A UserError, an OSError and any other kind pass unchanged. The first error is the cause."""
    kind = getattr(errors, name, None) or getattr(__import__("builtins"), name)
    first = kind("no such\nname")
    with (
        pytest.raises(Exception) as caught,
        errors.input_errors("config.json", ValueError, KeyError, OSError),
    ):
        raise first
    if name == "KeyError":
        assert type(caught.value) is errors.InputError and caught.value.__cause__ is first
        assert str(caught.value) == "config.json: no such name"
    else:
        assert caught.value is first
