"""The fused MoE of backend triton against the oracle in Triton's interpreter; run by test_kernels.py in a process of
its own. Inputs are fresh in every session; a failure prints the seed, and MOE_DIST_TEST_SEED repeats it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter  # noqa: F401  # before any kernel is decorated
from sinks import InRanges
from torch import Tensor

from moe_dist import kernels
from moe_dist.backends.base import Backend
from moe_dist.backends.base import Problem as OfRank
from moe_dist.backends.deep_gemm_grouped import DeepGemm
from moe_dist.backends.triton_fused import TritonFused
from moe_dist.kernels.triton import permute
from moe_dist.kernels.triton import pipeline as module
from moe_dist.kernels.triton.align import _count, _place, _prepare
from moe_dist.kernels.triton.fused_moe import Config, TritonPipeline, fused_moe
from moe_dist.kernels.triton.padded import TILE, PaddedPipeline
from moe_dist.kernels.triton.pipeline import _requantize, _row_maxima, _weighted_sum
from moe_dist.kernels.triton.quantize import divided
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8, FP8_MAX, TINY, QuantizedRows, quantize_rows, scale_of
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard, stack
from moe_dist.oracle.reference import oracle_partial, relative_error
from moe_dist.step import Step, TokenRows, Workspace
from moe_dist.step import fresh as fresh_tensors
from moe_dist.workloads.random_weights import random_expert

FP8_KINDS = ("fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic")
KINDS = ("none", *FP8_KINDS)
slow = partial(pytest.param, marks=pytest.mark.slow)  # `make nightly` runs these
SEED = int(os.environ.get("MOE_DIST_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))


@pytest.fixture(autouse=True)
def fresh():
    """Random inputs; new memory is full of NaN, and of -1 where it holds integers."""
    print(f"MOE_DIST_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert torch.empty(8, dtype=torch.uint8).view(torch.bfloat16).isnan().all()


@dataclass
class Problem:
    spec: MoESpec
    x: Tensor
    routing: Routing
    experts: ExpertWeights

    def run(self, config: Config, quantized: bool = False, out_dtype: torch.dtype = torch.float32, **changes) -> Tensor:
        """`quantized`: before they come, as rows are that travel in FP8."""
        experts = self.experts.with_tensors(**changes)
        x = quantize_rows(self.x, self.spec.quant, experts.a13) if quantized else self.x
        ids, weights = self.routing.ids_TK, self.routing.weights_TK
        return fused_moe(x, ids, weights, experts, self.spec.activation, config, out_dtype)

    def error(self, y: Tensor, backend: type[Backend] = TritonFused) -> float:
        spec, ids = self.spec, self.routing.ids_TK
        alone, together = Placement.build(spec, ParallelSpec()), [(0, len(self.x))]
        groups, numerics = torch.where(ids < 0, -1, 0), backend.numerics_of(spec)
        expected = oracle_partial(self.x, self.routing, self.experts, spec, alone, 0, together, groups, numerics)
        assert expected.any() or not (ids >= 0).any()
        return relative_error(y, expected)

    def check(self, config: Config, quantized: bool = False) -> Tensor:
        y = self.run(config, quantized)
        error, bound = self.error(y), TritonFused.numerics_of(self.spec).tolerance
        assert error <= bound, f"off by {error:.2e} with {config} for {self.spec}"
        return y


def problem(rows: int = 7, width: int = 144, up_scale: float = 0.25, **changes: Any) -> Problem:
    """A tenth of the choices is not here."""
    sizes = {"hidden": 208, "num_experts": 4, "top_k": 2}
    spec = MoESpec(intermediate=width, **sizes | changes)
    ids = torch.rand(rows, spec.num_experts).argsort(1)[:, : spec.top_k].to(torch.int32).contiguous()
    ids[torch.rand(ids.shape) < 0.1] = -1
    ids[0, 0] = spec.num_experts - 1  # one is, in any case
    ids[0, 1:][ids[0, 1:] == ids[0, 0]] = -1
    experts = stack([random_expert(spec, expert, SEED, up_scale=up_scale) for expert in range(spec.num_experts)])
    x = torch.randn(rows, spec.hidden).bfloat16()
    return Problem(spec, x, Routing(ids, torch.rand(ids.shape)), experts)


def config_of(spec: MoESpec | None = None, **changes: Any) -> Config:
    bk = 64 if spec and not spec.quantized else 128
    tiles = {"bn1": 128, "bk1": bk, "warps1": 4, "stages1": 3, "bn2": 128, "bk2": bk, "warps2": 4, "stages2": 3}
    return Config(**{"bm": 16, "swap": True} | tiles | changes)


PLAIN = {"bm": 16, "swap": True, "tma": False, "twice": False, "span": 1, "split2": 1, "split_k": 1, "group": 1}
RICH = {"bm": 64, "swap": False, "tma": True, "twice": True, "span": 2, "split2": 2, "split_k": 2, "group": 8}


@pytest.mark.parametrize(
    ("quant", "activation"),
    [
        (slow if activation != "swiglu" and quant not in ("none", "fp8_block") else pytest.param)(quant, activation)
        for quant in KINDS for activation in ("swiglu", "geglu", "relu2")
    ],
)  # fmt: skip
def test_every_format_and_activation(quant, activation):
    case = problem(quant=quant, activation=activation)
    case.check(config_of(case.spec, **PLAIN))
    case.check(config_of(case.spec, **RICH), quantized=case.spec.quantized)


@pytest.mark.parametrize("quant", KINDS)
def test_biases_and_a_clamped_activation(quant):
    """Tokens are so large that gate and up are clamped on every side, where no static scale is made for others. A bias
    counts once, where GEMM2's sum has several parts too, and gate's is not up's."""
    case = problem(quant=quant, activation="swigluoai", expert_bias=True, up_scale=1.0)
    if quant != "fp8_tensor_static":
        case.x *= 8
        case.experts = case.experts.with_tensors(**{name: 8 * bias for name, bias in case.experts.biases.items()})
    plain, experts = config_of(case.spec, **PLAIN), case.experts
    case.check(config_of(case.spec, **RICH), quantized=case.spec.quantized)
    if quant != "fp8_block":
        return
    y = case.check(plain)
    for wrong in ({"b2_eH": None}, {"b13_eF": torch.cat(experts.b13_eF.chunk(2, 1)[::-1], 1)}):
        assert case.error(case.run(plain, **wrong)) > 0.05
    experts.turn(gate_first=False)
    assert torch.equal(case.check(plain), y)


