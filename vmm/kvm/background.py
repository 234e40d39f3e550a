# SPDX-License-Identifier: Apache-2.0
"""Capturing a running guest's memory in a file, with its disks switched over at one moment of it.

Decides which commands QEMU gets, which of three modes is used, and what state a failure leaves:

    background   stop -> disks -> migrate with background-snapshot: the guest continues at once, and a page that it is
                 about to change is written first (userfaultfd). The memory is that of the stop. The shortest pause
    switchover   migrate while the guest runs -> it is paused at the end -> disks -> the rest -> it continues.
                 The memory is that of the end
    stop         stop -> disks -> migrate -> it continues. It is paused all the time

A background capture is never cancelled, and writes to a regular file in which all the space is reserved: in QEMU 7.2 a
failed one leaves the guest's memory write-protected, and the guest hangs for good. It needs userfaultfd, by one of the
ways in `userfault`.

A failure before the disks are switched leaves everything as it was; a later one leaves the guest running on the new
disks (`Capturing.pivoted` is True then). Must not know what is done with the file and the disks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from vmm.kvm import memory_file
from vmm.kvm.qemu_errors import reason_of
from vmm.kvm.qmp import Qmp
from vmm.model.errors import QemuFailed, TimedOut, Unsupported, VmmError
from vmm.model.waiting import async_looks

STOP_SECONDS = 20.0  # stop and cont wait for requests in flight, whose server may be down
RESUME_SECONDS = 20.0
SWITCHOVER_SECONDS = 60.0  # after that, a guest that changes memory faster than it is written is paused
FASTEST_BYTES = 1 << 36  # per second: no limit
_NAME = "snapshot-memory"  # QEMU's name for our descriptor
_SHORT_LOOK_SECONDS = 0.002  # while the guest is paused: it notices how long that takes

Progress = Callable[[dict[str, Any]], None]
Pivot = Callable[[], Awaitable[None]]


class Mode(StrEnum):
    """How memory is captured."""

    BACKGROUND = "background"
    SWITCHOVER = "switchover"
    STOP = "stop"


BACKGROUND_HINT = (
    "it has the risks that vmm host doctor and docs/snapshots.md name: sysctl vm.unprivileged_userfaultfd=1, or as "
    "root, when the machine is off, vmm set NAME --background-capture"
)


async def best_mode(qmp: Qmp, wanted: Mode | None = None, *, room_taken: bool = True, runs: bool = True) -> Mode:
    """The best mode that this QEMU supports; if `wanted` is given, that mode or an error. Raises Unsupported,
    QemuFailed.

    `room_taken`: all space in the file is reserved; `runs`: the guest runs (a paused one is captured in mode STOP).
    """
    if wanted is Mode.STOP or not runs:
        return Mode.STOP
    if wanted is Mode.SWITCHOVER:
        return Mode.SWITCHOVER
    problem = "the file system cannot reserve space beforehand" if not room_taken else await background_problem(qmp)
    if problem is None:
        return Mode.BACKGROUND
    if wanted is Mode.BACKGROUND:
        raise Unsupported(f"memory cannot be captured in the background: {problem}", hint=BACKGROUND_HINT)
    return Mode.SWITCHOVER


async def background_problem(qmp: Qmp) -> str | None:
    """Why this QEMU cannot capture in the background; None if it can. Raises TimedOut."""
    try:
        await _set_capability(qmp, Mode.BACKGROUND)
    except QemuFailed as error:
        return error.problem.partition(": ")[2] or error.problem
    await _set_capability(qmp, None)
    return None


_CAPABILITY_OF = {Mode.BACKGROUND: "background-snapshot", Mode.SWITCHOVER: "pause-before-switchover"}


async def _set_capability(qmp: Qmp, mode: Mode | None) -> None:
    chosen = None if mode is None else _CAPABILITY_OF.get(mode)
    names = sorted(_CAPABILITY_OF.values(), key=lambda name: name == chosen)  # disable first: they are exclusive
    states = [{"capability": name, "state": name == chosen} for name in names]
    await qmp.execute("migrate-set-capabilities", capabilities=states)


class Capturing:
    """One capture: `prepare`, then `take`, then `finish`, which waits until everything is written.

    `descriptor` is the file. QEMU writes through a duplicate, which shares the file position.
    """

    def __init__(self, qmp: Callable[[], Qmp], descriptor: int, mode: Mode, *, was_running: bool) -> None:
        self._qmp = qmp
        self._descriptor = descriptor
        self.mode = mode
        self._was_running = was_running
        self.pivoted = False
        self.pause_seconds: float | None = None

    async def prepare(self) -> None:
        """Everything that QEMU may refuse before the guest is touched. Raises QemuFailed, TimedOut."""
        qmp = self._qmp()
        await _set_capability(qmp, self.mode)
        await qmp.execute("migrate-set-parameters", max_bandwidth=FASTEST_BYTES)
        await qmp.send_descriptor(_NAME, self._descriptor)

    async def take(self, pivot: Pivot, progress: Progress) -> None:
        """The moment of the snapshot: `pivot` switches the disks, or raises and has changed nothing.

        On return the guest is in the state that it was in before. Raises whatever `pivot` raises, QemuFailed,
        TimedOut.
        """
        if self.mode is Mode.SWITCHOVER:
            await self._switchover(pivot, progress)
            return
        began = time.monotonic()
        if self._was_running:
            await self._qmp().execute("stop", timeout_seconds=STOP_SECONDS)
        try:
            await pivot()
            self.pivoted = True
            await self._qmp().execute("migrate", uri=f"fd:{_NAME}", timeout_seconds=STOP_SECONDS)
            if self.mode is Mode.BACKGROUND:
                await self._wait_resumed()
            else:
                await wait_written(self._qmp, progress)
        except BaseException:
            await self._go_on()
            raise
        if self.mode is Mode.STOP:
            await self._go_on()
        self.pause_seconds = time.monotonic() - began if self._was_running else 0.0

    async def _wait_resumed(self) -> None:
        """QEMU resumes the guest by itself when the devices are written and the memory is protected."""
        async for _ in async_looks(RESUME_SECONDS, every_seconds=_SHORT_LOOK_SECONDS):
            if (await self._qmp().execute("query-status"))["status"] == "running":
                return
            migration = await self._qmp().execute("query-migrate")
            if migration.get("status") in ("failed", "cancelled"):
                raise QemuFailed(f"the memory could not be captured: {_reason(migration)}")
        raise TimedOut(f"the guest did not resume within {RESUME_SECONDS:g} s")

    async def _switchover(self, pivot: Pivot, progress: Progress) -> None:
        qmp = self._qmp()
        await qmp.execute("migrate", uri=f"fd:{_NAME}", timeout_seconds=STOP_SECONDS)
        try:
            await self._wait_standing(progress)
            began = time.monotonic()
            await pivot()
            self.pivoted = True
            await qmp.execute("migrate-continue", state="pre-switchover", timeout_seconds=STOP_SECONDS)
            await wait_written(self._qmp, progress)
        except BaseException:
            with contextlib.suppress(VmmError):
                await self._qmp().execute("migrate_cancel")
            await self._go_on()
            raise
        await self._go_on()
        self.pause_seconds = time.monotonic() - began

    async def _wait_standing(self, progress: Progress) -> None:
        deadline = time.monotonic() + SWITCHOVER_SECONDS
        stopped = False
        async for _ in async_looks(every_seconds=_SHORT_LOOK_SECONDS):
            migration = await self._qmp().execute("query-migrate")
            if migration.get("status") == "pre-switchover":
                return
            if migration.get("status") in ("failed", "cancelled", "completed"):
                raise QemuFailed(f"the memory could not be captured: {_reason(migration)}")
            _tell(migration, progress)
            if not stopped and time.monotonic() > deadline:
                stopped = True
                await self._qmp().execute("stop", timeout_seconds=STOP_SECONDS)

    async def _go_on(self) -> None:
        """Return the guest to its earlier state, as soon as possible.

        A guest that was paused is resumed for a moment: QEMU refuses to write the memory of a guest that is paused
        because its memory was written.
        """
        async for is_last in async_looks(RESUME_SECONDS):
            try:
                qmp = self._qmp()
                status = (await qmp.execute("query-status"))["status"]
                if status == "running" or (not self._was_running and status != "postmigrate"):
                    return
                await qmp.execute("cont", timeout_seconds=STOP_SECONDS)
                if not self._was_running:
                    await qmp.execute("stop", timeout_seconds=STOP_SECONDS)
                return
            except VmmError:
                if is_last:
                    raise

    async def finish(self, progress: Progress) -> int:
        """Wait until everything is written; returns the file's size. Raises QemuFailed, also if data is missing."""
        await wait_written(self._qmp, progress)
        size = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        await check_written(self._qmp(), self._descriptor, size)
        return size

    async def reset(self) -> None:
        """Restore QEMU's normal settings for saving and migrating. Not while a capture is in progress."""
        with contextlib.suppress(VmmError):
            await self._qmp().forget_descriptor(_NAME)
            await _set_capability(self._qmp(), None)


