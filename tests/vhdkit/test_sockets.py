# SPDX-License-Identifier: Apache-2.0
"""Unix sockets under names: which users may connect, whatever the umask. Names of dead sockets: `test_listen`."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest

from vhdkit.sockets import SocketFile


@pytest.mark.parametrize("shared", [False, True])
def test_permitted_users(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: None) -> None:
    """INV-NEW-PRIVATE: a socket is private to its owner, or to a named group, and never wider."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    seen: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            seen.append(stat.S_IMODE(os.stat("s").st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    with closing(SocketFile("s", owner=(os.getuid(), os.getgid()) if shared else None)) as file:
        assert stat.S_IMODE(os.stat("s").st_mode) == (0o660 if shared else 0o600)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("s")
            file.socket.accept()[0].close()
    assert len(seen) == 1 and seen[0] & ~0o600 == 0
    assert not os.path.lexists("s")
