# SPDX-License-Identifier: Apache-2.0
"""A port's socket in a folder that its guest's process can write to."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_root
from vmm.model import errors
from vmm.net.engine import Port, PortRules
from vmm.net.port_socket import PortSocket
from vmm.net.ports import PortSetup

STRANGER = 54321


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vmm-port-") as name:
        yield Path(name)


def opened(folder: Path, owner: int | None) -> PortSocket:
    """The port's socket in this folder."""
    setup = PortSetup("p", str(folder / "switch.sock"), str(folder / "guest.sock"), owner=owner)
    return PortSocket(Port("p", PortRules()), setup)


def test_only_its_owner_may_send(folder: Path) -> None:
    """The socket has mode 0600 from its first moment on."""
    usual = os.umask(0)
    try:
        sock = opened(folder, None)
    finally:
        os.umask(usual)
    assert (folder / "switch.sock").stat().st_mode & 0o777 == 0o600
    sock.close()


@pytest.mark.parametrize("swapped", ["link", "file", "another name"])
def test_a_swapped_name_does_not_change_other_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    """If a guest's process puts another file in its place, that file keeps its mode and its owner."""
    require_root()
    victim = folder / "victim"
    victim.write_text("secret")
    victim.chmod(0o644)

    class Swapping(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            path = Path(str(address))
            if swapped == "another name":
                os.link(path, folder / "other")
                return
            path.unlink()
            path.symlink_to(victim) if swapped == "link" else os.link(victim, path)

    monkeypatch.setattr("vmm.net.port_socket.socket.socket", Swapping)
    with pytest.raises(errors.VmmError):
        opened(folder, STRANGER)
    assert victim.stat().st_mode & 0o777 == 0o644
    assert all(path.lstat().st_uid == 0 for path in folder.iterdir())


def test_the_socket_is_given_to_its_guest(folder: Path) -> None:
    """Its owner is QEMU's user."""
    require_root()
    sock = opened(folder, STRANGER)
    assert (folder / "switch.sock").stat().st_uid == STRANGER
    sock.close()
