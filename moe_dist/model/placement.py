"""Who holds which slice of which expert, and which copy of an expert serves a token.

Every parallel mode is a placement: TP slices all experts over all ranks, EP gives whole experts to ranks, TP×EP is a
grid of both. Rank r is tensor-parallel member `r % tp` of expert group `r // tp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of, verb
from moe_dist.model.spec import MoESpec, ParallelSpec, slice_bounds, split_bounds


@dataclass(frozen=True)
class Placement:
    """`slices[t]` is the range of the intermediate size that TP member t holds; `owners[e]` is the group that owns
    expert e; `homes[g]` lists the global ids of the experts of group g in the order of their local slots: its own
    ascending, then its replicas of others."""

    num_experts: int
    intermediate: int
    slices: tuple[tuple[int, int], ...]
    owners: tuple[int, ...] = field(hash=False)  # tables are looked up by the hash in every step
    homes: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, spec: MoESpec, parallel: ParallelSpec) -> Placement:
        """Raises ConfigError when a rank would hold nothing, when the map of experts is not one group for each expert,
        or when a replica names no expert or group."""
        allow = parallel.allow_empty_shards
        slices = slice_bounds(spec.intermediate, parallel.tp, spec.granularity, "parallel.tp", allow)
        if parallel.ep > spec.num_experts and not allow:
            few = f"{count_of(spec.num_experts, 'expert')} {verb(spec.num_experts, 'leave')}"
            rule = f"{few} a rank with none (allow_empty_shards=true permits that)"
            raise ConfigError("parallel.ep", parallel.ep, rule, f"1 to {spec.num_experts}")
        owners = _owners(spec, parallel)
        homes: list[list[int]] = [[] for _ in range(parallel.ep)]
        for expert, group in enumerate(owners):
            homes[group].append(expert)
        for expert, groups in parallel.replicas:
            if not 0 <= expert < spec.num_experts:
                raise ConfigError("parallel.replicas", expert, "no such expert", f"0 to {spec.num_experts - 1}")
            for group in groups:
                if not 0 <= group < parallel.ep:
                    rule = f"no such expert group for a copy of expert {expert}"
                    raise ConfigError("parallel.replicas", group, rule, f"0 to {parallel.ep - 1}")
                if expert in homes[group]:
                    rule = f"expert {expert} lives in this group already"
                    raise ConfigError("parallel.replicas", group, rule)
                homes[group].append(expert)
        if parallel.expert_map and [] in homes and not allow:
            rule = f"leaves group {homes.index([])} without an expert (allow_empty_shards=true permits that)"
            raise ConfigError("parallel.expert_map", parallel.expert_map, rule, "an expert in each group")
        return cls(spec.num_experts, spec.intermediate, tuple(slices), owners, tuple(map(tuple, homes)))

    @property
    def tp(self) -> int:
        return len(self.slices)

    @property
    def ep(self) -> int:
        return len(self.homes)

    @property
    def world(self) -> int:
        return self.tp * self.ep

    def slice_of(self, rank: int) -> tuple[int, int]:
        """The range [start, stop) of the intermediate size that `rank` holds."""
        return self.slices[rank % self.tp]

    def width_of(self, rank: int) -> int:
        start, stop = self.slice_of(rank)
        return stop - start

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Global ids of the experts on `rank`, in the order of its local slots."""
        return self.homes[rank // self.tp]

    @cached_property
    def replicated(self) -> bool:
        return sum(map(len, self.homes)) > self.num_experts

    def serving_groups(self, ids_TK: Tensor, rows_T: Tensor, sources_T: Tensor | None) -> Tensor:
        """The expert group that serves each (token, expert) pair, int64 [T, K]; -1 where the id is no expert.

        `rows_T` is the token's index on its source rank and `sources_T` that rank (None: tokens are replicated, they
        have no source). With one copy of an expert the answer is its owner. With several it is the source's own group
        if that holds a copy, else copy number (row + expert) mod copies: every rank finds the same answer alone.
        """
        tables = tables_on(self, ids_TK.device)
        experts = self._columns(ids_TK)
        if not self.replicated:
            return tables.groups_EC[experts, 0]
        copy = (rows_T[:, None] + experts) % tables.copies_E[experts]
        groups = tables.groups_EC[experts, copy]
        if sources_T is None:
            return groups
        own = (sources_T // self.tp)[:, None].expand_as(experts)
        return torch.where(tables.slots_GE[own, experts] >= 0, own, groups)

    def _columns(self, ids_TK: Tensor) -> Tensor:
        """Ids as columns of the tables: whatever is no expert is the last one, whose entries say so."""
        known = (ids_TK >= 0) & (ids_TK < self.num_experts)
        return torch.where(known, ids_TK, self.num_experts).long()

    def local_slots(self, ids_TK: Tensor, groups_TK: Tensor, rank: int) -> Tensor:
        """The slot on `rank` of each pair that its group serves, int32 [T, K]; -1 where the pair is not here."""
        group = rank // self.tp
        slots = tables_on(self, ids_TK.device).slots_GE[group][self._columns(ids_TK)]
        return torch.where(groups_TK == group, slots, -1)

    def slots_served(self, ids_TK: Tensor, groups_TK: Tensor) -> Tensor:
        """The slot of each pair in the group that serves it, int32 [T, K]; -1 where the id is no expert."""
        return tables_on(self, ids_TK.device).slots_GE[groups_TK, self._columns(ids_TK)]

    def slots_on(self, rank: int, ids_RK: Tensor, sharded: int | None = None) -> Tensor:
        """The slot on `rank` of each pair of all tokens, int32 [R, K]; -1 where it is served elsewhere.

        Tokens are replicated, or lie in equal runs of `sharded` rows from rank 0, 1, … With one copy of each expert
        this is one look-up.
        """
        if not self.replicated:
            return tables_on(self, ids_RK.device).slots_GE[rank // self.tp][self._columns(ids_RK)]
        rows_R = torch.arange(len(ids_RK), device=ids_RK.device)
        sources_R = None if sharded is None else rows_R // sharded
        groups_RK = self.serving_groups(ids_RK, rows_R if sharded is None else rows_R % sharded, sources_R)
        return self.local_slots(ids_RK, groups_RK, rank)

    def rows_per_rank(self, groups_TK: Tensor) -> list[int]:
        """How many (token, expert) pairs each rank computes; TP members of a group all compute the group's."""
        counts = torch.bincount(groups_TK.flatten() + 1, minlength=self.ep + 1)[1:].tolist()
        return [counts[rank // self.tp] for rank in range(self.world)]


def _owners(spec: MoESpec, parallel: ParallelSpec) -> tuple[int, ...]:
    """The group that owns each expert: by the map, or in equal runs."""
    if not parallel.expert_map:
        bounds = split_bounds(spec.num_experts, parallel.ep)
        return tuple(group for group, (start, stop) in enumerate(bounds) for _ in range(start, stop))
    if len(parallel.expert_map) != spec.num_experts:
        rule = (
            f"names the groups of {count_of(len(parallel.expert_map), 'expert')}, and the model has {spec.num_experts}"
        )
        raise ConfigError(
            "parallel.expert_map", parallel.label, rule, f"a map made for {count_of(spec.num_experts, 'expert')}"
        )
    for expert, group in enumerate(parallel.expert_map):
        if not 0 <= group < parallel.ep:
            rule = f"no such expert group for expert {expert}"
            raise ConfigError("parallel.expert_map", group, rule, f"0 to {parallel.ep - 1}")
    return parallel.expert_map


def imbalance(rows_per_rank: list[int]) -> float:
    """Most rows over mean rows; 1.0 is perfect balance, the world size is the worst."""
    total = sum(rows_per_rank)
    return max(rows_per_rank) * len(rows_per_rank) / total if total else 1.0


@dataclass(frozen=True)
class Tables:
    """A placement as tensors on one device. The entry behind those of the experts is that of no expert."""

    slots_GE: Tensor  # local slot of expert e in group g, -1 if it is not there; int32 [groups, experts + 1]
    groups_EC: Tensor  # group of copy c of expert e, owner first, -1 for none; int64 [experts + 1, most copies]
    copies_E: Tensor  # number of copies, 1 for no expert; int64 [experts + 1]


@lru_cache(maxsize=64)
def tables_on(placement: Placement, device: torch.device) -> Tables:
    slots = torch.full((placement.ep, placement.num_experts + 1), -1, dtype=torch.int32, device="cpu")
    groups: list[list[int]] = [[] for _ in range(placement.num_experts)]
    for group, experts in enumerate(placement.homes):
        for slot, expert in enumerate(experts):
            slots[group, expert] = slot
            groups[expert].insert(0 if placement.owners[expert] == group else len(groups[expert]), group)
    most = max(map(len, groups))
    groups.append([])
    padded = torch.tensor([held + [-1] * (most - len(held)) for held in groups], dtype=torch.int64, device="cpu")
    copies = torch.tensor([max(1, len(held)) for held in groups], dtype=torch.int64, device="cpu")
    return Tables(slots.to(device), padded.to(device), copies.to(device))
