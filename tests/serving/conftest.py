"""Each of these files needs a serving stack, installed without what it depends on (`make test-sglang`, `test-vllm`);
without it the file is skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS = {"test_sglang": "sglang", "test_vllm": "vllm"}


class _Skipped(pytest.File):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"needs {NEEDS[self.path.stem]}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    package = NEEDS.get(module_path.stem)
    if package is not None and find_spec(package) is None:
        return _Skipped.from_parent(parent, path=module_path)
    return None
