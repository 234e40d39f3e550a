# SPDX-License-Identifier: Apache-2.0
"""Files sent to sockets by the kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vhdkit import errors, page_cache
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB


def test_what_arrives(tmp_path: Path) -> None:
    """The range arrives in as many parts as the socket takes; then, and past the end of the file, nothing is sent."""
    path = tmp_path / "file"
    content = os.urandom(MIB + 100)
    path.write_bytes(content)
    ours, theirs = socket.socketpair()
    with ours, theirs, FileStore.open(path) as file:
        theirs.setblocking(False)
        got, position = b"", 5
        while position < len(content):
            sent = file.send(theirs.fileno(), position, len(content) - position)
            if sent:
                position += sent
            else:
                got += ours.recv(MIB)
        theirs.shutdown(socket.SHUT_WR)
        while piece := ours.recv(MIB):
            got += piece
        assert got == content[5:]
        assert file.send(theirs.fileno(), len(content), 10) == 0
        ours.close()
        assert file.send(theirs.fileno(), 0, 10) == 0


def test_a_range_past_the_end_is_not_sendable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends inside the range cannot be sent whole, whatever the page cache has."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * KIB))
    monkeypatch.setattr(page_cache, "holds", lambda fd, offset, size: True)
    with FileStore.open(path) as file:
        file.pread(0, 64 * KIB)
        assert file.can_send(0, 64 * KIB)
        assert not file.can_send(0, 64 * KIB + 1)
        monkeypatch.setattr(page_cache, "holds", lambda fd, offset, size: False)
        assert not file.can_send(0, 64 * KIB)


def test_a_closed_file_is_not_sent(tmp_path: Path) -> None:
    """The number of a closed descriptor may belong to another file."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    file = FileStore.open(path)
    file.close()
    with pytest.raises(errors.DiskClosed):
        file.can_send(0, 1)
    with pytest.raises(errors.DiskClosed):
        file.send(0, 0, 1)
