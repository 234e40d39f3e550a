# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a machine that runs, in its worker: memory, devices and all disks of one moment.

    lock, journal: prepare   the snapshot's folder, its configuration, a file with room for all the memory
    (agent: freeze)          only when asked for; thawed in any case
    the guest stands still   all disks get their new leaves, in one call of their server
    it goes on               definitions follow; QEMU writes memory in the background
    all is written           the folder gets its name, and the tree the snapshot: from here on it is there

Decides the order, and what is left when it ends early: before the disks nothing; after them the guest goes on on its
new leaves, and the images below, on which no snapshot is, are merged when the machine is off. Killed, the worker's
follower finishes it (`finish_interrupted`): QEMU goes on writing by itself. How QEMU is told is `kvm.background`'s
decision.

No numpy here: the worker stays small. What needs it is done by the command that asks, or by `fold`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmm.errors import InUse, QemuFailed, StoreFailed, VmmError, WrongState
from vmm.kvm import background
from vmm.kvm.background import Capturing, Mode
from vmm.paths import write_whole
from vmm.removal import remove_image
from vmm.rpc import Method, Progress, parameter
from vmm.snapshots.create import Wish, begin
from vmm.snapshots.memory import SnapshotFolder, description_document
from vmm.snapshots.settle import adopt, settle
from vmm.snapshots.steps import Pivot, pivoted, pivots_in, prepare_document
from vmm.snapshots.store import Held, has_tree, holding, load_tree
from vmm.snapshots.tree import Snapshot, snapshot_document, snapshot_of
from vmm.state import MachineState

if TYPE_CHECKING:
    from vmm.plugging import Plugging
    from vmm.running import Running

OPERATION = "snapshot"
SERVER_SECONDS = 30.0  # for the disks' server to be back, when it was killed
FREEZE_SECONDS = 10.0  # the guest's file systems thaw by themselves then
_LOCK_SECONDS = 30.0
_LOOK_SECONDS = 0.1


