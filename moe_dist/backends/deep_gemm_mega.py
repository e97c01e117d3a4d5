"""Backend `deep_gemm_mega`: DeepGEMM's kernel of a whole layer for Hopper, dispatch, both GEMMs and combine in one
launch; behind exchange `fused` only."""

from __future__ import annotations

import inspect
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends.base import Backend, Problem
from moe_dist.backends.own import on_hopper
from moe_dist.comm.symmetric import without_multicast
from moe_dist.kernels import put_pairs, quantize_rows
from moe_dist.machine.machine import HOPPER
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.model.spec import BLOCK, MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.step import LayerRows, Ranks, Sink, Step, Support, TokenRows

PACKAGE = "sgl-deep-gemm"
OLDER, NEWER = "0.1.4", "0.2.5"  # releases whose kernel was looked at
NEWER_TORCH = (2, 13)  # from which on the newer one loads
# What is called, and the parameters that it is called with by name.
CALLED: dict[str, tuple[str, ...]] = {
    "get_symm_buffer_for_sm90_mega_moe": (),
    "transform_weights_for_mega_moe_sm90": (),
    "fp8_mega_moe": ("recipe", "activation", "activation_clamp", "fast_math"),
}
BOUND = "num_tokens_bound"  # of the newer release: the most tokens of any rank in this call
GRAIN = 64  # columns of GEMM2's input that share a scale in the older release
MOST_INTERMEDIATE, MOST_CHOICES = 4096, 32
TOGETHER = 256  # columns of a sum that a warp adds at once
FEWEST = 256  # tokens a rank that memory is made for
ROWS = 384  # tokens, and rows of an expert, come in whole ones of these at most


@cache
def installed() -> Support:
    """Whether the package is there, of a release that is known, and loads beside this torch."""
    fitting = NEWER if _torch_release() >= NEWER_TORCH else f"{OLDER}.post1"
    found = release()
    if found is None:
        return Support(False, f"{PACKAGE} is not installed (pip install {PACKAGE}=={fitting})")
    if not any(_is_of(found, known) for known in (OLDER, NEWER)):
        known = f"{OLDER} and {NEWER}"
        return Support(False, f"{PACKAGE} {found} is installed, and its whole-layer kernel is known of {known} only")
    try:
        import deep_gemm
    except Exception as error:  # a compiled module that does not fit raises what it likes
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = f"pip install {PACKAGE}=={fitting}"
        return Support(False, f"{PACKAGE} {found} does not load with torch {torch.__version__} ({hint}): {why}")
    for name, parameters in CALLED.items():
        function = getattr(deep_gemm, name, None)
        if function is None:
            return Support(False, f"the installed {PACKAGE} {found} has no {name}")
        if lacking := [each for each in parameters if each not in inspect.signature(function).parameters]:
            return Support(False, f"{name} of the installed {PACKAGE} {found} takes no {', '.join(lacking)}")
    return Support(True, f"{PACKAGE} {found}")


@cache
def release() -> str | None:
    """Of the installed package; None where it is not."""
    try:
        return version(PACKAGE) if find_spec("deep_gemm") else None
    except PackageNotFoundError:
        return None


def _is_of(found: str, known: str) -> bool:
    return found == known or found.startswith(f"{known}.")


def _torch_release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


