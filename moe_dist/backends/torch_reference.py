"""Backend `torch`: plain torch, on CPU and GPU, exact about where it quantizes. For correctness, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.backends.base import Backend, Problem
from moe_dist.model.quantization import QuantizedRows, dequantize_rows, quantize_rows
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights, activate
from moe_dist.step import ExpertRows, Sink, Stages, Step, Support, TokenRows
from moe_dist.step.rows import used_rows

CACHE_BYTES = 2 << 30  # dequantized weights are kept up to this size and made anew in every step beyond it


class TorchBackend(Backend):
    """Rows are grouped by expert, each expert is two float32 matmuls on dequantized weights."""

    capturable = False  # group sizes are read back to the host
    deterministic = True
    takes = ("token", "expert")

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._weights: ExpertWeights | None = None
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = False
        self._versions: list[int] = []

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        return frozenset({"none", "bf16", "fp32", "fp8"})

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        return Support(True)

    def prepare(self, weights: ExpertWeights) -> None:
        self._weights = weights
        self._cache.clear()
        self._versions = _versions(weights)
        self._keep = 4 * (weights.w13_eFH.numel() + weights.w2_eHi.numel()) <= CACHE_BYTES

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        if self._weights is None:
            raise RuntimeError("prepare() comes before forward()")
        if (versions := _versions(self._weights)) != self._versions:
            self._cache.clear()
            self._versions = versions
        stages = step.stages
        x_RH = self._inputs(stages, rows, self._weights)
        y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        groups = self._by_expert(rows) if self._weights.width else []
        hidden = [
            (slot, row, weight, self._hidden(stages, x_RH[row], slot, self._weights.first_bias(slot)))
            for slot, row, weight in groups
        ]
        if hidden and self.spec.quantized:
            inputs = self._requantize(stages, [h for *_, h in hidden], [slot for slot, *_ in hidden], self._weights)
        else:
            inputs = [h for *_, h in hidden]
        with stages("gemm2"):
            for (slot, row, weight, _), h in zip(hidden, inputs, strict=True):
                y = h @ self._dense(slot)[1].T
                if self._weights.b2_eH is not None:
                    y = y + self._weights.b2_eH[slot]
                y_RH.index_add_(0, row, y * weight[:, None])
        for start, stop in sink.columns():
            sink.put(start, stop, sink.target(start, stop).copy_(y_RH[:, start:stop]))

    def _inputs(self, stages: Stages, rows: TokenRows, weights: ExpertWeights) -> Tensor:
        """GEMM1's input as float32 values: what FP8 holds, or the rows as they are."""
        with stages("quantize"):
            if isinstance(rows.x, QuantizedRows):
                return dequantize_rows(rows.x, weights.a13)
            if not self.spec.quantized:
                return rows.x.float()
            used_R = used_rows(self.spec.quant, rows.slots_RK)
            return dequantize_rows(quantize_rows(rows.x, self.spec.quant, weights.a13, used_R), weights.a13)

    def _by_expert(self, rows: TokenRows) -> list[tuple[int, Tensor, Tensor]]:
        """(slot, row indices, weights) for each slot that has rows."""
        top_k, weights = rows.slots_RK.shape[1], rows.weights_RK.flatten()
        if isinstance(rows, ExpertRows):
            counts = (rows.stops_e - rows.starts_e).tolist()
            pieces = torch.split(rows.order_N[: sum(counts)].long(), counts)
        else:
            flat = rows.slots_RK.flatten().long()
            counts = torch.bincount(flat + 1, minlength=1).tolist()
            pieces = torch.split(flat.argsort(stable=True), counts)[1:]  # the first piece are the pairs not here
        return [(slot, piece // top_k, weights[piece]) for slot, piece in enumerate(pieces) if len(piece)]

    def _hidden(self, stages: Stages, x: Tensor, slot: int, bias_F: Tensor | None) -> Tensor:
        with stages("gemm1"):
            gate_up = x @ self._dense(slot)[0].T
            if bias_F is not None:
                gate_up = gate_up + bias_F
        with stages("activation"):
            return activate(gate_up, self.spec.activation)

    def _requantize(
        self, stages: Stages, hidden: list[Tensor], slots: list[int], weights: ExpertWeights
    ) -> list[Tensor]:
        """GEMM2's inputs through FP8. All experts' rows together are the tensor of a dynamic per-tensor scale."""
        with stages("quantize"):
            sizes = [len(h) for h in hidden]
            static = None
            if weights.a2 is not None:
                per_slot = weights.a2[torch.tensor(slots, device=weights.device)]
                static = per_slot.repeat_interleave(torch.tensor(sizes, device=weights.device))[:, None]
            rows = quantize_rows(torch.cat(hidden), self.spec.quant, static)
            return list(torch.split(dequantize_rows(rows, static), sizes))

    def _dense(self, slot: int) -> tuple[Tensor, Tensor]:
        if self._weights is None:
            raise RuntimeError("prepare() comes before forward()")
        if slot in self._cache:
            return self._cache[slot]
        dense = self._weights.dequantized(slot)
        if self._keep:
            self._cache[slot] = dense
        return dense


def _versions(weights: ExpertWeights) -> list[int]:
    """How often each tensor was changed in place. Those that were made in inference mode don't count that, and must not
    be changed."""
    return [0 if tensor.is_inference() else tensor._version for tensor in weights.tensors().values()]
