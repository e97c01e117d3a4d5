"""Tuning tables: what a file holds, which one is found, what is said where none is."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist import tables
from moe_dist.errors import ConfigError
from moe_dist.messages.notices import collecting
from moe_dist.model.spec import MoESpec
from moe_dist.tables import Entry, Shape, TuningTable, find_table, read_table, table_source, tuned_config, user_folder

SHAPE = Shape("triton", "NVIDIA H200", "fp8_block", "swiglu", 7168, 2048, 64, 256, 8)


def entry(name: object = "best", **changes) -> Entry:
    return replace(Entry({"name": name}, us=10.5, floor_us=8.25, default_us=12.0, err_oracle=2e-3), **changes)


def table(*, shape: Shape = SHAPE, revision: int = 3, entries: dict[int, Entry] | None = None) -> TuningTable:
    made = {"date": "2026-11-22T12:00:00Z", "commit": "abc", "command": "moe-dist tune", "machine": {"torch": "2.13"}}
    return TuningTable(shape=shape, revision=revision, entries=entries or {8: entry()}, **made)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's and the shipped folder, both of this test alone."""
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    find_table.cache_clear()
    tables.say_missing_once.cache_clear()
    yield user_folder(), tables.SHIPPED
    find_table.cache_clear()


class TestShape:
    def test_file_name(self):
        assert SHAPE.file_name == "triton--NVIDIA_H200--fp8_block--swiglu--H7168-I2048-E64of256-K8.json"
        assert "/" not in replace(SHAPE, device="a/b (c)").file_name

    def test_every_field_makes_another_file(self):
        others = [replace(SHAPE, **{name: 1 if isinstance(value, int) else "x"}) for name, value in vars(SHAPE).items()]
        assert len({shape.file_name for shape in [SHAPE, *others]}) == 1 + len(vars(SHAPE))

    def test_of_a_spec(self):
        spec = MoESpec(hidden=7168, intermediate=4096, num_experts=256, top_k=8)
        assert Shape.of("triton", "NVIDIA H200", spec, 2048, 64) == SHAPE
        assert Shape.of("triton", "x", spec.with_changes(quant="none"), 2048, 64).quant == "bf16"


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path):
        made = table(entries={128: entry(floor_us=None), 8: entry(64)})
        path = made.write(tmp_path / "new" / "folder")
        assert path.name == SHAPE.file_name
        assert read_table(path) == made
        assert [other.name for other in path.parent.iterdir()] == [path.name]

    def test_one_line_an_entry_in_the_order_of_their_rows(self, tmp_path: Path):
        buckets = (128, 8, 1024)
        path = table(entries={rows: entry(rows) for rows in buckets}).write(tmp_path)
        lines = path.read_text().splitlines()
        starts = [
            next(n for n, line in enumerate(lines) if line.startswith(f'  "{rows}": {{"config"')) for rows in buckets
        ]
        assert starts[1] + 1 == starts[0] == starts[2] - 1
        again = table(entries={rows: entry(rows) for rows in reversed(buckets)}).write(tmp_path / "again")
        assert again.read_text() == path.read_text()

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch):
        path = table().write(tmp_path)
        before = path.read_text()

        def fail(*_, **__):
            raise OSError("no space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            table(revision=4).write(tmp_path)
        assert path.read_text() == before

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            (lambda found: found.pop("commit"), "table.commit"),
            (lambda found: found.update(more=1), "table.more"),
            (lambda found: found.update(revision="new"), "table.revision"),
            (lambda found: found.update(entries={}), "table.entries"),
            (lambda found: found["entries"].update({"0": found["entries"]["8"]}), "table.entries"),
            (lambda found: found["entries"]["8"].pop("config"), "table.entries.8.config"),
            (lambda found: found["entries"]["8"].update(us=0), "table.entries.8.us"),
            (lambda found: found["entries"]["8"].update(us="5"), "table.entries.8.us"),
            (lambda found: found["entries"]["8"].update(us=True), "table.entries.8.us"),
            (lambda found: found["entries"]["8"].update(err_oracle="0"), "table.entries.8.err_oracle"),
            (lambda found: found["entries"].update({"9" * 4301: found["entries"]["8"]}), "table.entries"),
            (lambda found: found["entries"].update({"16777217": found["entries"]["8"]}), "table.entries"),
            (lambda found: found["entries"].update({"\uff18": found["entries"]["8"]}), "table.entries"),
            (lambda found: found["entries"]["8"].update(err_oracle=None), "table.entries.8.err_oracle"),
            (lambda found: found["entries"]["8"].update(speed=1), "table.entries.8.speed"),
            (lambda found: found["shape"].update(hidden="wide"), "table.shape.hidden"),
            (lambda found: found["shape"].update(hidden=4096), "table.shape"),  # another file's content
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_broken_one_names_file_and_field(self, tmp_path: Path, change, field):
        path = table().write(tmp_path)
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        with pytest.raises(ConfigError) as broken:
            read_table(path)
        assert broken.value.field.startswith(f"{path}: {field}")

    @pytest.mark.parametrize(("text", "said"), [("{", "no valid JSON"), ("[1]", "holds list")])
    def test_one_that_is_no_table_at_all(self, tmp_path: Path, text, said):
        path = tmp_path / SHAPE.file_name
        path.write_text(text)
        with pytest.raises(ConfigError, match=said) as broken:
            read_table(path)
        assert broken.value.value == str(path)

    def test_numbers_that_json_has_not_are_never_written(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"table\.entries\.8\.us"):
            table(entries={8: entry(us=float("inf"))})
        with pytest.raises(ValueError, match="JSON"):
            table(entries={8: entry(float("nan"))}).write(tmp_path)
        assert list(tmp_path.glob("*.json")) == []


class TestNearest:
    @pytest.mark.parametrize(
        ("rows", "expected"),
        [(0, 1), (1, 1), (2, 1), (3, 8), (8, 8), (22, 8), (23, 64), (64, 64), (181, 64), (182, 512), (100_000, 512)],
    )
    def test_takes_the_nearest_by_ratio(self, rows, expected):
        made = table(entries={bucket: entry(bucket) for bucket in (512, 1, 64, 8)})
        assert made.nearest(rows) == expected

    def test_of_two_as_near_the_smaller(self):
        assert table(entries={16: entry(16), 4: entry(4)}).nearest(8) == 4


class TestFind:
    def test_the_users_goes_before_the_shipped_one(self, folders):
        user, shipped = folders
        assert find_table(SHAPE, 3) is None
        table(entries={8: entry("shipped")}).write(shipped)
        assert find_table(SHAPE, 3).entries[8].config == {"name": "shipped"}
        assert table_source(SHAPE, 3) == "shipped"
        table(entries={8: entry("user")}).write(user)
        assert find_table(SHAPE, 3).entries[8].config == {"name": "user"}
        assert table_source(SHAPE, 3) == "user"

    @pytest.mark.parametrize("revision", [2, 4])
    def test_another_revision_is_passed_over(self, folders, revision):
        user, shipped = folders
        table(revision=revision).write(user)
        assert find_table(SHAPE, 3) is None
        assert table_source(SHAPE, 3) is None
        table(entries={8: entry("shipped")}).write(shipped)
        assert find_table(SHAPE, 3).entries[8].config == {"name": "shipped"}

    def test_another_shape_is_not_found(self, folders):
        table().write(folders[0])
        assert find_table(replace(SHAPE, device="NVIDIA H100"), 3) is None

    def test_is_read_once(self, folders):
        path = table().write(folders[0])
        found = find_table(SHAPE, 3)
        path.unlink()
        assert find_table(SHAPE, 3) is found

    @pytest.mark.parametrize("text", ["{", "[" * 200_000, '{"revision": ' + "9" * 5000 + "}", "\udc80"])
    def test_a_broken_one_is_never_passed_over_in_silence(self, folders, text):
        table().write(folders[1])
        (folders[0] / SHAPE.file_name).parent.mkdir(parents=True)
        (folders[0] / SHAPE.file_name).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=r"no valid JSON|no UTF-8 text"):
            find_table(SHAPE, 3)

    @pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a link to nothing"])
    def test_what_is_no_file_is_never_passed_over(self, folders, kind):
        table().write(folders[1])
        folders[0].mkdir(parents=True)
        path = folders[0] / SHAPE.file_name
        {"a folder": Path.mkdir, "a FIFO": os.mkfifo, "a link to nothing": lambda at: at.symlink_to("gone")}[kind](path)
        with pytest.raises(ConfigError, match=f"{SHAPE.file_name}': can't be read"):
            find_table(SHAPE, 3)

    def test_the_users_of_another_revision_is_passed_over_aloud(self, folders):
        path = table(revision=2).write(folders[0])
        table(entries={8: entry("shipped")}).write(folders[1])
        with collecting() as said:
            assert tuned_config(SHAPE, 3, 8).config == {"name": "shipped"}
            assert tuned_config(SHAPE, 3, 8).config == {"name": "shipped"}
        assert said == [f"the shipped tuning table is used; {path} is passed over: its configs are of another revision"]

    def test_no_home_directory(self, monkeypatch):
        """Nobody is asked for one while another folder is named."""

        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", none)
        assert user_folder().name == "tables"
        monkeypatch.delenv("MOE_DIST_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert user_folder() == Path("/xdg/moe_dist/tables")
        monkeypatch.delenv("XDG_CACHE_HOME")
        with pytest.raises(ConfigError, match="MOE_DIST_CACHE = None: is not set"):
            user_folder()
        with pytest.raises(ConfigError, match="MOE_DIST_CACHE"):
            find_table(SHAPE, 3)

    def test_the_users_folder(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.setenv("MOE_DIST_CACHE", "/own")
        assert user_folder() == Path("/own/tables")
        monkeypatch.delenv("MOE_DIST_CACHE")
        assert user_folder() == Path("/xdg/moe_dist/tables")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/me")
        assert user_folder() == Path("/home/me/.cache/moe_dist/tables")
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # to be passed over, says its specification
        assert user_folder() == Path("/home/me/.cache/moe_dist/tables")
        monkeypatch.setenv("MOE_DIST_CACHE", "~/own")  # as it comes from a file that no shell has read
        assert user_folder() == Path("/home/me/own/tables")

    @pytest.mark.parametrize("given", ["cache", "./cache", "~no-such-user/cache"])
    def test_a_folder_that_depends_on_where_one_stands_is_refused(self, monkeypatch, given):
        monkeypatch.setenv("MOE_DIST_CACHE", given)
        with pytest.raises(ConfigError, match=r"MOE_DIST_CACHE = .*working directory.* \(legal: an absolute path"):
            user_folder()


class TestChoice:
    @pytest.mark.parametrize(
        ("rows", "config", "source"),
        [(8, 8, "tuned"), (9, 8, "nearest:8"), (0, 8, "nearest:8"), (64, 64, "tuned"), (4096, 64, "nearest:64")],
    )
    def test_says_where_the_config_comes_from(self, folders, rows, config, source):
        table(entries={8: entry(8), 64: entry(64)}).write(folders[1])
        with collecting() as said:
            assert tuned_config(SHAPE, 3, rows) == ({"name": config}, source)
        assert said == []


class TestMissing:
    def test_is_said_once_a_shape(self):
        with collecting() as said:
            assert tuned_config(SHAPE, 3, 8) is None
            assert tuned_config(SHAPE, 3, 16) is None
            (line,) = said
            for words in (SHAPE.file_name, "not found", "moe-dist tune --backend triton"):
                assert words in line
            other = replace(SHAPE, width=1024)
            assert tuned_config(other, 3, 8) is None
        assert [other.file_name in line for line in said] == [False, True]

    def test_of_another_revision_is_said_too(self, folders):
        path = table(revision=2).write(folders[0])
        with collecting() as said:
            assert tuned_config(SHAPE, 3, 8) is None
        (line,) = said
        assert f"passed over, its configs are of another revision of triton: {path}" in line
        assert "moe-dist tune --backend triton" in line


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"revision": 3', '"revision": 3, "revision": 3', "stands there twice"),
        ('"revision": 3', '"revision": true', "revision"),
        ('"width": 2048', '"width": "2048"', "width"),
        ('"8": {', '"08": {', "is no number of rows"),
        ('"8": {', '" 8": {', "is no number of rows"),
        ('"err_oracle": 0.002', '"err_oracle": 5.0', "err_oracle"),
    ],
)
def test_a_table_that_could_be_read_in_two_ways_is_refused(tmp_path, old, new, said):
    path = table().write(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said):
        read_table(path)
