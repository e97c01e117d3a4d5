"""Backend triton without a GPU: what it refuses, which configs it offers, and which one it runs with."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unit.asked import HOPPER, problem

from moe_dist import tables
from moe_dist.backends import BACKENDS, own
from moe_dist.backends.base import Problem
from moe_dist.backends.triton_fused import TritonFused
from moe_dist.errors import ConfigError
from moe_dist.kernels.triton import fused_moe, precompile
from moe_dist.kernels.triton.fused_moe import Config
from moe_dist.messages.notices import MoeDistWarning, collecting
from moe_dist.model.quantization import quantize_rows
from moe_dist.model.spec import QUANT_KINDS, MoESpec
from moe_dist.model.weights import empty_like, slice_width
from moe_dist.step.rows import TokenRows
from moe_dist.step.stages import Stages
from moe_dist.tables import Entry, Shape, TuningTable, find_table, read_table, user_folder
from moe_dist.workloads.random_weights import random_weights

FP8_KINDS = QUANT_KINDS[1:]
SHARED_MEMORY = 227 * 1024  # bytes that one program can have on SM90
SPEC = MoESpec(hidden=64, intermediate=48, num_experts=4, top_k=2)
SHAPE = Shape("triton", "NVIDIA H200", "fp8_block", "swiglu", 64, 48, 4, 4, 2)


class TestSupports:
    @pytest.mark.parametrize(
        "asked",
        [
            *(problem(quant=quant) for quant in QUANT_KINDS),
            *(problem(activation=activation) for activation in ("swiglu", "geglu", "relu2", "swigluoai")),
            problem(activation="swigluoai", expert_bias=True),
            problem(hidden=2880, width=720),  # whole sixteens, not whole blocks
            problem(payload="fp8"),
            problem(width=0),  # an empty shard is skipped, not computed
            problem(num_local=0),
        ],
    )
    def test_takes(self, asked):
        assert TritonFused.supports(asked).ok

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            (problem(quant="none", dtype="fp32"), "bf16 and FP8 layers, not fp32"),
            (problem(capability=(8, 9)), r"needs compute capability 9\.0, not \(8, 9\)"),
            (problem(capability=(10, 0)), r"needs compute capability 9\.0, not \(10, 0\)"),
            (problem(capability=None), r"needs compute capability 9\.0, not None"),
            (problem(hidden=200), r"hidden \(200\) and slices \(256\) in multiples of 16"),
            (problem(width=100), r"hidden \(256\) and slices \(100\) in multiples of 16"),
            (problem(quant="none", width=24), r"slices \(24\)"),
        ],
    )
    def test_refuses_with_the_reason(self, asked, reason):
        support = TritonFused.supports(asked)
        assert not support.ok
        assert re.search(reason, support.reason), support.reason

    def test_every_supported_quantization_has_its_payloads(self):
        assert TritonFused.payloads(SPEC.with_changes(quant="none")) == {"none", "bf16"}
        for quant in FP8_KINDS:
            assert TritonFused.payloads(SPEC.with_changes(quant=quant)) == {"none", "bf16", "fp8"}

    def test_the_activation_is_rounded_where_a_scale_waits_for_the_whole_row(self):
        rounded = {quant for quant in QUANT_KINDS
                   if TritonFused.numerics_of(SPEC.with_changes(quant=quant)).bf16_activation}  # fmt: skip
        assert rounded == {"none", "fp8_channel", "fp8_tensor_dynamic"}
        tolerances = {quant: TritonFused.numerics_of(SPEC.with_changes(quant=quant)).tolerance for quant in QUANT_KINDS}
        assert tolerances.pop("fp8_tensor_dynamic") == 3e-2
        assert set(tolerances.values()) == {1e-2}


class TestAvailable:
    def test_not_on_a_cpu(self):
        state = TritonFused.available("cpu")
        assert not state.ok
        assert "Hopper" in state.reason

    @pytest.mark.parametrize(
        ("capability", "package", "ok", "reason"),
        [
            ((9, 0), True, True, r"^triton \d+\.\d+"),
            ((9, 0), False, False, "needs the package triton"),
            ((10, 0), True, False, "needs SM90, this GPU is SM100"),
            ((8, 9), True, False, "needs SM90, this GPU is SM89"),
        ],
    )
    def test_on_a_gpu(self, monkeypatch, capability, package, ok, reason):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(own, "find_spec", lambda name: package or None)
        state = TritonFused.available("cuda")
        assert state.ok == ok
        assert re.search(reason, state.reason), state.reason

    def test_it_is_listed(self):
        assert BACKENDS.get("triton") is TritonFused


ROWS = (1, 7, 64, 128, 320, 512, 1024, 3000, 8192, 65536)
LAYERS = {
    "DeepSeek-V3": {"hidden": 7168, "intermediate": 2048, "num_experts": 256, "top_k": 8},
    "Qwen3-30B-A3B": {"hidden": 2048, "intermediate": 768, "num_experts": 128, "top_k": 8},
    "one expert": {"hidden": 2880, "intermediate": 720, "num_experts": 1, "top_k": 1},
}


def check(config: Config, quant: str) -> None:
    """What the kernels take for granted, and what SM90 has room for."""
    for size in ("bm", "bn1", "bk1", "warps1", "bn2", "bk2", "warps2", "split2"):
        assert getattr(config, size).bit_count() == 1, f"{size} of {config} is no power of two"
    assert min(config.stages1, config.stages2, config.span, config.split_k, config.group) >= 1
    rows = config.bm // config.split2
    if config.swap:  # then tensor cores take the weights' rows by 64, as four warps hold them
        assert min(config.bn1, config.bn2) >= 64
        assert rows >= 8
    else:
        assert rows >= 64
    if quant == "fp8_block":  # a tile of h has one scale for a row, a step along K one of the weights
        assert config.bn1 == 128
        assert all(128 % size == 0 for size in (config.bk1, config.bn2, config.bk2)), config
    # Each stage of GEMM1 holds rows and two tiles of weights, of GEMM2 rows and one or, with `twice`, two.
    size = 2 if quant == "none" else 1
    bytes1 = (config.bm + 2 * config.bn1) * config.bk1 * size * config.stages1
    bytes2 = (rows + config.bn2 * (2 if config.twice else 1)) * config.bk2 * size * config.stages2
    assert max(bytes1, bytes2) <= SHARED_MEMORY, f"{bytes1} and {bytes2} of {config}"


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("layer", LAYERS)
class TestCandidates:
    def each(self, layer, quant):
        """(rows, config) of everything that is offered."""
        asked = problem(quant=quant, **LAYERS[layer])
        return [(rows, config) for rows in ROWS for config in TritonFused.candidates(asked, rows)]

    def test_are_json_and_configs(self, layer, quant):
        for _, config in self.each(layer, quant):
            assert json.loads(json.dumps(config)) == config
            assert vars(Config(**config)).items() >= config.items()

    def test_the_default_is_the_first_and_none_comes_twice(self, layer, quant):
        asked = problem(quant=quant, **LAYERS[layer])
        for rows in ROWS:
            offered = TritonFused.candidates(asked, rows)
            assert TritonFused.default_config(asked, rows) == offered[0]
            assert len({json.dumps(config, sort_keys=True) for config in offered}) == len(offered) > 1

    def test_tiles_grow_with_the_pairs_of_an_expert(self, layer, quant):
        asked = problem(quant=quant, **LAYERS[layer])
        tiles = [TritonFused.default_config(asked, rows)["bm"] for rows in (1, *ROWS, 10**6)]
        assert tiles == sorted(tiles)
        assert (tiles[0], tiles[-1]) == (16, 128)

    def test_the_kernels_can_run_them(self, layer, quant):
        for _, config in self.each(layer, quant):
            check(Config(**config), quant)


def test_the_kernels_can_run_what_is_shipped():
    """As far as one sees without a GPU."""
    shipped = [read_table(path) for path in tables.SHIPPED.glob("triton--*.json")]
    assert shipped
    for table in shipped:
        assert table.revision == TritonFused.table_revision
        for entry in table.entries.values():
            check(Config(**entry.config), "none" if table.shape.quant == "bf16" else table.shape.quant)


def test_compiling_ahead_takes_what_will_run(monkeypatch):
    monkeypatch.setattr(precompile, "precompile", list)
    asked = [problem(), problem(num_local=2, width=128, payload="fp8"), problem(payload="none")]
    found = TritonFused.compile_ahead([(one, 8, {"bm": index}) for index, one in enumerate(asked)])
    spec = asked[0].spec
    assert found == [(spec, 256, 4, 8, False, {"bm": 0}), (spec, 128, 2, 8, True, {"bm": 1}),
                     (spec, 256, 4, 8, False, {"bm": 2})]  # fmt: skip


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the kernels are called with, on a GPU's name and tables of this test's own."""
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    find_table.cache_clear()
    tables.say_missing_once.cache_clear()
    made = []

    class Recorded:
        def __init__(self, step, rows, experts, config, tiles):
            self.step, self.rows, self.config = step, rows, config

        def run(self, activation, sink):
            made.append((self.config, self.rows.x, activation, sink.dtype, self.step.stages))
            sink.put_all(sink.whole(self.step).fill_(1))

    monkeypatch.setattr(fused_moe, "TritonPipeline", Recorded)
    yield made
    find_table.cache_clear()
    tables.say_missing_once.cache_clear()


