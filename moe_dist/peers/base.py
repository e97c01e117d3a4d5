"""What a peer is: another package's whole layer, run by our ranks, timed by our clock, checked by our oracle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.step import Support

# x_TH of the spec's dtype and its routing, both of this rank's tokens, to y_TH of the same shape and dtype.
PeerStep = Callable[[Tensor, Routing], Tensor]


@dataclass(frozen=True)
class PeerCase:
    """What a rank gives a peer: its shard of the placement, the group of all ranks (None: this rank is alone), and the
    most tokens of any rank in any step."""

    spec: MoESpec
    placement: Placement
    rank: int
    shard: ExpertWeights
    group: dist.ProcessGroup | None
    device: torch.device
    bucket: int


class Peer(ABC):
    """One file and one line in PEERS. `package`: the distribution that has it. `deterministic`: equal bits from equal
    inputs. `capturable`: its step may be recorded into a CUDA graph. `numerics`: where it rounds; the oracle follows.
    `payload`, `combine`: what rows and partial sums travel as: none, bf16, fp32 or fp8.
    """

    package: ClassVar[str]
    deterministic: ClassVar[bool]
    capturable: ClassVar[bool]
    numerics: ClassVar[Numerics]
    payload: ClassVar[str]
    combine: ClassVar[str]

    @classmethod
    def version(cls) -> str | None:
        """Of the package; None where it is not installed."""
        try:
            return version(cls.package)
        except PackageNotFoundError:
            return None

    @classmethod
    def label(cls) -> str:
        """Package and version, as rows have it."""
        return f"{cls.package} {cls.version() or 'of no known version'}"

    @classmethod
    @abstractmethod
    def available(cls, device: str) -> Support:
        """Whether it can run on this machine at all, with the reason if not. Compiles nothing."""

    @classmethod
    @abstractmethod
    def supports(cls, spec: MoESpec, placement: Placement, token_layout: TokenLayout, shares: list[int]) -> Support:
        """Whether it computes this layer exactly as asked, the reason if not. `shares`: the tokens of each rank."""

    @classmethod
    @abstractmethod
    def prepare(cls, case: PeerCase) -> PeerStep:
        """Collective. The step does all that is timed: from the tokens and their routing to the finished tokens. It may
        `turn` the shard, as a backend may, and must not change what the shard holds."""
