"""The debug mode's look at a collective before it starts: do all ranks begin the same one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moe_dist.comm.teller import Teller, by_value, number_of, ranks_in_words
from moe_dist.errors import RankFailure


class Form(NamedTuple):
    """Of a collective. `text`: what crosses, without the rows that may differ between ranks; `send` and `receive`: rows
    for and from each rank, where they may."""

    text: str = ""
    send: Sequence[int] = ()
    receive: Sequence[int] = ()


def form_of(tensors: Sequence[Tensor]) -> Form:
    """Of tensors that have one shape on all ranks."""
    return Form(", ".join(f"{list(each.shape)} {_name(each)}" for each in tensors))


def form_of_rows(tensors: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]) -> Form:
    """Of tensors whose rows go where `send` says."""
    return Form(", ".join(f"rows of {list(each.shape[1:])} {_name(each)}" for each in tensors), send, receive)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_form(teller: Teller, op: str, sequence: int, form: Form) -> None:
    """Collective. Raises RankFailure on all ranks where they begin different collectives, or one that sends another
    number of rows than the other side waits for."""
    said, nobody = f"{op} of {form.text}" if form.text else op, [0] * teller.world
    send, receive = list(form.send) or nobody, list(form.receive) or nobody
    told = teller.numbers([sequence, number_of(said), *send, *receive])
    if any(each[:2] != told[0][:2] for each in told):
        groups = by_value(teller.texts(f"{said} (sequence number {sequence})"))
        both = "; ".join(f"{ranks_in_words(ranks)}: {text}" for text, ranks in groups.items())
        odd = min(groups.values(), key=len)[0] if len(groups) > 1 else 0
        raise RankFailure(odd, op, sequence, f"ranks begin different collectives: {both}; {AGAIN}")
    for source, row in enumerate(told):
        for target, rows in enumerate(row[2 : 2 + teller.world]):
            waits_for = told[target][2 + teller.world + source]
            if rows != waits_for:
                cause = f"rank {source} sends {rows} rows to rank {target}, which waits for {waits_for}"
                raise RankFailure(source, op, sequence, f"{cause}, in {said}; {AGAIN}")


AGAIN = "form a new process group to go on"
