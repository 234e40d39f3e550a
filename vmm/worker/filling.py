# SPDX-License-Identifier: Apache-2.0
"""Filling the disks of a machine that was started from a night of a backup, while its guest runs.

    what B is filled from is compared with its sums             unless the user left it out; damage is never copied
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
import shlex
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import vhdkit
from vmm.model.errors import InUse, NoSpace, TimedOut, VmmError, store_error
from vmm.processes.rpc import Method, Progress
from vmm.store.filling import Filling, read_filling, remove_filling, write_filling
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.store import Held, holding
from vmm.worker.night_check import damage_in_night
from vmm.worker.served import served_layers

if TYPE_CHECKING:
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

_FILL_SECONDS = 30 * 24 * 3600.0
_LOOK_SECONDS = 0.5  # between looks at the progress, for hours
_AGAIN_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)  # until the next attempt, after whatever failed
_DAMAGED_SECONDS = 3600.0  # until a night that is damaged is compared again: everything is read for that
_STOP_SECONDS = 30.0  # a pull that hangs with its repository does not stop


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
        self._compared: set[str] = set()  # disks whose files have the right sums
        self._damaged: dict[str, str] = {}  # disk -> what is damaged of its night

    # -- for others --------------------------------------------------------------------------------------------------

    def before(self, method: Method) -> Method:
        """Wrap a method that works on the disks: nothing is filled while it runs, and filling goes on afterwards."""

        async def called(params: dict[str, Any], progress: Progress) -> object:
            async with self.paused(_STOP_SECONDS):
                return await method(params, progress)

        return called

    @contextlib.asynccontextmanager
    async def paused(self, within_seconds: float = _STOP_SECONDS) -> AsyncIterator[None]:
        """While the block runs, no disk is filled: the disk server does one thing at a time with each disk.

        Raises TimedOut if the filling does not stop within that time, since the repository does not answer.
        """
        self._waiting += 1
        self._may_go_on.clear()
        end = time.monotonic() + within_seconds
        try:
            while not self._is_idle.is_set():  # a pull that has only just been requested may miss a cancellation
                if time.monotonic() > end:
                    source = (self._running.filling or {}).get("source", "a backup")
                    raise TimedOut(
                        f"the filling of {self._disk} cannot be stopped: {source} does not answer",
                        hint="once it answers, this works, too; vmm stop works in any case",
                    )
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
        if self._running.exited.is_set():
            return
        self._show(problem=problem)
        if problem != self._problem:
            self._problem = problem
            source = (self._running.filling or {}).get("source", "a backup")
            hint = f"{source} must be readable until it is whole"
            if isinstance(error, NoSpace):
                hint = "free space where its disks are: then it goes on by itself"
            self._running.tell("filling-waits", problem=problem, hint=hint)

    def _show(self, **facts: object) -> None:
        known = self._running.filling or {}
        self._running.filling = {**known, "problem": None, **facts}

    async def _fill_next(self, filling: Filling) -> None:
        """Fill a disk that is served, and do what follows. Raises VmmError, VhdkitError."""
        self._show(source=filling.source, problem=self._problem)
        served = await served_layers(self._running)
        for disk_id, image in filling.disks.items():
            layers = [os.path.realpath(path) for path in served.get(disk_id, ())]
            if image not in layers:
                continue  # the machine is in the state of a snapshot in which it had another disk, or none
            if layers[-1] == image:
                await self._finish(filling, disk_id, image)
            elif disk_id in self._damaged:
                continue
            elif await self._is_right(filling, disk_id, image):
                await self._fill(filling, disk_id, image)
            return
        if self._damaged:
            self._show(disk=None, problem=f"the night is damaged: {next(iter(self._damaged.values()))}")
            await asyncio.sleep(_DAMAGED_SECONDS)  # nothing tells when it was mended
            self._damaged.clear()
            return
        if filling.disks:
            raise VmmError("none of the disks that are to be filled is a disk of the machine at present")
        await asyncio.to_thread(self._end, filling)

    async def _is_right(self, filling: Filling, disk_id: str, image: str) -> bool:
        """Compare what a disk is filled from with its sums, once; an event says what is damaged. Raises VmmError."""
        if not filling.checks or disk_id in self._compared:
            return True
        self._show(disk=disk_id, done_bytes=None, total_bytes=None, step="comparing")
        damage, unknown = await damage_in_night(self._running.machine.folder, disk_id)
        self._show(step=None)
        if damage is None:
            if unknown:
                problem = f"an unfinished prune has changed {', '.join(unknown)}: the sums could not be compared"
                self._running.tell("night-not-compared", disk=disk_id, problem=problem)
            self._compared.add(disk_id)
            return True
        self._damaged[disk_id] = damage
        self._running.tell("night-damaged", disk=disk_id, problem=damage, hint=self._words_for_damaged(disk_id, image))
        return False

    def _words_for_damaged(self, disk_id: str, image: str) -> str:
        spec = self._running.spec
        folders = next((disk.parent_dirs for disk in spec.disks if disk.id == disk_id), ())
        options = "".join(f" {word}" for one in folders for word in ("--allow-parent-dir", shlex.quote(one)))
        return (
            f"{disk_id} is not filled, and what the guest reads of it may be wrong. Restore another night (vmm backup"
            " verify says which are whole), or fill it as it is while the machine is off:"
            f" vhdkit pull {shlex.quote(image)} --independent{options}"
        )

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
