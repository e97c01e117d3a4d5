"""What ranks agree on, on the CPU: small numbers, whatever device they compute on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_dist.comm.bounded import Bounded
from moe_dist.comm.collectives import gather_into
from moe_dist.errors import ConfigError, RankFailure


class Agreements(Bounded):
    """A rank's part in them."""

    def meet(self, tokens: int, bucket: int | None, alike: bool, same: Callable[[], dict[str, int]] = dict) -> int:
        """The ranks tell each other, on the CPU, which step they begin, with how many tokens, in which bucket, and the
        numbers by name that `same` gives; the largest number of tokens comes back. Raises RankFailure where they begin
        different steps, as after an input that one of them has refused, ConfigError where one of these numbers differs,
        their buckets, or, with `alike`, their tokens."""
        if self.world == 1:
            return tokens
        numbers = same()
        told = [self._user.steps, -1 if bucket is None else bucket, tokens, *numbers.values()]
        mine = torch.tensor([told], dtype=torch.int64, device="cpu")
        everyone = mine.new_empty(self.world, len(told))

        def tell() -> None:
            self._wait(gather_into(everyone, mine, group=self._cpu_group, async_op=True))

        self._run("meet", tell)
        steps, buckets, counts, *others = everyone.T.tolist()
        if len(set(steps)) > 1:
            behind = steps.index(min(steps))
            cause = f"it begins step {min(steps)} where others begin step {max(steps)}"
            why = "one of them left a step out, or raised in one and went on"
            raise RankFailure(behind, "meet", self.sequence, f"{cause}: {why}; form a new process group to go on")
        told_by = dict(zip(numbers, others, strict=True))
        for field in (name for name in told_by if name.startswith("plan.")):  # what differs else may follow from it
            _check_same(field, told_by[field])
        for field, values, matters in (("max_tokens_per_rank", buckets, True), ("tokens", counts, alike)):
            if matters and len(set(values)) > 1:
                told_all = ", ".join("none" if value < 0 else str(value) for value in values)
                mine_is = None if values[self.rank] < 0 else values[self.rank]
                raise ConfigError(field, mine_is, f"must be one on all ranks, not {told_all}")
        for field, values in told_by.items():
            _check_same(field, values)
        return int(max(counts))

    def agree_max(self, value: int) -> int:
        """The largest `value` of any rank, agreed on the CPU group."""
        if self.world == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.int64, device="cpu")

        def agree() -> None:
            self._wait(dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._cpu_group, async_op=True))

        self._run("agree_max", agree)
        return int(agreed)

    def barrier(self) -> None:
        if self.world > 1:
            self._run("barrier", lambda: self._wait(dist.barrier(group=self._cpu_group, async_op=True)))


def _check_same(field: str, values: list[int]) -> None:
    """Raise ConfigError that says which ranks have what in common."""
    ranks: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) > 1:
        told = "; ".join(f"rank{'s' * (len(group) > 1)} {', '.join(map(str, group))}" for group in ranks.values())
        rule = "the ranks call different layers" if field == "layer" else "must be the same on all ranks"
        raise ConfigError(field, f"{len(ranks)} different ones", f"{rule}, alike are: {told}")
