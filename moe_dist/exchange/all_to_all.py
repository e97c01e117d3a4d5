"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, activations_of, pad_rows, parts_of, payload_row_bytes
from moe_dist.kernels import sum_rows, take_rows
from moe_dist.placement import Placement
from moe_dist.quantization import Activations
from moe_dist.routing import Routing
from moe_dist.rows import TokenRows
from moe_dist.spec import MoESpec, TokenLayout

EVEN_UP_TO = 64  # tokens a rank: below this, waiting for the split sizes costs more than the padding of even splits


@dataclass(frozen=True)
class _Sent:
    """`position_TW[t, w]`: where token t stands among the rows sent to all ranks, -1 if rank w does not get it."""

    position_TW: Tensor
    send: list[int]
    receive: list[int]


class AllToAll(Exchange):
    """Two ways to split, chosen alike on all ranks from the agreed bucket.

    Uneven: ranks tell each other how many rows will come, on the host, and exactly these rows move. Even: every rank
    sends every other `bucket` rows, padded with slot -1; static shapes and no host sync, so it can be captured in a
    CUDA graph, and it is also quicker for few tokens.
    """

    token_layout: ClassVar[TokenLayout] = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach, or splits are even."""
        shard = -(-tokens // placement.world)
        reached = placement.world if shard <= EVEN_UP_TO else min(placement.world, spec.top_k * placement.tp)
        row = payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize
        return shard * row * min(reached, placement.world - 1)

    def splits_evenly(self, bucket: int) -> bool:
        return self.static or bucket <= EVEN_UP_TO

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bucket = self.check_bucket(routing.tokens, bucket)
        x = self.to_payload(x)
        with self.stages("dispatch"):
            ids_TK = routing.ids_TK
            row_T = torch.arange(routing.tokens, device=ids_TK.device)
            groups_TK = self.placement.serving_groups(ids_TK, row_T, torch.full_like(row_T, self.comm.rank))
            wanted_WT = self._wanted(groups_TK)
            if self.splits_evenly(bucket):
                token_S, sent = self._even(wanted_WT, bucket)
                target_S = torch.arange(len(token_S), device=token_S.device) // bucket
            else:
                target_S, token_S = wanted_WT.nonzero(as_tuple=True)  # sorted by target rank, then by token
                send = wanted_WT.sum(1).tolist()
                sent = _Sent(_positions(wanted_WT), send, self.comm.exchange_counts(send))
            meta_SM = self._meta(routing, groups_TK, token_S, target_S)
            parts = [take_rows(_at_least_one(part), token_S.clamp_min(0)) for part in parts_of(x)]
            *received, meta_RM = self.comm.all_to_all([*parts, meta_SM], sent.send, sent.receive)
            slots_RK, weights_RK = (half.contiguous() for half in meta_RM.chunk(2, dim=1))
            rows = TokenRows(activations_of(x, received), slots_RK, weights_RK.view(torch.float32))
            return rows, Handle(routing.tokens, sent)

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        with self.stages("combine"):
            sent: _Sent = handle.notes
            (back_SH,) = self.comm.all_to_all([y_RH], sent.receive, sent.send)
            return sum_rows(back_SH, sent.position_TW)

    def _wanted(self, groups_TK: Tensor) -> Tensor:
        """bool [W, T]: rank w must see token t. All TP members of a group see the group's tokens."""
        groups = torch.arange(self.placement.ep, device=groups_TK.device)
        wanted_GT = (groups_TK[None] == groups[:, None, None]).any(-1)
        return wanted_GT.repeat_interleave(self.placement.tp, 0, output_size=self.placement.world)

    def _even(self, wanted_WT: Tensor, bucket: int) -> tuple[Tensor, _Sent]:
        """The token of each of world·bucket places, -1 for padding, rank by rank."""
        world, tokens = wanted_WT.shape
        order_WT = wanted_WT.cumsum(1) - 1
        # Tokens that are not wanted are written to one place too many, which is cut off.
        place_WT = torch.where(wanted_WT, order_WT, bucket)
        token_WB = torch.full((world, bucket + 1), -1, dtype=torch.int64, device=wanted_WT.device)
        token_T = torch.arange(tokens, device=wanted_WT.device)
        token_WB.scatter_(1, place_WT, token_T.expand(world, tokens))
        first_W = torch.arange(world, device=wanted_WT.device)[:, None] * bucket
        position_TW = torch.where(wanted_WT, first_W + order_WT, -1).T
        return token_WB[:, :bucket].flatten(), _Sent(position_TW, [bucket] * world, [bucket] * world)

    def _meta(self, routing: Routing, groups_TK: Tensor, token_S: Tensor, target_S: Tensor) -> Tensor:
        """int32 [S, 2K]: the slots that the target holds, then the weights' bits; -1 and 0 elsewhere and in padding."""
        slots_TK = self.placement.slots_served(routing.ids_TK, groups_TK)
        parts = [_at_least_one(part) for part in (groups_TK, slots_TK, routing.weights_TK)]
        groups_SK, slots_SK, weights_SK = (part[token_S.clamp_min(0)] for part in parts)
        here_SK = (groups_SK == (target_S // self.placement.tp)[:, None]) & (token_S >= 0)[:, None]
        slots_SK = torch.where(here_SK, slots_SK, -1)
        return torch.cat([slots_SK, torch.where(here_SK, weights_SK, 0.0).view(torch.int32)], 1)


def _positions(wanted_WT: Tensor) -> Tensor:
    """[T, W]: the index of each wanted (rank, token) in rank-major order, -1 where it is not wanted."""
    order = wanted_WT.flatten().cumsum(0).view_as(wanted_WT) - 1
    return order.masked_fill(~wanted_WT, -1).T


def _at_least_one(rows: Tensor) -> Tensor:
    """Padding reads row 0, so there must be one even on a rank without tokens."""
    return rows if rows.shape[0] else pad_rows(rows, 1, 0)
