"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for sm_90."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_dist.backends import Problem
from moe_dist.backends.triton_fused import TritonFused
from moe_dist.model.spec import MoESpec

TESTS = Path(__file__).parents[1]
SHARED_MEMORY = 227 * 1024  # bytes that one program can have on SM90


def in_the_interpreter(file: str, passed: int, timeout_s: float, *options: str) -> None:
    """Triton reads the variable when kernels are decorated, so they get a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/unit/{file}", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(rf"^{passed} passed\b", done.stdout, re.MULTILINE), done.stdout[-500:]


def test_row_kernels_in_the_interpreter():
    in_the_interpreter("kernels_interpreted.py", passed=14, timeout_s=170)


def test_the_nvlink_exchange_in_the_interpreter():
    in_the_interpreter("nvlink_interpreted.py", passed=61, timeout_s=170)


def test_schedules_of_the_nvlink_exchange_in_the_interpreter():
    in_the_interpreter("nvlink_schedules_interpreted.py", passed=7, timeout_s=170)


@pytest.mark.timeout(400)
def test_fused_moe_in_the_interpreter():
    in_the_interpreter("fused_moe_interpreted.py", passed=107, timeout_s=390)


@pytest.mark.slow
def test_the_rest_of_the_fused_moe_in_the_interpreter():
    in_the_interpreter("fused_moe_interpreted.py", 53, 170, "-m", "slow")


def kernels():
    """Every kernel with the types of its arguments and values for its constants."""
    from moe_dist.exchange.all_to_all import list_kernels, row_kernels
    from moe_dist.exchange.nvlink import flags, reduce_kernels, sum_kernels
    from moe_dist.exchange.nvlink import row_kernels as nvlink_rows
    from moe_dist.kernels.triton import padded, pairs, quantize, slots

    fp8 = {"H": "i32", "FP8_MAX": 448.0}
    yield quantize._quantize_groups, {"x": "*bf16", "q": "*fp8e4nv", "s": "*fp32", "groups": "i32", "TINY": 1e-12,
                                      "GROUP": 128, "TOGETHER": 8, **fp8}  # fmt: skip
    yield quantize._quantize_whole_rows, {"x": "*bf16", "q": "*fp8e4nv", "s": "*fp32", "TINY": 1e-12, "WIDTH": 8192,
                                          **fp8}  # fmt: skip
    yield pairs._put_pairs, {
        "ids": "*i32", "weights": "*fp32", "ids_out": "*i64", "weights_out": "*fp32", "PAIRS": "i32", "PLACES": "i32",
        "EXPERTS": "i32", "BLOCK": 512,
    }  # fmt: skip
    yield quantize._cast, {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32", "BLOCK": 2048, **fp8}
    yield row_kernels._take_sends, {
        **dict.fromkeys(("source", "token", "counts", "send", "receive"), "*i32"), "width": "i32", "rank": "i32",
        "WORDS": True, "COMPACT": True, "TARGETS": 4, "BLOCK": 2048,
    }  # fmt: skip
    yield row_kernels._sum_rows, {"back": "*bf16", "own": "*bf16", "order": "*i32", "counts": "*i32", "y": "*bf16",
                           "hidden": "i32", "bucket": "i32", "rank": "i32", "COUNTED": True, "WORLD": 4,
                           "BLOCK": 1024}  # fmt: skip
    yield slots._slots_on, {**dict.fromkeys(("ids", "slot_table", "slots"), "*i32"),
                               **dict.fromkeys(("PAIRS", "own_group", "EXPERTS"), "i32"), "BLOCK": 512}  # fmt: skip
    for counted in (True, False):
        yield list_kernels._send_lists, {
            **dict.fromkeys(("ids", "slot_table", "orders", "tokens_out", "slots_out", "slots_own", "counts"), "*i32"),
            **dict.fromkeys(("weights_out", "weights_own"), "*i32" if counted else "*fp32"),
            "weights": "*fp32", "group_table": "*i64", "copy_counts": "*i64",
            **dict.fromkeys(("T", "BUCKET", "rank", "own_group", "EXPERTS", "COPIES"), "i32"),
            "K": 8, "TP": 2, "REPLICATED": True, "PLACES": 8, "COUNTED": counted, "PARTS": True, "LOOK": 1024,
            "BLOCK": 256,
        }  # fmt: skip
    yield list_kernels._packed_sends, {
        **dict.fromkeys(("send", "receive", "ids", "slot_table", "orders"), "*i32"),
        "values": "*fp8e4nv", "scales": "*fp32", "weights": "*fp32", "group_table": "*i64", "copy_counts": "*i64",
        **dict.fromkeys(("T", "rank", "own_group", "EXPERTS", "COPIES"), "i32"),
        **dict.fromkeys(("VALUE_WORDS", "SCALE_WORDS", "ROW_WORDS"), "i32"),
        "K": 8, "TP": 2, "REPLICATED": True, "PLACES": 8, "TOKENS": 64, "SCALES": 64, "BLOCK": 2048,
    }  # fmt: skip
    yield list_kernels._unpack_rows, {
        "wire": "*i32", "long": "*fp8e4nv", "short": "*fp32", "slots": "*i32", "weights": "*fp32",
        **dict.fromkeys(("ROW_WORDS", "LONG", "A", "K"), "i32"), "SHORT": 64, "BLOCK": 2048,
    }  # fmt: skip
    yield list_kernels._unpack_pairs, {
        "pairs": "*i32", "slots": "*i32", "weights": "*fp32", "BUCKET": "i32", "rank": "i32", "K": 8, "PLACES": 8,
        "SOURCES": 4, "BLOCK": 128,
    }  # fmt: skip
    ends = {"header": "*i32", "failed": "*i32", "peers": "*i64", "rank": "i32", "BUCKET": "i32", "LIMIT_NS": "i64",
            "W": 4, "LANES": 4, "WAITS": True, "BLOCK": 2048, "K": 8, "PLACES": 8, "EARLY": True}  # fmt: skip
    yield nvlink_rows._send_rows, {
        **ends, "values": "*fp8e4nv", "scales": "*fp32", "weights": "*fp32", "group_table": "*i64",
        "copy_counts": "*i64", "served": "*i8", **dict.fromkeys(("ids", "slot_table"), "*i32"),
        **dict.fromkeys(("T", "own_group", "EXPERTS", "COPIES", "VALUE_WORDS", "SCALE_WORDS"), "i32"),
        **dict.fromkeys(("VALUES_AT", "SCALES_AT", "SLOTS_AT", "WEIGHTS_AT"), "i32"),
        "TP": 2, "REPLICATED": True, "SCALES": 64, "QUANTIZES": False, "TO_OWN": True, "TO_OTHERS": True, "ENDS": True,
    }  # fmt: skip
    yield nvlink_rows._send_rows, {
        **ends, "values": "*bf16", "scales": "*bf16", "weights": "*fp32", "group_table": "*i64", "copy_counts": "*i64",
        "served": "*i8", **dict.fromkeys(("ids", "slot_table"), "*i32"),
        **dict.fromkeys(("T", "own_group", "EXPERTS", "COPIES", "VALUE_WORDS", "SCALE_WORDS"), "i32"),
        **dict.fromkeys(("VALUES_AT", "SCALES_AT", "SLOTS_AT", "WEIGHTS_AT"), "i32"),
        "TP": 2, "REPLICATED": False, "SCALES": 64, "QUANTIZES": True, "TO_OWN": True, "TO_OTHERS": True, "ENDS": True,
    }  # fmt: skip
    yield sum_kernels._send_sums, {**ends, "sums": "*bf16", "slots": "*i32", "WORDS": "i32", "WIDTH": "i32",
                              "RANGES": "i32", "SUMS_AT": "i32"}  # fmt: skip
    yield sum_kernels._add_sums, {**ends, "came": "*bf16", "own": "*bf16", "served": "*i8", "y": "*bf16", "T": "i32",
                             "H": "i32", "WIDTH": "i32", "RANGES": "i32", "APART": "i32", "OWN": True,
                             "ENDS": True}  # fmt: skip
    yield flags._meet, {**ends, "phase": 1}
    yield nvlink_rows._set_number, {"header": "*i32"}
    yield nvlink_rows._await_copies, ends
    sizes = dict.fromkeys(("T", "EACH", "WORDS", "AT", "HERE", "H"), "i32")
    yield reduce_kernels._send_shares, {**ends, **sizes, "sums": "*bf16", "by_rank": "*i64"}
    yield reduce_kernels._add_share, {**ends, **sizes, "came": "*bf16", "total": "*bf16", "ENDS": True}
    yield reduce_kernels._gather_shares, {**ends, **sizes, "y": "*bf16", "by_rank": "*i64", "ENDS": True}
    lists = dict.fromkeys(("starts", "stops", "order", "experts", "slots", "places"), "*i32")
    yield padded._pad_rows, {**lists, "x": "*fp8e4nv", "xs": "*fp32", "padded_x": "*fp8e4nv", "padded_s": "*fp32",
                             "E": 160, "WIDE": 256, "K": 8, "H": 7168, "TILE": 128, "ONE_EACH": False,
                             "BLOCK": 4096}  # fmt: skip
    yield padded._activate_rows, {**lists, "d": "*bf16", "h": "*fp8e4nv", "hs": "*fp32", "I": 2048, "ACTIVATION": 0,
                                  "GATE_FIRST": True, "TOGETHER": 4, "TINY": 1e-12, **fp8}  # fmt: skip


@pytest.mark.parametrize("index", range(24))
def test_compiles_for_sm_90(index):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, arguments = list(kernels())[index]
    constants = {name: arguments[name] for name in kernel.arg_names if not isinstance(arguments[name], str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
    if constants.get("EARLY"):
        begin_early(kernel.__name__, compiled.asm["ptx"])


def begin_early(name: str, ptx: str) -> None:
    """What began while the launch before still ran touches no memory before its wait; rows are sent by a launch that
    began as any other and lets the next one begin."""
    waits, memory = ptx.find("griddepcontrol.wait"), re.search(r"\s(ld|st|atom|red)\.(?!param)", ptx)
    assert memory is not None
    if name == "_send_rows":
        assert (waits, ptx.count("griddepcontrol.launch_dependents")) == (-1, 1)
    else:
        assert 0 < waits < memory.start()


TYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv", torch.float32: "fp32", torch.int32: "i32"}
FEW, MANY = 16, 16384  # rows; with DeepSeek-V3's experts half a pair for each and 512
ALWAYS = ["_prepare", "_gemm1", "_gemm2", "_weighted_sum"]
OF_MANY = ["_count", "_place", *ALWAYS[1:]]
REQUANTIZED = ["_prepare", "_gemm1", "_row_maxima", "_requantize", "_gemm2", "_weighted_sum"]


DEEPSEEK_V3 = {"hidden": 7168, "intermediate": 2048, "num_experts": 256, "top_k": 8}
GPT_OSS = {"hidden": 2880, "intermediate": 2880, "num_experts": 128, "top_k": 4, "activation": "swigluoai",
           "expert_bias": True}  # fmt: skip


def launched(quant: str, rows: int, quantized: bool = False, layer=DEEPSEEK_V3, **changes):
    """What the fused MoE launches with its default config for a rank with all experts, compiled for sm_90: {kernel's
    name: compiled}, in order, and the config."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from moe_dist.kernels.triton import pipeline, precompile, quantize

    calls = []

    def record(kernel, grid, tensors, integers, constants=(), **options):
        calls.append((kernel, tensors, integers, constants, options))

    spec = MoESpec(**layer, quant=quant)
    width, experts = spec.intermediate, spec.num_experts
    problem = Problem(spec, width, experts, "cuda", (9, 0), "fp8" if quantized else "bf16")
    config = TritonFused.default_config(problem, rows) | changes
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, quantize):
            patch.setattr(module, "launch", record)
        precompile._compile(spec, width, experts, rows, quantized, config)
    found = {}
    for kernel, tensors, integers, constants, options in calls:
        types = [
            "constexpr"
            if tensor is None
            else f"*{TYPES[tensor.dtype]}"
            if isinstance(tensor, torch.Tensor)
            else f"tensordesc<{TYPES[tensor.base.dtype]}{tensor.block_shape}>"
            for tensor in tensors
        ] + ["i32"] * len(integers)
        names = kernel.arg_names
        signature = dict(zip(names, types + ["constexpr"] * len(constants), strict=True))
        whole = [isinstance(each, torch.Tensor) for each in tensors]
        whole += [
            value % 16 == 0 and name not in kernel.do_not_specialize
            for name, value in zip(names[len(tensors) :], integers, strict=False)
        ]
        aligned = {(index,): [["tt.divisibility", 16]] for index, is_whole in enumerate(whole) if is_whole}
        fixed = {name: None for name, tensor in zip(names, tensors, strict=False) if tensor is None}
        fixed |= dict(zip(names[len(types) :], constants, strict=True))
        source = ASTSource(kernel, signature, fixed, aligned)
        found[kernel.fn.__name__] = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return found, config


