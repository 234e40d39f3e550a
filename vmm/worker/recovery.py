# SPDX-License-Identifier: Apache-2.0
"""Operations that were interrupted on a running machine, settled by a restarted worker or on a command's request.

    CreateLive        QEMU keeps writing memory by itself: once it has finished, so is the snapshot; if it cannot
                      finish, the new leaves that are served become the machine's disks, without a snapshot
    MergeLive         continues in the disk server; when it ends, the image that is served is the machine's disk
    Delete, MergeOff  settled as when the machine is off: no guest uses the files concerned
    Backup            leaves that take the guest's writes become its disks; the note of a backup becomes such a journal

Decides that from the moment at which this module takes over a journal, no snapshot, merge or backup begins before it
is settled. Which image takes a guest's writes is decided by what the disk server serves (`served`).

Does not import numpy, so that the worker stays small. What needs it is done by the command that asks
(`machine_snapshots`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, assert_never

from vmm.kvm import background
from vmm.kvm.background import Mode
from vmm.model.errors import InUse, QemuFailed, StoreFailed, VmmError, WrongState
from vmm.model.waiting import async_looks
from vmm.processes.rpc import Method, Progress
from vmm.snapshots.recovery import settle_journal, take_over_note
from vmm.store.backup_note import has_note
from vmm.store.snapshots.journal import (
    Apply,
    Backup,
    CreateLive,
    CreateOff,
    Delete,
    Memory,
    MergeLive,
    MergeOff,
    PutInPlace,
    words_of,
)
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.store import Held, has_tree, holding, load_tree
from vmm.worker.backup import settle_freeze
from vmm.worker.served import follow_merge, follow_pivots, served_leaves, wait_merged

if TYPE_CHECKING:
    from vmm.worker.running import Running

OPERATION = "settle"
_HOLD_SECONDS = 30.0


class Recovery:
    """The interrupted operations of one running machine."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._under_way = asyncio.Lock()

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket."""
        return {"snapshot-settle": self._asked}

    def before(self, method: Method) -> Method:
        """Wrap a method so that it runs after interrupted operations on the disks are settled. While another operation
        is in progress, the method is called at once, and refuses.
        """

        async def called(params: dict[str, Any], progress: Progress) -> object:
            if self._running.note.operation in (None, OPERATION) and self.is_pending():
                await self.finish()
            return await method(params, progress)

        return called

    def is_pending(self) -> bool:
        """True if an interrupted operation has to be settled. Raises VmmError."""
        machine = self._running.machine
        return has_note(machine) or (has_tree(machine) and load_tree(machine).journal is not None)

    async def _asked(self, params: dict[str, Any], progress: Progress) -> object:
        """Settle interrupted operations for a command that is about to begin one; {"settled": true}."""
        await self.finish()
        return {"settled": True}

    async def finish_interrupted(self) -> None:
        """As `finish`, for a restarted worker. A failure is recorded as an event, and the next command tries again."""
        try:
            await self.finish()
        except (VmmError, OSError) as error:
            self._running.tell("snapshot-left", problem=str(error))

    async def finish(self) -> None:
        """Settle what was interrupted. Raises InUse during another operation, and the error that prevents settling."""
        async with self._under_way:
            if not self.is_pending():
                return
            async with contextlib.AsyncExitStack() as stack:
                await self._wait_idle(stack)
                with contextlib.ExitStack() as locks:
                    held = await hold(self._running, locks)
                    await self.settle(held)
                    if has_note(held.machine):
                        await asyncio.to_thread(take_over_note, held)
                        await self.settle(held)

    async def _wait_idle(self, stack: contextlib.AsyncExitStack) -> None:
        """Wait until no other operation is in progress. What another command does ends, and usually settles itself."""
        async for is_last in async_looks(_HOLD_SECONDS):
            try:
                stack.enter_context(self._running.busy(OPERATION))
                return
            except InUse:
                if is_last:
                    raise

    async def settle(self, held: Held) -> None:
        """Settle what the journal says. Raises VmmError; then the journal stays."""
        journal = held.take_over()
        match journal:
            case None:
                return
            case CreateLive():
                await self._create(held, journal)
            case MergeLive():
                await self._merge(held, journal)
            case Delete() | MergeOff():
                await asyncio.to_thread(settle_journal, held, journal)
                return
            case Backup():
                await settle_freeze(self._running, held, journal)
            case CreateOff() | Apply() | PutInPlace():
                raise WrongState(
                    f"{words_of(journal)} was interrupted before the start, and can be settled only while it is off",
                    machine=held.name, hint=f"vmm shutdown {held.name}; any command settles it then",
                )  # fmt: skip
            case _:
                assert_never(journal)
        self._running.tell("snapshots-settled", after=words_of(journal))

    # -- a snapshot --------------------------------------------------------------------------------------------------

    async def _create(self, held: Held, journal: CreateLive) -> None:
        running = self._running
        folder = SnapshotFolder(journal.folder)
        moved = await served_leaves(running)
        snapshot: Snapshot | None = None
        is_pivoted = journal.pivoted or any(moved.get(one.disk) == one.child for one in journal.pivots)
        try:
            memory = await self._written_memory(journal, is_pivoted)
            await self._complete_found(folder, memory)
            folder.finish()
            snapshot = replace(memory.snapshot, memory_bytes=os.stat(folder.memory).st_size)
        except (VmmError, OSError) as error:
            running.tell("snapshot-failed", problem=str(error))
        finally:
            if has_qemu(running):
                await self._let_go_on(journal)
        await follow_pivots(running, held, journal.pivots, moved)
        if snapshot is None:
            folder.discard()
        else:
            held.tree.add(snapshot)
        held.done()
        if snapshot is not None:
            running.tell("snapshot-created", snapshot=snapshot.name)

    async def _written_memory(self, journal: CreateLive, is_pivoted: bool) -> Memory:
        """Wait until QEMU has written all the memory. Raises QemuFailed if it has not and will not."""
        running = self._running
        lost = QemuFailed("the worker died before the memory was captured")
        if not has_qemu(running):
            raise QemuFailed("QEMU died before the memory was captured")
        await running.wait_reachable()
        status = await background.status_of(running.qmp)
        memory = journal.memory
        is_background = memory is not None and memory.mode == Mode.BACKGROUND
        if not is_pivoted or memory is None or status == "none" or (
            not is_background and status != "completed"
        ):  # fmt: skip
            if status not in ("none", "completed", "failed", "cancelled") and not is_background:
                await background.give_up(running.qmp)
            raise lost
        await background.wait_written(lambda: running.qmp, lambda document: None)
        return memory

    async def _complete_found(self, folder: SnapshotFolder, memory: Memory) -> None:
        """Complete the memory file that another worker began: its length is what QEMU wrote. Raises VmmError."""
        path = folder.in_part(folder.memory)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreFailed(f"the memory file cannot be opened: {error.strerror}", path=path) from error
        try:
            size = os.fstat(descriptor).st_size
            await background.check_written(self._running.qmp, descriptor, size)
            await asyncio.to_thread(folder.complete_memory, descriptor, size, dict(memory.description))
        finally:
            os.close(descriptor)

    async def _let_go_on(self, journal: CreateLive) -> None:
        running = self._running
        for capability in ("background-snapshot", "pause-before-switchover"):
            with contextlib.suppress(VmmError):
                states = [{"capability": capability, "state": False}]
                await running.qmp.execute("migrate-set-capabilities", capabilities=states)
        with contextlib.suppress(VmmError):
            status = (await running.qmp.execute("query-status"))["status"]
            if (
                journal.memory is not None
                and journal.memory.was_running
                and status in ("paused", "postmigrate", "finish-migrate")
            ):
                await running.qmp.execute("cont", timeout_seconds=background.STOP_SECONDS)

    # -- a merge -----------------------------------------------------------------------------------------------------

    async def _merge(self, held: Held, journal: MergeLive) -> None:
        await wait_merged(self._running, journal.disk)
        await follow_merge(self._running, held, journal)
        held.done()


def has_qemu(running: Running) -> bool:
    """True while QEMU is alive. The disk server may outlive it, and is queried all the same."""
    return running.note.qemu is not None and not running.exited.is_set()


async def hold(running: Running, stack: contextlib.ExitStack) -> Held:
    """Take the tree once the command that holds it is done. Raises InUse."""
    async for is_last in async_looks(_HOLD_SECONDS):
        try:
            return stack.enter_context(holding(running.machine, running.spec.name))
        except InUse:
            if is_last:
                raise
    raise AssertionError("the last look returned nothing, and raised nothing")
