"""One rank's share of the layer on one GPU, backends side by side with what else computes it:

    python benchmarks/local_backends.py OUT.json [SECONDS]

DeepSeek-V3 under EP4 and TP4 and Qwen3-235B-A22B under TP4, as rank 0 holds them, from bf16 rows: the whole operation
in a CUDA graph (quantizing included), dense random data, uniform routing, median over five seeds; the floor is that of
the routing drawn. The two grouped GEMMs are timed alone too, ours with the activation in them, and DeepGEMM's, where
that package is installed, on rows sorted and quantized beforehand; TFLOP/s count the real pairs, no padding. A part and
the whole are timed alike: several routings' calls in one graph, as often, each after a rest of the GPU, whose clock
falls at full load so that one would pay for another. Rows go into the project's results form, with layer "local".
Without time for everything within SECONDS the last sizes are left out, and said.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends import BACKENDS
from moe_dist.bench.peaks import PEAKS
from moe_dist.bench.results import provenance
from moe_dist.bench.roofline import rank_floor_us, rank_work
from moe_dist.bench.tune import FORWARDS, Sample, calls_us, draw_sample, forward_us
from moe_dist.commands.config import find_model
from moe_dist.engine.plan import Part, Plan
from moe_dist.engine.planning import make_plan
from moe_dist.kernels import quantize_rows
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import BLOCK, ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard_from
from moe_dist.oracle.reference import relative_error
from moe_dist.step import Step, Workspace
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SHAPES = (("DeepSeek-V3", {"ep": 4}), ("DeepSeek-V3", {"tp": 4}), ("Qwen3-235B-A22B", {"tp": 4}))
ROWS = (8, 128, 2048, 8192)
PACKAGES = {"flashinfer_cutlass": "flashinfer-python", "deep_gemm": "sgl-deep-gemm"}
SEEDS, ITERS = 5, 20
REST_S = 0.1
OURS, PEERS = ("triton", "cutlass"), ("flashinfer_cutlass", "deep_gemm")


def main() -> None:
    path, until = sys.argv[1], time.time() + (float(sys.argv[2]) if len(sys.argv) > 2 else 3600.0)
    machine, rows = Machine.detect("cuda"), []
    names = [name for name in (*OURS, *PEERS) if BACKENDS.get(name).available("cuda").ok]
    print(f"backends: {', '.join(names)}", flush=True)
    with torch.inference_mode():
        for model, grid in SHAPES:
            spec, parallel = find_model(model), ParallelSpec(**grid)
            shard: ExpertWeights | None = None
            known: dict[Any, Sample] = {}  # the oracle takes seconds, and backends of equal numerics the same one
            for name in names:
                plan = make_plan(spec, parallel, exchange="ag_rs", backend=name, payload="unquantized", machine=machine)
                part = plan.parts()[0]
                if shard is None:
                    make = lambda expert, spec=spec: random_expert(spec, expert, 0, "cuda")  # noqa: E731
                    shard = shard_from(make, part.placement, part.rank)
                backend = BACKENDS.get(name)(part.problem)
                shard.turn(gate_first=True)
                backend.prepare(shard)
                for count in ROWS:
                    if time.time() > until:
                        print(f"left out, no time: {model} {parallel.label} {name} {count}", flush=True)
                        continue
                    rows.append(measured(plan, part, shard, backend, count, known))
                    print(line(rows[-1]), flush=True)
            if shard is not None and "deep_gemm" in names:
                shard.turn(gate_first=True)
                for count in ROWS:
                    if time.time() < until:
                        rows.append(gemms_alone(plan, part, shard, count))
                        print(line(rows[-1]), flush=True)
            del shard, backend
            torch.cuda.empty_cache()
            with open(path, "w") as file:
                json.dump(provenance(machine).model_dump() | {"rows": rows}, file, indent=1, allow_nan=False)


def measured(
    plan: Plan, part: Part, shard: ExpertWeights, backend: Any, count: int, known: dict[Any, Sample]
) -> dict[str, Any]:
    times, floors, stages, gemms, rates = [], [], {}, [], []
    for seed in range(SEEDS):
        key = count, seed, backend.numerics if seed == 0 else None
        if key not in known:
            known[key] = draw_sample(plan, part, shard, backend, count, seed)
        sample = known[key]
        backend.use_config(None)
        if seed == 0:
            error = relative_error(backend.forward_alone(sample.rows[0], sample.dtype), sample.expected_RH)
            ok = error <= sample.tolerance
            stages = kernels_us(lambda sample=sample: backend.forward_alone(sample.rows[0], sample.dtype))
        rest()
        times.append(forward_us(backend, sample, ITERS))
        floors.append(sample.floor_us or float("nan"))
        if plan.backend in OURS:
            gemms.append(own_gemms_us(plan, backend, sample))
            rates.append(mean(flops(plan, part, rows.slots_RK) for rows in sample.rows) / gemms[-1] / 1e6)
    return (
        row(plan, sample.rows[0].slots_RK, count)
        | {
            "backend": plan.backend,
            "p50_us": round(median(times), 2),
            "floor_us": round(median(floors), 2),
            "ratio": round(median(t / f for t, f in zip(times, floors, strict=True)), 3),
            "err_oracle": error,
            "ok": ok,
            "kernels_us": stages,
        }
        | ({"gemms_us": round(median(gemms), 2), "gemms_tflops": round(median(rates))} if gemms else {})
        | ({"peer": f"{PACKAGES[plan.backend]} {version(PACKAGES[plan.backend])}"} if plan.backend in PEERS else {})
    )


def own_gemms_us(plan: Plan, backend: Any, sample: Sample) -> float:
    """Both GEMMs of one of our backends, on rows that were sorted and quantized before."""
    device = sample.expected_RH.device  # a workspace each: all are prepared before the first is computed
    pipelines = [backend.pipeline(Step(Workspace(device)), rows) for rows in sample.rows]
    prepared = [pipeline.prepare() for pipeline in pipelines]

    def all_gemms() -> None:
        for pipeline, (values, scales) in zip(pipelines, prepared, strict=True):
            pipeline.gemm1(values, scales, plan.spec.activation)
            pipeline.gemm2(0, plan.spec.hidden)

    return rested_us(all_gemms, len(pipelines))


def rested_us(calls: Callable[[], None], count: int) -> float:
    rest()
    return calls_us(calls, calls, count, torch.device("cuda"), ITERS)


def rest() -> None:
    torch.cuda.synchronize()
    time.sleep(REST_S)


def flops(plan: Plan, part: Part, slots: Tensor) -> float:
    """Of the pairs that are here: a multiplication and an addition for each weight."""
    return 2.0 * int((slots >= 0).sum()) * 3 * plan.spec.hidden * part.problem.width


def row(plan: Plan, here: Tensor, count: int) -> dict[str, Any]:
    """`here`: the slots of one seed's routing."""
    spec, placement = plan.spec, plan.placement
    return {
        "model": spec.name, "hidden": spec.hidden, "intermediate": spec.intermediate, "num_experts": spec.num_experts,
        "top_k": spec.top_k, "activation": spec.activation, "quant": spec.quant_label, "tp": placement.tp,
        "ep": placement.ep, "world": placement.world, "placement": plan.parallel.label, "layer": "local",
        "exchange": "local", "token_layout": "replicated", "global_tokens": count, "skew": "uniform", "seed": 0,
        "seeds": SEEDS, "iters": ITERS, "graph": True, "runtime": None, "payload_dtype": "bf16",
        "combine_dtype": plan.combine_dtype, "p99_us": None, "err_exact": None, "pairs": int((here >= 0).sum()),
        "active_experts": int(here[here >= 0].unique().numel()), "chosen_by": "name",
    }  # fmt: skip