def prepared(spec: MoESpec = SPEC, change=lambda weights: weights) -> TritonFused:
    weights = change(random_weights(spec, seed=1))
    backend = TritonFused(Problem(spec, weights.width, weights.num_experts, "cuda", HOPPER, "bf16", "NVIDIA H200"))
    backend.prepare(weights)
    return backend


def forward(backend: TritonFused, rows: TokenRows, **how) -> torch.Tensor:
    return backend.forward_alone(rows, torch.bfloat16, **how)


def rows_of(count: int) -> TokenRows:
    return TokenRows(torch.randn(count, 64).bfloat16(), torch.zeros(count, 2, dtype=torch.int32), torch.ones(count, 2))


def write_table(shape: Shape = SHAPE, revision: int = TritonFused.table_revision) -> tuple[Config, Config]:
    """A table for 8 and 512 rows; what it says for them."""
    offered = TritonFused.candidates(Problem(SPEC, 48, 4, "cuda", HOPPER, "bf16"), 8)
    entries = {rows: Entry(offered[index], 1.0, None, 2.0, 0.0) for rows, index in ((8, 3), (512, 5))}
    made = {"date": "2026-11-22T12:00:00Z", "commit": "abc", "command": "moe-dist tune", "machine": {"torch": "2.13"}}
    TuningTable(shape=shape, revision=revision, entries=entries, **made).write(user_folder())
    return Config(**offered[3]), Config(**offered[5])


