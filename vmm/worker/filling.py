# SPDX-License-Identifier: Apache-2.0
"""Filling the disks of a machine that was started from a night of a backup, while its guest runs.

    the disk server fills B from the night, and cuts it off     in parts; the guest's writes go to O, above it
    B is marked as that night, and kept for the next one        if the machine is the one that was saved
    the definition forgets the repository's folders
    the record forgets the disk; after the last one the lease ends, and the record goes

Decides when a disk is filled: not while another operation works on the machine's disks, and again after whatever
failed. Every step may be repeated, so a killed worker's successor begins with the first one. If the repository goes
away, the guest is paused when it reads what is not filled (as for any failed disk), and both go on when it is back.

Does not import numpy, so that the worker stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import vhdkit
from vmm.model.errors import InUse, VmmError, store_error
from vmm.processes.rpc import Method, Progress
from vmm.store.filling import Filling, read_filling, remove_filling, write_filling
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.store import Held, holding
from vmm.worker.served import served_layers

if TYPE_CHECKING:
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

_FILL_SECONDS = 30 * 24 * 3600.0
_LOOK_SECONDS = 0.5  # between looks at the progress, for hours
_AGAIN_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)  # until the next attempt, after whatever failed


class Filler:
    """The filling of one running machine's disks."""

    def __init__(self, running: Running, plugging: Plugging) -> None:
        self._running = running
        self._plugging = plugging
        self._waiting = 0  # operations on the disks that are under way
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._problem: str | None = None
        self._disk = ""  # that is being filled

    # -- for others --------------------------------------------------------------------------------------------------

    def before(self, method: Method) -> Method:
        """Wrap a method that works on the disks: nothing is filled while it runs, and filling goes on afterwards."""

        async def called(params: dict[str, Any], progress: Progress) -> object:
            async with self.paused():
                return await method(params, progress)

        return called

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """While the block runs, no disk is filled: the disk server does one thing at a time with each disk."""
        self._waiting += 1
        self._may_go_on.clear()
        try:
            while not self._is_idle.is_set():  # a pull that has only just been requested may miss a cancellation
                with contextlib.suppress(VmmError):
                    await self._running.server.call("cancel", timeout_seconds=5, export=self._disk)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_idle.wait(), _LOOK_SECONDS)
            yield
        finally:
            self._waiting -= 1
            if self._waiting == 0:
                self._may_go_on.set()

    # -- filling -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fill all disks, for as long as the machine runs; returns at once if there is nothing to fill."""
        failures = 0
        while not self._running.exited.is_set():
            await self._wait_allowed()
            try:
                filling = await asyncio.to_thread(read_filling, self._running.machine)
                if filling is None:
                    break
                await self._fill_next(filling)
                failures, self._problem = 0, None
            except (VmmError, OSError, vhdkit.VhdkitError) as error:
                if self._may_go_on.is_set():  # otherwise it was stopped for another operation
                    if not isinstance(error, InUse):  # a merge, or another command, which ends
                        self._report(error)
                    await asyncio.sleep(_AGAIN_SECONDS[min(failures, len(_AGAIN_SECONDS) - 1)])  # longer each time
                    failures += 1
        self._running.filling = None

    async def _wait_allowed(self) -> None:
        while not self._may_go_on.is_set():  # the next operation may have begun before this is resumed
            await self._may_go_on.wait()

    def _report(self, error: Exception) -> None:
        """Record why it does not go on, once for each reason."""
        problem = error.problem if isinstance(error, VmmError | vhdkit.VhdkitError) else str(error)
        if problem != self._problem and not self._running.exited.is_set():
            self._problem = problem
            self._show(problem=problem)
            source = (self._running.filling or {}).get("source", "a backup")
            self._running.tell("filling-waits", problem=problem, hint=f"{source} must be readable until it is whole")

    def _show(self, **facts: object) -> None:
        known = self._running.filling or {}
        self._running.filling = {**known, "problem": None, **facts}

    async def _fill_next(self, filling: Filling) -> None:
        """Fill a disk that is served, and do what follows. Raises VmmError, VhdkitError."""
        self._show(source=filling.source)
        served = await served_layers(self._running)
        for disk_id, image in filling.disks.items():
            layers = [os.path.realpath(path) for path in served.get(disk_id, ())]
            if image not in layers:
                continue  # the machine is in the state of a snapshot in which it had another disk, or none
            if layers[-1] == image:
                await self._finish(filling, disk_id, image)
            else:
                await self._fill(filling, disk_id, image)
            return
        if filling.disks:
            raise VmmError("none of the disks that are to be filled is a disk of the machine at present")
        await asyncio.to_thread(self._end, filling)

    async def _fill(self, filling: Filling, disk_id: str, image: str) -> None:
        """Have the disk server fill the image and cut it off, or wait while it does that for an earlier worker.

        Raises StoreFailed, InUse.
        """
        await self._wait_allowed()
        self._disk = disk_id
        self._is_idle.clear()
        pulling: asyncio.Task[Any] | None = None
        try:
            if await self._look(disk_id):
                while await self._look(disk_id):
                    await asyncio.sleep(_LOOK_SECONDS)  # the server reports no end to those who did not ask for it
                return
            pulling = asyncio.create_task(
                self._running.server.call(
                    "pull", timeout_seconds=_FILL_SECONDS, export=disk_id, layer=image, cut=True,
                    max_rate_bytes=filling.max_rate_bytes,
                )
            )  # fmt: skip
            while not pulling.done():
                await asyncio.wait({pulling}, timeout=_LOOK_SECONDS)
                await self._look(disk_id)
            pulling.result()
        finally:
            if pulling is not None and not pulling.done():  # QEMU has ended
                pulling.cancel()
            self._is_idle.set()

    async def _look(self, disk_id: str) -> bool:
        """Note the progress; False if the server does not fill this disk, or does not answer."""
        with contextlib.suppress(VmmError, KeyError, TypeError, StopIteration):
            status = await self._running.server.call("status", timeout_seconds=5)
            pull = next(one["pull"] for one in status["exports"] if one["name"] == disk_id)
            if pull:
                self._show(disk=disk_id, done_bytes=pull["done_bytes"], total_bytes=pull["total_bytes"])
                return True
        return False

    async def _finish(self, filling: Filling, disk_id: str, image: str) -> None:
        """Do what follows once an image stands on nothing any more. Repeatable. Raises VmmError."""
        is_marked = filling.marks and await asyncio.to_thread(self._mark, filling, disk_id, image)
        with holding(self._running.machine, self._running.spec.name) as held:
            if is_marked:
                self._keep(held, filling, disk_id, image)
            spec = self._running.spec
            disks = [one.model_copy(update={"parent_dirs": ()}) if one.id == disk_id else one for one in spec.disks]
            await asyncio.to_thread(self._plugging.write_down, held, spec.changed(disks=disks))
            left = filling.without(disk_id)
            await asyncio.to_thread(write_filling, self._running.machine, left)
        self._running.tell("disk-filled", disk=disk_id, source=filling.source)
        if not left.disks:
            await asyncio.to_thread(self._end, left)

    def _keep(self, held: Held, filling: Filling, disk_id: str, image: str) -> None:
        """Keep the image as the layer that the night's backup would have kept: nothing is merged into it."""
        kept = Kept(filling.repository_id, filling.repository, filling.night_id, disk_id, image)
        if kept not in held.tree.kept:
            held.tree.begin_night([kept])
            held.save()

    def _mark(self, filling: Filling, disk_id: str, image: str) -> bool:
        """Mark the image as the night; without the mark the next backup compares. A failure is an event."""
        from vhdkit import backups

        place = filling.repository_id, filling.machine_id, disk_id
        try:
            backups.mark_as_night(image, *place, filling.night, filling.night_id)
        except vhdkit.VhdkitError as error:
            self._running.tell("night-not-marked", disk=disk_id, problem=str(error))
            return False
        return True

    def _end(self, filling: Filling) -> None:
        """End the lease, then remove the record. Raises VmmError while the repository cannot be reached."""
        from vhdkit import backups

        if filling.lease is not None:
            try:
                with backups.open_repository(filling.repository) as opened:
                    if opened.id == filling.repository_id:
                        backups.release(opened.root, filling.lease)
            except (vhdkit.NotFound, vhdkit.ReadOnly, vhdkit.AccessDenied) as error:
                self._running.tell("lease-left", lease=filling.lease, problem=str(error))
            except vhdkit.VhdkitError as error:
                raise store_error(error) from error
        remove_filling(self._running.machine)
        self._running.tell("filled", source=filling.source)
