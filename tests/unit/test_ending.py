"""How the command ends: exit codes, one line on standard error, and text that a terminal must not obey."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_dist.commands import cli
from moe_dist.commands.call import ThisCall
from moe_dist.commands.flags import Json
from moe_dist.errors import (
    CheckpointError,
    ClusterLost,
    ConfigError,
    MoeDistError,
    OutputError,
    RankFailure,
    ResourceError,
    UnsupportedError,
)
from moe_dist.exits import exit_codes
from moe_dist.exits.exit_codes import MEANINGS
from moe_dist.messages.printable import one_line, printable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ends(monkeypatch, capsys):
    """`doctor` raises what is given; returns (exit code, standard output, lines of standard error)."""

    def run(error: BaseException, *arguments: str):
        def fail():
            raise error

        monkeypatch.setattr("moe_dist.commands.doctor.examine", fail)
        code = cli.main(["doctor", *arguments])
        found = capsys.readouterr()
        return code, found.out, found.err.splitlines()

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("f", 1, "r"), 2),
        (UnsupportedError("x", ["r"]), 2),
        (CheckpointError("/c", "cut"), 2),
        (ResourceError("GPUs", 2, 1, "Take one."), 3),
        (MemoryError("no room"), 3),
        (RankFailure(1, "op", 2, "died"), 4),
        (ClusterLost("a:1", "waiting", "gone"), 5),
        (OutputError("/o", "full"), 6),
        (RuntimeError("odd"), 70),
        (OSError(5, "Input/output error"), 70),
        (BrokenPipeError(32, "not of standard output"), 70),
        (RecursionError("deep"), 70),
        (SystemExit(1), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_error_has_its_code_and_one_line(ends, error, code, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found, out, lines = ends(error)
    assert (found, out, len(lines)) == (code, "", 1)
    assert lines[0].startswith("moe-dist: ")
    if not isinstance(error, KeyboardInterrupt):
        assert str(error) in lines[0]
        code, out, lines = ends(error, "--json")
        assert json.loads(out)["error"] == type(error).__name__
        assert len(lines) == 1


def test_every_error_that_is_raised_on_purpose_has_a_code():
    defined = [cls for cls in MoeDistError.__subclasses__() if cls.__module__ == "moe_dist.errors"]
    codes = {cls: exit_codes.code_of(cls.__new__(cls)) for cls in defined}
    assert 1 not in codes.values()
    assert set(codes.values()) == {2, 3, 4, 5, 6}


def test_an_unexpected_error_leaves_its_traceback_in_a_private_file(ends, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, (line,) = ends(ZeroDivisionError("two\nlines \x1b[31m"))
    assert code == 70
    assert r"ZeroDivisionError: two lines \x1b[31m" in line
    assert "please report it" in line
    path = Path(re.search(r"traceback is in (\S+);", line)[1])
    assert path.read_text().startswith("Traceback")
    assert path.parent.stat().st_mode & 0o077 == 0


def test_without_a_place_for_it_the_traceback_is_shown(ends, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    code, _, lines = ends(ZeroDivisionError("x"))
    assert code == 70
    assert "please report it" in lines[0]
    assert lines[-1] == "ZeroDivisionError: x"


def test_what_was_measured_so_far_is_said(monkeypatch, capsys):
    def fail(*, json: Json = False, call: ThisCall):
        call.ending.kept = "3 rows are in o.json"
        raise RankFailure(1, "gemm", 7, "died")

    monkeypatch.setattr("moe_dist.commands.doctor.doctor", fail)
    assert cli.main(["doctor", "--json"]) == 4
    found = capsys.readouterr()
    assert found.err.strip().endswith("died; 3 rows are in o.json")
    assert json.loads(found.out)["kept"] == "3 rows are in o.json"


def test_the_docs_and_the_help_list_the_same_codes(capsys):
    page = (ROOT / "docs" / "usage.md").read_text()
    documented = {int(code): text for code, text in re.findall(r"^\| (\d+) \| ([^|]+?) \|$", page, re.M)}
    assert documented == MEANINGS
    assert cli.main(["--help"]) == 0
    helped = {int(c): text for c, text in re.findall(r"^  (\d+) +(\S.*)$", capsys.readouterr().out, re.M)}
    assert helped == MEANINGS


def test_every_code_is_in_the_list():
    tree = ast.parse(Path(exit_codes.__file__).read_text())
    constants = [n.targets[0].id for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
    assert {getattr(exit_codes, name) for name in constants} == set(MEANINGS)


def program(code: str, **options) -> subprocess.Popen:
    """A command with this body as a program of its own."""
    head = "import sys, os, signal, time\nfrom moe_dist.commands.ending import Ending\ndef command():\n"
    tail = '\nending = Ending(lambda: True, lambda code: "")\nsys.exit(ending.code_of(command, last=True))'
    source = head + textwrap.indent(textwrap.dedent(code), "    ") + tail
    return subprocess.Popen(
        [sys.executable, "-c", source], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    )


STUCK = (
    "import ctypes\nwhile True:\n    try:\n        ctypes.CDLL(None).sleep(60)\n"
    "    except KeyboardInterrupt:\n        pass"
)
WAITING = "ending.kept = '2 rows are in o.json'\nprint('ready', flush=True)\n"


def ended(process: subprocess.Popen, *signals: int) -> tuple[int, str, float]:
    """(exit code, standard error, seconds from the first signal on)."""
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    for index, number in enumerate(signals):
        time.sleep(1.2 * (index > 0))
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - start


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)
class TestSignals:
    def test_in_python(self, number, code, word):
        assert ended(program(WAITING + "time.sleep(60)"), number)[:2] == (
            code,
            f"moe-dist: {word}: 2 rows are in o.json\n",
        )

    def test_swallowed_by_a_callback(self, number, code, word):
        body = WAITING + "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\nending.signals.check()"
        assert ended(program(body), number)[:2] == (code, f"moe-dist: {word}: 2 rows are in o.json\n")

    def test_what_follows_from_it_is_no_error_of_its_own(self, number, code, word):
        body = WAITING + "try:\n    time.sleep(60)\nfinally:\n    raise RuntimeError('a rank was interrupted too')"
        assert ended(program(body), number)[:2] == (code, f"moe-dist: {word}: 2 rows are in o.json\n")

    def test_in_c_where_no_handler_runs(self, number, code, word):
        """A lock of C++ never comes back to Python: the thread that hears of signals ends the process."""
        body = "import moe_dist.exits.signals; moe_dist.exits.signals.PATIENCE_S = 1.0\n" + WAITING + STUCK
        found, err, seconds = ended(program(body), number)
        assert (found, err) == (code, f"moe-dist: {word}: 2 rows are in o.json\n")
        assert seconds < 20

    def test_a_second_one_ends_a_slow_clean_up(self, number, code, word):
        body = WAITING + "try:\n    time.sleep(60)\nfinally:\n    time.sleep(60)"
        found, err, seconds = ended(program(body), number, number)
        assert (found, err) == (code, f"moe-dist: {word}: 2 rows are in o.json\n")
        assert seconds < 10


@pytest.mark.parametrize("stuck", [True, False])
def test_a_signal_while_a_cluster_starts(stuck):
    """Nothing is waited for in C++ for long, what was started is ended, and an exception that gets lost in it is raised
    again behind it."""
    lost = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
    body = "import ctypes\nfrom moe_dist.exits.signals import starting\nwith starting(lambda: os.write(2, b'end ')):\n"
    body += textwrap.indent(WAITING + (STUCK if stuck else lost), "    ") + "\ntime.sleep(60)"
    code, err, seconds = ended(program(body), signal.SIGINT)
    assert (code, err.replace("end ", "")) == (130, "moe-dist: interrupted: 2 rows are in o.json\n")
    assert err.startswith("end ") == stuck
    assert seconds < 10  # where a clean-up may take 15


@pytest.mark.parametrize("stuck", [True, False])
def test_a_signal_ends_with_a_document_and_a_code_too(tmp_path, stuck):
    """Also where the main thread is in C++ and the thread that hears of signals has the last word."""
    body = (
        "import moe_dist.exits.signals; moe_dist.exits.signals.PATIENCE_S = 1.0; from pathlib import Path\n"
        f"ending.leave_code = lambda code: Path({str(tmp_path / 'code')!r}).write_text(str(code)) and ''\n"
        "ending.as_json = True\nprint('ready', flush=True)\n"
    )
    process = program(body + (STUCK if stuck else "time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert json.loads(out) == {"error": "interrupted", "message": "interrupted"}
    assert (process.returncode, err) == (130, "moe-dist: interrupted\n")
    assert (tmp_path / "code").read_text() == "130"


@pytest.mark.parametrize(
    ("number", "stuck", "code", "said"),
    [
        (signal.SIGTERM, False, 4, "rank 0 failed in o (sequence number 2): c"),
        (signal.SIGTERM, True, 4, "rank 0 failed in o (sequence number 2): c"),
        (signal.SIGINT, False, 130, "interrupted"),
    ],
)
def test_sigterm_tells_a_death_where_there_was_one(number, stuck, code, said):
    body = (
        "from moe_dist.errors import RankFailure; import moe_dist.exits.signals; moe_dist.exits.signals.HURRY_S = 1.0\n"
        "ending._death_of = lambda: RankFailure(0, 'o', 2, 'c')\nprint('ready', flush=True)\n"
    )
    found, err, seconds = ended(program(body + (STUCK if stuck else "time.sleep(60)")), number)
    assert (found, err) == (code, f"moe-dist: {said}\n")
    assert seconds < 10  # the main thread has nothing left to do


@pytest.mark.parametrize(("rank", "said"), [(0, "rank 0 failed in work (sequence number 20): killed"),
                                            (1, "rank 0 failed in o (sequence number 2): c")])  # fmt: skip
def test_what_is_known_of_a_dead_rank_goes_before_that_it_is_gone(rank, said):
    """The signal comes while a collective that the death has broken ends the command."""
    body = (
        "from moe_dist.errors import RankFailure\nending._death_of = lambda: RankFailure(0, 'o', 2, 'c')\n"
        "print('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n"
        f"raise RankFailure({rank}, 'work', 20, 'killed')"
    )
    assert ended(program(body), signal.SIGTERM)[:2] == (4, f"moe-dist: {said}\n")


def test_what_is_known_of_a_dead_rank_outlives_a_signal_that_comes_while_the_ranks_are_left():
    body = (
        "from moe_dist.errors import RankFailure\nending._death_of = lambda: RankFailure(0, 'o', 2, 'c')\n"
        "try:\n    raise RankFailure(0, 'work', 20, 'killed')\n"
        "finally:\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    assert ended(program(body), signal.SIGTERM)[:2] == (
        4,
        "moe-dist: rank 0 failed in work (sequence number 20): killed\n",
    )


def test_an_end_is_told_once_by_whoever_comes_first():
    """The thread that hears of signals has had enough while the main thread is telling."""
    body = (
        "from moe_dist.errors import RankFailure; import moe_dist.exits.signals; moe_dist.exits.signals.HURRY_S = 1.0\n"
        "import threading\n"
        "ending._death_of = lambda: RankFailure(0, 'o', 2, 'c')\n"
        "report = ending._report\n"
        "def slowly(*said):\n"
        "    time.sleep(threading.current_thread() is threading.main_thread())\n"
        "    report(*said)\n"
        "ending._report = slowly\n"
        "print('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    time.sleep(0.8)\n"
        "raise RankFailure(0, 'work', 20, 'killed')"
    )
    said = "moe-dist: rank 0 failed in work (sequence number 20): killed\n"
    assert ended(program(body), signal.SIGTERM)[:2] == (4, said)


def test_a_signal_that_was_ignored_from_the_start_stays_so():
    """nohup"""
    body = "print('ready', flush=True)\ntime.sleep(1)\nreturn 0"
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert ended(program(body, **ignoring), signal.SIGHUP)[:2] == (0, "")


def test_such_a_signal_stays_ignored_in_what_the_command_starts():
    """Ray's head and raylet, which Ray starts with a `preexec_fn`: without them the command would not go on."""
    body = """
        import subprocess
        child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None)
        child.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        print(child.poll(), flush=True)
        child.kill()
        return child.wait()
    """
    process = program(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.communicate(timeout=60) == ("None\n", "")


def test_sigterm_where_another_library_has_set_its_handler():
    """ray.init does, and exits with 1 or 15."""
    body = WAITING + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\ntime.sleep(60)"
    assert ended(program(body), signal.SIGTERM)[:2] == (143, "moe-dist: terminated: 2 rows are in o.json\n")


def test_a_forked_child_keeps_its_signals_to_itself():
    body = """
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), flush=True)
        time.sleep(0.5)
        return 0
    """
    process = program(body)
    assert process.communicate(timeout=60) == (f"{signal.SIGTERM.value}\n", "")
    assert process.returncode == 0


def test_handlers_are_given_back():
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in ending]
    assert cli.main(["plan", "--model", "nosuch"]) == 2
    assert [signal.getsignal(number) for number in ending] == before


