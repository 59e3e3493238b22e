"""What a program can check in the documents: commands parse, settings exist, links lead somewhere."""

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from unclip_jax.cli.main import build_parser
from unclip_jax.cli.options import parse_assignments
from unclip_jax.cli.train import load_config, override

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def commands(path):
    """The words of each command line in a document's fenced blocks, continued lines joined."""
    text = path.read_text(encoding="utf-8")
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        for command in re.split(r" && | \| ", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # an apostrophe in a sentence: not a command
                continue
            if words:
                yield words


def all_commands(program):
    """(document, words) of every command that starts with `program`."""
    found = [(path.name, words) for path in DOCUMENTS for words in commands(path) if words[0] == program]
    assert found, f"no document has a command of {program}"
    return found


@pytest.mark.parametrize("document, words", all_commands("unclip"), ids=lambda value: str(value)[:80])
def test_commands_parse_and_their_settings_exist(document, words, capsys):
    """`unclip` takes the arguments; a named configuration loads with every documented `--set`."""
    if "..." in words:
        pytest.skip("shortened in the text")
    try:
        args = build_parser().parse_args(words[1:])
    except SystemExit as exit_:
        assert exit_.code == 0, f"{document}: {shlex.join(words)}: {capsys.readouterr().err}"
        return
    if args.verb in ("train", "compile"):
        config = load_config(args.config)
        for key, value in parse_assignments(args.assignments).items():
            override(config, key, value)


@pytest.mark.parametrize("document, words", all_commands("python"), ids=lambda value: str(value)[:80])
def test_benchmarks_take_their_documented_arguments(document, words, monkeypatch):
    """A documented script is there, and its parser takes the arguments."""
    if not words[1].endswith(".py"):
        return
    script = ROOT / words[1]
    assert script.is_file(), f"{document} names {words[1]}"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(script.parent)  # as for a script that Python runs
    spec.loader.exec_module(module)

    class Parsed(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every relative link names a file of the repository."""
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert not missing
