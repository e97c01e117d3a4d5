"""Who is named when a group fails: from made-up records, all orders of what can have happened."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.errors import ConfigError, RankFailure
from moe_dist.runtime import pulse as pulse_module
from moe_dist.runtime.blame import as_failure, blamed, is_echo, left_early, overdue, packed, silence, stalled, unpacked
from moe_dist.runtime.logs import said_last
from moe_dist.runtime.pulse import Peer, Pulse, Sight, describe_end

WAITING = Sight(0, "timing", "barrier", 21)
BROKE = RankFailure(0, "barrier", 21, "RuntimeError: Timed out")


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (Sight(1, "loading", "", 20), "did not come to sequence number 21; rank 0 waited in barrier"),
        (Sight(1, "loading", "", 20, finished=True), "returned after 20 collectives; rank 0 waited in barrier"),
        (Sight(1, "loading", "", 21, stopped=True), "its process is stopped (SIGSTOP, or a debugger); rank 0"),
        (Sight(1, "loading", "", 21, silent_s=9), "silent for 9 s; rank 0"),
        (Sight(1, "loading", "", 25, ended="its process died of SIGSEGV"), "its process died of SIGSEGV; rank 0"),
        (Sight(1, "loading", "all_reduce", 21), "was in all_reduce where rank 0 was in barrier; rank 0"),
    ],
)
def test_who_did_not_come_is_blamed(peer: Sight, why: str) -> None:
    bystander = Sight(2, "timing", "barrier", 21)
    found = blamed([BROKE], [WAITING, bystander, peer])
    assert (found.rank, found.op, found.seq) == (1, "loading", peer.sequence)
    assert found.cause.startswith(why)
    assert "(sequence number 21): RuntimeError: Timed out" in found.cause


def test_without_a_suspect_the_failure_stays() -> None:
    assert blamed([BROKE], [WAITING, Sight(1, "timing", "barrier", 21)]) is BROKE


def test_ranks_that_both_broke_in_different_collectives() -> None:
    other = RankFailure(1, "all_reduce", 21, "RuntimeError: Timed out")
    found = blamed([other, BROKE], [Sight(0, "a", "", 21), Sight(1, "b", "", 21)])
    assert (found.rank, found.op) == (1, "b")
    assert found.cause.startswith("was in all_reduce where rank 0 was in barrier")


def test_a_peer_that_did_not_write_in_a_step_stays_the_one_that_is_named() -> None:
    """Its step's number says nothing of collectives, and who waits for the device is in none."""
    said = RankFailure(1, "nvlink, rows", 6, "rank 0 waited 60 s for its flag of step 41")
    for other in (Sight(2, "steps", "to_host", 6), Sight(2, "steps", "", 6)):
        assert blamed([said], [Sight(0, "steps", "", 6), Sight(1, "steps", "to_host", 6), other]) is said


def test_a_rank_that_waits_for_its_device_is_not_the_one_that_computes() -> None:
    late = stalled([Sight(0, "steps", "to_host", 6, noted_s=1.7, limit_s=1.5),
                    Sight(1, "steps", "", 6, noted_s=1.6, limit_s=1.5, where="a.py:7 in spin")])  # fmt: skip
    assert late is not None
    assert late.rank == 1
    assert late.cause.startswith("in no collective for 1.6 s")
    assert late.cause.endswith("rank 0 waits in to_host (sequence number 6)")


def test_only_a_rank_that_was_left_behind_makes_a_return_early() -> None:
    done = Sight(1, "measure", "", 20, finished=True)
    found = left_early([WAITING, done])
    assert found is not None
    assert (found.rank, found.seq) == (1, 20)
    assert left_early([Sight(0, "timing", "", 21), done]) is None  # not in a collective: may be about to return
    assert left_early([WAITING, Sight(1, "measure", "", 21, finished=True)]) is None  # took part


def test_silence_and_lateness_name_who_waits() -> None:
    late = Sight(1, "loading", "", 20, silent_s=31, doing_s=40, stopped=True)
    silent = silence([WAITING, late], 30)
    assert silent is not None
    assert silent.cause == (
        "silent for 31 s: its process is stopped (SIGSTOP, or a debugger); rank 0 waits in barrier (sequence number 21)"
    )
    found = overdue([WAITING, late], 600)
    assert (found.rank, found.op, found.seq) == (1, "loading", 20)
    assert found.cause.startswith("not done within 600 s, here for 40 s; its process is stopped")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"silent_s": 4.0, "stopped": True}, True),
        ({"silent_s": 3.0, "stopped": True}, False),  # it may have been stopped a moment ago
        ({"silent_s": 29.0, "stopped": True, "traced": True}, False),  # somebody looks at it
        ({"silent_s": 31.0, "stopped": True, "traced": True}, True),
        ({"silent_s": 29.0}, False),
        ({"silent_s": 31.0}, True),
        ({"silent_s": 31.0, "finished": True}, False),
    ],
)
def test_a_stopped_process_is_given_up_sooner(given: dict[str, Any], named: bool) -> None:
    assert (silence([WAITING, Sight(1, "loading", "", 20, **given)], 30) is not None) == named