def resources(compiled, folder: Path) -> tuple[int, int]:
    """A thread's registers, and the bytes that it keeps in memory because its registers don't hold them."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    ((registers, size),) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(registers), int(size)


@pytest.mark.parametrize(
    ("quant", "rows", "quantized", "changes", "names"),
    [
        ("fp8_block", FEW, False, {}, ALWAYS),
        ("fp8_block", FEW, True, {"tma": True, "span": 2, "split_k": 2, "pdl": False}, ALWAYS),
        ("fp8_block", MANY, False, {}, OF_MANY),
        ("fp8_block", MANY, True, {"pdl": True}, OF_MANY),
        ("none", FEW, False, {}, ALWAYS),
        ("none", MANY, False, {}, OF_MANY),
        ("fp8_channel", FEW, False, {}, ["_quantize_whole_rows", *REQUANTIZED]),
        ("fp8_tensor_static", MANY, True, {"twice": True, "split2": 1, "warps2": 8}, OF_MANY),
        ("fp8_tensor_dynamic", FEW, True, {"bm": 32}, REQUANTIZED),
    ],
)
def test_fused_moe_compiles_for_sm_90(quant, rows, quantized, changes, names):
    """On Hopper's tensor cores, within its shared memory, with what the config asks for."""
    found, config = launched(quant, rows, quantized, **changes)
    assert list(found) == names
    assert (config["bm"], config["swap"]) == ((128, False) if rows == MANY else (changes.get("bm", 16), True))
    for name in {*ALWAYS, *OF_MANY}.intersection(found):
        assert ("griddepcontrol.wait" in found[name].asm["ptx"]) == config["pdl"], name
    for name in ("_gemm1", "_gemm2"):
        code = found[name].asm["ptx"]
        assert "wgmma.mma_async" in code
        assert "mma.sync" not in code
        assert ("cp.async.bulk.tensor" in code) == config["tma"]
        assert found[name].metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("quant", "rows"), [("fp8_block", MANY), pytest.param("fp8_block", FEW, marks=pytest.mark.slow),
                        pytest.param("none", MANY, marks=pytest.mark.slow),
                        pytest.param("fp8_channel", FEW, marks=pytest.mark.slow)],
)  # fmt: skip
def test_biases_and_a_clamped_activation_compile_for_sm_90(quant, rows, tmp_path: Path):
    found, _ = launched(quant, rows, layer=GPT_OSS)
    for name in ("_gemm1", "_gemm2"):
        assert "wgmma.mma_async" in found[name].asm["ptx"]
        assert found[name].metadata.shared <= SHARED_MEMORY
        assert resources(found[name], tmp_path)[1] == 0  # as there were when gate's bias was added before up's


def test_what_many_rows_are_computed_by_spills_nothing(tmp_path: Path):
    """GEMM1 was 1.7 times slower when it did. An SM holds eight programs of `_count`, as many as quantizing wants."""
    found, config = launched("fp8_block", MANY)
    sizes = {"bm": 128, "bn1": 128, "bk1": 128, "warps1": 8, "stages1": 3, "tma": True}
    assert config | sizes == config
    used = {name: resources(kernel, tmp_path) for name, kernel in found.items()}
    assert {name: stack for name, (_, stack) in used.items()} == dict.fromkeys(OF_MANY, 0)
    assert used["_count"][0] <= 32
