"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, activations_of, parts_of, payload_row_bytes
from moe_dist.placement import Placement
from moe_dist.quantization import Activations
from moe_dist.routing import Routing
from moe_dist.rows import TokenRows
from moe_dist.spec import MoESpec, TokenLayout


@dataclass(frozen=True)
class _Sent:
    """`position_TW[t, r]`: where token t stands among the rows sent to all ranks, -1 if rank r does not get it."""

    position_TW: Tensor
    send: list[int]
    receive: list[int]


class AllToAll(Exchange):
    """Uneven splits, agreed on the host before the rows move: eager only."""

    token_layout: ClassVar[TokenLayout] = "sharded"
    capturable = False
    needs_bucket = False
    every_token = False

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach."""
        reached = min(placement.world, spec.top_k * placement.tp)
        row = payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize
        return -(-tokens // placement.world) * row * min(reached, placement.world - 1)

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        x = self.to_payload(x)
        with self.stages("dispatch"):
            ids_TK = routing.ids_TK
            row_T = torch.arange(routing.tokens, device=ids_TK.device)
            source_T = torch.full_like(row_T, self.comm.rank)
            groups_TK = self.placement.serving_groups(ids_TK, row_T, source_T)
            wanted_WT = self._wanted(groups_TK)
            target_S, token_S = wanted_WT.nonzero(as_tuple=True)  # sorted by target rank, then by token
            send = wanted_WT.sum(1).tolist()
            receive = self.comm.exchange_counts(send)

            here_SK = groups_TK[token_S] == (target_S // self.placement.tp)[:, None]
            slots_SK = self._slots_in_own_group(ids_TK, groups_TK)[token_S].masked_fill(~here_SK, -1)
            weights_SK = routing.weights_TK[token_S].masked_fill(~here_SK, 0.0)
            rows = [part[token_S] for part in parts_of(x)] + [slots_SK, weights_SK]
            received = [self.comm.all_to_all(part, send, receive) for part in rows]
            sent = _Sent(_positions(wanted_WT), send, receive)
            return TokenRows(activations_of(x, received[:-2]), *received[-2:]), Handle(routing.tokens, sent)

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        with self.stages("combine"):
            sent: _Sent = handle.notes
            back_SH = self.comm.all_to_all(y_RH, sent.receive, sent.send)
            # Rank by rank in float32: the same order and so the same bits in every run, without atomics.
            y_TH = torch.zeros(handle.tokens, self.spec.hidden, dtype=torch.float32, device=y_RH.device)
            for position_T in sent.position_TW.unbind(1):
                token = (position_T >= 0).nonzero()[:, 0]
                y_TH[token] += back_SH[position_T[token]].float()
            return y_TH.to(y_RH.dtype)

    def _wanted(self, groups_TK: Tensor) -> Tensor:
        """bool [W, T]: rank w must see token t. All TP members of a group see the group's tokens."""
        groups = torch.arange(self.placement.ep, device=groups_TK.device)
        wanted_GT = (groups_TK[None] == groups[:, None, None]).any(-1)
        return wanted_GT.repeat_interleave(self.placement.tp, 0)

    def _slots_in_own_group(self, ids_TK: Tensor, groups_TK: Tensor) -> Tensor:
        """The slot of each pair in the group that serves it, int32."""
        slots_TK = torch.full_like(ids_TK, -1)
        for group in range(self.placement.ep):
            slots_TK = slots_TK.maximum(self.placement.local_slots(ids_TK, groups_TK, group * self.placement.tp))
        return slots_TK


def _positions(wanted_WT: Tensor) -> Tensor:
    """[T, W]: the index of each wanted (rank, token) in rank-major order, -1 where it is not wanted."""
    order = wanted_WT.flatten().cumsum(0).view_as(wanted_WT) - 1
    return order.masked_fill(~wanted_WT, -1).T