def busy(rank: int, noted_s: float, **changes: Any) -> Sight:
    return Sight(rank, "steps", "", 20, **{"limit_s": 1.0, "noted_s": noted_s} | changes)


def waits(rank: int, noted_s: float, **changes: Any) -> Sight:
    return Sight(rank, "steps", "barrier", 21, **{"limit_s": 1.0, "noted_s": noted_s} | changes)


@pytest.mark.parametrize(
    ("sights", "rank", "why"),
    [
        ([waits(0, 1.2), busy(1, 1.3)], 1, "in no collective for 1.3 s, where its limit is 1 s; rank 0 waits"),
        ([busy(0, 1.2, where="a.py:7 in f"), busy(1, 0.2)], 0, "in no collective for 1.2 s, where its limit is 1 s"),
        ([waits(0, 1.2), busy(1, 1.1, limit_s=0.0)], 1, "did not come to sequence number 21; rank 0 waited in barrier"),
        ([waits(0, 1.2), busy(1, 1.1, limit_s=9.0)], 1, "did not come to sequence number 21; rank 0 waited in barrier"),
        ([waits(0, 1.2, fresh=True), waits(1, 1.1, fresh=True, where="a.py:7 in f")], 1, "in barrier for 1.1 s"),
        ([waits(0, 3.2, fresh=True), waits(1, 3.1)], 1, "in barrier for 3.1 s, where its limit is 1 s and not"),
        ([waits(0, 1.2, fresh=True), waits(1, 1.3, fresh=True)], 0, "not over after 1.2 s, where its limit is 1 s"),
    ],
)  # fmt: skip
def test_a_rank_over_its_own_limit_is_named(sights: list[Sight], rank: int, why: str) -> None:
    found = stalled(sights)
    assert found is not None
    assert found.rank == rank
    assert found.cause.startswith(why)


@pytest.mark.parametrize(
    "sights",
    [
        [waits(0, 0.9), busy(1, 0.9)],
        [waits(0, 99.0, limit_s=0.0), busy(1, 99.0, limit_s=0.0)],  # loading: nobody has set a limit
        [busy(0, 0.1), busy(1, 99.0, finished=True)],
        [waits(0, 1.2, fresh=True), waits(1, 1.3)],  # who is really in it shows with the next sign of life
    ],
)
def test_a_rank_within_its_limit_is_not(sights: list[Sight]) -> None:
    assert stalled(sights) is None