def kernels_us(call: Callable[[], object], count: int = 5) -> dict[str, float]:
    """Mean microseconds of each kernel of one call, run eagerly, longest first."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        name = event.key.split("(")[0]
        name = name if len(name) <= 80 else name.split("<")[0][:80]
        times[name] = times.get(name, 0.0) + event.self_device_time_total / count
    return {name: round(us, 1) for name, us in sorted(times.items(), key=lambda item: -item[1]) if us > 0.05}


def gemms_alone(plan: Plan, part: Part, shard: ExpertWeights, count: int) -> dict[str, Any]:
    """DeepGEMM's contiguous grouped GEMMs on rows that lie sorted by expert, each expert's padded to whole blocks."""
    import deep_gemm

    times, floors, rates = [], [], []
    for seed in range(SEEDS):
        calls, work, least = [], [], []
        for number in range(FORWARDS):
            routing = synthetic_routing(plan.spec, count, "uniform", seed, number).to("cuda")
            slots = part.placement.slots_on(part.rank, routing.ids_TK)
            counts = torch.bincount(slots[slots >= 0].long(), minlength=shard.num_experts)
            calls += two_gemms(shard, counts, Stream("rows of GEMMs alone", count, seed, number, device="cuda"))
            work.append(flops(plan, part, slots))
            pairs, active = int(counts.sum()), int((counts > 0).sum())
            done = rank_work(plan.spec, part.placement, part.rank, pairs, active)
            least.append(rank_floor_us(plan.spec, done, PEAKS[plan.machine.name]))

        def all_gemms(calls: list[Any] = calls) -> None:
            for rows, weights, out, expert in calls:
                deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, weights, out, expert)

        times.append(rested_us(all_gemms, FORWARDS))
        rates.append(mean(work) / times[-1] / 1e6)
        floors.append(mean(least))
    return row(plan, slots, count) | {
        "backend": "deep_gemm: two GEMMs alone",
        "peer": f"{PACKAGES['deep_gemm']} {version(PACKAGES['deep_gemm'])}",
        "p50_us": round(median(times), 2),
        "floor_us": round(median(floors), 2),
        "ratio": round(median(t / f for t, f in zip(times, floors, strict=True)), 3),
        "gemms_us": round(median(times), 2),
        "gemms_tflops": round(median(rates)),
        "err_oracle": None,
        "ok": None,
    }


def two_gemms(shard: ExpertWeights, counts: Tensor, stream: Stream) -> list[Any]:
    """Their arguments, for so many random rows of each expert."""
    import deep_gemm

    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    expert = torch.repeat_interleave(torch.arange(shard.num_experts, device="cuda", dtype=torch.int32), padded)
    made = []
    for weights, scales in ((shard.w13_eFH, shard.s13), (shard.w2_eHi, shard.s2)):
        wide, columns = weights.shape[2], weights.shape[1]
        rows = quantize_rows(stream.normal(len(expert), wide).bfloat16(), "fp8_block")
        codes = rows.values_RH, deep_gemm.get_mn_major_tma_aligned_tensor(rows.scales_RS)
        out = torch.empty(len(expert), columns, device="cuda", dtype=torch.bfloat16)
        made.append((codes, (weights, scales), out, expert))
    return made


def line(found: dict[str, Any]) -> str:
    error = "" if found["err_oracle"] is None else f" err {found['err_oracle']:.4f}"
    if "gemms_us" in found:
        error += f"  GEMMs {found['gemms_us']:.1f} µs {found['gemms_tflops']} TFLOP/s"
    return (
        f"{found['model']:16s} {found['placement']:4s} {found['global_tokens']:5d} {found['backend']:28s}"
        f" {found['p50_us']:9.1f} µs  floor {found['floor_us']:7.1f}  x{found['ratio']:.3f}{error}"
    )


if __name__ == "__main__":
    main()
