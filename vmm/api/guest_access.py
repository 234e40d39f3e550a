# SPDX-License-Identifier: Apache-2.0
"""The inside of a machine, for programs and the command line: console, screen, agent, exchanged items.

Decides which of these need a running machine, and that exchanged items can also be read and set while it is off. The
counterpart in the worker is `guest_services`. Must not know terminals. Synchronous, and light to import.

    guest = Manager().guest("web")
    guest.screen()                          # a PNG
    guest.set_item("role", "front end")     # the guest finds it under that key
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.api import machines
from vmm.model.errors import NotFound, VmmError, WrongState
from vmm.model.folders import in_use, uses_own_folders
from vmm.processes.worker_connection import MachineRef

if TYPE_CHECKING:
    from vmm.api.machine import OpenMachine
    from vmm.kvm.console import Typing
    from vmm.kvm.picture import Picture
    from vmm.model.guest import ExchangedItem, GuestInfo, Heartbeat

FREEZE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ConsoleConnection:
    """A two-way connection to a serial console, which the caller closes, and whether input on it is accepted."""

    link: socket.socket
    may_type: bool


@uses_own_folders
class GuestAccess:
    """The inside of one machine."""

    def __init__(self, place: MachineRef) -> None:
        self._place = place
        self.folders = in_use()

    # -- console and screen -----------------------------------------------------------------------------------------

    def open_console(self, *, typing: Typing = "alone", scrollback_bytes: int | None = None) -> ConsoleConnection:
        """A connection to the serial console.

        Raises WrongState if the machine is off, InUse if too many clients are connected.
        """
        from vmm.kvm import console

        size = console.SCROLLBACK_BYTES if scrollback_bytes is None else scrollback_bytes
        try:
            link, answer = console.open_console(self._place.runtime.console, typing=typing, scrollback_bytes=size)
        except NotFound:
            with machines.reach(self._place) as machine:  # raises with its state, or restarts its worker
                machine.need_guest()
            link, answer = console.open_console(self._place.runtime.console, typing=typing, scrollback_bytes=size)
        except VmmError as error:
            error.machine = error.machine or self._place.name
            raise
        return ConsoleConnection(link, answer["typing"] is True)

    def has_console(self) -> bool:
        """True while the console exists, also while a new worker replaces one that died."""
        return os.path.exists(self._place.runtime.console)

    def console_log(self) -> bytes:
        """What is kept of the guest's console output, whether the machine runs or not."""
        from vmm.kvm.console import read_log

        return read_log(self._place.machine.console_log)

    def screen(self) -> bytes:
        """A picture of the screen, as PNG. Raises WrongState when the machine is off or has no screen."""
        with machines.reach(self._place) as machine:
            return machine.screen()

    def picture(self) -> Picture:
        """The same for programs, which can compare it with others. Raises WrongState."""
        with machines.reach(self._place) as machine:
            return machine.picture()

    def vnc_socket(self) -> str:
        """The unix socket of the machine's VNC server. Raises WrongState when it is off or has no screen."""
        with machines.reach(self._place) as machine:
            machine.need_guest()
        if not os.path.exists(self._place.runtime.vnc):
            raise WrongState("has no screen", machine=self._place.name)
        return self._place.runtime.vnc

    # -- agent ------------------------------------------------------------------------------------------------------

    def ping(self) -> Heartbeat:
        """The heartbeat, requested now. Raises AgentUnavailable, TimedOut."""
        with machines.reach(self._place) as machine:
            return machine.ping()

    def info(self) -> GuestInfo:
        """What the guest's agent says: heartbeat, system, addresses. Raises AgentUnavailable."""
        with machines.reach(self._place) as machine:
            return machine.guest_info()

    def freeze(self, max_seconds: float = FREEZE_SECONDS) -> int:
        """Flush and freeze the guest's file systems; returns how many. They thaw by themselves after `max_seconds`."""
        with machines.reach(self._place) as machine:
            return machine.freeze(max_seconds)

    def thaw(self) -> int:
        """Thaw them; returns how many. Raises TimedOut if they had to be thawed earlier."""
        with machines.reach(self._place) as machine:
            return machine.thaw()

    def set_time(self) -> None:
        """Set the guest's clock to the host's."""
        with machines.reach(self._place) as machine:
            machine.set_time()

    # -- exchanged items --------------------------------------------------------------------------------------------

    def items(self) -> dict[str, dict[str, str]]:
        """All items of both pools: {"host": {key: value}, "guest": {...}}. Raises AgentUnavailable when it is off."""
        with machines.reach(self._place) as machine:
            return machine.items()

    def get_item(self, key: str, pool: str | None = None) -> ExchangedItem:
        """An item, from the guest's pool and then the host's unless one is named. Raises NotFound."""
        with machines.reach(self._place) as machine:
            return machine.get_item(key, pool)

    def set_item(self, key: str, value: str) -> bool:
        """Set an item of the host's pool; True if the guest has accepted it already. Raises InvalidSpec."""
        with self._for_a_change() as machine:
            return machine.set_item(key, value)

    def delete_item(self, key: str) -> bool:
        """Remove an item of the host's pool; True if the guest has received the deletion. Raises NotFound."""
        with self._for_a_change() as machine:
            return machine.delete_item(key)

    @contextlib.contextmanager
    def _for_a_change(self) -> Iterator[OpenMachine]:
        """Open the machine: through its worker if it runs, which needs no lock; otherwise its file, under its lock."""
        with machines.reach(self._place) as machine:
            if machine.is_running:
                yield machine
                return
        with machines.open(self._place.name, stop_merge=False) as machine:
            yield machine
