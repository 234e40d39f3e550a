# SPDX-License-Identifier: Apache-2.0
"""The inside of a machine, for programs and the command line: console, screen, agent, exchanged items.

Decides which of these need a running machine, and that exchanged items can also be read and set while it is off. The
counterpart in the worker is `guest_services`. Must not know terminals. Synchronous, and light to import.

    guest = Manager().guest("web")
    guest.screen()                          # a PNG
    guest.set_item("role", "front end")     # the guest finds it under that key
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmm.model.errors import NotFound, VmmError, WrongState
from vmm.processes import worker_connection as contact
from vmm.processes.rpc import ANSWER_SECONDS, ControlClient
from vmm.processes.worker_connection import Place

if TYPE_CHECKING:
    from vmm.kvm.console import Typing
    from vmm.kvm.key_value import KeyValueStore, Pool

FREEZE_SECONDS = 10.0
_FREEZING_SECONDS = 120.0  # the guest writes out all that is dirty first


class GuestAccess:
    """The inside of one machine."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def _connect(self) -> ControlClient:
        """A connection to the machine's worker. Raises WrongState where it does not run."""
        client = contact.contact(self._place)
        if client is None:
            state = contact.state_of(self._place)["state"]
            name = self._place.name
            raise WrongState(f"is {state}: no guest is running", machine=name, hint=f"start it: vmm start {name}")
        return client

    def _call(self, method: str, timeout_seconds: float = ANSWER_SECONDS, **params: object) -> Any:
        with self._connect() as worker:
            return worker.call(method, timeout_seconds=timeout_seconds, progress=None, **params)

    # -- console and screen -----------------------------------------------------------------------------------------

    def open_console(
        self, *, typing: Typing = "alone", scrollback_bytes: int | None = None
    ) -> tuple[socket.socket, bool]:
        """A two-way connection to the serial console, and whether input on it is accepted.

        Raises WrongState if the machine is off, InUse if too many people watch.
        """
        from vmm.kvm import console

        size = console.SCROLLBACK_BYTES if scrollback_bytes is None else scrollback_bytes
        try:
            link, answer = console.open_console(self._place.runtime.console, typing=typing, scrollback_bytes=size)
        except NotFound:
            self._connect().close()  # says what state it is in, or brings the worker back
            link, answer = console.open_console(self._place.runtime.console, typing=typing, scrollback_bytes=size)
        except VmmError as error:
            error.machine = error.machine or self._place.name
            raise
        return link, answer["typing"] is True

    def has_console(self) -> bool:
        """True while there is a console, also while a new worker replaces one that died."""
        return os.path.exists(self._place.runtime.console)

    def console_log(self) -> bytes:
        """What is kept of the guest's console output, whether the machine runs or not."""
        from vmm.kvm.console import read_log

        return read_log(self._place.machine.console_log)

    def screen(self) -> bytes:
        """A picture of the screen, as PNG. Raises WrongState when the machine is off or has no screen."""
        return base64.b64decode(self._call("screen")["png"])

    def vnc_socket(self) -> str:
        """The unix socket of the machine's VNC server. Raises WrongState when it is off or has no screen."""
        with self._connect():
            pass
        if not os.path.exists(self._place.runtime.vnc):
            raise WrongState("has no screen", machine=self._place.name)
        return self._place.runtime.vnc

    # -- agent ------------------------------------------------------------------------------------------------------

    def ping(self) -> dict[str, Any]:
        """The heartbeat, requested now: {"state", "seen_seconds_ago"}. Raises AgentUnavailable, TimedOut."""
        answer: dict[str, Any] = self._call("agent-ping")
        return answer

    def info(self) -> dict[str, Any]:
        """What the guest's agent says: {"heartbeat", "os": {...}, "interfaces": [...]}. Raises AgentUnavailable."""
        answer: dict[str, Any] = self._call("agent-info")
        return answer

    def freeze(self, max_seconds: float = FREEZE_SECONDS) -> int:
        """Flush and freeze the guest's file systems; returns how many. They thaw by themselves after `max_seconds`."""
        answer = self._call("agent-freeze", max_seconds=max_seconds, timeout_seconds=_FREEZING_SECONDS)
        return int(answer["count"])

    def thaw(self) -> int:
        """Thaw them; returns how many. Raises TimedOut if they had to be thawed earlier."""
        return int(self._call("agent-thaw", timeout_seconds=_FREEZING_SECONDS)["count"])

    def set_time(self) -> None:
        """Set the guest's clock to the host's."""
        self._call("agent-set-time")

    # -- exchanged items --------------------------------------------------------------------------------------------

    def items(self) -> dict[str, dict[str, str]]:
        """All items of both pools: {"host": {key: value}, "guest": {...}}. Raises AgentUnavailable when it is off."""
        try:
            items: dict[str, dict[str, str]] = self._call("kvp-list")["items"]
            return items
        except WrongState:
            store = self._store()
            return {"host": store.items("host"), "guest": store.items("guest")}

    def get_item(self, key: str, pool: str | None = None) -> tuple[str, str]:
        """(value, pool) of a key, from the guest's pool and then the host's unless one is named. Raises NotFound."""
        from vmm.kvm.key_value import find_item, pool_named

        try:
            answer = self._call("kvp-get", key=key, pool=pool)
            return answer["value"], answer["pool"]
        except WrongState:
            return find_item(self._store().get, key, pool_named(pool))

    def set_item(self, key: str, value: str) -> bool:
        """Set an item of the host's pool; True if the guest has accepted it already. Raises InvalidSpec."""
        try:
            return bool(self._call("kvp-set", key=key, value=value)["taken"])
        except WrongState:
            return self._change(lambda store, pool: store.set(pool, key, value))

    def delete_item(self, key: str) -> bool:
        """Remove an item of the host's pool; True if the guest has been told already. Raises NotFound."""
        try:
            return bool(self._call("kvp-delete", key=key)["taken"])
        except WrongState:
            return self._change(lambda store, pool: store.delete(pool, key))

    def _store(self) -> KeyValueStore:
        from vmm.kvm.key_value import KeyValueStore, store_path

        return KeyValueStore(store_path(self._place.machine.folder))

    def _change(self, change: Callable[[KeyValueStore, Pool], None]) -> bool:
        """Change the file of a machine that is off, while nobody starts it."""
        with contact.changing(self._place.name, stop_merge=False) as (machine, client):
            if client is not None:
                raise WrongState("was started just now", machine=machine.name, hint="try again")
            store = self._store()
            change(store, "host")
            store.save()
        return False
