# SPDX-License-Identifier: Apache-2.0
"""Freezing the disks of a running machine for a backup: a snapshot without memory and without an entry in the tree.

    journal -> guest's file systems frozen -> new leaves on all disks at one moment -> thawed
            -> tree, journal and definition name the new leaves, and the tree keeps the frozen layers -> journal done

Decides this order, what a freeze is worth (whether the guest's agent took part), and what an early end leaves: leaves
that take the guest's writes become the machine's disks, others are removed. The process that asks writes the night
from the frozen layers, while the guest runs on; this worker knows neither the repository nor the copy. How leaves are
made is decided in `new_leaves`.

Does not import numpy, so that the worker stays small.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.model.errors import VmmError, WrongState
from vmm.processes.rpc import Progress, parameter
from vmm.snapshots.dependents import images_of
from vmm.snapshots.freeze import NightToCome, refuse_unfreezable
from vmm.snapshots.steps import pivots_for
from vmm.store.snapshots.journal import Backup, MergeLive
from vmm.store.snapshots.store import Held, holding
from vmm.store.state import MachineState
from vmm.worker.new_leaves import NewLeaves
from vmm.worker.served import follow_merge, follow_pivots, served_leaves, wait_merged

if TYPE_CHECKING:
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

OPERATION = "backup"
FREEZE_SECONDS = 10.0  # after this the guest's file systems thaw by themselves


class Freezes:
    """The freezes of one running machine."""

    def __init__(self, running: Running, plugging: Plugging) -> None:
        self._running = running
        self._plugging = plugging

    async def freeze(self, params: dict[str, Any], progress: Progress) -> object:
        """{"night": `NightToCome`, "consistent": the agent must take part}: {"agent": it did, "pause_seconds"}."""
        running = self._running
        night = NightToCome.of_document(parameter(params, "night", dict, {}))
        must = bool(parameter(params, "consistent", bool, False))
        if must and running.state is not MachineState.RUNNING:
            raise WrongState(
                f"is {running.state.value}: its guest cannot freeze its file systems", hint="without --consistent"
            )
        with running.busy(OPERATION), holding(running.machine, running.spec.name) as held:
            held.need_settled()
            spec = running.spec
            refuse_unfreezable(spec)
            pivots = pivots_for(spec, held.tree, images_of(spec))
            journal = Backup(tuple(pivots))
            leaves = NewLeaves(running, self._plugging, held, pivots)
            held.begin(journal)
            try:
                await leaves.prepare()
                began = time.monotonic()
                by_agent = await self._put_on(leaves, must=must)
                seconds = time.monotonic() - began
                held.tree.begin_night(night.keeps({one.disk: one.frozen for one in pivots}))
                await leaves.follow(journal)
                held.done()
            except BaseException:
                await self._take_back(held)
                raise
        return {"agent": by_agent, "pause_seconds": round(seconds, 4)}

    async def _put_on(self, leaves: NewLeaves, *, must: bool) -> bool:
        """Freeze all disks at one moment; True if the guest's agent had written out and frozen its file systems."""
        agent, is_frozen, is_done = self._running.agent, False, False
        if must or (self._running.spec.integration.backup and agent.is_open):
            try:
                async with agent.frozen(max_seconds=FREEZE_SECONDS):
                    is_frozen = True
                    await leaves.put_on()
                    is_done = True
                return True
            except VmmError:  # no answer, or the guest thawed before the disks were frozen
                if must or (is_frozen and not is_done):
                    raise
        if not is_done:
            await leaves.put_on()
        return False

    async def _take_back(self, held: Held) -> None:
        """Settle a freeze that failed. What cannot be settled now stays in the journal, and is settled before any
        other operation.
        """
        running = self._running
        try:
            held.reload()
            journal = held.tree.journal
            if running.exited.is_set() or not isinstance(journal, Backup):
                return  # it is settled when the machine is off, or before it is restarted
            held.take_over()
            await settle_freeze(running, held, journal)
        except (VmmError, OSError) as error:
            running.tell("snapshot-left", problem=str(error))


async def settle_freeze(running: Running, held: Held, journal: Backup) -> None:
    """Settle a freeze that was interrupted: what the disk server serves is what the guest writes to. What was frozen
    is in no snapshot, so it is merged when the machine is off, or by its next backup.

    Raises StoreFailed, TimedOut; the journal then remains.
    """
    for one in journal.pivots:
        await wait_merged(running, one.disk)
    if journal.merging:
        for one in journal.pivots:
            await follow_merge(running, held, MergeLive(one.disk, one.frozen, (one.child,)))
    else:
        await follow_pivots(running, held, journal.pivots, await served_leaves(running))
    for one in journal.pivots:
        held.tree.forget_users_image(one.frozen)
    held.done()
    held.remove_empty()