def default(rows: int) -> Config:
    return Config(**TritonFused.default_config(Problem(SPEC, 48, 4, "cuda", HOPPER, "bf16"), rows))


class TestForward:
    def test_a_missing_table_is_said_once_and_defaults_are_used(self, calls):
        backend = prepared()
        assert backend.config_sources() == ()
        with collecting() as said:
            for count in (3, 3, 600):
                forward(backend, rows_of(count))
            forward(prepared(), rows_of(3))
        (line,) = said
        assert SHAPE.file_name in line
        assert "defaults are used" in line
        assert backend.config_sources() == ("default",)
        assert default(3) != default(600)
        assert [config for config, *_ in calls] == [default(rows) for rows in (3, 3, 600, 3)]

    def test_what_was_tuned_is_used(self, calls):
        few, many = write_table()
        backend = prepared()
        with collecting() as said:
            for count in (8, 600, 1):
                forward(backend, rows_of(count))
        assert [config for config, *_ in calls] == [few, many, few]
        assert few not in (many, default(8))
        assert said == []
        assert backend.config_sources() == ("tuned", "nearest:512", "nearest:8")

    def test_sources_are_those_of_what_ran(self, calls):
        """Not of what is found by now, nor of another backend's forwards."""
        backend = prepared()
        with collecting():
            forward(backend, rows_of(8))
        write_table()
        find_table.cache_clear()
        forward(backend, rows_of(8))
        assert backend.config_sources() == ("default",)
        another = prepared()
        forward(another, rows_of(8))
        assert another.config_sources() == ("tuned",)
        another.use_config(vars(default(8)))
        forward(another, rows_of(8))
        assert another.config_sources() == ("tuned", "given")

    @pytest.mark.parametrize("rows", [0, 3])
    def test_an_empty_shard_has_no_config(self, calls, rows):
        backend = prepared(change=empty_like)
        forward(backend, rows_of(rows))
        assert backend.config_sources() == ()

    @pytest.mark.parametrize(
        ("change", "field"),
        [({"bn3": 128}, "bn3"), ({"bm": "16"}, "bm"), ({"tma": 1}, "tma"), ({"stages1": 3.0}, "stages1")],
    )
    def test_a_table_with_a_config_that_is_none_is_named(self, calls, change, field):
        write_table()
        path = user_folder() / SHAPE.file_name
        document = json.loads(path.read_text())
        document["entries"]["8"]["config"] |= change
        path.write_text(json.dumps(document))
        find_table.cache_clear()
        with pytest.raises(ConfigError, match=rf"{re.escape(SHAPE.file_name)}: config\.{field} = "):
            forward(prepared(), rows_of(8))

    def test_a_table_is_asked_once_for_a_number_of_rows(self, calls, monkeypatch):
        asked = []
        monkeypatch.setattr(own, "tuned_config", lambda *arguments: asked.append(arguments))
        backend = prepared()
        for count in (3, 3, 4, 3, 4):
            forward(backend, rows_of(count))
        assert asked == [(SHAPE, TritonFused.table_revision, 3), (SHAPE, TritonFused.table_revision, 4)]
        assert len(calls) == 5

    def test_tables_of_another_shape_or_revision_are_not(self, calls):
        write_table(replace(SHAPE, width=64))
        write_table(revision=TritonFused.table_revision + 1)
        with pytest.warns(MoeDistWarning, match="another revision"):  # nobody collects in a process of one's own
            forward(prepared(), rows_of(8))
        assert calls[0][0] == default(8)

    def test_a_part_of_the_layer_has_a_table_of_its_own(self, calls):
        own = write_table(replace(SHAPE, width=32, experts=3))[0]

        def part(weights):
            held = {name: tensor[:3] for name, tensor in weights.tensors().items()}
            return slice_width(weights.with_tensors(**held), 0, 32)

        forward(prepared(change=part), rows_of(8))
        assert calls[0][0] == own

    def test_a_config_can_be_forced(self, calls):
        few, many = write_table()
        forced = default(600)
        backend = prepared()
        for config in (None, vars(forced), None):
            backend.use_config(config)
            for count in (8, 600):
                forward(backend, rows_of(count))
        assert [config for config, *_ in calls] == [few, many, forced, forced, few, many]
        assert forced not in (few, many)

    def test_rows_go_in_as_they_come(self, calls):
        backend = prepared(SPEC.with_changes(activation="geglu"))
        rows = rows_of(3)
        quantized = replace(rows, x=quantize_rows(rows.x, "fp8_block"))
        y = forward(backend, rows)
        forward(backend, quantized)
        assert [x for _, x, *_ in calls] == [rows.x, quantized.x]
        assert {(activation, dtype) for *_, activation, dtype, _ in calls} == {("geglu", torch.bfloat16)}
        assert (y.shape, y.dtype) == ((3, 64), torch.bfloat16)

    def test_its_stages_are_those_of_the_layer(self, calls):
        stages = Stages()
        forward(prepared(), rows_of(3), stages=stages)
        assert calls[0][-1] is stages

    @pytest.mark.parametrize(
        ("change", "count"),
        [(lambda weights: weights, 0), (empty_like, 3), (lambda weights: slice_width(weights, 48, 48), 3)],
        ids=["no rows", "no expert", "an empty slice"],
    )
    def test_where_nothing_is_to_be_done_nothing_runs(self, calls, change, count):
        y = forward(prepared(change=change), rows_of(count))
        assert torch.equal(y, torch.zeros(count, 64, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert calls == []


@pytest.mark.parametrize(
    ("quant", "change", "field"),
    [
        ("fp8_block", {"bn1": 64}, "bn1"),
        ("fp8_block", {"bk2": 256}, "bk2"),
        ("fp8_block", {"bn2": 256}, "bn2"),
        ("none", {"bm": 24}, "bm"),
        ("none", {"split2": 2}, "split2"),
        ("none", {"span": 0}, "span"),
        *(
            ("none", {name: 1 << 70}, name)
            for name in ("bm", "bn2", "bk1", "span", "group", "split_k", "stages2", "warps1")
        ),
        *(("none", {"stages1": count}, "stages1") for count in (-1, 0, 9)),
        *(("none", {"warps2": count}, "warps2") for count in (-1, 0, 3, 7, 32)),
        ("none", {"bn1": 512}, "bn1"),
    ],
)
def test_a_config_that_would_compute_something_else_is_refused(quant, change, field):
    legal = Config(16, True, 128, 128, 4, 3, 128, 128, 4, 3)
    legal.check(quant)
    with pytest.raises(ConfigError, match=rf"config\.{field}"):
        replace(legal, **change).check(quant)


def test_rows_too_long_for_one_scale_are_refused():
    spec = MoESpec(hidden=16400, intermediate=64, num_experts=4, top_k=2, quant="fp8_channel")
    support = TritonFused.supports(Problem(spec, 64, 4, "cuda", (9, 0), "bf16"))
    assert not support.ok
    assert "at most 16384" in support.reason