class DeepGemmMega(Backend):
    """fp8_block with swiglu. Its GEMM2 takes rows that have their pair's weight already, in the older release with a
    scale for each 64 columns that is a power of two, in the newer one with scales like ours. Both have kernels for many
    tokens that keep a GEMM's sum in the tensor cores (`kReuseAccumAsFinal` in their source). Tokens are quantized by
    our kernel, straight into the package's memory."""

    capturable = True
    deterministic = True
    sums = frozenset({"bf16"})
    takes = ("layer",)

    @classmethod
    def available(cls, device: str) -> Support:
        hopper = on_hopper(device)
        return installed() if hopper.ok else hopper

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        return frozenset({"fp8"})

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        if _is_of(release() or "", NEWER):
            return Numerics(gemm2_weighted=True, fast_accumulation=True)
        return Numerics(gemm2_weighted=True, fast_accumulation=True, gemm2_group=GRAIN, gemm2_power_of_2=True)

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec = problem.spec
        if problem.capability != HOPPER:
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if refusal := cls.refused(spec, ("swiglu",)):
            return refusal
        if spec.quant != "fp8_block":
            return Support(False, f"computes fp8_block, not {spec.quant_label}")
        if spec.shared_experts != "none":
            return Support(False, "computes no shared expert, and nothing runs beside it")
        if spec.top_k > MOST_CHOICES:
            return Support(False, f"takes at most {MOST_CHOICES} experts for a token, not {spec.top_k}")
        return _sizes(spec)

    @classmethod
    def scratch_bytes(cls, problem: Problem, rows: int) -> int:
        """Nothing: all of it is in memory that ranks share."""
        return 0

    @classmethod
    def window_bytes(cls, spec: MoESpec, placement: Placement, bucket: int) -> int:
        """Of all capacities up to this bucket's, since each has memory of its own that stays."""
        capacities = [FEWEST]
        while bucket > capacities[-1]:
            capacities.append(2 * capacities[-1])
        return sum(_memory_bytes(spec, placement, capacity) for capacity in capacities) if bucket else 0

    @classmethod
    def copied_bytes(cls, problem: Problem) -> int:
        """w13 with gate and up in turn, eight rows each."""
        return problem.num_local * problem.spec.w13_rows(problem.width) * problem.spec.hidden

    def prepare(self, weights: ExpertWeights) -> None:
        import deep_gemm

        first, second = _gate_first(weights), (weights.w2_eHi, weights.s2)
        self._first, self._second = deep_gemm.transform_weights_for_mega_moe_sm90(first, second)
        self._bounded = BOUND in inspect.signature(deep_gemm.fp8_mega_moe).parameters

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        if not isinstance(rows, LayerRows):
            raise RuntimeError("deep_gemm_mega computes whole layers, from the rows that exchange fused hands over")
        if rows.bucket == 0:  # on all ranks alike
            sink.put_zeros()
            return
        memory = self._memory(rows.bucket, rows.ranks)
        with step.stages("quantize"):
            self._bring(memory, rows)
        y_RH = sink.whole(step)
        with step.stages("layer"):
            self._launch(memory, y_RH)
        sink.put_all(y_RH)

    def _memory(self, bucket: int, ranks: Ranks) -> Any:
        """The package's; all layers of one shape share it, as one step ends before the next one begins. Steps of each
        capacity have their own. The package compiles for the capacity, and the newer release picks by it what it does,
        so a step must not depend on how large another one was."""
        spec, capacity = self.spec, _capacity(bucket)
        sizes = capacity, spec.top_k, spec.hidden, spec.intermediate

        def made() -> Any:
            import deep_gemm

            without_multicast()
            with torch.inference_mode(False):  # what is made in it could be filled in it only
                return deep_gemm.get_symm_buffer_for_sm90_mega_moe(ranks.process_group, spec.num_experts, *sizes)

        return ranks.keep(("deep_gemm_mega", spec.num_experts, *sizes), made)

    def _bring(self, memory: Any, rows: LayerRows) -> None:
        """This rank's tokens to where the kernel reads them; the places behind them have no expert."""
        tokens, bucket = len(rows), rows.bucket
        if tokens:
            if not isinstance(rows.x, Tensor):
                raise RuntimeError("deep_gemm_mega quantizes by itself")
            places = {FP8: memory.x[:tokens], torch.float32: memory.x_sf[:tokens]}
            found = quantize_rows(rows.x, "fp8_block", take=lambda shape, dtype: _room(places[dtype]))
            for place, values in ((places[FP8], found.values_RH), (places[torch.float32], found.scales_RS)):
                if values is not None and values.data_ptr() != place.data_ptr():
                    place.copy_(values)
        given = rows.slots_RK, rows.weights_RK, self.spec.num_experts
        put_pairs(*given, memory.topk_idx[:bucket], memory.topk_weights[:bucket])

    def _launch(self, memory: Any, y_RH: Tensor) -> None:
        """The number of rows is that of all ranks: by it the newer release picks its schedule, which it would pick by
        the memory's size otherwise."""
        import deep_gemm

        bound = {BOUND: len(y_RH)} if self._bounded else {}
        deep_gemm.fp8_mega_moe(
            y_RH, self._first, self._second, memory, recipe=(BLOCK, BLOCK, BLOCK), activation="swiglu",
            activation_clamp=None, fast_math=True, **bound,
        )  # fmt: skip


def _sizes(spec: MoESpec) -> Support:
    """What both releases compile for, and what the installed one takes beyond that."""
    hidden, intermediate = spec.hidden, spec.intermediate
    sizes = f"hidden ({hidden}) and intermediate ({intermediate})"
    if hidden % BLOCK or intermediate % BLOCK:
        return Support(False, f"needs {sizes} in whole blocks of {BLOCK}")
    if intermediate > MOST_INTERMEDIATE:
        return Support(False, f"takes intermediate sizes of at most {MOST_INTERMEDIATE}, not {intermediate}")
    parts = 7 if hidden % 7 == 0 else 4 if hidden >= 4 * TOGETHER else 1  # in which it adds up sums at prefill
    if hidden % (parts * TOGETHER):
        return Support(False, f"adds up rows in {parts} parts of whole {TOGETHER}s, which hidden ({hidden}) has not")
    if _is_of(release() or "", NEWER) and (hidden % 512 or intermediate % 256):
        return Support(False, f"{PACKAGE} {NEWER} needs {sizes} in multiples of 512 and 256")
    return Support(True)


def _gate_first(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """w13 as [gate; up] with its scales, which are a copy: another backend of the layer may turn those of the shard.
    The package makes one of the weights."""
    w13, s13 = weights.w13_eFH, weights.s13
    if s13 is None:
        raise RuntimeError("experts in fp8_block have scales")
    if weights.gate_first:
        return w13, s13.clone()
    gate_first, scales = (torch.cat(each.chunk(2, dim=1)[::-1], dim=1) for each in (w13, s13))
    return gate_first, scales


def _memory_bytes(spec: MoESpec, placement: Placement, capacity: int) -> int:
    """The most that either release asks for at this capacity: every rank's pairs in this one's experts, each expert's
    in whole tiles, as inputs of both GEMMs, whose scales lie in tiles of 128 for every 8 rows in the older one; its own
    tokens as they come in and the sums of their pairs; and who sent which pair."""
    world, local, top_k = placement.world, len(placement.experts_of(0)), spec.top_k
    tokens = cdiv(capacity, ROWS) * ROWS
    rows = world * tokens * min(top_k, local) + local * ROWS
    scales = 4 * (cdiv(spec.hidden, BLOCK) + cdiv(spec.intermediate, GRAIN))
    pooled = spec.hidden + spec.intermediate + 16 * scales + 32
    own = spec.hidden + cdiv(spec.hidden, BLOCK) * 4 + 12 * top_k + 2 * top_k * spec.hidden
    return rows * pooled + tokens * own + 4 * local * world * world * tokens


def _capacity(bucket: int) -> int:
    """Tokens a rank that memory is made for: few sizes, which all together take twice the largest at most."""
    return power_of_2(max(bucket, FEWEST))


def _room(place: Tensor) -> Tensor:
    """The package's own memory, where rows lie there as our kernel writes them; else memory to copy from."""
    return place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
