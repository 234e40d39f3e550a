# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a running machine, in its worker: memory, devices and all disks at one moment.

    lock, journal: prepare   the snapshot's folder, its configuration, a file with room for all the memory
    (agent: freeze)          only on request; thawed in any case
    the guest is paused      all disks get new leaves, in one call to the disk server
    the guest resumes        definitions follow; QEMU writes memory in the background
    all is written           the folder gets its final name, the tree the snapshot: from here on it exists

Decides the order, and what an early end leaves: before the disks are switched, nothing; after that the guest continues
on its new leaves, and the images below them, which belong to no snapshot, are merged once the machine is off. If the
worker is killed, its successor finishes the snapshot (`recovery`), because QEMU keeps writing by itself. Which
commands QEMU gets is decided in `kvm.background`.

Does not import numpy, so that the worker stays small. What needs it is done by the command that takes the snapshot, or
by `background_merge`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmm.kvm import background
from vmm.kvm.background import Capturing, Mode
from vmm.model.errors import VmmError, WrongState
from vmm.processes.rpc import Method, Progress, parameter
from vmm.snapshots.create import SnapshotRequest, begin
from vmm.store.snapshots.journal import CreateLive, Memory
from vmm.store.snapshots.memory import SnapshotFolder, description_document
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.store import Held, holding
from vmm.store.state import MachineState
from vmm.worker.adapter_hotplug import announced_mtus
from vmm.worker.new_leaves import NewLeaves
from vmm.worker.served import follow_pivots, served_leaves
from vmm.worker.states import Verb

if TYPE_CHECKING:
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

OPERATION = "snapshot"
# after a longer pause the guest's clock is set: without a better mode, much memory means a long pause
LONG_PAUSE_SECONDS = 1.0
FREEZE_SECONDS = 10.0  # after this the guest's file systems thaw by themselves


class Capture:
    """The snapshots of one running machine."""

    def __init__(self, running: Running, plugging: Plugging) -> None:
        self._running = running
        self._plugging = plugging

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket."""
        return {"snapshot-create": self._create}

    # -- taking --------------------------------------------------------------------------------------------------

    async def _create(self, params: dict[str, Any], progress: Progress) -> object:
        """{"name", "notes", "consistent", "mode"}: {"id", "pause_seconds", "mode"}."""
        running = self._running
        request = SnapshotRequest(
            parameter(params, "name", str), parameter(params, "notes", str, ""),
            bool(parameter(params, "consistent", bool, False)), parameter(params, "mode", str),
        )  # fmt: skip
        running.need(Verb.SNAPSHOT)
        if request.consistent and running.state is not MachineState.RUNNING:
            raise WrongState("is paused: its guest cannot freeze its file systems", hint="without --consistent")
        with running.busy(OPERATION), holding(running.machine, running.spec.name) as held:
            held.need_settled()
            taking = _Taking(running, self._plugging, held, request)
            try:
                snapshot = await taking.run(progress)
            except BaseException:
                await taking.take_back()
                raise
        if (snapshot.pause_seconds or 0.0) > LONG_PAUSE_SECONDS:
            running.clock.bring_to_now("snapshot")
        running.tell(
            "snapshot-created", snapshot=snapshot.name, pause_seconds=snapshot.pause_seconds, mode=snapshot.mode
        )
        return {"id": snapshot.id, "pause_seconds": snapshot.pause_seconds, "mode": snapshot.mode}


class _Taking:
    """One snapshot in progress."""

    def __init__(self, running: Running, plugging: Plugging, held: Held, request: SnapshotRequest) -> None:
        self._running = running
        self._held = held
        self._mode = Mode(request.mode) if request.mode else None
        self._consistent = request.consistent
        self._was_running = running.state is MachineState.RUNNING
        snapshot, pivots = begin(held, running.spec, request, "running" if self._was_running else "paused")
        self._leaves = NewLeaves(running, plugging, held, pivots)
        self._snapshot = replace(snapshot, consistent=request.consistent)
        self._folder = SnapshotFolder(snapshot.folder)
        self._journal = CreateLive(snapshot.folder, tuple(pivots))
        self._is_begun = False
        self._capturing: Capturing | None = None

    async def run(self, progress: Progress) -> Snapshot:
        """Take the snapshot. Raises VmmError; then call `take_back`."""
        running, spec = self._running, self._running.spec
        self._held.begin(self._journal)
        self._is_begun = True
        progress({"step": "making room"})
        await asyncio.to_thread(self._folder.begin, spec)
        descriptor, room_taken = await asyncio.to_thread(self._folder.open_memory, spec.memory_bytes)
        try:
            mode = await background.best_mode(running.qmp, self._mode, room_taken=room_taken, runs=self._was_running)
            capturing = self._capturing = Capturing(
                lambda: running.qmp, descriptor, mode, was_running=self._was_running
            )
            version = (await running.qmp.execute("query-version"))["qemu"]
            description = description_document(
                spec, qemu_version=f"{version['major']}.{version['minor']}.{version['micro']}",
                accelerator=str(running.note.accelerator), was_running=self._was_running,
                media=running.media, mtus=await announced_mtus(running.qmp, spec),
            )  # fmt: skip
            self._snapshot = replace(self._snapshot, mode=mode.value)
            memory = Memory(mode.value, self._was_running, description, self._snapshot)
            self._journal = replace(self._journal, memory=memory)
            self._held.go_on(self._journal)
            await capturing.prepare()
            await self._leaves.prepare()
            async with contextlib.AsyncExitStack() as frozen:
                if self._consistent:
                    await frozen.enter_async_context(running.agent.frozen(max_seconds=FREEZE_SECONDS))
                await capturing.take(self._pivot, progress)
            self._journal = await self._leaves.follow(self._journal)
            size = await capturing.finish(progress)
            await asyncio.to_thread(self._folder.complete_memory, descriptor, size, description)
        finally:
            os.close(descriptor)
        self._folder.finish()
        snapshot = replace(self._snapshot, memory_bytes=size, pause_seconds=capturing.pause_seconds)
        self._held.tree.add(snapshot)
        self._held.done()
        await capturing.reset()
        return snapshot

    async def _pivot(self) -> None:
        """All disks at once, and what else QEMU writes to while the guest runs."""
        await self._leaves.put_on()
        self._folder.copy_uefi(self._running.machine, self._running.spec)

    async def take_back(self) -> None:
        """Clean up after a failure: disks that were switched stay so, the rest is removed. What cannot be cleaned up
        now stays in the journal, and is settled before any other operation.
        """
        running, held = self._running, self._held
        try:
            if self._capturing is not None:
                await self._capturing.reset()
            held.reload()
            if not self._is_begun or held.tree.journal is None:
                return
            held.take_over()
            if running.exited.is_set():
                return  # the leaves are adopted when the machine is off, or before it is restarted
            moved = await served_leaves(running)
            await follow_pivots(running, held, self._journal.pivots, moved)
            self._folder.discard()
            held.done()
        except (VmmError, OSError) as error:
            running.tell("snapshot-left", problem=str(error))
