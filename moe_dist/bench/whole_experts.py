"""A check that a slice loaded wrong can't pass. The oracle takes its weights from the shards, so it would share their
mistake: here the exact layer made of shards is compared with whole experts, drawn or read without placement and shard,
on some tokens. Both are exact, so that a single wrong column shows; comparing a quantized layer's rows would hide it in
the cost of quantizing. That the layer's rows are those of its shards is what the other errors say, on all tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.gathered import summed, told
from moe_dist.bench.tolerance import WHOLE_TOLERANCE
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.comm import Comm
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.weights import ExpertWeights, activate
from moe_dist.oracle.reference import oracle_partial
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.streams import Stream

TOKENS = 4  # of the whole group; more where these leave out an expert that was not compared yet
LEAST_PART = 1 / 4  # of an even share of a token's weights: by a pair with less a token tells little of its expert

Copy = tuple[int, int]  # an expert, and the group that serves it there
# w13 with [gate; up] rows, w2, both biases of an expert that has them and, of a gated shared expert, the weight [H] of
# the sigmoid of a token.
Whole = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]


def whole_error(
    context: RankContext,
    case: Case,
    placement: Placement,
    shard: ExpertWeights,
    shared: ExpertWeights | None,
    x_TH: Tensor,
    routing: Routing,
    groups_TK: Tensor,
    exact_TH: Tensor,
) -> float:
    """The largest relative L2 error of any of the compared tokens, the same on every rank; collective.

    Tokens are the whole group's: `groups_TK` says which group of experts serves each pair (-1: none), `exact_TH` what
    the exact layer gives with the weights that the ranks hold, `shard` and `shared` this rank's.
    """
    comm = context.comm
    # An expert that was compared once is what it is: other workloads, exchanges and modes share the weights.
    of_weights = f"{case.model!r} {case.source!r} {case.parallel!r} {_fingerprints(comm, shard, shared)}"
    compared: set[Copy] = context.memo.setdefault("compared", {}).setdefault(of_weights, set())
    tokens, alone = compared_tokens(case, routing, groups_TK, compared)
    key = f"{case.model!r} {case.source!r} {case.depth} {case.step} {case.workload!r} {tokens.tolist()}"
    kept: dict[str, Tensor] = context.memo.setdefault("whole", {})
    tokens = tokens.to(x_TH.device)
    picked = Routing(routing.ids_TK[tokens], routing.weights_TK[tokens])
    # One serves all exchanges, backends and modes: reading whole experts takes longer than they. Behind the first layer
    # of a stack they have inputs of their own.
    if case.depth or key not in kept:
        kept.clear()
        kept[key] = _outputs(context, case, x_TH[tokens], picked, case.model.shared_experts != "none")
    error = largest_error(exact_TH[tokens], kept[key])
    if alone:
        x_nH = x_TH[torch.tensor(list(alone.values()), device=x_TH.device)]
        ids_n1, groups_n1 = (torch.tensor(values, device=x_TH.device)[:, None] for values in zip(*alone, strict=True))
        one = Routing(ids_n1.int(), torch.ones(len(alone), 1, dtype=torch.float32, device=x_TH.device))
        whole = [(0, len(alone))]
        part = oracle_partial(x_nH, one, shard, case.model, placement, comm.rank, whole, groups_n1, None)
        of_alone = _outputs(context, case, x_nH, one, shared=False)
        error = max(error, largest_error(summed(comm, part), of_alone))
    if error <= WHOLE_TOLERANCE:
        compared |= _copies(picked.ids_TK, groups_TK[tokens], _strong(picked)) | alone.keys()
    return error


def _fingerprints(comm: Comm, shard: ExpertWeights, shared: ExpertWeights | None) -> list[list[float]]:
    """Of all ranks' weights, and in which order their gate and up lie. The same on every rank, so that all choose the
    same tokens."""
    found = [(part.fingerprint(), part.gate_first) for part in (shard, shared) if part is not None]
    digest = hashlib.sha256(json.dumps(found).encode()).digest()
    numbers: list[list[float]] = told(comm, *(int.from_bytes(digest[at : at + 6]) for at in (0, 6))).tolist()
    return numbers


def compared_tokens(
    case: Case, routing: Routing, groups_TK: Tensor, compared: set[Copy]
) -> tuple[Tensor, dict[Copy, int]]:
    """Their numbers, ascending, int64, on the CPU: some at random, and one for each copy of an expert that these don't
    go to, but others do, and that was not compared yet. A token goes to an expert if the weight is no trifle. Copies in
    use that no token goes to in this sense must be compared alone: each with the number of a token that names it."""
    work = case.workload
    order = Stream("tokens compared with whole experts", work.seed, work.tokens).permutation(work.tokens)
    ids_TK, groups_TK = routing.ids_TK.cpu()[order], groups_TK.cpu()[order]
    strong_TK = _strong(Routing(ids_TK, routing.weights_TK.cpu()[order]))
    chosen = list(range(min(TOKENS, work.tokens)))
    seen = compared | _copies(ids_TK[chosen], groups_TK[chosen], strong_TK[chosen])

    def firsts(among_TK: Tensor, known: set[Copy]) -> Iterator[tuple[int, set[Copy]]]:
        """Each token that names copies which no token before it names, and these."""
        if not _copies(ids_TK, groups_TK, among_TK) - known:
            return
        known = set(known)
        for token, places in enumerate(zip(ids_TK.tolist(), groups_TK.tolist(), among_TK.tolist(), strict=True)):
            new = {(expert, group) for expert, group, counts in zip(*places, strict=True) if counts} - known
            if new:
                known |= new
                yield token, new

    for token, new in firsts(strong_TK, seen):
        chosen.append(token)
        seen |= new
    named = firsts(ids_TK >= 0, seen)
    alone = {copy: int(order[token]) for token, new in named for copy in sorted(new)}
    found: Tensor = order[chosen].unique()
    return found, alone


def _strong(routing: Routing) -> Tensor:
    """Which places hold an expert with a weight that is no trifle beside the token's others, bool [T, K]."""
    sizes_TK = routing.weights_TK.abs().masked_fill(routing.ids_TK < 0, 0.0)
    total_T1 = sizes_TK.sum(1, keepdim=True)
    return (sizes_TK > 0) & (sizes_TK >= LEAST_PART / sizes_TK.shape[1] * total_T1)


