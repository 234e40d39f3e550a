# SPDX-License-Identifier: Apache-2.0
"""A `user` switch in its own process, whose guests are sockets of the test."""

from __future__ import annotations

import shutil
import socket
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vmm.net.ports import PortSetup
from vmm.net.switch_process import SwitchProcess


class SwitchLab:
    """One switch; `close` ends it, whatever happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmm-switch-"))
        monkeypatch.setenv("VMM_RUNTIME", str(self.folder / "rt"))
        self.backend = SwitchProcess.of(str(uuid.uuid4()), "lab")
        self.guests: dict[str, socket.socket] = {}

    def setup(self, name: str) -> PortSetup:
        """The addresses of the port."""
        return PortSetup(name, str(self.folder / f"{name}.s"), str(self.folder / f"{name}.g"))

    def plug(self, name: str, **changes: object) -> socket.socket:
        """Plug in a guest like QEMU: a bound socket that sends to a path; return its port."""
        setup = replace(self.setup(name), **changes)  # type: ignore[arg-type]
        if name not in self.guests:
            guest = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            guest.bind(setup.peer)
            guest.settimeout(10)
            self.guests[name] = guest
        assert self.backend.plug(setup)
        return self.guests[name]

    def send(self, name: str, frame: bytes) -> None:
        """Send frames as QEMU does."""
        self.guests[name].sendto(frame, self.setup(name).address)

    def wait_for_end(self) -> None:
        """Wait until the process that was asked to end has ended."""
        wait_until(lambda: not self.backend.is_running(), "the switch ends")

    def close(self) -> None:
        """End the switch and remove everything."""
        try:
            self.backend.stop()
        finally:
            for guest in self.guests.values():
                guest.close()
            shutil.rmtree(self.folder, ignore_errors=True)
