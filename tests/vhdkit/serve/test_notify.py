# SPDX-License-Identifier: Apache-2.0
"""Notifications to the service manager."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vhdkit.serve.notify import READY, notify


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_manager_is_notified(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state arrives as one datagram, at a path or at an abstract name."""
    name = str(tmp_path / "n.sock") if kind == "path" else f"@vhdkit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if kind == "abstract" else name)
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify(READY)
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("name", [None, "", "@", "relative", "/no/such/socket", "@no-manager-here-vhdkit"])
def test_without_a_listening_manager(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manager, or with one that is gone, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not notify(READY)
