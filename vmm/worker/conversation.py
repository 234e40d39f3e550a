# SPDX-License-Identifier: Apache-2.0
"""The conversation with one QEMU: what it reports, for as long as it is alive.

Decides what each of QEMU's events means for the machine, and how a failed disk is retried. What follows from a change
of QEMU's status is decided in `states`. If the connection breaks off, a new one is made: QEMU may still be alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, assert_never

from vmm.kvm.drives import problem_of_store
from vmm.kvm.guest_agent import GuestAgent
from vmm.kvm.key_value import KeyValueChannel
from vmm.kvm.qmp import Event, Qmp
from vmm.model.errors import QemuFailed, VmmError
from vmm.model.paths import RuntimePaths
from vmm.model.spec import MachineSpec
from vmm.store.state import WorkerNote
from vmm.worker.clock import GuestClock
from vmm.worker.states import Effect, End, StatusReport, effects_of

STOP_SECONDS = 20.0  # stop and cont wait for requests in flight, whose server may be restarting
RETRY_SECONDS = (0.3, 0.5, 1.0, 2.0, 3.0)  # between attempts to continue after a disk failed
SOON_SECONDS = 0.05  # for what follows at once, if it follows

Data = Mapping[str, Any]

_FULL = "the disk is full"


class Machine(Protocol):
    """What is needed of a running machine; `running.Running` provides it."""

    runtime: RuntimePaths
    note: WorkerNote
    agent: GuestAgent
    exchange: KeyValueChannel
    clock: GuestClock
    exited: asyncio.Event
    end: End | None
    filling: dict[str, Any] | None

    @property
    def spec(self) -> MachineSpec: ...
    @property
    def is_paused_by_user(self) -> bool: ...
    def tell(self, event: str, **details: object) -> None: ...
    def in_background(self, work: Coroutine[Any, Any, None]) -> None: ...
    async def quit(self, end: End) -> None: ...


class Conversation:
    """What QEMU says about one running machine. For one event loop."""

    def __init__(self, running: Machine) -> None:
        self._running = running
        self._qmp: Qmp | None = None
        self._is_retrying = False
        self.status = "prelaunch"  # QEMU's word
        self.is_known = False  # True once QEMU has reported its status
        self.critical_reason: str | None = None  # why a disk failed last
        self._events: dict[str, Callable[[Data], Awaitable[None]]] = {
            "BLOCK_IO_ERROR": self._disk_failed,
            "STOP": self._status_changed,
            "RESUME": self._status_changed,
            "SUSPEND": self._status_changed,
            "WAKEUP": self._status_changed,
            "RESET": self._was_reset,
            "VSERPORT_CHANGE": self._port_event,
            "SHUTDOWN": self._shut_down,
            "GUEST_PANICKED": self._panicked,
        }

    @property
    def qmp(self) -> Qmp:
        """The monitor. Raises QemuFailed while it is not connected."""
        if self._qmp is None or not self._qmp.is_connected:
            raise QemuFailed("QEMU cannot be reached at the moment", hint="try again")
        return self._qmp

    @property
    def is_open(self) -> bool:
        """True while QEMU's monitor is connected."""
        return self._qmp is not None and self._qmp.is_connected

    @property
    def has_begun(self) -> bool:
        """True if QEMU has reported its status, in this conversation or an earlier one, and a monitor is set."""
        return self._qmp is not None and self.is_known

    def begin(self, qmp: Qmp | None) -> None:
        """Listen in the background, on this connection; without one, connect first."""
        self._qmp = qmp
        self._running.in_background(self._listen())

    async def close(self) -> None:
        """End the conversation."""
        if self._qmp is not None:
            await self._qmp.close()
            self._qmp = None

    async def _listen(self) -> None:
        """Listen for as long as QEMU is alive; reconnect when the connection breaks off."""
        while not self._running.exited.is_set():
            try:
                if self._qmp is None:
                    self._qmp = await Qmp.connect(self._running.runtime.qmp)
                    await self.refresh()
                await self._look_at_ports()
                async for event in self._qmp.events():
                    await self._hear(event)
            except VmmError:
                pass
            finally:
                await self.close()
            await asyncio.sleep(SOON_SECONDS)  # QEMU may be about to end; else it listens again in a moment

    # -- events --------------------------------------------------------------------------------------------------

    async def _hear(self, event: Event) -> None:
        if (handler := self._events.get(event["event"])) is not None:
            await handler(event.get("data") or {})

    async def _disk_failed(self, data: Data) -> None:
        reason = _FULL if data.get("nospace") else data.get("reason") or "failed"
        self.critical_reason = f"{data.get('node-name') or data.get('device')}: {data.get('operation')}: {reason}"

    async def _status_changed(self, data: Data) -> None:
        await self.refresh()

    async def _was_reset(self, data: Data) -> None:
        self._running.note.details["booted"] = time.time()
        self._running.tell("reset", by_guest=data.get("guest"))

    async def _port_event(self, data: Data) -> None:
        self._port_changed(str(data.get("id")), bool(data.get("open")))

    async def _shut_down(self, data: Data) -> None:
        self._powered_off(str(data.get("reason")))

    async def _panicked(self, data: Data) -> None:
        self._running.tell("guest-panicked")

    async def _look_at_ports(self) -> None:
        """Ask whether the guest holds its channels open: QEMU reports only changes."""
        for device in await self.qmp.execute("query-chardev"):
            self._port_changed(device["label"], bool(device["frontend-open"]))

    def _port_changed(self, port: str, is_open: bool) -> None:
        if port == "agent":
            self._running.agent.port_changed(is_open)
        elif port == "kvp":
            self._running.exchange.port_changed(is_open)

    def _powered_off(self, reason: str) -> None:
        running = self._running
        if running.end is not None:
            return
        running.end = End.STOPPED if reason.startswith("host-") else End.POWERED_OFF
        running.tell("powered-off" if running.end is End.POWERED_OFF else "stopped", by=reason)
        running.in_background(running.quit(running.end))

    # -- status --------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Query QEMU's status, and act on it. Raises QemuFailed, TimedOut."""
        before = self.status
        self.status = (await self.qmp.execute("query-status"))["status"]
        self.is_known = True
        report = StatusReport(
            before, self.status, has_ended=self._running.end is not None,
            is_retrying=self._is_retrying, is_paused_by_user=self._running.is_paused_by_user,
        )  # fmt: skip
        for effect in effects_of(report):
            self._act(effect)

    async def refresh_or_assume(self, status: str) -> None:
        """As `refresh`, after QEMU carried out a command; if it no longer answers, assume this status."""
        try:
            await self.refresh()
        except VmmError:
            self.status = status

    def _act(self, effect: Effect) -> None:
        running = self._running
        match effect:
            case Effect.FORGET_PAUSE:
                running.note.details.pop("paused", None)
            case Effect.POWERED_OFF:
                self._powered_off("guest-shutdown")
            case Effect.CRASHED:
                running.end = End.CRASHED
                running.tell("qemu-died", problem=f"the guest cannot continue: {self.status}")
                running.in_background(running.quit(End.CRASHED))
            case Effect.REPORT_FAILED_DISK:
                is_full = (self.critical_reason or "").endswith(_FULL)
                hint = None if is_full else _hint_while_filled(running.filling)
                running.tell("paused-critical", reason=self.critical_reason, hint=hint)
            case Effect.RETRY:
                self._is_retrying = True
                running.in_background(self._retry())
            case Effect.REPORT_RESUMED:
                running.tell("resumed")
                running.clock.bring_to_now("paused-critical")
            case _:
                assert_never(effect)

    async def _retry(self) -> None:
        """Try to continue until it works: the server may be restarted, or space may be freed on the file system."""
        running = self._running
        tries = 0
        try:
            while self.status == "io-error" and not running.is_paused_by_user and running.end is None:
                await asyncio.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])  # longer each time
                tries += 1
                problem = await asyncio.to_thread(problem_of_store, running.spec.disks, running.runtime.nbd)
                if problem is not None:
                    self.critical_reason = problem
                elif running.note.operation is None:
                    with contextlib.suppress(VmmError):
                        await self.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
                        await asyncio.sleep(SOON_SECONDS)  # a disk that fails again does so at once
                        await self.refresh()
        finally:
            self._is_retrying = False


def _hint_while_filled(filling: Mapping[str, Any] | None) -> str | None:
    """What helps a guest whose disk is not whole yet."""
    if filling is None:
        return None
    return f"its disks are still filled from {filling.get('source')}: once that can be read again, the guest continues"