def test_biases_without_a_gate():
    case = problem(activation="relu2", expert_bias=True)
    case.check(config_of(case.spec, **RICH))


@pytest.mark.parametrize("place", ["gate", "up"])
def test_a_value_that_is_no_number_is_not_clamped(place):
    case = problem(quant="none", activation="swigluoai", expert_bias=True, rows=3, num_experts=2, top_k=1)
    case.experts.b13_eF[:, 5 + 144 * (place == "up")] = torch.nan
    y = case.run(config_of(case.spec, **PLAIN))
    assert torch.equal(y.isnan().all(1), (case.routing.ids_TK >= 0).any(1))


@pytest.mark.parametrize("quant", ["none", "fp8_block", "fp8_channel", *map(slow, KINDS[3:])])
def test_equal_bits(quant):
    """In every run, for rows that come quantized, and rounded only once more for an output in bf16."""
    case = problem(quant=quant)
    config = config_of(case.spec)
    y = case.run(config)
    assert torch.equal(case.run(config, quantized=case.spec.quantized), y)
    assert torch.equal(case.run(config, out_dtype=torch.bfloat16), y.bfloat16())


# Any two values of any two options come together in these eight.
OPTIONS = [
    dict(zip(("swap", "tma", "twice", "split2", "span", "split_k", "group"), values, strict=True))
    for values in (
        (False, False, False, 1, 1, 1, 1), (False, False, True, 1, 2, 3, 8), (False, True, False, 2, 1, 3, 8),
        (False, True, True, 2, 2, 1, 1), (True, False, False, 2, 2, 1, 8), (True, False, True, 2, 1, 3, 1),
        (True, True, False, 1, 2, 3, 1), (True, True, True, 1, 1, 1, 8),
    )
]  # fmt: skip
SIZES = ((208, 144), (256, 192), (384, 64), (128, 128), (272, 320))  # (hidden, width)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_every_two_options_together(number):
    options = OPTIONS[number]
    for turn, quant in enumerate(("fp8_block", KINDS[number % 5])):
        hidden, width = SIZES[(number + 2 * turn) % 5]
        bm = (16, 32, 64)[(number + turn) % 3] * options["split2"]
        case = problem(rows=20, hidden=hidden, width=width, num_experts=2, quant=quant)
        case.check(config_of(case.spec, bm=bm, **options))