def test_a_reader_that_has_gone():
    command = f"set -o pipefail; {sys.executable} -m moe_dist plan --model DeepSeek-V3 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("KeyboardInterrupt", 130, "moe-dist: interrupted\n"),
        (
            "ImportError('libcudart.so is missing')",
            3,
            "moe-dist: this installation lacks something: libcudart.so is missing\n",
        ),
    ],
)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_before_there_is_a_command(tmp_path, fault, code, said, rank):
    """Importing torch takes seconds, and a broken installation fails there."""
    (tmp_path / "torch.py").write_text(f"raise {fault}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    if rank is not None:  # of torchrun's, of whom one speaks
        environment |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "a", "MASTER_PORT": "1", "MOE_DIST_EXIT_CODE_FILE": str(tmp_path / "code")}
    command = [sys.executable, "-m", "moe_dist", "run", "--runtime=torchrun"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "" if rank == "1" else said)
    if rank is not None:
        assert (tmp_path / "code").exists() == (rank == "0")


def test_streams_that_were_closed_from_the_start():
    body = """
        assert sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
        print("x")
        raise RuntimeError("nobody hears this")
    """
    process = program(body, stdout=None, stderr=None, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert process.wait(60) == 70


def test_a_log_on_a_full_disk_is_no_reason_to_stop():
    body = """
        import moe_dist.commands.progress as progress
        progress.EVERY_S = 0.0
        reporter = progress.Reporter(2)
        reporter.shown("one")
        reporter.shown("two")
        return 0
    """
    with open("/dev/full", "w") as full:
        assert program(body, stderr=full).wait(60) == 0


PRINTING = """
    from moe_dist.commands.terminal import terminal, to_standard_output
    with to_standard_output():
        terminal().print("Größe ×")
    return 0
"""


def test_standard_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        process = program(PRINTING, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 6
    assert err == "moe-dist: standard output can't be written: No space left on device\n"


def test_an_encoding_without_our_characters():
    process = program(PRINTING, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=60) == ("Gr??e ?\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ×µ – text", "plain ×µ – text"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202eevil", r"\u202eevil"),
        ("\udc80", r"\udc80"),
        ("\x9b2J", r"\x9b2J"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert one_line("a\n\n  b\x07") == r"a b\x07"


@pytest.mark.parametrize(
    "name", ["[/foo]", "[red]x[/red]", "\x1b[31mred", ":smile:", "a\u202eb", "x\r\ny", "[link=a]b"]
)
def test_a_name_is_shown_as_it_is_or_escaped(name, capsys):
    assert cli.main(["plan", f"model.name={json.dumps(name)}"]) == 0
    out = capsys.readouterr().out
    assert printable(name) in out
    assert out.replace("\n", "").isprintable()
    assert cli.main(["plan", f"model.name={json.dumps(name)}", f"{name}=1"]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "key", "value", "overrides"),
        [
            (["--skew", "single", "iters=2"], "skew", ["single"], ["iters=2"]),
            (["--tokens", "1", "16", "model.top_k=2", "--json"], "tokens", [1, 16], ["model.top_k=2"]),
            (["--backend", "torch", "a.b=[1, 2]", "c=3"], "backend", ["torch"], ["a.b=[1, 2]", "c=3"]),
            (["--skew", "file:/a=b.pt", "hot:2"], "skew", ["file:/a=b.pt", "hot:2"], []),
            (["a=1", "--skew", "single", "b=2", "--json", "c=3"], "skew", ["single"], ["a=1", "b=2", "c=3"]),
            (["--out", "a=1", "--skew", "single", "a=1"], "skew", ["single"], ["a=1"]),  # a file may be called so
        ],
    )
    def test_an_override_behind_several_values(self, arguments, key, value, overrides):
        bound = cli.parse(["check", *arguments]).bound
        assert bound.arguments[key] == value
        assert sorted(bound.arguments["overrides"]) == overrides

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--skew", "a=1"], "--skew = None: has no value"),
            (["--tokens", "8", "--tokens", "9"], "--tokens = '9': is given twice"),
            (["--world", "2", "--world", "2"], "--world = '2': is given twice"),
            (
                ["seed=1", "--skew", "single", "seed=2"],
                "override = 'seed=2': sets what seed=1 sets too (legal: each key once)",
            ),
            (["--out", "seed=1", "seed=2", "seed=1"], "override = 'seed=1': sets what seed=2 sets too"),
            (["--tokens", "many"], "--tokens = 'many': is no legal value (legal: whole numbers, as 1 2 or 1,2)"),
            (["--nosuch\x1b[31m"], r"option = '--nosuch\x1b[31m'"),
        ],
    )
    def test_what_is_none(self, arguments, said, capsys):
        assert cli.main(["check", *arguments]) == exit_codes.BAD_INPUT
        assert said in capsys.readouterr().err
