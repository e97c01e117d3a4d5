"""A peer's step in the form in which a layer is warmed up, captured and run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.comm.symmetric import without_multicast
from moe_dist.machine.surroundings import settled
from moe_dist.model.routing import Routing
from moe_dist.peers import PEERS, Peer, PeerCase
from moe_dist.step import Support


class PeerModule:
    """Like a MoELayer to whoever times it. Making it is collective; so is a call."""

    def __init__(self, name: str, case: PeerCase, comm: Comm) -> None:
        self.name, self.comm = name, comm
        self.peer: type[Peer] = PEERS.get(name)
        without_multicast()
        with torch.no_grad(), settled(comm.device):
            self._step = self.peer.prepare(case)

    @property
    def capturable(self) -> Support:
        return Support(self.peer.capturable, "" if self.peer.capturable else f"{self.peer.package} is not capturable")

    def checked(self, x_TH: Tensor, routing: Routing, bucket: int | None = None) -> tuple[Tensor, Routing]:
        """As they are: they were made for a layer, which has checked them."""
        return x_TH, routing

    def warm_up(self, x_TH: Tensor, routing: Routing, max_tokens_per_rank: int, captured: bool = False) -> None:
        """The ranks meet between two calls, as the first one compiles and may take longer on one of them."""
        for _ in range(2):
            self(x_TH, routing)
            self.comm.barrier()

    def __call__(self, x_TH: Tensor, routing: Any, **step: object) -> Tensor:
        """`routing`: one. `step`: what a layer is told of a step; a peer has no use for it."""
        with torch.no_grad(), settled(self.comm.device):
            return self._step(x_TH, routing)
