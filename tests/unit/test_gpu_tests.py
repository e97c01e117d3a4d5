"""What tests/gpu take from the package is there: they run seldom, and a name that has moved costs GPUs their time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "tests" / "gpu").glob("*.py"))
# Modules of kernels are decorated as they are imported, which must not meet those of other tests.
CHECK = """
import ast, importlib, sys
from pathlib import Path

wrong = []
for path in map(Path, sys.argv[1:]):
    tree, taken = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "moe_dist":
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    taken[alias.asname or alias.name] = found
                except ImportError:
                    wrong.append(f"{path.name}:{node.lineno}: {node.module} has no {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken:
            if type(taken[node.value.id]) is type(ast) and not hasattr(taken[node.value.id], node.attr):
                wrong.append(f"{path.name}:{node.lineno}: {node.value.id} has no {node.attr}")
print("\\n".join(wrong))
"""


def missing(*paths: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *map(str, paths)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_names_that_gpu_tests_use_are_there() -> None:
    assert len(FILES) > 15
    assert missing(*FILES) == []


def test_a_name_that_has_moved_is_found(tmp_path: Path) -> None:
    path = tmp_path / "moved.py"
    path.write_text("from moe_dist import kernels\nfrom moe_dist.step import fresh, gone\n\nkernels.moved(fresh)\n")
    assert missing(path) == ["moved.py:2: moe_dist.step has no gone", "moved.py:4: kernels has no moved"]
