"""Imports point downwards only, and there is no import circle.

A room may import rooms of lower floors, but no other room of its own floor.
"""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "unclip_jax"

FLOORS = (
    ("errors",),
    ("paths", "typed", "backend"),
    ("models", "diffusion", "data", "sharding", "grid"),
    ("generate", "checkpoint", "metrics"),
    ("run",),
    ("train", "sampling"),
    ("evaluate", "compile"),
    ("serve",),
    ("cli",),
)
ROOMS = [room for floor in FLOORS for room in floor]


def modules_of(path, package):
    """Names of the package's modules and rooms that a file imports anywhere.

    The name of unclip_jax.models.clip is "models.clip".
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("unclip_jax."):
                yield name.removeprefix("unclip_jax.")


def allowed(room):
    """The rooms that a room may import."""
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    return {room, *(name for rooms in FLOORS[:floor] for name in rooms)}


def violations(package):
    """(file, room it imports) of every import that points up or sideways."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for imported in sorted({name.split(".")[0] for name in modules_of(path, package)}):
            if imported in ROOMS and imported not in allowed(room):
                yield str(relative), imported


def circles(package):
    """Modules that import one another when they are loaded, each circle once."""
    graph = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = path
    loaded = {name: set(top_level(path, graph)) & graph.keys() for name, path in graph.items()}
    circles, state = [], {}

    def visit(name, way):
        state[name] = "open"
        for other in sorted(loaded[name]):
            if state.get(other) == "open" and other != name:
                circles.append([*way[way.index(other) :], other] if other in way else [name, other])
            elif other not in state:
                visit(other, [*way, other])
        state[name] = "done"

    for name in graph:
        if name not in state:
            visit(name, [name])
    return circles


def top_level(path, graph):
    """Modules that a file imports while it is loaded: those inside functions are imported later."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("unclip_jax"):
            module = node.module.removeprefix("unclip_jax").removeprefix(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".lstrip(".")
                yield whole if whole in graph else module
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("unclip_jax.")
                for a in node.names
                if a.name.removeprefix("unclip_jax.") in graph
            )


def test_every_room_has_a_floor():
    there = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__"} == set(ROOMS)


def test_imports_point_downwards():
    assert list(violations(PACKAGE)) == []


def test_there_is_no_import_circle():
    assert circles(PACKAGE) == []


def test_what_is_forbidden_is_found(tmp_path):
    """An import upwards, one sideways, and a circle."""
    for room, text in (
        ("models", "def f():\n    from unclip_jax.train import clip\n    return clip\n"),
        ("checkpoint", "from unclip_jax.generate import text\n"),
        ("run", "from unclip_jax.run import other\n"),
    ):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
        (tmp_path / room / "bad.py").write_text(text)
    (tmp_path / "run" / "other.py").write_text("from unclip_jax.run import bad\n")
    assert list(violations(tmp_path)) == [("checkpoint/bad.py", "generate"), ("models/bad.py", "train")]
    assert circles(tmp_path) == [["run.bad", "run.other", "run.bad"]] or circles(tmp_path) == [
        ["run.other", "run.bad", "run.other"]
    ]


def test_models_and_diffusion_import_no_io():
    io = {"tensorflow", "PIL", "pathlib", "os"}
    for room, banned in (("models", io), ("diffusion", io | {"flax"})):
        for path in (PACKAGE / room).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            roots = {
                a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
            }
            roots |= {
                n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
            }
            assert not roots & banned, path


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 450} == {}


def test_import_is_light():
    """Neither `import unclip_jax` nor the command's help imports jax, TensorFlow or torch."""
    heavy = "{'jax', 'tensorflow', 'torch', 'flax', 'numpy'}"
    for first in ("import unclip_jax", "from unclip_jax.cli.main import build_parser; build_parser()"):
        code = f"import sys; {first}; print(sorted({heavy} & set(sys.modules)))"
        assert (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
            == "[]"
        )
