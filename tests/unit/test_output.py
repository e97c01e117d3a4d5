"""`--out`: files are replaced whole, everything else is written through, and nothing that is there is destroyed."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from unit.test_bench import row

from moe_dist.bench import devices
from moe_dist.bench import output as module
from moe_dist.bench.output import open_output
from moe_dist.errors import ConfigError

FIRST, SECOND = {"date": "today", "rows": [1]}, {"date": "today", "rows": [1, 2]}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def written(said):
    """Write both documents to a path as a command does, and return the Output."""

    def write(path: Path | str):
        output = open_output(path, said.append)
        output.update(FIRST)
        output.update(SECOND)
        output.close(SECOND)
        return output

    return write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestFiles:
    def test_a_new_one_in_a_new_folder(self, written, tmp_path, said):
        path = tmp_path / "new" / "out.json"
        output = written(path)
        assert json.loads(path.read_text()) == SECOND
        assert (output.rows, output.problem, said) == (2, None, [])
        assert output.kept == f"2 rows are in {path}"
        assert names(path.parent) == ["out.json"]

    def test_each_row_is_there_at_once(self, tmp_path, said):
        output = open_output(tmp_path / "out.json", said.append)
        assert names(tmp_path) == []
        output.update(FIRST)
        assert json.loads((tmp_path / "out.json").read_text()) == FIRST

    @pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
    def test_mode_and_owner_of_an_existing_file_stay(self, written, tmp_path, mode, said):
        path = tmp_path / "out.json"
        path.write_text(json.dumps(FIRST))
        path.chmod(mode)
        owner = 12345 if os.getuid() == 0 else os.getuid()
        os.chown(path, owner, -1)
        written(path)
        assert json.loads(path.read_text()) == SECOND
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (mode, owner)
        assert said == [f"{path} is overwritten: it holds 1 row of today"]

    def test_a_new_file_has_the_mode_of_any_new_file(self, written, tmp_path):
        before = os.umask(0o027)
        try:
            written(tmp_path / "out.json")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out.json").stat().st_mode) == 0o640

    def test_older_results_are_named_before_they_go(self, written, tmp_path, said):
        written(tmp_path / "out.json")
        written(tmp_path / "out.json")
        assert said == [f"{tmp_path / 'out.json'} is overwritten: it holds 2 rows of today"]

    @pytest.mark.parametrize("content", ["mine", "{}", "[1]", '{"rows": 3, "date": "x"}', "hidden: 8", '{"rows": []}'])
    def test_a_file_that_holds_no_results_stays(self, written, tmp_path, content, said):
        path = tmp_path / "out.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"holds no results of moe-dist.*\(legal: a new name"):
            written(path)
        assert (path.read_text(), names(tmp_path), said) == (content, ["out.json"], [])

    @pytest.mark.parametrize("how", ["itself", "a link", "another name", "inside"])
    def test_what_the_command_reads_stays(self, tmp_path, how, said):
        """Were it even a file of earlier results."""
        reads, path = tmp_path / "reads", tmp_path / "out.json"
        reads.mkdir() if how == "inside" else reads.write_text(json.dumps(FIRST))
        if how == "a link":
            path.symlink_to(reads)
        elif how == "another name":
            os.link(reads, path)
        else:
            path = reads / "new" / "out.json" if how == "inside" else tmp_path / "x" / ".." / "reads"
        before = names(tmp_path)
        with pytest.raises(ConfigError, match=f"{reads}, which this command reads"):
            open_output(path, said.append, reads=["elsewhere", reads])
        assert (names(tmp_path), said) == (before, [])
        assert how == "inside" or json.loads(reads.read_text()) == FIRST

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_is_followed(self, written, tmp_path, there):
        target = tmp_path / "far" / "target.json"
        if there:
            target.parent.mkdir()
            target.write_text("")
        (tmp_path / "one").symlink_to("two")
        (tmp_path / "two").symlink_to("far/target.json")
        written(tmp_path / "one")
        assert json.loads(target.read_text()) == SECOND
        assert (tmp_path / "one").is_symlink()
        assert (tmp_path / "two").is_symlink()

    def test_two_names_of_a_file_stay_one_file(self, written, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(FIRST))
        os.link(tmp_path / "a.json", tmp_path / "b.json")
        written(tmp_path / "a.json")
        assert json.loads((tmp_path / "b.json").read_text()) == SECOND
        assert (tmp_path / "a.json").stat().st_nlink == 2

    def test_neighbours_are_left_alone(self, tmp_path, said):
        (tmp_path / "a.partial").write_text("a stranger's")
        both = [open_output(tmp_path / name, said.append) for name in ("a.json", "a.txt", "a")]
        for output, document in zip(both, (FIRST, SECOND, FIRST), strict=True):
            output.update(document)
        assert (tmp_path / "a.partial").read_text() == "a stranger's"
        assert [json.loads((tmp_path / name).read_text()) for name in ("a.json", "a.txt")] == [FIRST, SECOND]
        assert names(tmp_path) == ["a", "a.json", "a.partial", "a.txt"]

    def test_a_mount_point_is_written_over(self, written, tmp_path, monkeypatch):
        (tmp_path / "out.json").write_text(json.dumps(FIRST))

        def busy(*_):
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(os, "replace", busy)
        assert written(tmp_path / "out.json").problem is None
        assert json.loads((tmp_path / "out.json").read_text()) == SECOND


class TestTwoCommands:
    def test_the_second_is_refused_while_the_first_lives(self, tmp_path, said):
        first = open_output(tmp_path / "out.json", said.append)
        (tmp_path / "link").symlink_to("out.json")
        open_output(tmp_path / "other.json", said.append)
        for name in ("out.json", "link"):
            with pytest.raises(ConfigError, match="another command that is running writes to it"):
                open_output(tmp_path / name, said.append)
        first.close(SECOND)
        assert open_output(tmp_path / "out.json", said.append).kept.startswith("no row")
        assert names(tmp_path) == ["link", "out.json"]
        assert said == [f"{tmp_path / 'out.json'} is overwritten: it holds 2 rows of today"]

    def test_a_killed_one_is_in_nobody_s_way(self, tmp_path, said):
        code = (
            "import os, signal, sys; from moe_dist.bench.output import open_output\n"
            "output = open_output(sys.argv[1], print); os.kill(os.getpid(), signal.SIGKILL)"
        )
        path = tmp_path / "out.json"
        assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
        open_output(path, said.append)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("in_place", [True, False])
    @pytest.mark.parametrize("when", ["before the first row", "after it"])
    def test_what_somebody_else_has_written_stays(self, tmp_path, said, when, in_place):
        """One on another machine, which no lock keeps away."""
        path = tmp_path / "out.json"
        if in_place:
            path.write_text(json.dumps(FIRST))
            os.link(path, tmp_path / "second name")
        output = open_output(path, said.append)
        said.clear()
        if when == "after it":
            output.update(FIRST)
        path.write_text("a stranger's")
        output.update(SECOND)
        output.close(SECOND)
        assert path.read_text() == "a stranger's"
        assert said == [f"{path} can't be written: something else has written to it since; measuring goes on"]
        assert str(output.problem).endswith(f"has written to it since (no row is in {path})")

    def test_a_file_that_was_removed_is_made_again(self, tmp_path, said):
        output = open_output(tmp_path / "out.json", said.append)
        output.update(FIRST)
        (tmp_path / "out.json").unlink()
        output.update(SECOND)
        assert json.loads((tmp_path / "out.json").read_text()) == SECOND


class TestFullDisk:
    def test_the_old_file_stays_and_measuring_goes_on(self, tmp_path, said, monkeypatch):
        path, room = tmp_path / "out.json", True

        def fsync(_):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        output = open_output(path, said.append)
        output.update(FIRST)
        room = False
        output.update(SECOND)
        output.update(SECOND)
        assert json.loads(path.read_text()) == FIRST
        assert said == [f"{path} can't be written: No space left on device; measuring goes on"]
        assert str(output.problem) == f"{path} can't be written: No space left on device (1 row is in {path})"
        assert names(tmp_path) == ["out.json"]
        room = True  # somebody has made room
        output.close(SECOND)
        assert (output.problem, json.loads(path.read_text())) == (None, SECOND)

    def test_a_limit_of_the_system(self, tmp_path):
        """RLIMIT_FSIZE stands for the full disk: the real write fails."""
        code = (
            "import resource, signal, sys; from pathlib import Path; from moe_dist.bench.output import open_output\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "output = open_output(Path(sys.argv[1]), print); output.update({'rows': [1]})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "output.update({'rows': [1] * 9999}); print(output.problem)"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "o.json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "can't be written: File too large; measuring goes on" in done.stdout
        assert json.loads((tmp_path / "o.json").read_text()) == {"rows": [1]}
        assert names(tmp_path) == ["o.json"]

    def test_a_page_is_utf_8_in_any_locale(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from moe_dist.bench.output import open_output\n"
            "open_output(Path(sys.argv[1]), print).write('\\u00b5s \\u2500')"
        )
        environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        command = [sys.executable, "-c", code, tmp_path / "o.html"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "o.html").read_bytes() == "\u00b5s \u2500".encode()

    def test_a_device_that_is_full(self, written, said):
        before = os.stat("/dev/full")
        output = written("/dev/full")
        assert "No space left" in str(output.problem)
        assert os.stat("/dev/full") == before


class TestThrough:
    @pytest.mark.parametrize("link", [True, False])
    def test_a_device_stays_a_device(self, written, tmp_path, link):
        path = tmp_path / "link"
        path.symlink_to(os.devnull)
        before = os.stat(os.devnull).st_ino
        assert written(path if link else os.devnull).problem is None
        assert os.stat(os.devnull).st_ino == before
        assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
        assert path.is_symlink()

    def test_a_fifo_gets_the_whole_document_once(self, written, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
        reader.start()
        written(tmp_path / "fifo")
        reader.join(10)
        assert json.loads(read[0]) == SECOND
        assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)

    def test_a_fifo_without_reader_is_refused_in_bounded_time(self, written, tmp_path, monkeypatch):
        monkeypatch.setattr(devices, "READER_S", 0.3)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ConfigError, match="nobody has opened for reading"):
            written(tmp_path / "fifo")

    def test_a_reader_that_takes_nothing_is_no_hang(self, tmp_path, said, monkeypatch):
        monkeypatch.setattr(module, "STALL_S", 0.3)
        os.mkfifo(tmp_path / "fifo")
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        output = open_output(tmp_path / "fifo", said.append)
        output.close({"rows": ["x" * 300_000]})
        os.close(reader)
        assert "took nothing" in str(output.problem)

    def test_a_reader_that_has_gone(self, tmp_path, said):
        os.mkfifo(tmp_path / "fifo")
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        output = open_output(tmp_path / "fifo", said.append)
        os.close(reader)
        output.close(SECOND)
        assert "Broken pipe" in str(output.problem)

    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
    def test_standard_output_in_a_file_is_not_written_over(self, tmp_path, name):
        """Opened anew, the file would be written from its start."""
        (tmp_path / "link").symlink_to("/dev/stdout")
        code = (
            "import sys; from pathlib import Path; from moe_dist.bench.output import open_output\n"
            "print('before', flush=True); output = open_output(Path(sys.argv[1]), print)\n"
            "output.update({'rows': [1]}); output.close({'rows': [1]}); print('after')"
        )
        with open(tmp_path / "log", "w") as log:
            subprocess.run([sys.executable, "-c", code, name], stdout=log, cwd=tmp_path, check=True)
        text = (tmp_path / "log").read_text()
        assert text.startswith("before\n{")
        assert text.endswith("}\nafter\n")
        assert text.count("rows") == 1

    def test_what_is_refused(self, written, tmp_path, monkeypatch):
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(tmp_path)
            server.bind("socket")
            (tmp_path / "file").write_text("")
            (tmp_path / "round").symlink_to("round")
            (tmp_path / "link").symlink_to("nothing")
            for name, rule in ((".", "folder"), ("socket", "a socket"), ("file/below", "file is no folder"),
                               ("file/far/below", "file is no folder"), ("link/below", "link is no folder"),
                               ("new/", "ends with /"), ("file/", "ends with /"),
                               ("round", "symbolic links"), ("a\0b", "null"), ("x" * 400, "too long"),
                               ("/dev/fd/987654", "Bad file")):  # fmt: skip
                with pytest.raises(ConfigError, match=rule) as caught:
                    written(name)
                assert caught.value.field == "out"

    @pytest.mark.parametrize("folder", ["/proc/{}/fd", "/proc/{}/task/{}/fd"])
    def test_a_descriptor_of_another_process_is_refused(self, written, folder):
        """Its number means something else here, or nothing."""
        with pytest.raises(ConfigError, match="a descriptor of another process, "):
            written(folder.format(os.getppid(), os.getppid()) + "/1")

    def test_only_a_descriptor_that_was_given_is_taken(self, tmp_path, said):
        (tmp_path / "link").symlink_to("/proc/self/fd")
        with open(tmp_path / "log", "w") as log:
            inherited, everything = devices.open_descriptors(True), devices.open_descriptors(False)
            assert {0, 1, 2} <= inherited
            assert log.fileno() in everything - inherited  # opened here: no parent gave it
            for folder in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd", tmp_path / "link"):
                path = Path(f"{folder}/{log.fileno()}")
                with pytest.raises(ConfigError, match="no such descriptor was given to this process"):
                    open_output(path, said.append, inherited)
                assert isinstance(open_output(path, said.append, everything), module.Through)

    def test_the_command_takes_no_descriptor_of_its_own(self, tmp_path):
        code = "import sys; from moe_dist.commands import cli, measuring; "
        code += "measuring.group_starter = None; sys.exit(cli.main())"
        command = [sys.executable, "-c", code, "run", "--device", "cpu", "--out", "/dev/fd/4"]  # signals use a pipe
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "can't be written: no such descriptor was given" in done.stderr

    @pytest.mark.parametrize(
        ("place", "end", "code"),
        [
            ("out.json", "", 0),
            ("/dev/stdout", "", 0),
            ("/dev/stdout", "raise KeyboardInterrupt", 130),
            ("/dev/fd/3", "raise RankFailure(1, 'o', 2, 'c')", 4),
        ],
    )
    def test_the_command_prints_one_document(self, tmp_path, place, end, code):
        measured = row().model_dump_json()
        program = (
            "import sys; from moe_dist.bench.row import Row; from moe_dist.commands import cli, measuring\n"
            "from moe_dist.errors import RankFailure\n"
            "def run_cases(planned, start, timeout_s, outcome, *rest):\n"
            f"    outcome.rows.append(Row.model_validate_json({measured!r}))\n    {end}\n"
            "measuring.run_cases = run_cases; sys.exit(cli.main())"
        )
        command = [sys.executable, "-c", program, "run", "--device", "cpu", "--json", "--out", place]
        done = subprocess.run(
            ["bash", "-c", 'exec "$@" 3>&1', "bash", *command], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["rows"] == [json.loads(measured)]

    def test_standard_output_that_is_closed_keeps_no_results(self, tmp_path):
        program = "import sys; from moe_dist.commands import cli, measuring; "
        program += "measuring.run_cases = lambda *_: sys.exit(9); sys.exit(cli.main())"
        for given in ("--json", ""):
            command = f"exec {sys.executable} -c '{program}' run --device cpu {given} >&-"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 2, done.stderr
            assert "out = None: standard output is closed, so results would go nowhere" in done.stderr

    def test_a_disk_is_refused(self):
        """As root, what writes through would write over it."""
        with pytest.raises(OSError, match="it is a disk"):
            devices.open_device(Path("/dev/none"), stat.S_IFBLK | 0o660)