def test_values_beyond_a_static_scale_saturate():
    case = problem(num_experts=3, quant="fp8_tensor_static")
    experts = case.experts
    a13, a2 = experts.a13 / 4, experts.a2 / torch.tensor([80.0, 40.0, 20.0])
    case.experts = experts.with_tensors(a13=a13, a2=a2)
    assert (case.x.float().abs() > FP8_MAX * a13).any()
    y = case.check(config_of(case.spec))
    assert relative_error(y, case.run(config_of(case.spec), a2=experts.a2 / 4)) > 0.1  # it happens to h too


@pytest.mark.parametrize("bk", [32, slow(64), 128])
@pytest.mark.parametrize("quant", ["none", "fp8_block"])
def test_other_tiles(quant, bk):
    case = problem(rows=5, hidden=272, width=192, num_experts=2, top_k=1, quant=quant)
    for span in (1, 3):
        case.check(config_of(case.spec, bk1=bk, bk2=bk, bn2=64, span=span))


@pytest.mark.parametrize(
    ("hidden", "width", "experts", "top_k"),
    [slow(640, 64, 1, 1), slow(128, 192, 5, 1), (144, 384, 5, 3), (16, 16, 2, 2), (384, 128, 1, 1)],
)
def test_sizes(hidden, width, experts, top_k):
    for quant, options in (("fp8_block", PLAIN), ("none", RICH), ("fp8_channel", PLAIN)):
        case = problem(hidden=hidden, width=width, num_experts=experts, top_k=top_k, quant=quant)
        case.check(config_of(case.spec, **options))


FORMATS = ("none", "fp8_block", slow("fp8_tensor_dynamic"))


@pytest.mark.parametrize("quant", FORMATS)
class TestRouting:
    def test_one_token(self, quant):
        case = problem(rows=1, quant=quant)
        case.check(config_of(case.spec, **PLAIN))
        case.check(config_of(case.spec, **RICH))

    def test_all_tokens_on_one_expert(self, quant):
        """More pairs than a tile has rows, and a last tile that is not full, nor a half of it in GEMM2."""
        case = problem(rows=37, num_experts=3, top_k=1, quant=quant)
        case.routing.ids_TK.fill_(1)
        case.check(config_of(case.spec, **PLAIN))
        case.check(config_of(case.spec, **RICH | {"bm": 32}))

    def test_rows_without_any_expert_here_are_zero(self, quant):
        case = problem(quant=quant)
        case.routing.ids_TK[torch.tensor([2, 6])] = -1
        y = case.check(config_of(case.spec))
        assert torch.equal((y == 0).all(1), (case.routing.ids_TK < 0).all(1))

    def test_nobody_here(self, quant):
        case = problem(quant=quant)
        case.routing.ids_TK.fill_(-1)
        y = case.run(config_of(case.spec))
        assert torch.equal(y, torch.zeros(7, 208))

    def test_experts_without_tokens(self, quant):
        case = problem(quant=quant)
        ids = case.routing.ids_TK
        ids[(ids == 0) | (ids == 3)] = -1
        case.check(config_of(case.spec))

    def test_rows_of_zeros(self, quant):
        case = problem(quant=quant)
        case.x[torch.tensor([0, 4])] = 0
        y = case.check(config_of(case.spec))
        assert not y[0].any()
        assert not y[4].any()

    def test_a_token_that_names_an_expert_twice(self, quant):
        case = problem(top_k=3, quant=quant)
        case.routing.ids_TK[0] = torch.tensor([2, 3, 2])
        case.routing.ids_TK[5] = 1
        case.check(config_of(case.spec))


def test_a_part_of_the_experts():
    """One of five on this rank, and most pairs elsewhere."""
    case = problem(rows=20, num_experts=5, top_k=3)
    placement = Placement.build(case.spec, ParallelSpec(ep=5))
    ids, weights = case.routing.ids_TK, case.routing.weights_TK
    groups = torch.where(ids < 0, -1, ids)
    own = shard(case.experts, placement, 2)
    slots = placement.local_slots(ids, groups, 2)
    y = fused_moe(case.x, slots, weights, own, "swiglu", config_of(case.spec), torch.float32)
    numerics = TritonFused.numerics_of(case.spec)
    expected = oracle_partial(case.x, case.routing, own, case.spec, placement, 2, [(0, 20)], groups, numerics)
    assert (slots == 0).any()
    assert (slots < 0).any()
    assert relative_error(y, expected) <= numerics.tolerance


