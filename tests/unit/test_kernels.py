"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_in_the_interpreter():
    """Triton reads the variable when kernels are decorated, so they get a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/kernels_interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "11 passed" in done.stdout, done.stdout[-500:]


def kernels():
    """Every kernel with the types of its arguments and values for its constants."""
    from moe_dist.kernels.triton import quantize, rows, sendlist

    fp8 = {"H": "i32", "FP8_MAX": 448.0}
    yield quantize._quantize_groups, {"x": "*bf16", "q": "*fp8e4nv", "s": "*fp32", "groups": "i32", "TINY": 1e-12,
                                      "GROUP": 128, "TOGETHER": 8, **fp8}  # fmt: skip
    yield quantize._quantize_whole_rows, {"x": "*bf16", "q": "*fp8e4nv", "s": "*fp32", "TINY": 1e-12, "WIDTH": 8192,
                                          **fp8}  # fmt: skip
    yield quantize._cast, {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32", "BLOCK": 2048, **fp8}
    yield rows._take_sends, {**dict.fromkeys(("source", "token", "counts", "target"), "*i32"), "width": "i32",
                             "COMPACT": True, "TARGETS": 4, "BLOCK": 2048}  # fmt: skip
    yield rows._sum_rows, {"rows": "*bf16", "order": "*i32", "counts": "*i32", "y": "*bf16", "hidden": "i32",
                           "bucket": "i32", "COUNTED": True, "WORLD": 4, "BLOCK": 1024}  # fmt: skip
    yield sendlist._send_lists, {
        **dict.fromkeys(("ids", "slot_table", "orders", "tokens_out", "pairs", "counts"), "*i32"),
        "weights": "*fp32", "group_table": "*i64", "copy_counts": "*i64",
        **dict.fromkeys(("T", "BUCKET", "own_group", "EXPERTS", "COPIES"), "i32"),
        "K": 8, "TP": 2, "REPLICATED": True, "PLACES": 8, "BLOCK": 512,
    }  # fmt: skip
    words = ("values", "scales", "wire", "ids", "slot_table", "orders")
    yield sendlist._packed_sends, {
        **dict.fromkeys(words, "*i32"), "weights": "*fp32", "group_table": "*i64", "copy_counts": "*i64",
        **dict.fromkeys(("T", "own_group", "EXPERTS", "COPIES", "VALUE_WORDS", "SCALE_WORDS", "ROW_WORDS"), "i32"),
        "K": 8, "TP": 2, "REPLICATED": True, "PLACES": 8, "TOKENS": 64, "SCALES": 64, "BLOCK": 2048,
    }  # fmt: skip
    yield sendlist._unpack_rows, {
        **dict.fromkeys(("wire", "long", "a", "b", "c"), "*i32"),
        **dict.fromkeys(("ROW_WORDS", "LONG", "A", "B", "C"), "i32"), "SHORT": 64, "BLOCK": 2048,
    }  # fmt: skip
    yield sendlist._unpack_pairs, {"pairs": "*i32", "slots": "*i32", "weights": "*fp32", "BUCKET": "i32", "K": 8,
                                   "PLACES": 8, "SOURCES": 4, "COMPACT": True, "BLOCK": 128}  # fmt: skip


@pytest.mark.parametrize("index", range(9))
def test_compiles_for_sm_90(index):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, arguments = list(kernels())[index]
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
