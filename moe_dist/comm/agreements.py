"""What ranks agree on, on the CPU: small numbers, whatever device they compute on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_dist.comm.bounded import Bounded, R, short
from moe_dist.comm.guard import Form
from moe_dist.comm.teller import Facts, by_value, ranks_in_words
from moe_dist.errors import ConfigError, RankFailure

FACTS = "facts"  # of what Comm.meet is given: the digest of what its `facts` say in words


class Agreements(Bounded):
    """A rank's part in them."""

    def compare(self, facts: Facts) -> None:
        """Collective. Raises ConfigError on all ranks where a field that they have is not the same, with its values and
        whose they are."""
        if self.world > 1:
            self._run("compare", lambda: self._teller.compare(facts))

    def together(self, what: str, call: Callable[[], R]) -> R:
        """Collective. `call()` on every rank, which is no collective itself. Where it raises on some of them they raise
        that, and the others a RankFailure that names the first of them and `what` it was doing, instead of waiting for
        it in the next collective."""
        if self.world == 1:
            return call()
        found, failed = [], None
        try:
            found.append(call())
        except Exception as error:
            failed = error
        said = "" if failed is None else short(failed)
        told = self._run(what, lambda: self._teller.texts(said))
        if failed is not None:
            raise failed
        for rank, text in enumerate(told):
            if text:
                raise RankFailure(rank, what, self.sequence, text)
        return found[0]

    def meet(
        self,
        tokens: int,
        bucket: int | None,
        alike: bool,
        same: Callable[[], dict[str, int]] = dict,
        facts: Callable[[], Facts] = dict,
    ) -> int:
        """The ranks tell each other, on the CPU, which step they begin, with how many tokens, in which bucket, and the
        numbers by name that `same` gives; the largest number of tokens comes back. One of them may be FACTS, the digest
        of `facts`. Raises RankFailure where they begin different steps, as after an input that one of them has refused,
        ConfigError where one of these numbers differs, their facts, their buckets, or, with `alike`, their tokens."""
        if self.world == 1:
            return tokens
        numbers = same()
        told = [self._user.steps, -1 if bucket is None else bucket, tokens, *numbers.values()]
        everyone = self._run("meet", lambda: self._teller.numbers(told), lambda: Form(f"{len(told)} numbers"))
        steps, buckets, counts, *others = (list(column) for column in zip(*everyone, strict=True))
        self._check_steps(steps)
        told_by = dict(zip(numbers, others, strict=True))
        if len(set(told_by.pop(FACTS, ()))) > 1:  # what differs else may follow from it
            self._run("compare", lambda: self._teller.refuse(facts()))
        for field, values, matters in (("max_tokens_per_rank", buckets, True), ("tokens", counts, alike)):
            if matters and len(set(values)) > 1:
                told_all = ", ".join("none" if value < 0 else str(value) for value in values)
                mine_is = None if values[self.rank] < 0 else values[self.rank]
                raise ConfigError(field, mine_is, f"must be one on all ranks, not {told_all}")
        for field, values in told_by.items():
            _check_same(field, values)
        return int(max(counts))

    def _check_steps(self, steps: list[int]) -> None:
        if len(set(steps)) > 1:
            behind = steps.index(min(steps))
            cause = f"it begins step {min(steps)} where others begin step {max(steps)}"
            why = "one of them left a step out, or raised in one and went on"
            raise RankFailure(behind, "meet", self.sequence, f"{cause}: {why}; form a new process group to go on")

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
    groups = by_value([str(value) for value in values])
    if len(groups) > 1:
        told = "; ".join(ranks_in_words(ranks) for ranks in groups.values())
        rule = "the ranks call different layers" if field == "layer" else "must be the same on all ranks"
        raise ConfigError(field, f"{len(groups)} different ones", f"{rule}, alike are: {told}")
