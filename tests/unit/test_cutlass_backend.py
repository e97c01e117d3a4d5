"""Backend cutlass without a GPU: what it refuses, how its library is found, keyed and built, and what it offers."""

from __future__ import annotations

import ctypes
import fcntl
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from unit.asked import problem

from moe_dist import tables
from moe_dist.backends import BACKENDS
from moe_dist.backends.cutlass_fused import MOST_EXPERTS, CutlassFused
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.kernels.cutlass import check, library
from moe_dist.kernels.cutlass.fused_moe import SHARES, Config
from moe_dist.kernels.cutlass.library import Args, BuildError, WeightsMap
from moe_dist.messages.notices import collecting
from moe_dist.model.spec import QUANT_KINDS
from moe_dist.tables import tuned_config


class TestSupports:
    @pytest.mark.parametrize(
        "asked",
        [
            *(problem(quant=quant) for quant in QUANT_KINDS[1:]),
            *(problem(activation=activation) for activation in ("swiglu", "geglu", "relu2")),
            problem(hidden=2880, width=720),
            problem(payload="fp8"),
            problem(width=0),
            problem(num_local=0),
        ],
    )
    def test_takes(self, asked):
        assert CutlassFused.supports(asked).ok

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            (problem(quant="none"), "computes FP8 layers, not bf16"),
            (problem(num_local=MOST_EXPERTS + 1), f"at most {MOST_EXPERTS} experts on a rank, not {MOST_EXPERTS + 1}"),
            (problem(capability=(10, 0)), r"needs compute capability 9\.0, not \(10, 0\)"),
            (problem(hidden=200), r"hidden \(200\) and slices \(256\) in multiples of 16"),
            (problem(width=100), r"slices \(100\)"),
        ],
    )
    def test_refuses_with_the_reason(self, asked, reason):
        support = CutlassFused.supports(asked)
        assert not support.ok
        assert re.search(reason, support.reason), support.reason

    def test_not_on_a_cpu(self):
        assert "Hopper" in CutlassFused.available("cpu").reason
        assert BACKENDS.get("cutlass") is CutlassFused


class TestConfigs:
    @pytest.mark.parametrize("rows", [1, 64, 2048, 8192])
    def test_every_candidate_is_compiled(self, rows):
        offered = CutlassFused.candidates(problem(), rows)
        assert CutlassFused.default_config(problem(), rows) == offered[0]
        assert len({tuple(one.items()) for one in offered}) == len(offered) == len(SHARES) ** 2
        for one in offered:
            assert vars(CutlassFused.config_of(one, problem().spec)) == one

    @pytest.mark.parametrize("changes", [{"share1": 3}, {"share2": 0}])
    def test_another_is_refused_by_name(self, changes):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            Config(**{"share1": 2, "share2": 2} | changes).check()

    @pytest.mark.parametrize(
        ("values", "field"),
        [
            ({"share1": 1, "share2": 1, "pdl": True, "share3": 1}, "share3"),
            ({"share1": 1, "pdl": True}, "share2"),
            ({"share1": True, "share2": 1}, "share1"),
            ({"share1": "1", "share2": 1}, "share1"),
            ({"share1": 1, "share2": 1, "pdl": 1}, "pdl"),
        ],
    )
    def test_keys_and_types_of_a_table_s_config_are_checked(self, values, field):
        with pytest.raises(ConfigError, match=rf"config\.{field} = "):
            CutlassFused.config_of(values, problem().spec)

    def test_what_has_a_default_may_be_missing(self):
        assert CutlassFused.config_of({"share1": 2, "share2": 1}, problem().spec) == Config(2, 1, True)

    def test_a_missing_table_is_said_once(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path))
        tables.say_missing_once.cache_clear()
        shape = tables.Shape.of("cutlass", "NVIDIA H200", problem().spec, 256, 4)
        with collecting() as said:
            assert tuned_config(shape, CutlassFused.table_revision, 8) is None
            assert tuned_config(shape, CutlassFused.table_revision, 8) is None
        (line,) = said
        assert "moe-dist tune --backend cutlass" in line


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


