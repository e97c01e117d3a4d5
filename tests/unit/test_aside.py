"""Copies beside the current stream, through a stand-in for the GPU's streams."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from side_streams import CUDA, Turns

from moe_dist.comm import symmetric
from moe_dist.comm.symmetric import STREAMS, Aside


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Of one rank, whose copies nobody does before they are waited for."""
    turns = Turns(1)
    turns.stand_in(monkeypatch)
    monkeypatch.setattr(symmetric, "_own", symmetric._Own())
    return turns


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(2), torch.full((2,), number + 1.0)) for number in range(count)]


@pytest.mark.parametrize("in_turn", [False, True])
def test_copies_come_behind_what_was_launched_and_join_waits_for_all(turns, in_turn):
    """A capture can't end while one of them is under way."""
    given, aside = pairs(STREAMS + 3), Aside(CUDA)
    assert not aside.used
    for half in (given[:2], given[2:]):
        turns.stream.launched += 1
        aside.copy(half, in_turn)
    used = [side for side in turns.stream.sides if side.copies]
    assert len(used) == (1 if in_turn else STREAMS)
    assert not any(target.any() for target, _ in given)
    aside.join()
    assert turns.stream.joined
    assert all(torch.equal(target, source) for target, source in given)
    assert aside.used


def test_copies_in_turn_keep_their_order(turns):
    first, last = torch.zeros(1), torch.zeros(1)
    Aside(CUDA).copy([(first, torch.ones(1)), (last, first)], in_turn=True)
    (side,) = (side for side in turns.stream.sides if side.copies)
    side.copy_one()
    assert (first, last) == (1, 0)
    side.copy_one()
    assert last == 1


def test_what_is_copied_stays_until_join(turns, monkeypatch):
    """Its memory would be given to what is computed meanwhile."""
    monkeypatch.setattr(turns.stream, "wait_stream", lambda side: side.copies.clear())
    (target, source), aside = *pairs(1), Aside(CUDA)
    alive = weakref.ref(source)
    aside.copy([(target, source)])
    for side in turns.stream.sides:
        side.copies.clear()  # a GPU's stream keeps nothing alive
    del source
    gc.collect()
    assert alive() is not None
    aside.join()
    gc.collect()
    assert alive() is None


def test_streams_are_a_threads_own(turns):
    """While one thread captures, another one's copies must not get into its graph."""
    asides = [Aside(CUDA), Aside(CUDA)]
    asides[0].copy(pairs(1))
    Turns(1).play(lambda _: asides[1].copy(pairs(1)))
    assert sorted(len(side.copies) for side in turns.stream.sides) == [0] * (2 * STREAMS - 2) + [1, 1]
