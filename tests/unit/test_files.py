"""Small text files of unknown origin: whatever lies there, one line and no wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from moe_dist.files import read_small_text


def said(path: Path | str, limit: int = 100) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011 -- strerror is what is asked for
        read_small_text(path, limit)
    assert caught.value.strerror is not None
    assert "\n" not in caught.value.strerror
    return caught.value.strerror


def test_regular_files_and_links_are_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("größe: 8\r\n".encode())
    (tmp_path / "link").symlink_to(path)
    assert read_small_text(path, 12) == read_small_text(str(tmp_path / "link"), 12) == "größe: 8\r\n"
    (tmp_path / "empty").touch()
    assert read_small_text(tmp_path / "empty", 0) == ""


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_named_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert said(tmp_path / "fifo") == "is a FIFO, not a regular file"
    assert said(tmp_path / "zero") == said("/dev/null") == "is a device, not a regular file"
    assert said(tmp_path) == "is a folder, not a regular file"
    assert "symbolic links" in said(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the name of a socket has a small limit
        listening.bind("socket")
        assert said(tmp_path / "socket") == "is a socket, not a regular file"


def test_size_and_coding(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("x" * 101)
    assert said(path) == "is larger than the 100 bytes that such a file may have"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    assert "is larger than" in said(path)
    path.write_bytes(b"ab\xff")
    assert said(path) == "is no UTF-8 text: invalid start byte at byte 2"


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_small_text(tmp_path / "missing", 100)
    assert "null" in said("a\0b")
    assert said("x" * 5000) == "File name too long"