@pytest.mark.parametrize("tma", [slow(False), True])
@pytest.mark.parametrize("quant", KINDS)
def test_gate_and_up(quant, tma):
    """Either order gives equal bits; halves swapped without a word are seen, also where up is next to nothing."""
    case = problem(rows=5, num_experts=2, top_k=1, quant=quant, up_scale=1e-3)
    config = config_of(case.spec, tma=tma)
    y = case.check(config)
    case.experts.turn(gate_first=False)
    assert torch.equal(case.check(config), y)
    assert case.error(case.run(config, gate_first=True)) > 0.2


def test_how_rows_are_quantized_makes_no_difference(monkeypatch):
    """Beside few pairs or many; rows may lie apart in memory."""
    case = problem(rows=4, num_experts=2, top_k=1)
    config = config_of(case.spec)
    y = case.run(config)
    apart = torch.zeros(4, 2, 208).bfloat16()
    apart[:, 0] = case.x
    assert torch.equal(replace(case, x=apart[:, 0]).run(config), y)
    monkeypatch.setattr(permute, "MOST_PAIRS_TOGETHER", 0)
    assert torch.equal(case.run(config), y)


@pytest.mark.parametrize("quant", ["none", "fp8_block"])
def test_the_backend_computes_the_same_again_and_again(quant):
    """For weights of its own, and for those that it is given next."""
    first, second = problem(hidden=144, quant=quant), problem(hidden=144, quant=quant)
    second.experts = second.experts.with_tensors(w13_eFH=first.experts.w13_eFH.flip(0))
    config = config_of(first.spec, tma=True)
    width, experts = first.experts.width, first.experts.num_experts
    backend = TritonFused(OfRank(first.spec, width, experts, "cuda", (9, 0), "bf16"))
    for case in (first, second):
        backend.prepare(case.experts)
        backend.use_config(vars(config))
        y = case.check(config)
        for _ in range(2):
            rows = TokenRows(case.x, case.routing.ids_TK, case.routing.weights_TK)
            assert torch.equal(backend.forward_alone(rows, torch.float32), y)


class Stop(Exception):
    """Raised where the rest of the launches is of no interest."""


def prepared(
    slots: Tensor, experts: int, bm: int, together: bool | None = None, x: Tensor | None = None
) -> dict[str, Tensor]:
    """What `_prepare`, or `_count` and `_place`, leave in their tensors, with rows to quantize or without; numbers that
    they did not write are 12345. `together`: as they sort few pairs, as many, or by how many there are."""
    run, found, kernels = module.launch, {}, []

    def launch(kernel, grid, tensors, *others, **options):
        for name, tensor in zip(kernel.arg_names, tensors, strict=False):
            if name not in found and name not in ("slots", "x", "q", "s"):
                tensor.fill_(12345)
            found[name] = tensor
        run(kernel, grid, tensors, *others, **options)
        kernels.append(kernel)
        if kernel is not _count:
            raise Stop

    quant, code = ("none", torch.bfloat16) if x is None else ("fp8_block", FP8)
    x = torch.zeros(len(slots), 16).bfloat16() if x is None else x
    w13, w2 = (torch.zeros(experts, *sizes).to(code) for sizes in ((32, x.shape[1]), (x.shape[1], 16)))
    weights = ExpertWeights(quant, True, w13, w2)
    together = slots.numel() <= permute.MOST_PAIRS_TOGETHER if together is None else together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", launch)
        patch.setattr(permute, "MOST_PAIRS_TOGETHER", slots.numel() if together else 0)
        with pytest.raises(Stop):
            fused_moe(x, slots, torch.ones(slots.shape), weights, "swiglu", config_of(bm=bm), torch.float32)
    assert kernels == ([_prepare] if together else [_count, _place])
    return found


