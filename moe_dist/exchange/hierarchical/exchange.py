"""Two levels: over the network once for each node that needs a row, then on inside of the node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.exchange.base import Exchange
from moe_dist.exchange.hierarchical.hop import Crossed, Members, cross, return_sums
from moe_dist.exchange.rows import activations_of, parts_of, payload_row_bytes, row_specs, sorting_specs
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import told
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Step, Support, TensorSpec, TokenRows, Whole

LEGAL = "as many ranks on each node, all ranks in sum"


@dataclass(frozen=True)
class Sent:
    """Both hops of a dispatch: from node to node, and inside of the node."""

    across: Crossed
    inside: Crossed


class Hierarchical(Exchange[Sent, Whole]):
    """A row for another node goes to that node's rank with this rank's place on its own node, whatever ranks there need
    it, and from there to each of those. Their partial sums are added there, and one sum comes back from each node.

    Nodes are those of `comm.nodes`, with as many ranks each; on one node the first hop is left out, with one rank on
    each node the second. Splits are exact: the host waits for the numbers of both hops, so it can't be captured.
    """

    token_layout: TokenLayout = "sharded"
    capturable = False
    needs_bucket = True  # nothing is padded, but it bounds the scratch
    every_token = False
    makes = ("token", "expert")

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        nodes = machine.nodes_of(placement.world)
        if len(set(nodes)) > 1:
            return Support(False, f"needs as many ranks on each node, and the nodes have {told(nodes)} ranks")
        return Support(True)

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token is needed by every rank. N nodes of L ranks then get N - 1 rows of each token by
        the first hop and N (L - 1) by the second, which is one for each other rank, however they are grouped."""
        shard, others = cdiv(tokens, placement.world), placement.world - 1
        row = payload_row_bytes(spec, payload) + 4 * spec.top_k  # a pair's group travels too
        return others * (shard * (row + spec.hidden * combine_itemsize) + 8)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        """However ranks are grouped: rows that leave and that are here after each hop are at most one for each rank and
        token of the bucket."""
        rows = placement.world * bucket
        travelling: list[TensorSpec] = [*row_specs(spec, payload, rows), ((rows, 3 * spec.top_k), torch.int32)]
        sums: list[TensorSpec] = [((rows, spec.hidden), dtype)]
        return [
            *row_specs(spec, payload, bucket),  # quantized
            *travelling * 4,
            *sorting_specs(spec, placement, rows),
            *sums * 3,
        ]

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Sent]:
        self.check_bucket(routing.tokens, step.bucket)
        across, inside = _levels(self.comm)
        tp, take = self.placement.tp, step.workspace.take
        with step.stages("dispatch"):
            pairs_T3K = self._pairs(routing)
            # The first rank of each pair's group; that of no expert is on no node and no rank.
            first_TK = pairs_T3K[:, : self.spec.top_k] * tp
            nodes_N = torch.arange(len(across.ranks), device=first_TK.device)
            wanted_TN = (_floor(first_TK, len(inside.ranks))[:, :, None] == nodes_N).any(1)
            parts, sent_across = cross(self.comm, across, wanted_TN, [*parts_of(x), pairs_T3K], take)
            groups_RK = parts[-1][:, : self.spec.top_k]
            ranks_L = torch.tensor(inside.ranks, device=groups_RK.device)
            wanted_RL = (groups_RK[:, :, None] == ranks_L // tp).any(1)
            parts, sent_inside = cross(self.comm, inside, wanted_RL, parts, take)
            groups_RK, slots_RK, bits_RK = parts[-1].split(self.spec.top_k, 1)
            here_RK = groups_RK == self.comm.rank // tp
            slots_RK = slots_RK.masked_fill(~here_RK, -1)
            weights_RK = bits_RK.contiguous().view(torch.float32).masked_fill(~here_RK, 0.0)
            rows = TokenRows(activations_of(x, parts[:-1]), slots_RK, weights_RK)
            return rows, Sent(sent_across, sent_inside)

    def _pairs(self, routing: Routing) -> Tensor:
        """What travels with a row, int32 [T, 3K]: the groups that serve its pairs, the slots there, and the weights'
        bits. It is settled at the source: which copy of an expert serves a row follows from the row's place there."""
        row_T = torch.arange(routing.tokens, device=routing.ids_TK.device)
        source_T = torch.full_like(row_T, self.comm.rank)
        groups_TK = self.placement.serving_groups(routing.ids_TK, row_T, source_T)
        slots_TK = self.placement.slots_served(routing.ids_TK, groups_TK)
        bits_TK = routing.weights_TK.contiguous().view(torch.int32)
        return torch.cat([groups_TK.to(torch.int32), slots_TK, bits_TK], 1)

    def sink(self, step: Step, rows: TokenRows, handle: Sent, dtype: torch.dtype) -> Whole:
        return Whole(step, (len(rows), self.spec.hidden), dtype, self.comm.device)

    def combine(self, step: Step, sink: Whole, handle: Sent) -> Tensor:
        with step.stages("combine"):
            take, dtype = step.workspace.take, sink.y.dtype
            of_node = return_sums(self.comm, handle.inside, sink.y, take).to(dtype)
            return return_sums(self.comm, handle.across, of_node, take).to(dtype)


def _floor(ranks: Tensor, of: int) -> Tensor:
    """The node of each rank; negative ranks are on none."""
    return torch.div(ranks, of, rounding_mode="floor")


def _levels(comm: Comm) -> tuple[Members, Members]:
    """This rank's fellows on the other nodes, and those on its own. Raises ConfigError for nodes that can't be."""
    nodes, rank = comm.nodes or (comm.world,), comm.rank
    if len(set(nodes)) > 1 or sum(nodes) != comm.world:
        raise ConfigError(
            "comm.nodes", nodes, f"the exchange hierarchical has {count_of(comm.world, 'rank')} to send to", LEGAL
        )
    each = nodes[0]
    place, node = rank % each, rank // each
    across = Members(tuple(range(place, comm.world, each)), node)
    return across, Members(tuple(range(node * each, (node + 1) * each)), place)
