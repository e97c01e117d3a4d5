"""The package's floors (docs/architecture.md): imports go down only, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_dist

ROOT = Path(moe_dist.__file__).parent
FLOORS = (
    ("errors", "exits", "messages", "files", "registry", "machine"),
    ("model",),
    ("workloads", "oracle", "tables", "step", "balance"),
    ("checkpoint", "comm", "kernels"),
    ("exchange", "backends"),
    ("peers",),
    ("engine",),
    ("runtime",),
    ("bench",),
    ("report", "simulate"),
    ("commands", "integrations", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# A library, and the only place that may import it.
HOMES = {
    "ray": ("runtime/",),
    "triton": (
        "kernels/triton/",
        *("exchange/all_to_all/list_kernels", "exchange/all_to_all/row_kernels"),
        *(f"exchange/nvlink/{name}" for name in ("flags", "row_kernels", "sum_kernels", "reduce_kernels")),
        "exchange/served",
    ),
    "flashinfer": ("backends/flashinfer",),
    "deep_gemm": ("backends/deep_gemm",),
    "transformers": ("integrations/",),
    "sglang": ("integrations/",),
    "vllm": ("integrations/",),
    "safetensors": ("checkpoint/",),
    "psutil": ("machine", "runtime/"),
    "pynvml": ("machine",),
    "elftools": ("machine/",),
    "prometheus_client": ("runtime/",),
    "rich": ("bench/answer", "bench/diff", "bench/table", "commands/"),
    "cyclopts": ("commands/",),
    "jinja2": ("report/",),
}
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(source: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            base = node.module or ""
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def part_of(source: str) -> str:
    return source.removesuffix(".py").split("/")[0]


def inner(source: str) -> list[tuple[str, int]]:
    """The package's own parts that a file imports."""
    return [(name.split(".")[1], line) for name, line in imports(source) if name.split(".")[0] == "moe_dist"]


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "__init__.py"])
def test_imports_go_down_only(source):
    own = FLOOR[part_of(source)]  # a KeyError here: give the new file or folder a floor
    upward = [f"{source}:{line} imports {part}" for part, line in inner(source) if FLOOR[part] > own]
    assert upward == []


def test_exchange_and_backends_do_not_know_each_other():
    pairs = {("exchange", "backends"), ("backends", "exchange")}
    found = [
        f"{source}:{line}" for source in SOURCES for part, line in inner(source) if (part_of(source), part) in pairs
    ]
    assert found == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_home_only(library):
    found = [
        f"{source}:{line}"
        for source in SOURCES
        for name, line in imports(source)
        if name.split(".")[0] == library and not source.startswith(HOMES[library])
    ]
    assert found == []


def test_the_parts_of_a_floor_do_not_import_in_circles():
    """Between parts that share a floor the order must still be one way."""
    uses = {part: {p for source in SOURCES if part_of(source) == part for p, _ in inner(source)} for part in FLOOR}
    done: set[str] = set()
    while ready := {part for part in FLOOR if part not in done and uses[part] - {part} <= done}:
        done |= ready
    assert set(FLOOR) - done == set()


def modules_after(statement: str) -> tuple[set[str], float]:
    """The modules that an import loads into a fresh interpreter, and its CPU seconds beyond `import torch`."""
    code = (
        "import sys, time, torch; before, start = set(sys.modules), time.process_time();"
        f"{statement}; print(time.process_time() - start, *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    seconds, *names = done.stdout.split()
    return set(names), float(seconds)


def test_importing_the_layer_is_fast_and_loads_little():
    """Beside torch and the standard library, what checks input and nothing else: a serving process that imports it pays
    for no more."""
    names, seconds = modules_after("import moe_dist.engine.layer")
    assert "moe_dist.comm" in names
    packages = {name.split(".")[0] for name in names if not name.startswith("_")} - sys.stdlib_module_names
    assert packages == {"moe_dist", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
    assert {name for name in names if name.startswith("torch.")} == set()  # what torch loads later by itself
    assert seconds < 0.6  # 0.2 on two cores; of CPU time, so a busy machine is no excuse


def test_help_waits_for_no_command():
    """Nor does a slip of the keyboard: torch alone takes seconds to import."""
    code = "import sys; from moe_dist.commands.cli import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    for arguments in (["--help"], ["nosuch"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        names = done.stdout.split()
        assert "cyclopts" in names
        assert {"torch", "pydantic", "yaml", "numpy"} & set(names) == set()


@pytest.mark.parametrize("module", ["moe_dist.engine.layer", "moe_dist.bench.sweep", "moe_dist.commands.measuring"])
def test_libraries_wait_until_they_are_chosen(module):
    names, _ = modules_after(f"import {module}")
    chosen_later = {"ray", "triton", "flashinfer", "deep_gemm", "transformers", "sglang", "vllm"}
    assert {name for name in names if name.split(".")[0] in chosen_later} == set()
    for folder in ("backends", "exchange"):
        loaded = {name for name in names if name.startswith(f"moe_dist.{folder}.")}
        assert loaded <= {f"moe_dist.{folder}.{shared}" for shared in ("base", "layout", "rows")}