SAYS = 'case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac\n'
WRITES = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """An nvcc that writes empty files, and headers of CUTLASS."""
    headers = tmp_path / "packages" / "flashinfer" / "data" / "cutlass" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (headers / "version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 5\n#define CUTLASS_PATCH 0\n")
    (tmp_path / "packages" / "flashinfer" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    library._nvcc_says.cache_clear()
    yield script(tmp_path / "cuda" / "bin" / "nvcc", SAYS + WRITES)
    library._nvcc_says.cache_clear()


class TestBuild:
    def test_once_and_for_all(self, toolkit, capsys):
        assert not library.build_state().ok
        assert library.BUILD_COMMAND in library.build_state().reason
        path = library.ensure_built()
        assert path.read_text() == "made\n"
        assert library.build_state() == (True, "built")
        said = capsys.readouterr().err
        assert "compiled 19 of 19 sources" in said
        assert sorted(child.name for child in path.parent.iterdir()) == ["lock", "moe_dist_gemm.so"]
        assert library.ensure_built() == path
        assert not capsys.readouterr().err

    def test_the_key_holds_what_decides(self, toolkit, monkeypatch):
        first = library.library_path()
        script(toolkit, SAYS.replace("13.0", "13.1") + WRITES)
        library._nvcc_says.cache_clear()
        second = library.library_path()
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-lineinfo"))
        assert len({first, second, library.library_path()}) == 3

    def test_what_nvcc_says_is_shown(self, toolkit):
        script(toolkit, SAYS + 'echo "grouped_gemm.cuh(1): error: no" >&2; exit 2')
        with pytest.raises(BuildError, match=r"(?s)nvcc failed with 2: .*grouped_gemm\.cuh\(1\): error: no"):
            library.ensure_built()
        assert not library.library_path().exists()

    def test_one_that_hangs_is_ended(self, toolkit, monkeypatch):
        monkeypatch.setattr(library, "COMPILE_TIMEOUT_S", 0.3)
        script(toolkit, SAYS + "exec sleep 30")
        with pytest.raises(BuildError, match=r"nvcc took longer than 0 s"):
            library.ensure_built()

    def test_no_nvcc(self, toolkit, monkeypatch):
        monkeypatch.delenv("CUDA_HOME")
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(library, "_nvidia_folders", list)
        with pytest.raises(ResourceError, match=r"nvcc needed, none available\. Set CUDA_HOME"):
            library.ensure_built()
        assert "CUDA_HOME" in library.build_state().reason

    def test_a_toolkit_that_is_named_must_be_there(self, toolkit):
        toolkit.unlink()
        with pytest.raises(
            ResourceError, match=r"cuda/bin/nvcc needed, none available\. CUDA_HOME names a CUDA toolkit"
        ):
            library.ensure_built()

    def test_one_that_fails_is_named(self, toolkit):
        script(toolkit, "exit 7")
        assert re.search(r"bin/nvcc, which fails: .*exit status 7", library.build_state().reason)

    def test_a_cache_that_is_a_file(self, toolkit, tmp_path, monkeypatch):
        monkeypatch.setenv("MOE_DIST_CACHE", __file__)
        with pytest.raises(ConfigError, match=r"MOE_DIST_CACHE = .*can't be written"):
            library.ensure_built()

    def test_no_place_for_a_cache(self, toolkit, monkeypatch):
        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", none)
        for name in ("MOE_DIST_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        assert "MOE_DIST_CACHE" in library.build_state().reason
        with pytest.raises(ConfigError, match="MOE_DIST_CACHE"):
            library.ensure_built()

    def test_the_packaged_nvcc_is_found_last(self, toolkit, monkeypatch, tmp_path):
        monkeypatch.delenv("CUDA_HOME")
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
        packaged = script(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", SAYS + WRITES)
        monkeypatch.setattr(library, "_nvidia_folders", lambda: [tmp_path / "nvidia"])
        assert library.find_nvcc() == str(packaged)

    def test_an_old_nvcc(self, toolkit):
        script(toolkit, SAYS.replace("13.0", "11.8"))
        library._nvcc_says.cache_clear()
        with pytest.raises(ResourceError, match=r"nvcc 12\.4 or newer needed, .*nvcc of version 11\.8 available"):
            library.find_nvcc()

    def test_old_headers_or_none(self, toolkit, tmp_path, monkeypatch):
        file = tmp_path / "packages" / "flashinfer" / "data" / "cutlass" / "include" / "cutlass" / "version.h"
        file.write_text(file.read_text().replace("MAJOR 4", "MAJOR 2"))
        monkeypatch.setattr(library, "HEADERS", library.HEADERS[:1])
        with pytest.raises(ResourceError, match=r"CUTLASS 3\.7 or newer needed, 2\.5\.0 of flashinfer available"):
            library.find_headers()
        file.unlink()
        with pytest.raises(ResourceError, match=r"needed, none available\. pip install flashinfer-python"):
            library.find_headers()

    def test_one_process_compiles_and_another_says_that_it_waits(self, toolkit, monkeypatch, capsys):
        monkeypatch.setattr(library, "SAY_EVERY_S", 0.3)
        script(toolkit, SAYS + "sleep 0.2\n" + WRITES)
        path = library.library_path()
        path.parent.mkdir(parents=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\n"
             "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(1.2)", path.parent / "lock"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        began = time.monotonic()
        library.ensure_built()
        assert time.monotonic() - began > 0.8
        said = capsys.readouterr().err
        assert said.index("waiting for another process") < said.index("compiling 19 sources")
        assert holder.wait(10) == 0

    def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(self, toolkit, monkeypatch):
        monkeypatch.setattr(library, "SAY_EVERY_S", 0.1)
        monkeypatch.setattr(library, "LOCK_TIMEOUT_S", 0.3)
        script(toolkit, SAYS + WRITES)
        lock = library.library_path().parent / "lock"
        lock.parent.mkdir(parents=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(library.BuildError, match=rf"holds {lock} since 0 s: it compiles, is stopped or hangs"):
                library.ensure_built()
        library.ensure_built()

    def test_threads_of_one_process_build_once(self, toolkit, tmp_path):
        count = tmp_path / "count"
        script(toolkit, SAYS + f"echo x >> {count}\n" + WRITES)
        threads = [threading.Thread(target=library.ensure_built) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(count.read_text().split()) == 20  # 19 sources and a link


def test_arguments_lie_as_in_c():
    """Eleven pointers, two 64-bit strides, ten integers, in the order of grouped_gemm.cuh, whose size is checked when
    it is compiled."""
    text = (library.SOURCES / "grouped_gemm.cuh").read_text()
    body = text[text.index("struct Args {") : text.index("};", text.index("struct Args {"))]
    body = re.sub(r"//.*", "", body)
    declared = [name.strip(" *") for line in body.split("{")[1].split(";") for name in line.split(",")]
    names = [name.split()[-1].strip("*") for name in declared if name.strip()]
    assert names == [name for name, *_ in Args._fields_]
    assert ctypes.sizeof(Args) == 14 * 8 + 3 * 8 + 14 * 4


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads", None),
        ("0 bytes stack frame, 400 bytes spill stores, 800 bytes spill loads", "registers spill"),
        ("Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n0 bytes spill stores",
         "serialized due to x"),
        ("", "ptxas has not said"),
    ],
)  # fmt: skip
def test_the_check_reads_what_ptxas_says(said, problem):
    found = check.problem_of(said)
    assert found is None if problem is None else problem in str(found)


def test_the_check_keeps_what_it_found(toolkit, capsys):
    says = 'echo "ptxas info: 0 bytes stack frame, 0 bytes spill stores"\n'
    script(toolkit, SAYS + says + WRITES)
    assert check.main() == 0
    script(toolkit, SAYS + "exit 3")
    assert check.main() == 0
    assert capsys.readouterr().out.count("nothing serialized") == 2
    (library.library_path().parent / "check.txt").unlink()
    assert check.main() == 2
    assert "nvcc failed with 3" in capsys.readouterr().err


def test_a_weights_map_lies_at_a_multiple_of_64():
    for _ in range(20):
        made = WeightsMap()
        assert made.address % 64 == 0
        assert made.address + 128 <= ctypes.addressof(made._room) + ctypes.sizeof(made._room)


def test_the_forward_needs_no_library_for_an_empty_shard_s_rows(monkeypatch):
    """Zero rows come out as zero rows, whatever is built."""
    backend = CutlassFused(problem())
    monkeypatch.setattr(library, "load", lambda: None)
    from moe_dist.model.weights import empty_like
    from moe_dist.step.rows import TokenRows
    from moe_dist.workloads.random_weights import random_weights

    backend.prepare(empty_like(random_weights(problem().spec, 0)))
    rows = TokenRows(torch.zeros(3, 256).bfloat16(), torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2))
    assert torch.equal(backend.forward_alone(rows, torch.bfloat16), torch.zeros(3, 256).bfloat16())


def test_weights_that_are_not_contiguous_are_refused_by_name():
    from moe_dist.kernels.cutlass.fused_moe import Matrices
    from moe_dist.workloads.random_weights import random_weights

    weights = random_weights(problem().spec, 0)
    turned = weights.with_tensors(s2=weights.s2.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ConfigError, match=r"weights\.s2 .*contiguous"):
        Matrices(None, turned)