class Capture:
    """The snapshots of one running machine."""

    def __init__(self, running: Running, plugging: Plugging) -> None:
        self._running = running
        self._plugging = plugging

    def methods(self) -> dict[str, Method]:
        """What the control socket offers."""
        return {"snapshot-create": self._create}

    # -- taking --------------------------------------------------------------------------------------------------

    async def _create(self, params: dict[str, Any], progress: Progress) -> object:
        """{"name", "notes", "consistent", "mode"}: {"id", "pause_seconds", "mode"}."""
        running = self._running
        wish = Wish(parameter(params, "name", str), parameter(params, "notes", str, ""))
        mode = parameter(params, "mode", str)
        consistent = bool(parameter(params, "consistent", bool, False))
        if running.state not in (MachineState.RUNNING, MachineState.PAUSED):
            raise WrongState(f"is {running.state.value}: no snapshot can be taken now")
        if consistent and running.state is not MachineState.RUNNING:
            raise WrongState("is paused: its guest cannot freeze its file systems", hint="without --consistent")
        with running.busy(OPERATION), holding(running.machine, running.spec.name) as held:
            await self._settle(held)
            taking = _Taking(running, self._plugging, held, wish, Mode(mode) if mode else None, consistent=consistent)
            try:
                snapshot = await taking.run(progress)
            except BaseException:
                await taking.take_back()
                raise
        running.tell(
            "snapshot-created", snapshot=snapshot.name, pause_seconds=snapshot.pause_seconds, mode=snapshot.mode
        )
        return {"id": snapshot.id, "pause_seconds": snapshot.pause_seconds, "mode": snapshot.mode}

    async def _settle(self, held: Held) -> None:
        """Put in order what an earlier one left that failed badly. Raises InUse for a merge, VmmError."""
        journal = held.tree.journal
        if journal is None:
            return
        if journal["op"] == "create" and journal.get("live"):
            await self._finish_create(held, journal)
        elif journal["op"] == "live-merge":
            raise InUse("a merge is still being put in order", hint="try again in a moment")
        else:
            settle(held)

    # -- after another worker ----------------------------------------------------------------------------------------

    async def finish_interrupted(self) -> None:
        """What a worker that was killed had begun: finished, or taken back. A failure is told, no more."""
        running = self._running
        if not has_tree(running.machine):
            return
        try:
            journal = load_tree(running.machine).journal
            if journal is None or journal["op"] == "live-merge":
                return
            with running.busy(OPERATION), contextlib.ExitStack() as stack:
                held = await hold(running, stack)
                if held.tree.journal is not None:
                    await self._settle(held)
        except (VmmError, OSError, KeyError) as error:
            running.tell("snapshot-left", problem=str(error))

    async def _finish_create(self, held: Held, journal: dict[str, Any]) -> None:
        running = self._running
        pivots = pivots_in(journal)
        folder = SnapshotFolder(str(journal["folder"]))
        await running.wait_reachable()
        status = await background.status_of(running.qmp)
        is_background = journal.get("mode") == Mode.BACKGROUND
        moved = await served_leaves(running)
        is_pivoted = bool(journal.get("pivoted")) or any(moved.get(one.disk) == one.child for one in pivots)
        try:
            if not is_pivoted or status == "none" or (not is_background and status != "completed"):
                if status not in ("none", "completed", "failed", "cancelled") and not is_background:
                    await background.give_up(running.qmp)
                raise QemuFailed("the worker died before the memory was captured")
            await background.wait_written(lambda: running.qmp, lambda document: None)
            await self._complete_found(folder, journal)
            folder.finish()
            snapshot = snapshot_of(journal["snapshot"])
            size = os.stat(folder.memory).st_size
            held.tree.add(replace(snapshot, memory_bytes=size))
            running.tell("snapshot-created", snapshot=snapshot.name)
        except VmmError as error:
            folder.discard()
            running.tell("snapshot-failed", problem=str(error))
        finally:
            await self._let_go_on(journal)
        await follow_pivots(running, self._plugging, held, pivots, moved)
        held.note(None)

    async def _complete_found(self, folder: SnapshotFolder, journal: dict[str, Any]) -> None:
        """The memory file that another worker had begun: its length is what QEMU wrote. Raises VmmError."""
        path = folder.in_part(folder.memory)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreFailed(f"the memory's file cannot be opened: {error.strerror}", path=path) from error
        try:
            size = os.fstat(descriptor).st_size
            await background.check_written(self._running.qmp, descriptor, size)
            await asyncio.to_thread(folder.complete_memory, descriptor, size, dict(journal["description"]))
        finally:
            os.close(descriptor)

    async def _let_go_on(self, journal: dict[str, Any]) -> None:
        running = self._running
        for capability in ("background-snapshot", "pause-before-switchover"):
            with contextlib.suppress(VmmError):
                states = [{"capability": capability, "state": False}]
                await running.qmp.execute("migrate-set-capabilities", capabilities=states)
        with contextlib.suppress(VmmError):
            status = (await running.qmp.execute("query-status"))["status"]
            if journal.get("was_running") and status in ("paused", "postmigrate", "finish-migrate"):
                await running.qmp.execute("cont", timeout_seconds=background.STOP_SECONDS)


