# SPDX-License-Identifier: Apache-2.0
"""Sockets to which only their owner may connect."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.host.private_socket import bind_private


@pytest.fixture
def path() -> Iterator[str]:
    """A short path: the system allows 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vmm-sock-") as folder:
        yield os.path.join(folder, "s")


def test_a_socket_is_private(path: str, umask: None) -> None:
    """INV-NEW-PRIVATE: a socket has mode 0600 whatever the umask, replaces an old one, and does not change the
    umask."""
    bind_private(path).close()
    with bind_private(path) as listener, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        client.connect(path)
        listener.accept()[0].close()


def test_a_socket_never_has_more_rights(path: str, umask: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NEW-PRIVATE: when its name appears, a socket already has only its final rights."""
    seen: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            seen.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    bind_private(path).close()
    assert len(seen) == 1 and seen[0] & ~0o600 == 0


def test_a_socket_that_cannot_be_made_is_closed(tmp_path: Path) -> None:
    """A missing folder is an OSError, and nothing is left open (warnings are errors)."""
    with pytest.raises(FileNotFoundError):
        bind_private(str(tmp_path / "no" / "s"))
