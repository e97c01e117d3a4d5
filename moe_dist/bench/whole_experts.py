"""A check that a slice loaded wrong can't pass. The oracle takes its weights from the shards, so it would share their
mistake: here the exact layer made of shards is compared with whole experts, drawn or read without placement and shard,
on some tokens. Both are exact, so that a single wrong column shows; comparing a quantized layer's rows would hide it in
the cost of quantizing. That the layer's rows are those of its shards is what the other errors say, on all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.gathered import summed
from moe_dist.bench.results import WHOLE_TOLERANCE
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.routing import Routing
from moe_dist.runtime.context import RankContext
from moe_dist.streams import Stream
from moe_dist.weights import activate, random_expert

TOKENS = 4  # of the whole group; more where these leave out an expert that was not compared yet


def whole_error(
    context: RankContext, case: Case, x_TH: Tensor, routing: Routing, groups_TK: Tensor, exact_TH: Tensor
) -> float:
    """The largest relative L2 error of any of the compared tokens, the same on every rank; collective.

    All arguments are the whole group's: `groups_TK` says which group of experts serves each pair (-1: none), `exact_TH`
    what the exact layer gives with the weights that the ranks hold.
    """
    # An expert that was compared once is what it is: other workloads, exchanges and modes share the weights.
    of_weights = f"{case.model!r} {case.source!r} {case.parallel!r}"
    compared: set[tuple[int, int]] = context.memo.setdefault("compared", {}).setdefault(of_weights, set())
    tokens = compared_tokens(case, routing.ids_TK, groups_TK, compared)
    key = f"{case.model!r} {case.source!r} {case.workload!r} {tokens.tolist()}"
    kept: dict[str, Tensor] = context.memo.setdefault("whole", {})
    if key not in kept:  # one serves all exchanges, backends and modes: reading whole experts takes longer than they
        kept.clear()
        kept[key] = _outputs(context, case, x_TH, routing, tokens)
    error = largest_error(exact_TH[tokens.to(exact_TH.device)], kept[key])
    if error <= WHOLE_TOLERANCE:
        compared |= _copies(routing.ids_TK[tokens.to(groups_TK.device)], groups_TK[tokens.to(groups_TK.device)])
    return error


def compared_tokens(case: Case, ids_TK: Tensor, groups_TK: Tensor, compared: set[tuple[int, int]]) -> Tensor:
    """Their numbers, ascending, int64, on the CPU: some at random, and one for each copy of an expert that these don't
    go to, but others do, and that was not compared yet."""
    work = case.workload
    order = Stream("tokens compared with whole experts", work.seed, work.tokens).permutation(work.tokens)
    ids_TK, groups_TK = ids_TK.cpu()[order], groups_TK.cpu()[order]
    chosen = list(range(min(TOKENS, work.tokens)))
    seen = compared | _copies(ids_TK[chosen], groups_TK[chosen])
    if _copies(ids_TK, groups_TK) - seen:
        for token, copies in enumerate(zip(ids_TK.tolist(), groups_TK.tolist(), strict=True)):
            new = {copy for copy in zip(*copies, strict=True) if copy[0] >= 0} - seen
            if new:
                chosen.append(token)
                seen |= new
    found: Tensor = order[chosen].unique()
    return found


def _copies(ids_TK: Tensor, groups_TK: Tensor) -> set[tuple[int, int]]:
    """(expert, the group that serves it) of every pair with an expert, whoever serves it or not."""
    pairs = torch.stack([ids_TK.long(), groups_TK.long()], -1).flatten(0, 1).unique(dim=0).tolist()
    return {(expert, group) for expert, group in pairs if expert >= 0}


def largest_error(found_nH: Tensor, expected_nH: Tensor) -> float:
    """Of n tokens; NaN counts as infinite, 0 / 0 (a token without experts) as 0."""
    difference, size = (found_nH.double() - expected_nH).norm(dim=1), expected_nH.norm(dim=1)
    errors = torch.where(difference == 0, torch.zeros_like(size), difference / size)
    return float(torch.where(errors.isfinite(), errors, torch.full_like(size, torch.inf)).max())


def _outputs(context: RankContext, case: Case, x_TH: Tensor, routing: Routing, tokens: Tensor) -> Tensor:
    """float64 [tokens, H]. Each rank computes a part of the experts, one at a time."""
    comm, tokens = context.comm, tokens.to(x_TH.device)
    x, ids, weights = x_TH[tokens].double(), routing.ids_TK[tokens], routing.weights_TK[tokens].double()
    y = torch.zeros_like(x)
    make = _maker(case, comm.device)
    experts = ids[ids >= 0].unique().tolist()
    for done, expert in enumerate(experts[comm.rank :: comm.world]):
        context.progress(f"{case.label}: whole expert {done + 1} of {-(-len(experts) // comm.world)}")
        row, place = (ids == expert).nonzero(as_tuple=True)
        y.index_add_(0, row, weights[row, place, None] * _through(x[row], make(expert), case))
    if case.model.shared_experts != "none" and comm.rank == 0:
        y += _through(x, make(None), case)
    return summed(comm, y)


def _through(x: Tensor, matrices: tuple[Tensor, Tensor], case: Case) -> Tensor:
    w13, w2 = matrices
    y: Tensor = activate(x @ w13.double().T, case.model.activation) @ w2.double().T
    return y


def _maker(case: Case, device: torch.device) -> Callable[[int | None], tuple[Tensor, Tensor]]:
    """What makes one whole expert: w13 with [gate; up] rows and w2, float32 on `device`. None is the shared one."""
    source, spec = case.source, case.model
    if source.checkpoint is None or source.layer is None:

        def draw(expert: int | None) -> tuple[Tensor, Tensor]:
            if expert is None:
                return random_expert(spec.shared_spec(), spec.num_experts, source.seed, device).dequantized(0)
            return random_expert(spec, expert, source.seed, device).dequantized(0)

        return draw
    whole = WholeExperts(source.checkpoint, source.layer)

    def read(expert: int | None) -> tuple[Tensor, Tensor]:
        gate, up, down = whole.shared() if expert is None else whole.expert(expert)
        return torch.cat([gate, up]).to(device), down.to(device)

    return read
