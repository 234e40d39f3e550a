# SPDX-License-Identifier: Apache-2.0
"""A copy of all disks of a running machine at one moment: a snapshot without memory, then a live merge.

    journal -> guest's file systems frozen -> new leaves on all disks at one moment -> thawed -> definitions follow
            -> the frozen chains copied -> leaves merged into the frozen images while the guest runs -> journal done

Decides this order, and what an early end leaves: from the journal on, the definitions and the journal together say
which images the guest writes to, and settling the journal merges the leaves above the frozen images into them
(`recovery`; when the machine is off, `snapshots.recovery`). Must not know how an image is copied
(`processes.disk_copies`), nor how leaves are made and merged (`new_leaves`, `live_merge`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmm.model.errors import StoreFailed, VmmError
from vmm.processes.disk_copies import check_target, copy_disks, disks_to_copy, recording_failure
from vmm.processes.rpc import Progress
from vmm.snapshots.dependents import images_of
from vmm.snapshots.steps import pivots_for
from vmm.store.snapshots.journal import Backup, MergeLive, Pivot
from vmm.store.snapshots.store import Held, holding
from vmm.worker.live_merge import merge_served
from vmm.worker.new_leaves import NewLeaves
from vmm.worker.served import follow_merge, follow_pivots, served_layers, served_leaves, wait_merged

if TYPE_CHECKING:
    from vmm.model.spec import DiskSpec
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

FREEZE_SECONDS = 10.0  # after this the guest's file systems thaw by themselves


class Backups:
    """The backups of one running machine."""

    def __init__(self, running: Running, plugging: Plugging) -> None:
        self._running = running
        self._plugging = plugging

    async def take(self, params: dict[str, Any], progress: Progress) -> object:
        """Copy all disks as they are at one moment; {"folder": absolute path}: {"folder", "disks", "consistent"}."""
        running = self._running
        folder = str(params.get("folder", ""))
        with recording_failure(running.tell, folder):
            target = check_target(folder)
            disks = disks_to_copy(running.spec)
            with running.busy("backup"), holding(running.machine, running.spec.name) as held:
                copies, consistent = await self._take(held, disks, target, progress)
        running.tell("backed-up", folder=target, consistent=consistent)
        return {"folder": target, "disks": copies, "consistent": consistent}

    async def _take(
        self, held: Held, disks: list[DiskSpec], target: str, progress: Progress
    ) -> tuple[dict[str, str], bool]:
        running, spec = self._running, self._running.spec  # as it is when the disks are frozen
        pivots = pivots_for(spec, held.tree, images_of(spec))
        held.need_settled()
        if not pivots:
            return await copy_disks(running.machine, spec, disks, target, progress, self._is_over), True
        journal = Backup(tuple(pivots))
        held.begin(journal)
        try:
            leaves = NewLeaves(running, self._plugging, held, pivots)
            consistent = await self._freeze(leaves)
            journal = await leaves.follow(journal)
            copies = await copy_disks(running.machine, spec, disks, target, progress, self._is_over)
        finally:
            if not running.exited.is_set():  # otherwise the journal is settled while it is off, or at its restart
                await merge_away(running, held, journal, progress)
        return copies, consistent

    def _is_over(self) -> bool:
        return self._running.exited.is_set() or self._running.gives_way

    async def _freeze(self, leaves: NewLeaves) -> bool:
        """Freeze all disks at one moment; True if the guest's agent flushed and froze the file systems first."""
        running = self._running
        async with contextlib.AsyncExitStack() as frozen:
            consistent = False
            if running.spec.integration.backup and running.agent.is_open:
                with contextlib.suppress(VmmError):
                    await frozen.enter_async_context(running.agent.frozen(max_seconds=FREEZE_SECONDS))
                    consistent = True
            await leaves.put_on()
        return consistent


async def merge_away(running: Running, held: Held, journal: Backup, progress: Progress) -> None:
    """Merge the leaves above a backup's frozen images into them while the guest runs, and end the backup.

    Raises StoreFailed, TimedOut; the journal then remains, and the rest is merged when it is settled.
    """
    if not journal.merging:
        moved = await served_leaves(running)
        await follow_pivots(running, held, journal.pivots, moved)
        done = tuple(one for one in journal.pivots if moved.get(one.disk) == one.child)
        journal = replace(journal, pivots=done, pivoted=True, merging=True)
        held.go_on(journal)
    for one in journal.pivots:
        await _merge_away(running, held, one, progress)
        held.tree.forget_users_image(one.frozen)
        held.go_on(journal)
    held.done()
    held.remove_empty()


async def _merge_away(running: Running, held: Held, one: Pivot, progress: Progress) -> None:
    await wait_merged(running, one.disk)
    chain = (await served_layers(running)).get(one.disk)
    if chain is None:
        raise StoreFailed(f"the disk server does not serve {one.disk}", hint=f"vmm repair {held.name}")
    real, frozen = [os.path.realpath(path) for path in chain], os.path.realpath(one.frozen)
    if frozen not in real:
        raise StoreFailed("is no longer in the chain of its disk", path=one.frozen, hint=f"vmm repair {held.name}")
    above = chain[: real.index(frozen)]
    merge = MergeLive(one.disk, one.frozen, tuple(above) or (one.child,))
    if above and above[0] != one.child:  # an interrupted merge had put another leaf on top
        await follow_merge(running, held, merge)
        held.save()
    progress({"step": f"merging {one.disk}"})
    try:
        if above:
            await merge_served(running, merge, progress)
    except BaseException:
        if not running.exited.is_set():
            await follow_merge(running, held, merge)
            held.save()
        raise
    await follow_merge(running, held, merge)  # even if QEMU has ended: the caller expects the merge to be recorded
