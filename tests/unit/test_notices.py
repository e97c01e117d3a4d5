"""What is said to a user that is no error: once, to whoever listens."""

from __future__ import annotations

import threading
import warnings

import pytest

from moe_dist.messages import building
from moe_dist.messages.notices import MoeDistWarning, by_text, collecting, live, notice, telling, with_ranks


def test_a_process_of_its_own_warns_in_a_category_of_ours():
    with pytest.warns(MoeDistWarning, match="no table") as found:
        notice("no table")
    assert found[0].filename == __file__  # of who said it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeDistWarning)
        notice("filtered by its category")


def test_a_rank_keeps_each_once_in_their_order():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collecting() as said:
            for text in ("a", "b", "a"):
                notice(text)
    assert said == ["a", "b"]


def test_what_comes_later_goes_elsewhere():
    with collecting() as outer:
        with collecting() as inner:
            notice("a")
        notice("b")
    with pytest.warns(MoeDistWarning):
        notice("c")
    assert (outer, inner) == (["b"], ["a"])


def test_an_error_ends_the_collecting():
    with pytest.raises(ZeroDivisionError), collecting():
        raise ZeroDivisionError
    with pytest.warns(MoeDistWarning):
        notice("heard")


def test_threads_of_a_rank_are_heard():
    shown: list[str] = []
    with collecting(shown.append) as said:
        threads = [threading.Thread(target=building.say, args=(f"line {n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert sorted(said) == sorted(shown) == [f"line {n}" for n in range(8)]


class TestBuilding:
    def test_a_rank_whose_errors_nobody_sees(self, capsys):
        """What happened is kept for the user; how far it is, is only shown while it lasts."""
        shown: list[str] = []
        with collecting(shown.append) as said:
            building.say("compiling 3 sources")
            building.say("compiled 1 of 3", progress=True)
            building.say("compiled")
        assert said == ["compiling 3 sources", "compiled"]
        assert shown == ["compiling 3 sources", "compiled 1 of 3", "compiled"]
        assert capsys.readouterr().err == ""

    def test_a_process_that_is_seen(self, capsys):
        for progress in (False, True):
            building.say("compiling", progress=progress)
            with collecting() as said:  # torchrun's ranks: their standard error is the user's
                building.say("compiling", progress=progress)
            assert said == []
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        assert all(line.startswith("moe-dist (pid ") and line.endswith("): compiling") for line in lines)

    def test_nobody_watches(self):
        assert not live("text")


class TestPythonsWarnings:
    def test_other_libraries_warnings_are_notices(self):
        with collecting(warned=True) as said:
            warnings.warn("of another\nlibrary", UserWarning, stacklevel=1)
            notice("ours")
        assert said == ["UserWarning: of another library", "ours"]

    def test_only_where_they_are_asked_for(self):
        with pytest.warns(UserWarning, match="seen"), collecting() as said:
            warnings.warn("seen", UserWarning, stacklevel=1)
        assert said == []

    def test_afterwards_they_go_where_they_went(self):
        before = warnings.showwarning
        with pytest.raises(ZeroDivisionError), collecting(warned=True):
            raise ZeroDivisionError
        assert warnings.showwarning is before


def test_what_was_said_before_an_error_is_not_lost():
    def fails() -> None:
        with collecting():
            notice("before the error")
            raise ZeroDivisionError

    with collecting() as outer, pytest.raises(ZeroDivisionError):
        fails()
    assert outer == ["before the error"]


def test_a_command_says_each_once_in_its_own_words():
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with telling(said.append):
            for text in ("a", "b", "a"):
                notice(text)
            with collecting() as kept:
                notice("c")
    assert (said, kept) == (["a", "b"], ["c"])


def test_a_rank_of_a_group_says_which_it_is(monkeypatch):
    import torch.distributed as dist

    for name, answer in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 3)):
        monkeypatch.setattr(dist, name, lambda *_, answer=answer: answer)
    with pytest.warns(MoeDistWarning, match=r"^rank 3: no table$"):
        notice("no table")


def test_each_text_once_with_its_ranks():
    assert with_ranks(by_text([("a", "b"), (), ("b",)])) == ["rank 0: a", "rank 0, 2: b"]
