"""Imports point downwards only, and models, diffusion, data and sharding know nothing of one another."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "unclip_jax"

# A module may import from its own group, and from the groups listed.
LEAVES = ("models", "diffusion", "data", "sharding", "grid", "paths")
MIDDLE = ("evaluate", "generate", "checkpoint")
ALLOWED = {
    **{leaf: () for leaf in LEAVES},
    **{leaf: ("paths",) for leaf in ("data", "grid")},
    **{name: (*LEAVES, *MIDDLE) for name in MIDDLE},
    "train": (*LEAVES, *MIDDLE),
    "sampling": (*LEAVES, *MIDDLE),
    "cli": (*LEAVES, *MIDDLE, "train", "sampling"),
}


def imports_of(path):
    """Names of unclip_jax groups that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names if node.module == "unclip_jax"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "unclip_jax" and len(parts) > 1:
                yield parts[1]


def violations(package):
    """(file, group it imports) of every import that points up or sideways."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        group = relative.parts[0].removesuffix(".py")
        if group == "__init__":
            continue
        for imported in imports_of(path):
            if imported != group and imported not in ALLOWED[group]:
                yield str(relative), imported


def test_imports_point_downwards():
    assert list(violations(PACKAGE)) == []


def test_a_violation_is_found(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "bad.py").write_text("def f():\n    from unclip_jax.train import common\n    return common\n")
    assert list(violations(tmp_path)) == [("models/bad.py", "train")]


def test_models_and_diffusion_import_no_io():
    io = {"tensorflow", "PIL", "pathlib", "os"}
    for group, banned in (("models", io), ("diffusion", io | {"flax"})):
        for path in (PACKAGE / group).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
            assert not roots & banned, path


def test_import_is_light():
    """`import unclip_jax` imports neither jax nor TensorFlow nor torch."""
    code = "import sys, unclip_jax; print(sorted({'jax', 'tensorflow', 'torch', 'flax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
