"""Binary packages that don't fit the installed torch are found by reading, with the remedy. The samples are copies of
one of torch's own small libraries, whose names of symbols and needed libraries are overwritten."""

from __future__ import annotations

import shutil
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.machine import binaries
from moe_dist.machine.binaries import (
    Linked,
    NotElfError,
    check_packages,
    demangled,
    read_library,
    release_tried_with,
    torch_libraries,
)

SAMPLE = next(path for path in torch_libraries() if path.name == "libshm.so")
WANTED = next(name for name in read_library(SAMPLE).undefined if name.startswith("_ZN3c10") and len(name) > 20)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs sgl-deep-gemm 9.8 with one library, changed by the given replacements of bytes."""

    def install(*changes: tuple[str, str], requires: str = "", content: bytes | None = None) -> None:
        folder = tmp_path / "deep_gemm"
        folder.mkdir()
        data = SAMPLE.read_bytes() if content is None else content
        for before, after in changes:
            assert len(before) == len(after)
            assert before.encode() in data
            data = data.replace(before.encode() + b"\0", after.encode() + b"\0")
        (folder / "_C.so").write_bytes(data)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        info = tmp_path / "sgl_deep_gemm-9.8.dist-info"
        info.mkdir()
        asks = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sgl-deep-gemm\nVersion: 9.8\n{asks}")
        (info / "RECORD").write_text("deep_gemm/_C.so,,\ndeep_gemm/__init__.py,,\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def only_one() -> binaries.Fit:
    (fit,) = check_packages(["sgl-deep-gemm", "surely-not-installed"])
    assert (fit.package, fit.version) == ("sgl-deep-gemm", "9.8")
    return fit


def test_torchs_own_libraries_say_what_they_need():
    found = read_library(SAMPLE)
    assert {"libtorch_cpu.so", "libc10.so"} <= set(found.needed)
    assert any(name.startswith("_ZN3c10") for name in found.undefined)
    assert found.torchs


def test_one_that_fits(package):
    package()
    fit = only_one()
    assert fit.ok
    assert fit.files == 1
    assert (fit.problem(), fit.remedy("2.13.0", None)) == ("", "")


def test_a_symbol_that_torch_lacks(package):
    package((WANTED, WANTED[:-3] + "zzz"))
    fit = only_one()
    assert fit.missing == (WANTED[:-3] + "zzz",)
    assert "which this torch does not define" in fit.problem()
    remedy = fit.remedy("2.13.0+cpu", "<0.2,>=0.1.4")
    assert "built for torch 2.13 (this project was tried with sgl-deep-gemm<0.2,>=0.1.4)" in remedy
    assert "9.8 was built for" in remedy


def test_what_the_package_itself_asks_for_is_named(package):
    package((WANTED, WANTED[:-3] + "zzz"), requires="torch (==2.11.0)")
    assert "sgl-deep-gemm 9.8 asks for torch==2.11.0" in only_one().remedy("2.13.0", None)


def test_symbols_that_tell_the_release():
    name = "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE"
    fit = binaries.Fit("sgl-deep-gemm", "0.1.4.post1", 1, missing=("_ZN3c105otherEv", name))
    assert fit.problem().startswith("wants c10::impl::cow::materialize_cow_storage(c10::StorageImpl&) and 1 more")
    assert "materialize_cow_storage: torch 2.11 has it, 2.13 and 2.14 have not" in fit.remedy("2.13.0", None)


def test_a_library_of_torch_that_is_not_there(package):
    package(("libtorch_cpu.so", "libtorch_gpx.so"))
    fit = only_one()
    assert fit.absent == ("libtorch_gpx.so",)
    assert "needs libtorch_gpx.so, which this torch has not" in fit.problem()
    assert "install torch's build for CUDA" in fit.remedy("2.13.0", None)


def test_no_package_is_imported(package):
    package()
    assert only_one().ok  # its __init__ would raise


def test_a_damaged_library_says_so(package):
    package(content=SAMPLE.read_bytes()[:1000])
    fit = only_one()
    assert not fit.ok
    assert "_C.so can't be read as a library" in fit.problem()
    assert "--force-reinstall --no-deps sgl-deep-gemm==9.8" in fit.remedy("2.13.0", None)


def test_what_is_not_linked_with_torch_is_left_out(package):
    own = next(path for path in torch_libraries() if path.name.startswith("libgomp"))
    package(content=own.read_bytes())
    assert check_packages(["sgl-deep-gemm"]) == []


def test_another_cuda():
    built_for_12 = Linked(("libtorch.so", "libcudart.so.12", "libcublas.so.12"), ())
    assert built_for_12.torchs
    assert binaries._cuda_of(built_for_12.needed) == 12
    fit = binaries.Fit("x", "1", 1, cuda=12)
    assert "was built for CUDA 12" in fit.problem()
    assert "built for torch 2.13 and its CUDA" in fit.remedy("2.13.0+cu130", None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("torch==2.9.1", "==2.9.1"),
        ("torch (>=2.8,<2.10)", ">=2.8,<2.10"),
        ("torch>=2.0; extra == 'test'", None),
        ("torchvision==0.24", None),
        ("torch", None),
        ("torch>=2.4; python_version >= '3.10'", ">=2.4"),
    ],
)
def test_requirements(text: str, wanted: str | None):
    assert binaries._requirement([text], "torch") == wanted


def test_the_release_that_this_project_was_tried_with():
    (text,) = [line for line in Distribution.from_name("moe_dist").requires or () if line.startswith("sgl-deep-gemm")]
    assert release_tried_with("sgl-deep-gemm") in text
    assert release_tried_with("surely-not-there") is None


def test_names_as_they_were_written():
    assert demangled("_ZN3c104cuda14current_deviceEv") == "c10::cuda::current_device()"
    assert demangled("aoti_torch_free") == "aoti_torch_free"


@examples(40)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 42000))
def test_damaged_files_raise_nothing_else(tmp_path_factory, changes, length):
    data = bytearray(SAMPLE.read_bytes())
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.mktemp("damaged") / "x.so"
    path.write_bytes(data[:length])
    try:
        found: Linked | str = read_library(path)
    except NotElfError as error:
        found = str(error)
    shutil.rmtree(path.parent)
    assert isinstance(found, Linked) or (found and "\n" not in found)
