"""The contract of an exchange."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.kernels import quantize_rows, sorted_by_expert
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations, QuantizedRows
from moe_dist.model.routing import Routing
from moe_dist.model.spec import TOKEN_LAYOUTS, MoESpec, TokenLayout
from moe_dist.oracle.reference import ScaledBy
from moe_dist.registry import unknown
from moe_dist.step import FORMS, ExpertRows, Sink, Step, Support, Take, TensorSpec, TokenRows

H = TypeVar("H")  # what combine must know of its dispatch
S = TypeVar("S", bound=Sink)  # what it takes partial sums with


class Exchange(ABC, Generic[H, S]):
    """One rank's exchange. `dispatch` and `combine` are collective: every rank calls both, with zero tokens too.

    `payload` is the dtype that token rows travel in: "fp8" quantizes them at their source, "bf16" or "fp32" sends them
    as they are, "none" where tokens are on every rank already and nothing is sent. `static_scale` is the activations'
    scale for fp8_tensor_static. `sums_dtype`: that partial sums will have (default: the model's).

    `token_layout`: of the tokens that it takes and gives back. `capturable`: in a CUDA graph. `every_token`: it brings
    every token to every rank. `needs_bucket`: all ranks must pad to one agreed number of tokens. `makes`: the forms of
    rows that it can hand over (step.rows.FORMS), the one it makes without further work first; `form` is the plan's.
    """

    token_layout: TokenLayout
    capturable: bool
    every_token: bool
    needs_bucket: bool
    makes: tuple[str, ...] = ("token",)

    def __init__(
        self,
        comm: Comm,
        placement: Placement,
        spec: MoESpec,
        payload: str,
        static_scale: Tensor | None = None,
        form: str = "token",
        sums_dtype: torch.dtype | None = None,
    ) -> None:
        self.comm, self.placement, self.spec = comm, placement, spec
        self.sums_dtype = sums_dtype or spec.torch_dtype
        self.payload, self.static_scale, self.form = payload, static_scale, form

    @classmethod
    def declared_wrong(cls) -> str | None:
        """What its attributes say that nobody knows."""
        return unknown("makes", cls.makes, FORMS) or unknown("token_layout", [cls.token_layout], TOKEN_LAYOUTS)

    @classmethod
    def for_layout(cls, token_layout: TokenLayout) -> type[Exchange[Any, Any]]:
        """Which class serves tokens that lie so, where there is a choice. With another layout than that one's, tokens
        and results change theirs around it (exchange/layout.py)."""
        return cls

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        """Whether it serves this placement on such ranks. By default it serves all of them anywhere."""
        return Support(True)

    @classmethod
    @abstractmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """Most bytes one rank sends in a step of `tokens` global tokens, evenly sharded; for plans."""

    @classmethod
    @abstractmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        """The most that a rank takes from the workspace in a step at this bucket; for plans. `dtype`: of partial
        sums."""

    @classmethod
    def window_bytes(cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int) -> int:
        """Of the memory that ranks share in such a step (Comm.window), in which `scratch` is not; for plans."""
        return 0

    @classmethod
    def rows_entering(cls, placement: Placement, bucket: int) -> int:
        """The most rows that a rank's backend is given in such a step."""
        return bucket * (placement.world if cls.token_layout == "sharded" else 1)

    @abstractmethod
    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, H]:
        """This rank's tokens [T, H], as `to_payload` has left them, to the rows [R, H] that it must compute, and what
        `sink` and `combine` must know.

        `step.bucket`: the most tokens of any rank, agreed by all. To an exchange of replicated tokens it says that they
        were gathered from shards of that size, in rank order; None says that they were replicated all along.
        """

    @abstractmethod
    def sink(self, step: Step, rows: TokenRows, handle: H, dtype: torch.dtype) -> S:
        """What takes the partial sums of these rows, which the backend gives in `dtype`."""

    @abstractmethod
    def combine(self, step: Step, sink: S, handle: H) -> Tensor:
        """Partial sums of the computed rows to this rank's finished tokens [T, H], in the sink's dtype. The result is
        no scratch: it stays when the step has ended."""

    def stored_bytes(self) -> int:
        """Bytes that the last step has stored in other ranks' memory, which no collective counts. Waits for the
        device. All ranks ask alike."""
        return 0

    def splits(self, bucket: int, captured: bool) -> str | None:
        """How such a step cuts what it sends, where there is a choice."""
        return None

    def identify(self, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """(row on its source, source rank or None) of every global token, where `bounds[r]` is rank r's run of them:
        what decides which copy of an expert serves it. The oracle asks."""
        if self.token_layout == "replicated":
            return torch.arange(bounds[-1][1], device="cpu"), None
        counts = torch.tensor([stop - start for start, stop in bounds], dtype=torch.int64, device="cpu")
        sources = torch.arange(len(bounds), device="cpu").repeat_interleave(counts)
        rows = torch.cat([torch.arange(stop - start, device="cpu") for start, stop in bounds])
        return rows, sources

    def quantized_together(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The runs of global tokens that share a dynamic per-tensor scale. The oracle asks."""
        return list(bounds) if self.payload == "fp8" else [(bounds[0][0], bounds[-1][1])]

    @property
    def scaled_by(self) -> ScaledBy:
        """Which rows a dynamic per-tensor scale is made from. The oracle asks."""
        if self.payload != "fp8":
            return "computed"
        return "all" if self.spec.shared_experts == "tp" else "routed"

    def arrived(self, step: Step, rows: TokenRows, handle: H) -> TokenRows:
        """`rows` when all of them are here, as streams go. The layer asks, after `dispatch`, where the backend can't
        wait for them itself."""
        return rows

    def in_form(self, step: Step, rows: TokenRows) -> TokenRows:
        """`rows` as the plan wants them. The layer asks, after `dispatch`; an exchange that makes sorted rows by itself
        returns them as they are."""
        if self.form == "token" or isinstance(rows, ExpertRows):
            return rows
        return sorted_by_expert(rows, len(self.placement.experts_of(self.comm.rank)), step.workspace.take)

    def to_payload(self, step: Step, x: Activations, routing: Routing) -> Activations:
        """Quantize at the source if the payload is FP8 and that has not been done. The layer asks, before
        `dispatch`."""
        if self.payload != "fp8" or isinstance(x, QuantizedRows):
            return x
        with step.stages("quantize"):
            used_T = None
            if self.spec.quant == "fp8_tensor_dynamic" and self.scaled_by == "routed":
                used_T = routing.legal(self.spec.num_experts).any(1)
            return quantize_rows(x, self.spec.quant, self.static_scale, used_T, self.payload_room(step, routing.tokens))

    def payload_room(self, step: Step, tokens: int) -> Take:
        """Where quantized rows are put: values, then scales. By default they are scratch."""
        return step.workspace.take

    def check_bucket(self, tokens: int, bucket: int | None) -> int:
        """The bucket to pad to. Raises ConfigError where tokens would not fit: none is ever dropped."""
        if bucket is None or tokens > bucket:
            rule = f"this rank has {count_of(tokens, 'token')} and all ranks step at one agreed size"
            raise ConfigError("max_tokens_per_rank", bucket, rule, f"{tokens} and more")
        return bucket