async def wait_written(qmp: Callable[[], Qmp], progress: Progress) -> None:
    """Wait until a capture in progress is complete. Raises QemuFailed if it failed, or if QEMU is gone."""
    async for _ in async_looks():
        migration = await qmp().execute("query-migrate", timeout_seconds=STOP_SECONDS)
        status = migration.get("status")
        if status == "completed":
            return
        if status in (None, "none", "failed", "cancelled"):
            raise QemuFailed(f"the memory could not be captured: {_reason(migration)}")
        _tell(migration, progress)


async def check_written(qmp: Qmp, descriptor: int, size_bytes: int) -> None:
    """Raise QemuFailed if the memory that QEMU reports as written is not in this file."""
    ram = (await qmp.execute("query-migrate")).get("ram") or {}
    problem = memory_file.problem_of(descriptor, size_bytes, memory_bytes=int(ram.get("transferred") or 0))
    if problem is not None:
        raise QemuFailed(f"the memory was not written where it should be: {problem}")


async def status_of(qmp: Qmp) -> str:
    """The status of the last capture: none, active, pre-switchover, completed, failed, ..."""
    return str((await qmp.execute("query-migrate")).get("status") or "none")


async def give_up(qmp: Qmp) -> None:
    """Cancel a capture, which must not be a background capture. Raises QemuFailed."""
    await qmp.execute("migrate_cancel")


def _reason(migration: dict[str, Any]) -> str:
    return reason_of(migration)


def _tell(migration: dict[str, Any], progress: Progress) -> None:
    if ram := migration.get("ram"):
        progress({"step": "saving memory", "done": ram["total"] - ram["remaining"], "total": ram["total"]})
