"""Backend deep_gemm without a GPU: what it refuses, and what it says of a package that is not there or doesn't fit.
Its kernels' surroundings are tested in Triton's interpreter (fused_moe_interpreted.py)."""

from __future__ import annotations

import re
import sys

import pytest
from unit.asked import problem

from moe_dist.backends import BACKENDS, deep_gemm_grouped
from moe_dist.backends.deep_gemm_grouped import DeepGemm, installed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package deep_gemm with this text."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text):
        (tmp_path / "deep_gemm.py").write_text(text)
        monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
        installed.cache_clear()

    yield write
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    installed.cache_clear()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(quant="none"), "computes fp8_block, not bf16"),
        (problem(quant="fp8_channel"), "computes fp8_block, not fp8_channel"),
        (problem(capability=(8, 9)), "compute capability"),
        (problem(hidden=272), r"hidden \(272\) and slices \(256\) in whole blocks of 128"),
        (problem(width=192), r"slices \(192\)"),
    ],
)
def test_refuses_with_the_reason(asked, reason):
    support = DeepGemm.supports(asked)
    assert not support.ok
    assert re.search(reason, support.reason), support.reason
    assert DeepGemm.supports(problem()).ok


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(deep_gemm_grouped, "find_spec", lambda name: None)
    installed.cache_clear()
    assert installed() == (False, "deep_gemm is not installed (pip install sgl-deep-gemm)")
    installed.cache_clear()


def test_a_build_that_does_not_fit_is_explained(package):
    package("raise OSError('undefined symbol: _ZN3c104cuda')")
    support = installed()
    assert not support.ok
    assert re.search(r"does not load with torch \S+: OSError: undefined symbol: _ZN3c104cuda", support.reason)


def test_one_without_a_function(package):
    package("")
    assert "has no m_grouped_fp8_gemm_nt_contiguous" in installed().reason
    package("m_grouped_fp8_gemm_nt_contiguous = None")
    assert "has no fp8_m_grouped_gemm_nt_masked" in installed().reason


def test_one_that_fits(package):
    package("m_grouped_fp8_gemm_nt_contiguous = fp8_m_grouped_gemm_nt_masked = None")
    assert installed().ok


def test_it_is_listed():
    assert BACKENDS.get("deep_gemm") is DeepGemm
    assert "Hopper" in DeepGemm.available("cpu").reason