def check_prepared(slots: Tensor, experts: int, bm: int, together: bool | None = None, x: Tensor | None = None) -> None:
    found = prepared(slots, experts, bm, together, x)
    table, starts, stops, order = (found[name] for name in ("table", "starts", "stops", "order"))
    assert found["taken"].tolist() == [0, 0]
    flat = slots.flatten()
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    assert torch.equal(stops.long(), counts.cumsum(0))
    assert torch.equal(starts.long(), counts.cumsum(0) - counts)
    by_expert = torch.cat([(flat == expert).nonzero()[:, 0] for expert in range(experts)])
    assert torch.equal(order[: len(by_expert)].long(), by_expert)
    assert (order[len(by_expert) :] == 12345).all()
    expected = torch.full_like(table, -1)
    for expert in range(experts):
        first, tiles = int(starts[expert]) // bm + expert, -(-int(counts[expert]) // bm)
        assert (expected[first : first + tiles] == -1).all(), "tiles of two experts in one place"
        expected[first : first + tiles] = expert
    assert torch.equal(table, expected)
    assert [int((table == expert).sum()) for expert in range(experts)] == [-(-int(n) // bm) for n in counts]
    if x is not None:
        expected = quantize_rows(x, "fp8_block")
        assert torch.equal(found["q"].view(torch.uint8), expected.values_RH.view(torch.uint8))
        assert torch.equal(found["s"], expected.scales_RS)


@pytest.mark.parametrize("together", [True, False])
class TestPrepare:
    @pytest.mark.parametrize(("most", "draws"), [(60, 10), slow(6000, 4)])  # some thousand pairs are read at once
    def test_random_slots(self, together, most, draws):
        for _ in range(draws):
            experts, top_k, rows = (int(torch.randint(1, limit, ())) for limit in (9, 5, most))
            slots = torch.randint(0, experts, (rows, top_k), dtype=torch.int32)
            slots[torch.rand(slots.shape) < torch.rand(())] = -1
            check_prepared(slots, experts, (16, 32, 64, 128)[int(torch.randint(0, 4, ()))], together)

    @pytest.mark.parametrize("slot", [slow(-1), slow(0), 2])
    def test_all_on_one_expert_or_none_here(self, together, slot):
        """Up to more tiles than are written to the table at once, and more pairs than are read."""
        for rows in (1, 16, 17, 4100):
            check_prepared(torch.full((rows, 3), slot, dtype=torch.int32), 3, 16, together)

    def test_a_single_expert(self, together):
        check_prepared(torch.tensor([[0, -1], [0, 0], [-1, -1]], dtype=torch.int32), 1, 16, together)

    @pytest.mark.parametrize("hidden", [128, 208, 2048, 4320])
    def test_rows_are_quantized_as_torch_does(self, together, hidden):
        x = (torch.randn(4, hidden) * torch.logspace(-6, 4, 4)[:, None]).bfloat16()
        x[2, 100:] = 0
        check_prepared(torch.randint(0, 3, (4, 2), dtype=torch.int32), 3, 16, together, x)


def random_slots(rows: int, top_k: int, experts: int) -> Tensor:
    """Some experts have many pairs, others none, and some pairs are not here."""
    popular = torch.randint(0, experts, (1 + experts // 3,), dtype=torch.int32)
    slots = popular[torch.randint(0, len(popular), (rows, top_k))]
    slots[torch.rand(slots.shape) < 0.4] = -1
    anywhere = torch.rand(slots.shape) < torch.rand(())
    slots[anywhere] = torch.randint(-1, experts, (int(anywhere.sum()),), dtype=torch.int32)
    return slots


class TestManyPairs:
    @pytest.mark.parametrize("experts", [slow(1), 8, slow(43), 160, slow(300), slow(512)])
    @pytest.mark.parametrize(("chunks", "compared"), [(4, 32), (32, 16)])
    def test_several_chunks_of_several_blocks(self, experts, chunks, compared, monkeypatch):
        """So many chunks, too, that their counts are not added up at once."""
        monkeypatch.setattr(permute, "MOST_CHUNKS", chunks)
        monkeypatch.setattr(permute, "COMPARED", compared)
        top_k, bm = int(torch.randint(1, 9, ())), (16, 64, 128)[int(torch.randint(0, 3, ()))]
        for pairs in (chunks * compared - 1, int(torch.randint(1, 4 * chunks * compared, ())), 2 * chunks * compared):
            check_prepared(random_slots(-(-pairs // top_k), top_k, experts), experts, bm, together=False)

    @pytest.mark.parametrize("slot", [-1, 299])
    def test_all_on_one_of_many_experts_or_none_here(self, slot, monkeypatch):
        monkeypatch.setattr(permute, "MOST_CHUNKS", 8)
        check_prepared(torch.full((1300, 3), slot, dtype=torch.int32), 300, 16, together=False)

    def test_how_many_pairs_are_many(self):
        """Beside them, rows are quantized."""
        for rows in (512, 513):
            x = torch.randn(rows, 208).bfloat16()
            check_prepared(random_slots(rows, 8, 160), 160, 64, x=x)


@triton.jit
def _divide(values, scales, found, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    at = row * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(found + at, divided(tl.load(values + at), tl.load(scales + row)))


class TestDivided:
    def check(self, values: Tensor, scales: Tensor) -> None:
        found = torch.empty_like(values)
        _divide[(len(values), 1, 1)](values, scales, found, values.shape[1])
        assert torch.equal(found, values / scales[:, None])

    def test_random_values(self):
        values = torch.randn(64, 8192) * torch.logspace(-12, 12, 64)[:, None]
        self.check(values, torch.rand(64) + 0.01)
        self.check(values.bfloat16().float(), scale_of(values.abs().amax(1)))

    def test_every_bf16_value_over_every_scale_of_bf16_rows(self):
        """Exponents don't matter to the rounding: all mantissas of both."""
        mantissas = torch.arange(128.0, 256.0)
        self.check(mantissas.repeat(128, 1), scale_of(mantissas))

    def test_infinite_quotients_stay_infinite(self):
        self.check(torch.tensor([[3e38, -3e38, 1.0, 0.0]]), torch.tensor([0.5]))


@pytest.mark.parametrize("quantized", [False, True])
def test_tensors_that_are_not_contiguous(quantized):
    case = problem()
    routing = case.routing
    turned = [part.T.contiguous().T for part in (routing.ids_TK, routing.weights_TK)]
    x = quantize_rows(case.x, "fp8_block") if quantized else case.x
    if quantized:
        x = QuantizedRows(x.values_RH.T.contiguous().T, x.scales_RS.T.contiguous().T)
    y = fused_moe(x, *turned, case.experts, "swiglu", config_of(case.spec), torch.float32)
    assert case.error(y) <= TritonFused.numerics_of(case.spec).tolerance


def test_row_maxima_and_codes():
    """Rows of h that no pair uses hold anything."""
    h = torch.full((6, 208), 1e9, dtype=torch.bfloat16)
    h[:4] = torch.randn(4, 208)
    h[2] = 0
    maxima, stops = torch.empty(6), torch.tensor([1, 4], dtype=torch.int32)
    _row_maxima[(6, 1, 1)](h, stops, maxima, I=208, E=2, WIDTH=256)
    assert torch.equal(maxima, torch.cat([h[:4].float().abs().amax(1), torch.zeros(2)]))
    codes, scales = torch.empty(6, 208, dtype=FP8), torch.empty(6, 1)
    _requantize[(6, 1, 1)](h, maxima, codes, scales, I=208, WIDTH=256, FP8_MAX=FP8_MAX, TINY=TINY)
    expected = quantize_rows(h[:4], "fp8_channel")
    assert torch.equal(codes[:4].view(torch.uint8), expected.values_RH.view(torch.uint8))
    assert torch.equal(scales[:4], expected.scales_RS)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_sum(dtype, split_k):
    """In float32 and in the order of K; what stands for pairs that are not here is not read."""
    slots = torch.tensor([[0, 3, 1, -1], [-1] * 4, [2, 2, -1, 0], [-1, 1, 0, 3]], dtype=torch.int32)
    weights, out = torch.randn(4, 4), torch.randn(split_k, 16, 1100).bfloat16()
    out[:, slots.flatten() < 0] = torch.nan
    y = torch.empty(4, 1100, dtype=dtype)
    sizes = {"H": 1100, "COLUMNS": 1100, "K": 4, "SPLIT_K": split_k, "BLOCK": 1024, "PDL": False}
    sizes |= {"AT": 0, "EACH": 1, "FIRST": 0, "WIDTH": 1100, "ROUTED": False, "EVERY": False, "WIDE": False}
    _weighted_sum[(4, 2, 1)](out, slots, weights, slots, y, 4, 0, PLACED=False, **sizes)
    pairs = sum(part.float() for part in out).view(4, 4, 1100)
    expected = torch.zeros(4, 1100)
    for place in range(4):
        expected += torch.where(slots[:, place, None] < 0, 0.0, weights[:, place, None] * pairs[:, place])
    assert torch.equal(y, expected.to(dtype))
    places = torch.randperm(16, dtype=torch.int32)
    moved = torch.empty_like(out)
    moved[:, places] = out
    y.fill_(torch.nan)
    _weighted_sum[(4, 2, 1)](moved, slots, weights, places, y, 4, 0, PLACED=True, **sizes)
    assert torch.equal(y, expected.to(dtype))
    part = torch.full((4, 76), torch.nan, dtype=dtype)
    _weighted_sum[(4, 1, 1)](moved, slots, weights, places, part, 4, 1024, PLACED=True, **sizes | {"COLUMNS": 76})
    assert torch.equal(part, expected[:, 1024:].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1])
def test_weighted_sum_by_routes(dtype, first):
    """Stored on two ranks, two rows each, where rank 1's places begin; what nobody asked for is not touched."""
    slots = torch.tensor([[0, 3], [-1, -1], [2, -1], [-1, -1]], dtype=torch.int32)
    weights, out = torch.randn(4, 2), torch.randn(1, 8, 1104).bfloat16()
    memory = [torch.full((4, 1104), 7.0, dtype=dtype) for _ in range(2)]
    addresses, at = torch.tensor([each.data_ptr() for each in memory]), 2 * 1104 * dtype.itemsize
    for start, columns in ((0, 1024), (1024, 80)):
        _weighted_sum[(4, 1, 1)](
            out, slots, weights, slots, addresses, 4, start, at + start * dtype.itemsize, 2, first, 1104,
            H=1104, COLUMNS=columns, K=2, SPLIT_K=1,
            PLACED=False, ROUTED=True, EVERY=False, WIDE=dtype == torch.float32, BLOCK=1024, PDL=False,
        )  # fmt: skip
    pairs = out[0].float().view(4, 2, 1104)
    for rank, row in ((0, 0), (1, 2)):
        wanted = sum(weights[row, k] * pairs[row, k] for k in range(2) if slots[row, k] >= 0)
        assert torch.equal(memory[rank][2], wanted.to(dtype))
        assert bool((memory[rank][:2] == 7).all())
        assert bool((memory[rank][3] == 7).all())


def test_weighted_sum_of_every_row_by_routes():
    """Three rows to two ranks with two places each: a row without a slot is zero, and the last place is not touched."""
    slots = torch.tensor([[0], [-1], [2]], dtype=torch.int32)
    weights, out = torch.randn(3, 1), torch.randn(1, 3, 64).bfloat16()
    memory = [torch.full((2, 64), 7.0) for _ in range(2)]
    addresses = torch.tensor([each.data_ptr() for each in memory])
    _weighted_sum[(4, 1, 1)](
        out, slots, weights, slots, addresses, 3, 0, 0, 2, 1, 64, H=64, COLUMNS=64, K=1, SPLIT_K=1, PLACED=False,
        ROUTED=True, EVERY=True, WIDE=True, BLOCK=64, PDL=False,
    )  # fmt: skip
    assert torch.equal(memory[0], torch.stack([weights[0] * out[0, 0].float(), torch.zeros(64)]))
    assert torch.equal(memory[1], torch.stack([weights[2] * out[0, 2].float(), torch.full((64,), 7.0)]))


@pytest.mark.parametrize(
    ("quant", "changes"),
    [
        slow("fp8_block", {}), ("fp8_block", {"twice": True, "span": 2}), slow("fp8_block", {"span": 3}),
        slow("fp8_block", {"split_k": 2}), slow("fp8_block", {"bn2": 64}), slow("fp8_channel", {"span": 3}),
        slow("fp8_tensor_static", {"split_k": 2}), slow("none", {"twice": True, "span": 2}),
    ],
)  # fmt: skip
def test_ranges_of_columns_give_the_same_bits(quant, changes):
    """Whatever the ranges are, GEMM2 and the weighted sum give what they give for all columns at once."""
    case = problem(rows=21, hidden=640, width=256, quant=quant)
    config = config_of(case.spec, **changes)
    whole = case.run(config)
    for widths in ([128], [256, 128], [384, 256]):
        sink = InRanges(tuple(whole.shape), whole.dtype, whole.device, widths)
        step = Step(Workspace(whole.device))
        rows = TokenRows(case.x, case.routing.ids_TK, case.routing.weights_TK)
        TritonPipeline(step, rows, case.experts, config, {}).run(case.spec.activation, sink)
        assert torch.equal(sink.y, whole), widths
        assert sink.put_so_far == sink.columns()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("quant", ["fp8_block", slow("fp8_tensor_dynamic"), "none"])
def test_rows_sorted_before_give_the_same_bits(quant, together, monkeypatch):
    """By the kernel that exchanges sort with, and by torch."""
    monkeypatch.setattr(permute, "MOST_PAIRS_TOGETHER", 4096 if together else 0)
    case = problem(rows=37, hidden=256, width=256, quant=quant, num_experts=5)
    rows, config = TokenRows(case.x, case.routing.ids_TK, case.routing.weights_TK), config_of(case.spec)
    whole = case.run(config)
    take = fresh_tensors(case.x.device)
    for by_expert in (permute.sorted_by_expert(rows, 5, take), kernels.sorted_by_expert(rows, 5, take)):
        step = Step(Workspace(case.x.device))
        sink = InRanges(tuple(whole.shape), whole.dtype, whole.device, [256])
        TritonPipeline(step, by_expert, case.experts, config, {}).run(case.spec.activation, sink)
        assert torch.equal(sink.y, whole)


class TestPadded:
    """What is around DeepGEMM's grouped GEMMs; for those stand GEMMs that know what they ask of their rows."""

    @staticmethod
    def contiguous(rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], out: Tensor, expert_R: Tensor) -> None:
        (codes, scales), (w, s) = rows, weights
        assert len(codes) % TILE == 0
        assert (codes.shape, out.shape[1]) == ((len(out), w.shape[2]), w.shape[1])
        for tile in expert_R.view(-1, TILE):  # one expert in a tile, and its padding last
            real = tile[tile >= 0]
            assert torch.equal(tile[: len(real)], real)
            assert len(real.unique()) <= 1
        assert (expert_R.diff()[(expert_R >= 0)[1:] & (expert_R >= 0)[:-1]] >= 0).all()
        for expert in range(len(w)):
            mine = expert_R == expert
            k = torch.arange(codes.shape[1]) // 128
            values = codes[mine].float() * scales[mine][:, k]
            dense = w[expert].float() * s[expert][torch.arange(len(w[expert])) // 128][:, k]
            out[mine] = (values @ dense.T).bfloat16()

    @staticmethod
    def masked(
        rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], out: Tensor, counts: Tensor, expected: int
    ) -> None:
        (codes, scales), (w, s) = rows, weights
        assert codes.shape == (len(w), TILE, w.shape[2])
        assert scales.shape == (len(w), TILE, -(-w.shape[2] // 128))
        assert out.shape == (len(w), TILE, w.shape[1])
        assert counts.dtype == torch.int32
        assert int(counts.max()) <= TILE
        assert expected >= 1
        k = torch.arange(codes.shape[2]) // 128
        out.fill_(torch.nan)  # what is not asked for
        for expert, count in enumerate(counts.tolist()):
            values = codes[expert, :count].float() * scales[expert, :count][:, k]
            dense = w[expert].float() * s[expert][torch.arange(len(w[expert])) // 128][:, k]
            out[expert, :count] = (values @ dense.T).bfloat16()

    def run(self, case: Problem, quantized: bool = False) -> Tensor:
        x = quantize_rows(case.x, "fp8_block") if quantized else case.x
        step = Step(Workspace(x.device if isinstance(x, Tensor) else x.values_RH.device))
        rows = TokenRows(x, case.routing.ids_TK, case.routing.weights_TK)
        made = PaddedPipeline(step, rows, case.experts, self.contiguous, self.masked)
        assert made.one_each == (case.routing.ids_TK.numel() <= TILE)
        made.expert_R.zero_()  # as another step may leave it
        sink = InRanges((len(case.x), case.spec.hidden), torch.float32, case.x.device, [128])
        made.run(case.spec.activation, sink)
        return sink.y

    @pytest.mark.parametrize(
        ("rows", "activation", "quantized"),
        [
            (1, "geglu", False), (42, "swiglu", True), slow(42, "relu2", False), (90, "swiglu", False),
            slow(90, "relu2", True),
        ],
    )  # fmt: skip
    def test_against_the_oracle(self, activation, quantized, rows):
        case = problem(rows=rows, hidden=256, width=384, activation=activation)
        assert case.error(self.run(case, quantized), DeepGemm) <= DeepGemm.numerics_of(case.spec).tolerance
        case.experts.turn(gate_first=False)
        assert case.error(self.run(case, quantized), DeepGemm) <= DeepGemm.numerics_of(case.spec).tolerance

    @pytest.mark.parametrize("rows", [slow(TILE), 140])
    @pytest.mark.parametrize("where", ["none here", "all on one", "one expert", "none on the first"])
    def test_who_is_where(self, where, rows):
        case = problem(rows=rows, hidden=128, width=128, num_experts=1 if where == "one expert" else 4, top_k=1)
        ids = case.routing.ids_TK
        if where == "none here":
            ids.fill_(-1)
            assert not self.run(case).any()
            return
        ids.fill_(2) if where == "all on one" else ids.clamp_(min=1 if where == "none on the first" else 0)
        assert case.error(self.run(case), DeepGemm) <= DeepGemm.numerics_of(case.spec).tolerance