def _copies(ids_TK: Tensor, groups_TK: Tensor, among_TK: Tensor) -> set[Copy]:
    """Of the pairs in `among_TK` with an expert, whoever serves it or not."""
    pairs = torch.stack([ids_TK[among_TK].long(), groups_TK[among_TK].long()], -1).unique(dim=0).tolist()
    return {(expert, group) for expert, group in pairs if expert >= 0}


def largest_error(found_nH: Tensor, expected_nH: Tensor) -> float:
    """Of n tokens; NaN counts as infinite, 0 / 0 (a token without experts) as 0."""
    difference, size = (found_nH.double() - expected_nH).norm(dim=1), expected_nH.norm(dim=1)
    errors = torch.where(difference == 0, torch.zeros_like(size), difference / size)
    return float(torch.where(errors.isfinite(), errors, torch.full_like(size, torch.inf)).max())


def _outputs(context: RankContext, case: Case, x_nH: Tensor, routing: Routing, shared: bool) -> Tensor:
    """float64 [n, H]. Each rank computes a part of the experts, one at a time. `shared`: with the shared expert."""
    comm = context.comm
    x, ids, weights = x_nH.double(), routing.ids_TK, routing.weights_TK.double()
    y = torch.zeros_like(x)
    make = _maker(case, comm.device)
    experts = ids[ids >= 0].unique().tolist()
    for done, expert in enumerate(experts[comm.rank :: comm.world]):
        context.progress(f"{case.label}: whole expert {done + 1} of {cdiv(len(experts), comm.world)}")
        row, place = (ids == expert).nonzero(as_tuple=True)
        weight_n1 = weights[row, place, None]
        if case.model.weights_on_input:
            y.index_add_(0, row, _through(weight_n1 * x[row], make(expert), case))
        else:
            y.index_add_(0, row, weight_n1 * _through(x[row], make(expert), case))
    if shared and comm.rank == 0:
        y += _through(x, make(None), case)
    return summed(comm, y)


def _through(x: Tensor, tensors: Whole, case: Case) -> Tensor:
    w13, w2, biases, gate_H = tensors
    b13, b2 = (bias.double() for bias in biases) if biases else (0.0, 0.0)
    y: Tensor = activate(x @ w13.double().T + b13, case.model.activation) @ w2.double().T + b2
    return y if gate_H is None else torch.sigmoid(x @ gate_H.double())[:, None] * y


def _maker(case: Case, device: torch.device) -> Callable[[int | None], Whole]:
    """What makes one whole expert, float32 on `device`. None is the shared one."""
    source, spec = case.source, case.model
    if source.checkpoint is None or source.layer is None:

        def draw(expert: int | None) -> Whole:
            number, own = (spec.num_experts, spec.shared_spec()) if expert is None else (expert, spec)
            drawn = random_expert(own, number, source.seed, device, layer=case.depth)
            bias_F, b2_eH = drawn.first_bias(0), drawn.b2_eH
            biases = None if bias_F is None or b2_eH is None else (bias_F, b2_eH[0])
            return *drawn.dequantized(0), biases, None if drawn.token_gate_eH is None else drawn.token_gate_eH[0]

        return draw
    whole = WholeExperts(source.checkpoint, source.layer)

    def read(expert: int | None) -> Whole:
        gate, up, down = whole.shared() if expert is None else whole.expert(expert)
        of_token = whole.token_gate() if expert is None else None
        biases = None if expert is None else whole.biases(expert)
        if biases is not None:
            biases = (biases[0].to(device), biases[1].to(device))
        gate_H = None if of_token is None else of_token.to(device)
        return torch.cat([gate, up]).to(device), down.to(device), biases, gate_H

    return read