def test_a_record_says_where_its_rank_is() -> None:
    record = Pulse()
    record.note("barrier", 1)
    peer = Peer(0, os.getpid(), record.fd)
    assert (peer.sight().fresh, peer.sight().where) == (False, "")
    record.beat()
    assert (peer.sight().fresh, peer.sight().where) == (True, "")  # this very thread has asked
    thread = threading.Thread(target=record.beat)
    thread.start()
    thread.join()
    assert peer.sight().where.startswith("threading.py:")
    record.status("steps", 2.5)
    assert (peer.sight().limit_s, peer.sight().where) == (2.5, "")
    record.status("loading")
    assert peer.sight().limit_s == 0.0
    peer.close()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("os._exit(7)", "its process died with exit code 7"),
        ("os.kill(os.getpid(), 11)", "its process died of SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "its process died of SIGKILL; where nobody sent it, the kernel did"),
    ],
)
def test_a_record_outlives_its_process(ending: str, said: str) -> None:
    code = (
        "import os; from moe_dist.runtime.pulse import Pulse; pulse = Pulse(); pulse.status('work');"
        f"pulse.note('barrier', 5); print(pulse.fd, flush=True); input(); {ending}"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    peer = Peer(1, child.pid, int(child.stdout.readline()))
    assert (peer.sight().ended, peer.sight().stopped) == (None, False)
    os.kill(child.pid, signal.SIGSTOP)
    while not peer.sight().stopped:
        pass
    assert not peer.sight().traced
    os.kill(child.pid, signal.SIGCONT)
    with child:
        child.communicate("\n", timeout=30)
        sight = peer.sight()
        assert (sight.doing, sight.op, sight.sequence) == ("work", "barrier", 5)
        assert sight.ended is not None
        assert sight.ended == "its process died" or sight.ended.startswith(said)  # Linux before 6.15: no more is known
    peer.close()


def test_one_that_ends_while_it_is_asked_about_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives at the first question, and is gone at the second."""
    record, answers = Pulse(), iter([None, 7 << 8])
    peer = Peer(1, os.getpid(), record.fd)
    monkeypatch.setattr(pulse_module, "_exit_code", lambda _: next(answers))
    monkeypatch.setattr(pulse_module.psutil, "pid_exists", lambda _: False)
    assert peer.ended() == "its process died with exit code 7"
    peer.close()


def test_words_for_an_end() -> None:
    assert describe_end(7 << 8) == "its process died with exit code 7"
    assert describe_end(signal.SIGABRT) == "its process died of SIGABRT"
    assert "memory ran out" in describe_end(signal.SIGKILL)


def test_a_record_is_never_read_half_written() -> None:
    """A reader that saw zeros would take the writer for a rank that is silent since the machine was started."""
    pulse, running = Pulse(), threading.Event()
    pulse.note("barrier", 1 << 40)

    def write() -> None:
        while not running.is_set():
            pulse.beat()
            pulse.status("work")
            pulse.note("barrier", 1 << 40)

    code = (
        "import sys; from moe_dist.runtime.pulse import Peer; peer = Peer(0, int(sys.argv[1]), int(sys.argv[2]));"
        "sights = [peer.sight() for _ in range(3000)]; print(max(s.silent_s for s in sights),"
        "{(s.doing, s.op, s.sequence) for s in sights} == {('work', 'barrier', 1 << 40)})"
    )
    writer = threading.Thread(target=write)
    writer.start()
    try:
        command = [sys.executable, "-c", code, str(os.getpid()), str(pulse.fd)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    finally:
        running.set()
        writer.join()
    silent_s, same = done.stdout.split()
    assert float(silent_s) < 30
    assert same == "True"


def test_a_long_status_fits() -> None:
    pulse = Pulse()
    pulse.status("é" * 500)
    pulse.note("x" * 100, 1 << 40)
    assert Peer(0, os.getpid(), pulse.fd).sight().sequence == 1 << 40


def test_what_a_log_says(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":actor_name:RankActor\nterminate called\n  what():  enforce failed: 64 vs 32\n*** SIGABRT\n")
    assert said_last(str(log)) == f"; its log: {log}, which says: what():  enforce failed: 64 vs 32"
    log.write_text(":job_id:01000000\n")
    assert said_last(str(log)) == f"; its log: {log}, which is empty"
    assert said_last(None) == ""


CONTEXT: Any = SimpleNamespace(rank=1, status="at work", comm=SimpleNamespace(sequence=20))


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class Locked(ConfigError):
    def __init__(self) -> None:
        super().__init__("field", 7, "rule")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit("early"), "GeneratorExit: early"),
        (Mute(), "Mute (its message can't be shown: __str__ raised KeyboardInterrupt)"),
        (ValueError("a\ud800b"), r"ValueError: a\ud800b"),
        (Locked(), "Locked: field = 7: rule"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_rank_raises_travels_as_its_own_failure(error: BaseException, cause: str) -> None:
    found: Any = pickle.loads(pickle.dumps(as_failure(error, CONTEXT)))
    assert (found.rank, found.op, found.seq, found.cause) == (1, "at work", 20, cause)
    assert not is_echo(found)
    (str(found) + found.trace).encode()


def test_an_error_of_moe_dist_keeps_its_type_and_can_be_encoded() -> None:
    found: Any = as_failure(ConfigError("a\ud800", 7, "rule"), CONTEXT)
    assert (type(found), str(found), found.field) == (ConfigError, r"a\ud800 = 7: rule", r"a\ud800")


class Unreadable:
    def __reduce__(self) -> Any:
        return (int, ("no number",))


def test_a_result_that_can_not_travel_is_its_rank_s_failure() -> None:
    with pytest.raises(
        RankFailure, match="its result, of type lock, can't be pickled: TypeError: cannot pickle"
    ) as one:
        packed(threading.Lock(), CONTEXT)
    assert (one.value.rank, one.value.op, one.value.seq) == (1, "at work", 20)
    results = [packed("fine", CONTEXT), packed(Unreadable(), CONTEXT)]
    with pytest.raises(RankFailure, match=r"rank 1 failed in work .*: its result can't be unpickled: ValueError"):
        unpacked(results, "work")