class _Taking:
    """One snapshot being taken."""

    def __init__(
        self, running: Running, plugging: Plugging, held: Held, wish: Wish, mode: Mode | None, *, consistent: bool
    ) -> None:
        self._running = running
        self._plugging = plugging
        self._held = held
        self._mode = mode
        self._consistent = consistent
        self._was_running = running.state is MachineState.RUNNING
        snapshot, self._pivots = begin(held, running.spec, wish, "running" if self._was_running else "paused")
        self._snapshot = replace(snapshot, consistent=consistent)
        self._folder = SnapshotFolder(snapshot.folder)
        self._journal = prepare_document("create", snapshot.folder, self._pivots, live=True)
        self._capturing: Capturing | None = None

    async def run(self, progress: Progress) -> Snapshot:
        """The snapshot. Raises VmmError; `take_back` afterwards."""
        running, spec = self._running, self._running.spec
        self._held.note(self._journal)
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
            )  # fmt: skip
            self._snapshot = replace(self._snapshot, mode=mode.value)
            self._journal |= {"mode": mode.value, "was_running": self._was_running, "description": description,
                              "snapshot": snapshot_document(self._snapshot)}  # fmt: skip
            self._held.note(self._journal)
            await capturing.prepare()
            if self._pivots:
                await running.server.call("prepare", exports=self._leaves())
            async with contextlib.AsyncExitStack() as frozen:
                if self._consistent:
                    await frozen.enter_async_context(running.agent.frozen(max_seconds=FREEZE_SECONDS))
                await capturing.take(self._pivot, progress)
            await self._follow()
            size = await capturing.finish(progress)
            await asyncio.to_thread(self._folder.complete_memory, descriptor, size, description)
        finally:
            os.close(descriptor)
        self._folder.finish()
        snapshot = replace(self._snapshot, memory_bytes=size, pause_seconds=capturing.pause_seconds)
        self._held.tree.add(snapshot)
        self._held.note(None)
        await capturing.reset()
        return snapshot

    def _leaves(self) -> dict[str, str]:
        return {one.disk: one.child for one in self._pivots}

    async def _pivot(self) -> None:
        """All disks at once, and what else QEMU writes to while the guest runs."""
        if self._pivots:
            await self._running.server.call("snapshot", exports=self._leaves())
        self._folder.copy_uefi(self._running.machine, self._running.spec)

    async def _follow(self) -> None:
        """The definitions say where the disks are now, and the tree knows the images."""
        self._journal["pivoted"] = True
        for one in self._pivots:
            self._held.tree.grow(one.frozen, one.child, one.format)
        self._held.note(self._journal)
        if self._pivots:
            await asyncio.to_thread(self._plugging.write_down, self._held, pivoted(self._running.spec, self._pivots))

    async def take_back(self) -> None:
        """After a failure: what was pivoted stays so, the rest goes."""
        running = self._running
        try:
            if self._capturing is not None:
                await self._capturing.reset()
            self._held.tree = load_tree(running.machine)
            if running.exited.is_set():
                return  # the leaves are adopted when the machine is off
            self._folder.discard()
            moved = await served_leaves(running)
            await follow_pivots(running, self._plugging, self._held, self._pivots, moved)
            self._held.note(None)
        except (VmmError, OSError) as error:
            running.tell("snapshot-left", problem=str(error))


async def hold(running: Running, stack: contextlib.ExitStack) -> Held:
    """The tree, when whoever has it is done with it. Raises InUse."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LOCK_SECONDS
    while True:
        try:
            return stack.enter_context(holding(running.machine, running.spec.name))
        except InUse:
            if loop.time() > deadline:
                raise
            await asyncio.sleep(_LOOK_SECONDS)


async def served_leaves(running: Running) -> dict[str, str]:
    """Disk id -> the image that takes its writes now. Raises StoreFailed.

    A snapshot that the server is in the middle of is waited for: it does one thing after the other. New leaves that it
    has only prepared go.
    """
    await running.server.wait_serving(SERVER_SECONDS)
    with contextlib.suppress(VmmError):
        await running.server.call("prepare", exports={})
    return {disk: layers[0] for disk, layers in (await served_layers(running)).items()}


async def served_layers(running: Running) -> dict[str, list[str]]:
    """Disk id -> the images it is read from, leaf first. Raises StoreFailed."""
    status = await running.server.call("status")
    return {one["name"]: [layer["path"] for layer in one["layers"]] for one in status["exports"]}


async def follow_pivots(
    running: Running, plugging: Plugging, held: Held, pivots: list[Pivot], moved: dict[str, str]
) -> None:
    """Those new leaves that are served are the machine's disks, the others go. Raises VmmError, OSError."""
    done = [one for one in pivots if moved.get(one.disk) == one.child]
    for one in pivots:
        if one not in done:
            with contextlib.suppress(InUse):  # the journal was wrong about it
                remove_image(one.child, held)
    adopt(held, done)
    spec = pivoted(running.spec, done)
    if spec != running.spec:
        write_whole(running.runtime.running, spec.to_json(), durable=False)
        running.spec = spec
