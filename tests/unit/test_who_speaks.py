"""Under torchrun one rank speaks for all: the one that comes to the store first, where two may have passed each other
over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.distributed import HashStore

from moe_dist.runtime.torchrun_group import _Watcher


def watcher(rank: int, store: Any) -> _Watcher:
    made = object.__new__(_Watcher)  # its threads and signals are not needed here
    made._store, made._context = store, SimpleNamespace(rank=rank)  # type: ignore[assignment]
    return made


def test_the_first_one_speaks_and_goes_on_to() -> None:
    store = HashStore()
    one, zero = watcher(1, store), watcher(0, store)
    assert [one._first_to_speak(), zero._first_to_speak(), one._first_to_speak()] == [True, False, True]


def test_without_a_store_each_speaks() -> None:
    class Gone:
        def compare_set(self, *_: str) -> bytes:
            raise ConnectionError("the store has ended")

    assert watcher(1, Gone())._first_to_speak()
