"""Routings for experiments, drawn by a skew."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, split_bounds
from moe_dist.workloads.skew_names import DRAWN_SKEWS, canonical_skew, check_skew_fits, parts_of
from moe_dist.workloads.streams import Stream
from moe_dist.workloads.traces import read_trace

STRETCH = 4  # of `burst`: one of so many equal runs of the tokens


def synthetic_routing(
    spec: MoESpec, tokens: int, skew: str, seed: int, number: int = 0, trace: str | None = None, step: int = 0
) -> Routing:
    """Routing of `tokens` rows over the whole group, drawn on the CPU: the same whatever the number of ranks. One seed
    has as many of them as there are values of `number`. Which experts are hot is the same for any number of tokens.
    A token's weights are a softmax over its K places, or, with weights_on_input, where that is 1, a sigmoid.

    balanced: every expert gets the same number of rows (± 1). uniform: K distinct experts at random.
    zipf:S: expert of popularity rank r is drawn with odds r^-S, popularity being a random order of the experts.
    hot:N: N random experts fill as many of a token's K places as they can, the rest is uniform.
    hot_rank:RxS: the experts lie in R equal runs, as expert parallelism over R ranks places them. One run, at random,
    gets S times its share of all pairs, that is S/R of them. Which tokens give it more of their places, and which of
    its experts they take, is random.
    burst:N: one quarter of the tokens, neighbours at a random place, go to N random experts as in hot:N, the others are
    uniform: a long prompt beside other requests. Tokens of one sequence share experts (arXiv 2401.14361, section 3).
    limited:GxN: the experts lie in G equal runs, and each token draws its K uniformly from N random ones of them: the
    device-limited routing of DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), where a token reaches few ranks.
    single: all rows on one random expert, the other K-1 places empty (id -1).
    rotating:SKEW: in `step` 0 what SKEW gives. In each later step other experts are hot: the order of popularity is
    moved on by N experts of hot:N, by one expert of zipf and by one run of hot_rank, and tokens draw anew.
    spread:R:SKEW: what SKEW gives with its experts renumbered, so that R runs of experts get loads that are as equal as
    `spread` makes them: what a rearrangement without copies would give.
    file:PATH: the first rows of a trace, see traces.read_trace, repeated to `tokens` rows. ConfigError if it is not the
    content whose hash is `trace`, if a row holds an expert twice, and if these rows hold no expert with a weight.
    """
    skew = canonical_skew(skew)
    check_skew_fits(skew, spec)
    kind, argument, inner = parts_of(skew)
    if kind == "router":
        raise ConfigError("workload.skew", skew, "needs a checkpoint with a router", DRAWN_SKEWS)
    if kind == "file":
        return read_trace(spec, skew, trace).routing(0, 0, tokens)
    if kind == "rotating":
        return _drawn(spec, tokens, inner, seed, number, step)
    if kind == "spread":
        return spread(_drawn(spec, tokens, inner, seed, number), spec.num_experts, int(argument))
    return _drawn(spec, tokens, skew, seed, number)


def _drawn(spec: MoESpec, tokens: int, skew: str, seed: int, number: int, step: int = 0) -> Routing:
    kind, argument, _ = parts_of(skew)
    stream = Stream("synthetic routing", skew, tokens, seed, number)
    E, K = spec.num_experts, spec.top_k
    order = Stream("popularity of experts", skew, seed, number).permutation(E)  # the same for any number of tokens
    first = int(order[0])
    if step:
        stream = Stream("rotated routing", skew, tokens, seed, number, step)
        order = order.roll(-step * (int(argument) if kind == "hot" else 1))
    if kind == "balanced":
        places = torch.arange(tokens * K, device="cpu").view(tokens, K) % E
        places = places[stream.permutation(tokens)]
    elif kind == "limited":
        order = torch.arange(E, device="cpu")  # runs of neighbours are the point here
        places = _draw_limited(E, K, tokens, argument, stream)
    elif kind == "hot_rank":
        runs, times = argument.split("x")
        size = E // int(runs)
        order = torch.arange(E, device="cpu").roll(-(first // size + step) * size)
        places = _draw_hot_run(E, K, tokens, size, float(times), stream)
    elif kind == "burst":
        places = _draw_burst(E, K, tokens, argument, stream)
    elif kind == "single":
        places = torch.zeros(tokens, K, dtype=torch.int64, device="cpu")
    else:
        places = _draw(E, K, tokens, kind, argument, stream)
    ids = order[places]
    logits = stream.normal(tokens, K)
    if kind == "single":
        ids[:, 1:] = -1
        logits[:, 1:] = float("-inf")
    # A softmax over one place is 1, and where weights are an expert's inputs' a weight of 1 would hide that.
    weights = logits.sigmoid() if spec.weights_on_input else logits.softmax(-1)
    return Routing(ids.to(torch.int32), weights * spec.routed_scaling)


def _draw(E: int, K: int, tokens: int, kind: str, argument: str, stream: Stream) -> Tensor:
    """K distinct places out of E for each token: the largest of log-odds + Gumbel noise (Gumbel top-k sampling)."""
    log_odds = torch.zeros(E, dtype=torch.float32, device="cpu")
    if kind == "zipf":
        log_odds = -float(argument) * torch.arange(1, E + 1, dtype=torch.float32, device="cpu").log()
    elif kind == "hot":
        log_odds[: int(argument)] = 60.0  # e^60 to 1; more would leave the noise beside it too few bits
    chunks = [
        (log_odds + stream.gumbel(n, E)).topk(K, dim=-1).indices
        for n in [4096] * (tokens // 4096) + [tokens % 4096] * (tokens % 4096 > 0)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, K, dtype=torch.int64, device="cpu")


def _draw_limited(E: int, K: int, tokens: int, argument: str, stream: Stream) -> Tensor:
    groups, chosen = map(int, argument.split("x"))
    kept_TG = stream.uniform(tokens, groups).argsort(-1) < chosen
    odds_TE = stream.uniform(tokens, E).masked_fill(~kept_TG.repeat_interleave(E // groups, 1), -1.0)
    return odds_TE.topk(K, dim=-1).indices


def _draw_hot_run(E: int, K: int, tokens: int, size: int, times: float, stream: Stream) -> Tensor:
    """The first `size` places get `times` their share of all pairs, to the nearest pair."""
    least, most = max(0, K - (E - size)), min(K, size)  # of a token's pairs
    wanted = min(max(round(tokens * K * times * size / E), tokens * least), tokens * most)
    extra = stream.permutation(tokens * (most - least)) < wanted - tokens * least
    hot_T1 = least + extra.view(tokens, most - least).sum(1, keepdim=True)
    noise_TE = stream.uniform(tokens, E)
    parts = (noise_TE[:, :size], hot_T1), (noise_TE[:, size:], K - hot_T1)
    taken = [part.argsort(-1).argsort(-1) < count_T1 for part, count_T1 in parts]
    return noise_TE.masked_fill(~torch.cat(taken, 1), -1.0).topk(K, dim=-1).indices


def _draw_burst(E: int, K: int, tokens: int, argument: str, stream: Stream) -> Tensor:
    quarters = split_bounds(tokens, STRETCH)[: max(1, min(STRETCH, tokens))]  # the others have no token
    start, stop = quarters[int(stream.integers(len(quarters), 1))]
    places = _draw(E, K, tokens, "uniform", "", stream)
    places[start:stop] = _draw(E, K, stop - start, "hot", argument, stream)
    return places


def spread(routing: Routing, num_experts: int, runs: int) -> Routing:
    """The same routing with its experts renumbered, so that the pairs of `runs` equal runs of experts are about equal:
    the expert with most pairs first, each to the run with the fewest that has room (longest processing time first,
    Graham 1969, as DeepSeek's EPLB packs experts without copies)."""
    ids = routing.ids_TK.long()
    loads = torch.bincount(ids[ids >= 0], minlength=num_experts)
    bounds = split_bounds(num_experts, runs)
    new = torch.empty(num_experts, dtype=torch.int32, device="cpu")
    least = [(0, run, start) for run, (start, _) in enumerate(bounds)]  # pairs so far, and the next free number
    for expert in loads.argsort(descending=True, stable=True).tolist():
        pairs, run, place = heapq.heappop(least)
        new[expert] = place
        if place + 1 < bounds[run][1]:
            heapq.heappush(least, (pairs + int(loads[expert]), run, place + 1))
    return Routing(torch.where(ids >= 0, new[ids.clamp_min(0)], -1), routing.weights_TK)
