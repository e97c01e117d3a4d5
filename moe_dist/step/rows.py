"""What travels between an exchange and a backend, and how both answer whether they can do a thing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from moe_dist.model.quantization import Activations
from moe_dist.model.spec import QuantKind

T = TypeVar("T")


@dataclass(frozen=True)
class Arrivals:
    """When rows are here that were on their way as they were handed over. Rows p · each to (p + 1) · each are part p:
    part 0 is here, part p as soon as the int32 word `flags_P[p]` is the word `step` + 1. It is read with acquire at
    system scope; `values_RH` and `scales_RS` of the part are there from then on. Parts come in any order, so each has
    to be waited for.

    A wait ends after `limit_ns` nanoseconds. Then `failed` (int32 [4], which the host can read) gets the number of the
    rank, (rank + p) modulo the number of parts, behind the first word, the step's number behind that, and at last in
    the first word `phase` + 1."""

    flags_P: Tensor
    step: Tensor
    failed: Tensor
    each: int
    rank: int
    limit_ns: int
    phase: int


@dataclass(frozen=True)
class TokenRows:
    """R token rows for one rank. `x` is [R, H] or quantized rows; `slots_RK` int32 local slots, -1 = not here;
    `weights_RK` float32, whose value is of no account where the slot is -1. A row may come with no slot at all
    (padding, or a token that is only gathered here): what `x` holds there is of no account either. With `arrivals`,
    slots and weights are here, but `x` is not yet: see Backend.awaits."""

    x: Activations
    slots_RK: Tensor
    weights_RK: Tensor
    arrivals: Arrivals | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return self.slots_RK.shape[0]


@dataclass(frozen=True)
class ExpertRows(TokenRows):
    """The same with the pairs that are here sorted by local expert, and within one in their own order. Pair row · K + k
    is the choice k of that row. Of e experts the pairs of expert j are `order_N` from `starts_e[j]` to `stops_e[j]`;
    all int32, N = R · K, and what `order_N` holds behind the last pair is of no account."""

    starts_e: Tensor
    stops_e: Tensor
    order_N: Tensor


class Ranks(Protocol):
    """The ranks of a layer, for a backend that reaches the others by itself. See moe_dist.comm.Comm, which is one."""

    rank: int
    world: int

    @property
    def process_group(self) -> Any: ...

    def keep(self, key: Hashable, make: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class LayerRows(TokenRows):
    """This rank's own tokens, for a backend that computes whole layers: it brings them to their experts on all ranks
    and the sums back. `x` is as it came into the layer, [T, H]. `slots_RK` holds global ids, as in a Routing: what is
    no expert's id stands for none. Every rank steps at `bucket` rows. The rows behind a rank's own have no expert;
    their sums are taken too, and are of no account."""

    bucket: int
    ranks: Ranks


FORMS: dict[str, type[TokenRows]] = {"token": TokenRows, "expert": ExpertRows, "layer": LayerRows}  # of rows, by name


def used_rows(kind: QuantKind, slots_RK: Tensor) -> Tensor | None:
    """Which rows a dynamic per-tensor scale is made from, bool [R]: those that are computed here. None for formats
    without such a scale."""
    return (slots_RK >= 0).any(1) if kind == "fp8_tensor_dynamic" else None


class Support(NamedTuple):
    """`reason` says why not, or, if ok, what to know."""

    ok: bool
    reason: str = ""
